"""Units, voxel sizes and columns in the headers of other programs, and what the verbs do with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import swc
from hpc_neuro.data.swc.header import SwcComment, SwcHeader, find_other_columns, parse_header
from hpc_neuro.info import main as info
from hpc_neuro.score_tool import score
from hpc_neuro.swc_tool import main
from tests.helpers.swc_cases import Put

ROWS = "1 1 3.3 6.6 3 0.66 -1\n2 3 6.6 6.6 3 0.33 1\n3 3 9.9 9.9 4 0.33 2\n"

UNITS = {
    "um": [
        "unit: um",
        "units um",
        "UNITS = microns",
        "Unit = 'µm'",
        "Units: micrometers (µm)",
        "units are um",
        "all units are in micrometers",
        "unit of length: um",
        "Spatial units: µm",
        "in micron units",
        "unit=1 um",
        "units 1000 nm",
        "All positions and radii in µm",
        "All positions and radii in \u03bcm",
        "All positions and radii in microns",
        "All positions and radii in micron",
        "All positions and radii in ?m",
        "All positions and radii in Âµm",
        "All positions and radii in \\u00B5m",
        "Coordinates in micrometers",
        "coordinates converted to microns",
        "x, y, z = cartesian coordinates (um)",
        "R = radius at the point (um)",
        "Positions [µm], radii [µm]",
        'Meta: {"units": "1 micrometer"}',
        "id,type,x_um,y_um,z_um,radius_um,parent",
        "id type x(µm) y(µm) z(µm) r(µm) parent",
        "SCALE 1.0 1.0 1.0",
        "Original file n400.swc edited using StdSwc version 1.21 on 6/18/15.",
        "LengthUnit=um",
        'spatialUnits="micrometer"',
        "unit_of_measure: micrometer",
        "units: x=um y=um z=um",
        "units (x,y,z): um, um, um",
        "Einheit: µm",
        "Unité: µm",
        "units -> um",
        "x/um y/um z/um",
        "r in um",
    ],
    "nm": [
        '{"units": {"x": "nm", "y": "nm", "z": "nm"}}',
        "id type x/nm y/nm z/nm r/nm parent",
        "units nm",
        "unit: nanometre",
        "All positions and radii in nm",
        "x_nm y_nm z_nm",
        "coordinates (nm)",
    ],
    "8 nm": ['Meta: {"id": 1, "units": "8 nanometer"}'],
    "inch": ["unit: inches", "All positions and radii in inches", "Units = inch"],
    "mm": ["units: mm", "All positions and radii in millimeters"],
    "voxel": ["unit: voxel", "All positions and radii in pixels", "coordinates in voxel space", "units px"],
}
NO_UNITS = [
    "(x, y, z) resolutions = (0.094, 0.094, 0.25) um/pixel",
    "Voxel separation (x,y,z): 0.33, 0.33, 1.0",
    "Soma radius 5 um",
    "resampled at 1 um spacing",
    "Image size in pixels: 512 512 60",
    "stitched in 512 pixel tiles",
    "units unknown",
    "positions are not in um",
    "WARNING: Usage of pixel coordinates does not respect the SWC specification",
    "SHRINKAGE_CORRECTION 1.0 1.0 1.0",
    "source: All positions and radii in pixels",
    "Voxel size units: um",
    "time unit: s",
    "units: um/voxel",
    "units: µm³",
    "unit: arbitrary",
    "unit: n/a",
    "Coordinates in RAS",
]
OPEN_UNITS = [
    "units: furlongs",
    "unit: ft",
    "All positions and radii in feet",
    "coordinates are in mils",
    "units: µ",
    "units: 1/100 mm",
    "units in um*10",
    "unit: um x 10",
    "units: 4 4 40 nm",
    "units: um, um, mm",
    "units: um um voxel",
    "positions in um, radii in nm",
    "x y z in voxels, r in um",
    "x, y in px; z in um",
    "original units: nm",
    "coordinates originally in nm, now in um",
    "input units: nm; output units: um",
    "units: 单",
]
"""Lines that state a unit which no program may guess."""
OTHER_COLUMNS = {
    "id type z y x radius parent": [0, 1, 4, 3, 2],
    "n,type,z,y,x,r,parent": [0, 1, 4, 3, 2],
    "id;type;y;x;z;radius;parent": [0, 1, 3, 2, 4],
    "Node Type Z_um Y_um X_um R_um Parent": [0, 1, 4, 3, 2],
}
SWC_COLUMNS = [
    "id type x y z radius parent",
    "n,type,x,y,z,radius,parent,seg_id,level,mode,timestamp,teraflyindex",
    "PointNo Label X Y Z Radius Parent",
    "inode R X Y Z D/2 idpar",
    "node id, node type, x, y, z, radius, parent id",
    "sample number, structure identifier, x position, y position, z position, radius, parent sample",
    "x y z are column, row, slice of the image, without offset or flip",
]


def parse_lines(*lines: str) -> SwcHeader:
    return parse_header([SwcComment(number, line) for number, line in enumerate(lines, start=1)])


@pytest.mark.parametrize(("unit", "line"), [(unit, line) for unit, lines in UNITS.items() for line in lines])
def test_units_in_the_words_of_other_programs(unit: str, line: str) -> None:
    header = parse_lines("CREATURE", line)
    assert (header.unit, header.unit_line, header.conflict) == (unit, 2, "")


@pytest.mark.parametrize("line", NO_UNITS)
def test_lines_about_something_else_state_no_unit(line: str) -> None:
    assert parse_lines(line).unit is None


@pytest.mark.parametrize("line", OPEN_UNITS)
def test_units_that_are_open_are_refused_until_they_are_stated(
    line: str, file: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(f"# {line}\n{ROWS}")
    assert main(["check", str(path)]) == 3
    assert main(["convert", str(path), "voxel_size=1,1,1"]) == 2
    assert main(["fix", str(path)]) == 2

    # The advice, obeyed: the unit is stated once, and the line that is wrong is no statement any more.
    advice = f"hpc-neuro swc fix {path} unit=um"
    assert advice in capsys.readouterr().err
    assert main(["fix", str(path), "unit=um"]) == 0
    assert swc.require_header(path.with_suffix(".fixed.swc")).unit == "um"


def test_an_earlier_unit_beside_the_present_one_is_no_statement() -> None:
    assert parse_lines("original units: nm", "unit: um").unit == "um"


def test_latin_1_bytes(file: Put) -> None:
    assert swc.read_header(file(b"# All positions and radii in \xb5m\n" + ROWS.encode())).unit == "um"


def test_voxel_sizes() -> None:
    separation = "Voxel separation (x,y,z): 0.33, 0.33, 1.0"
    assert parse_lines("All positions and radii in µm", separation).voxel_size == (1.0, 0.33, 0.33)
    nanometers = parse_lines("units nm", "Voxel separation (x,y,z): 330, 330, 1000")
    assert nanometers.voxel_size == (1.0, 0.33, 0.33)
    # A separation in pixels, or without a unit or an order of axes, is no size in um.
    assert parse_lines("All positions and radii in pixels", separation).voxel_size is None
    assert parse_lines(separation).voxel_size is None
    assert parse_lines("voxel size (um): 0.3 0.3 1").voxel_size is None
    assert parse_lines("(x, y, z) resolutions = (0.1, 0.2, 0.3) um/pixel").voxel_size == (0.3, 0.2, 0.1)
    assert parse_lines("unit: voxel", "SCALE 0.2 0.2 0.5").voxel_size == (0.5, 0.2, 0.2)


@pytest.mark.parametrize(
    "lines",
    [
        ("unit: um", "All positions and radii in pixels"),
        ("radius in um, positions are in voxels",),
        ("unit: um", "voxel size um z y x: 1 0.3 0.3", "Voxel separation (x,y,z): 0.5, 0.5, 1.0"),
        ("SCALE 0.33 0.33 1.0",),
        ("scale: 0.5",),
        ("SCALE nan 1 1",),
    ],
)
def test_contradictions_are_refused(file: Put, tmp_path: Path, lines: tuple[str, ...]) -> None:
    path = file("".join(f"# {line}\n" for line in lines) + ROWS)
    assert parse_lines(*lines).conflict
    assert [finding.kind for finding in swc.check(path)] == ["unit"]
    with pytest.raises(InputError, match="swc fix"):
        swc.require_header(path)
    assert main(["convert", str(path), "voxel_size=1,1,1"]) == 2
    assert main(["fix", str(path)]) == 2
    assert info([str(path)]) == 0
    # The advice of the refusal: say which holds.
    unit = parse_lines(*lines).unit or "um"
    assert main(["fix", str(path), f"unit={unit}", f"out={tmp_path / 'out'}"]) == 0
    assert swc.require_header(tmp_path / "out" / f"{path.stem}.fixed.swc").unit == unit


@pytest.mark.parametrize("line", ["scale: 1", "scale bar 10 um", "scaled by hand", "SCALE 1.0 1.0 1.0"])
def test_words_on_a_scale_and_a_scale_of_one_change_nothing(line: str) -> None:
    assert not parse_lines(line).conflict


def test_an_offset_that_is_no_number_is_named_without_an_impossible_advice(file: Put) -> None:
    (finding,) = swc.check(file("# unit: um\n# OFFSET 1e400 0 0\n" + ROWS))
    assert finding.kind == "offset"
    assert finding.text == "the header states an offset that is no number: 'OFFSET 1e400 0 0'; correct the line"


def test_navis_unit_of_several_nanometers(file: Put) -> None:
    path = file('# Meta: {"units": "8 nanometer"}\n' + ROWS)
    assert main(["convert", str(path), "to=um"]) == 0
    converted = path.with_suffix(".um.swc")
    np.testing.assert_allclose(swc.read(converted).points, swc.read(path).points * 0.008, atol=1e-6)
    assert swc.read_header(converted).unit == "um"


@pytest.mark.parametrize("line", UNITS["um"])
def test_convert_never_scales_what_is_in_um(file: Put, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(f"# {line}\n{ROWS}")
    assert main(["convert", str(path), "voxel_size=1,0.33,0.33"]) == 2
    assert "in um already" in capsys.readouterr().err
    assert not path.with_suffix(".um.swc").exists()
    assert main(["convert", str(path), "to=voxel", "voxel_size=1,0.33,0.33"]) == 0
    points = swc.read(path).points / (1, 0.33, 0.33)
    np.testing.assert_allclose(swc.read(path.with_suffix(".voxel.swc")).points, points, atol=1e-6)
    assert swc.read_header(path.with_suffix(".voxel.swc")).unit == "voxel"


def test_nanometers_are_converted_without_a_voxel_size(file: Put) -> None:
    path = file("# units nm\n" + ROWS)
    assert main(["convert", str(path), "to=um"]) == 0
    np.testing.assert_allclose(swc.read(path.with_suffix(".um.swc")).points, swc.read(path).points / 1000, atol=1e-6)


@pytest.mark.parametrize(("unit", "line"), [(unit, line) for unit, lines in UNITS.items() for line in lines])
def test_fix_keeps_comments_and_the_stated_unit(file: Put, unit: str, line: str) -> None:
    comments = ["# Exported from another program", f"# {line}", "# https://imagej.net/SNT"]
    path = file("\n".join(comments) + "\n" + ROWS)
    assert main(["fix", str(path)]) == 0
    fixed = path.with_suffix(".fixed.swc")
    lines = fixed.read_text(encoding="utf-8").splitlines()
    assert set(comments) <= set(lines)
    assert swc.read_header(fixed).unit == unit
    assert swc.check(fixed) == []
    # A second repair changes nothing more: own lines are not doubled.
    assert main(["fix", str(fixed)]) == 0
    again = fixed.with_suffix(".fixed.swc").read_text(encoding="utf-8").splitlines()
    assert sum(text.startswith("# unit:") for text in again) == 1 + (line.lower().startswith("unit:"))
    other = "voxel" if unit != "voxel" else "um"
    with pytest.raises(ConfigError, match="the header of .* says"):
        main(["fix", str(path), f"unit={other}"])


def test_transform_marks_what_no_longer_holds(file: Put) -> None:
    path = file("# All positions and radii in µm\n# Voxel separation (x,y,z): 0.33, 0.33, 1.0\n" + ROWS)
    assert main(["transform", str(path), "scale=2,2,2"]) == 0
    moved = path.with_suffix(".moved.swc")
    assert swc.require_header(moved) == SwcHeader("um", None, 2)
    assert "# source: Voxel separation (x,y,z): 0.33, 0.33, 1.0" in moved.read_text()


def test_fix_says_when_a_unit_is_assumed(file: Put, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fix", str(file(ROWS))]) == 0
    assert "does not state its unit; unit=um states another" in capsys.readouterr().out


def test_info_prints_the_unit(file: Put, capsys: pytest.CaptureFixture[str]) -> None:
    header = "# SNT\n# All positions and radii in µm\n# Voxel separation (x,y,z): 0.33, 0.33, 1.0\n"
    assert info([str(file(header + ROWS))]) == 0
    out = capsys.readouterr().out
    assert "unit: um, by line 2 of the header" in out
    assert "voxel size: 1 x 0.33 x 0.33 um (z y x)" in out
    assert "does not say" not in out


def test_score_compares_the_units_of_other_programs(file: Put) -> None:
    um, pixels = file("# units: microns\n" + ROWS, "a.swc"), file("# All positions in pixels\n" + ROWS, "b.swc")
    with pytest.raises(InputError, match=r"is in um and .* is in voxel"):
        score(um, pixels)


@pytest.mark.parametrize("columns", OTHER_COLUMNS)
@pytest.mark.parametrize("mark", ["# ", "##", ""])
def test_other_columns_are_refused_and_put_in_order(file: Put, columns: str, mark: str) -> None:
    separator = ";" if ";" in columns else "," if "," in columns else " "
    order = [*OTHER_COLUMNS[columns], 5, 6]
    rows = [row.split() for row in ROWS.splitlines()]
    body = "".join(separator.join(row[order.index(place)] for place in range(7)) + "\n" for row in rows)
    path = file(f"{mark}{columns}\n{body}", "other.swc")
    findings = [finding for finding in swc.check(path) if finding.kind == "column names"]
    assert findings[0].line == 1
    with pytest.raises(InputError, match=r"(?s)line 1: the header names the columns .* swc fix"):
        swc.read(path)
    assert main(["fix", str(path)]) == 0
    fixed, plain = path.with_suffix(".fixed.swc"), file(ROWS, "plain.swc")
    np.testing.assert_array_equal(swc.read(fixed).points, swc.read(plain).points)
    assert swc.check(fixed) == []


def test_diameters_are_halved_by_fix_only(file: Put) -> None:
    path = file("# id type x y z diameter parent\n" + ROWS)
    with pytest.raises(InputError, match="diameter"):
        swc.read(path)
    assert swc.fix(path).tree.radii.tolist() == [0.33, 0.165, 0.165]


@pytest.mark.parametrize("line", SWC_COLUMNS)
def test_the_columns_of_swc_are_no_finding(line: str) -> None:
    assert find_other_columns(line) is None


def test_foreign_comment_does_not_remove_nodes(file: Put) -> None:
    rows = "1 1 0 0 0 1 -1\n2 3 0 0 0 1 1\n3 3 0 0 5 1 2\n"
    assert len(swc.read(file("# added: 1 2\n" + rows))) == 3
    assert main(["fix", str(file("# added: 1 2\n" + rows, "a.swc"))]) == 0
