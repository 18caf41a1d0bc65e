"""The table of inputs that were once read wrong in silence: each case, what is right, and what happens.

Sibling kinds that were found beside the reported ones stand in the same table; the columns are: name, a function that
makes the input and runs the command line, the exit code, and a part of what is printed or the value that is right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro.cli import main
from hpc_neuro.core import morphology
from hpc_neuro.data import swc

ROWS = "1 1 3 6 3 0.66 -1\n2 3 6 6 3 0.33 1\n3 3 9 9 4 0.33 2\n"
SEMICOLONS = "1;1;10;20;3;2;-1\n2;3;14;22;3,5;1;1\n3;3;16;23;4;1;2\n"
THREE_POINTS = "1 1 0 0 0 2 -1\n2 1 0 -2 0 2 1\n3 1 0 2 0 2 1\n4 3 0 0 6 1 1\n5 3 0 0 9 1 4\n"

VOLUME = {
    **{"file": "a.h5", "shape": [8, 8, 8], "voxel_size_um": [1.0, 1.0, 1.0], "dtype": "uint8", "low": 0.0, "high": 9.0},
    **{"root_voxel": None, "split": "test", "digest": "0" * 64, "sha256": {"image": "0" * 64, "swc": "0" * 64}},
}
TOTALS = {
    "code": "",
    "splits": {"train": [], "val": [], "test": ["../../victim"]},
    "totals": {"volumes": 1, "voxels": 512, "bytes": 1},
}

Case = tuple[str, bytes, list[str], int, str]
"""File name, its bytes, command with FILE for the path, exit code, part of the output."""

CASES: dict[str, Case] = {
    # Reported: headers in the words of other programs.
    "SNT header": ("a.swc", f"# All positions and radii in µm\n{ROWS}".encode(), ["info", "FILE"], 0, "unit: um"),
    "SNT header, converted": (
        *("a.swc", f"# All positions and radii in µm\n{ROWS}".encode()),
        *(["swc", "convert", "FILE", "voxel_size=1,0.3,0.3"], 2, "in um already"),
    ),
    "NeuroMorpho header": ("a.swc", f"# SCALE 1.0 1.0 1.0\n{ROWS}".encode(), ["info", "FILE"], 0, "unit: um"),
    "units nm": ("a.swc", f"# units nm\n{ROWS}".encode(), ["info", "FILE"], 0, "unit: nm"),
    "columns z y x": ("a.swc", f"# id type z y x r parent\n{ROWS}".encode(), ["swc", "check", "FILE"], 3, "columns"),
    # Siblings of them.
    "latin-1 header": ("a.swc", b"# Positions in \xb5m\n" + ROWS.encode(), ["info", "FILE"], 0, "unit: um"),
    "lost micro sign": ("a.swc", f"# All positions in ?m\n{ROWS}".encode(), ["info", "FILE"], 0, "unit: um"),
    "navis units": ("a.swc", f'# Meta: {{"units": "8 nanometer"}}\n{ROWS}'.encode(), ["info", "FILE"], 0, "8 nm"),
    "two units": ("a.swc", f"# unit: um\n# in pixels\n{ROWS}".encode(), ["swc", "fix", "FILE"], 2, "two units"),
    "a scale to apply": ("a.swc", f"# SCALE 2 2 1\n{ROWS}".encode(), ["swc", "fix", "FILE"], 2, "leaves open"),
    "z in slices": ("a.swc", f"# x, y in um, z in slices\n{ROWS}".encode(), ["swc", "fix", "FILE"], 2, "z in slices"),
    "z (slice)": ("a.swc", f"# x (um) y (um) z (slice)\n{ROWS}".encode(), ["info", "FILE"], 0, "does not say"),
    "ESWC": ("a.eswc", f"#n type x y z r pid seg\n{ROWS}".encode(), ["info", "FILE"], 0, "3 nodes"),
    "diameters": ("a.swc", f"# id type x y z diameter p\n{ROWS}".encode(), ["info", "FILE"], 2, "diameter"),
    # Reported: tables.
    "semicolons": ("a.swc", SEMICOLONS.encode(), ["info", "FILE"], 0, "1 tip, 0 branch points"),
    "repeated lines": ("a.swc", (ROWS * 2).encode(), ["swc", "fix", "FILE"], 0, "3 nodes"),
    "large id": ("a.swc", b"5000000000 1 0 0 1 .5 -1\n", ["swc", "check", "FILE"], 3, "MorphIO and NeuroM"),
    "type turns at root": (
        *("a.swc", b"1 5 0 0 0 1 -1\n2 2 0 0 5 1 1\n3 2 0 0 9 1 2\n"),
        *(["swc", "check", "FILE"], 3, "type turns"),
    ),
    "branching soma": (
        *("a.swc", b"1 1 0 0 0 1 -1\n2 1 0 0 1 1 1\n3 1 0 0 2 1 2\n4 1 0 1 1 1 2\n5 3 0 0 6 1 3\n"),
        *(["swc", "check", "FILE"], 3, "soma branches"),
    ),
    # Siblings of them.
    "commas for all": ("a.swc", b"1,3,0,5,1,5,0,1,-1\n2,3,1,5,1,5,0,1,1\n", ["info", "FILE"], 2, "decimal points"),
    "empty column": ("a.swc", b"1,3,,0,0,1,-1,7\n", ["info", "FILE"], 2, "not seven numbers"),
    "underscore": ("a.swc", b"1 3 1_0 0 0 1 -1\n", ["info", "FILE"], 2, "not seven numbers"),
    "an offset": ("a.swc", f"# OFFSET 10 20 30\n{ROWS}".encode(), ["swc", "check", "FILE"], 3, "shift=30,20,10"),
    "no offset": ("a.swc", f"# OFFSET 0 0 0\n{ROWS}".encode(), ["swc", "check", "FILE"], 0, "clean"),
    "quoted numbers": ("a.swc", b'1 1 0 0 1 .5 "-1"\n', ["info", "FILE"], 2, "Export it again"),
    "a page of a web site": ("a.swc", b"404: Not Found\n", ["swc", "check", "FILE"], 3, "export the tree again"),
    "a point beyond all": (
        *("a.swc", b"1 3 0 0 0 1 -1\n2 3 1e41 0 0 1 1\n", ["score", "FILE", "FILE"], 2),
        *("more than any neuron has",),
    ),
    "beyond any neuron": (
        *("a.swc", b"1 3 0 0 0 1 -1\n2 3 1e308 0 0 1 1\n3 3 -1e308 0 0 1 2\n"),
        *(["swc", "check", "FILE"], 3, "farther than a neuron reaches"),
    ),
    "three-point soma": ("a.swc", THREE_POINTS.encode(), ["swc", "check", "FILE"], 0, "clean"),
    # Reported: YAML 1.1, bombs.
    "minutes by clock": ("c.yaml", b"out: o\nstore: s\noptim: {steps: 12:00:00}\n", ["train", "FILE"], 2, "12:00:00"),
    "key twice": ("c.yaml", b"out: a\nout: b\n", ["prepare", "FILE"], 2, "stands twice"),
    "two numbers for three": (
        "c.yaml",
        b"root: [1, 2]\n",
        ["trace", "x.tif", "FILE"],
        2,
        "3 numbers are expected, found 1, 2",
    ),
    "a number for three": ("c.yaml", b"voxel_size: 1\n", ["trace", "x.tif", "FILE"], 2, "voxel_size is [um] z,y,x"),
    "four numbers for three": ("c.yaml", b"root: 1,2,3,4\n", ["trace", "x.tif", "FILE"], 2, "z,y,x where the neuron"),
    "deep YAML": ("c.yaml", b"images: " + b"[" * 5000, ["prepare", "FILE"], 2, "nested too deeply"),
    "YAML that holds itself": ("c.yaml", b"images: &a [*a]\n", ["prepare", "FILE"], 2, "nested"),
    "empty out": ("c.yaml", b"images: x\nout: ''\n", ["prepare", "FILE"], 2, "out is empty"),
    "blank out": ("c.yaml", b"images: x\nout: ' '\n", ["prepare", "FILE"], 2, "out is empty"),
    "empty images": ("c.yaml", b"images: ''\nout: o\n", ["prepare", "FILE"], 2, "images is empty"),
    "NUL in a path": ("c.yaml", b'store: "a\\0b"\nout: o\n', ["precompute", "FILE"], 2, "no path can hold"),
    "latin-1 YAML": ("c.yaml", b"images: caf\xe9\nout: o\n", ["prepare", "FILE"], 2, "save the file as UTF-8"),
    "UTF-16 YAML": ("c.yaml", "images: a\nout: o\n".encode("utf-16"), ["prepare", "FILE"], 2, "as UTF-8"),
    "YAML tags": ("c.yaml", b"images: !!python/name:os.system\n", ["prepare", "FILE"], 2, "constructor"),
    # Reported: an index with an id of elsewhere.
    "id of elsewhere": (
        *("dataset.json", json.dumps({"format": 1, "volumes": {"../../victim": VOLUME}} | TOTALS).encode()),
        *(["evaluate", "store=FOLDER", "predictions=FOLDER", "out=FOLDER/out"], 2, "'../../victim'"),
    ),
    "deep JSON": (
        *("dataset.json", b"[" * 200_000),
        *(["evaluate", "store=FOLDER", "predictions=FOLDER", "out=FOLDER/out"], 2, "nested too deeply"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_right_or_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, words, code, text = CASES[case]
    path = tmp_path / "data" / name
    path.parent.mkdir()
    path.write_bytes(content)
    arguments = [word.replace("FILE", str(path)).replace("FOLDER", str(path.parent)) for word in words]

    assert main(arguments) == code
    captured = capsys.readouterr()
    assert text in captured.out + captured.err
    assert "Traceback" not in captured.err
    # Nothing is written outside the folder.
    assert [item.name for item in tmp_path.iterdir()] == ["data"]


def test_ids_stay_as_written(tmp_path: Path) -> None:
    for name in ("010", "8"):
        (tmp_path / f"{name}.swc").write_text("1 3 8 8 4 1 -1\n2 3 16 8 4 1 1\n")
        rng = np.random.default_rng(int(name))
        tifffile.imwrite(tmp_path / f"{name}.tif", rng.integers(0, 255, (8, 16, 24), dtype=np.uint8))
    rows = [f"- {{id: {i}, image: {name}.tif, swc: {name}.swc}}\n" for i, name in (("010", "010"), ("8", "8"))]
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text("".join(rows))
    arguments = [f"manifest={manifest}", f"out={tmp_path / 'store'}", "voxel_size=[1,1,1]", "misaligned=warn"]

    assert main(["prepare", *arguments, "split.test=[010]"]) == 0
    index = json.loads((tmp_path / "store" / "dataset.json").read_text())
    assert list(index["volumes"]) == ["010", "8"]
    assert index["volumes"]["010"]["split"] == "test"


PAIR_CASES: dict[str, tuple[str, bytes, int, str]] = {
    # What stands beside a pair n1.tif and n1.swc; exit code of `prepare`; the voxel size or a part of the message.
    "x y z as text": ("meta.json", b'{"n1": {"voxel_size_um_xyz": "0.3 0.4 1"}}', 0, "[1.0, 0.4, 0.3]"),
    "x y z as texts": ("meta.json", b'{"n1": {"voxel_size_um_xyz": ["0.3", "0.4", "1"]}}', 0, "[1.0, 0.4, 0.3]"),
    "byte-order mark": ("meta.json", b'\xef\xbb\xbf{"n1": {"voxel_size_um_xyz": [1, 2, 3]}}', 0, "[3.0, 2.0, 1.0]"),
    "an id twice": (
        *("meta.json", b'{"n1": {"voxel_size_um_xyz": [1, 1, 1]}, "n1": {"voxel_size_um_xyz": [2, 2, 2]}}'),
        *(2, "the key 'n1' stands twice"),
    ),
    "a key twice": ("meta.json", b'{"n1": {"swc_unit": "um", "swc_unit": "voxel"}}', 2, "'swc_unit' stands twice"),
    "true for 1": ("meta.json", b'{"n1": {"voxel_size_um_xyz": [true, 1, 1]}}', 2, "three finite numbers x y z"),
    "two sizes": ("meta.json", b'{"n1": {"voxel_size_um_xyz": [1, 1]}}', 2, "three finite numbers x y z"),
    "semicolons": ("m.csv", b"id;image;swc;voxel_size\n010;n1.tif;n1.swc;1 2 3\n", 0, "[1.0, 2.0, 3.0]"),
    "tabs": ("m.csv", b"id\timage\tswc\tvoxel_size\n010\tn1.tif\tn1.swc\t1 2 3\n", 0, "[1.0, 2.0, 3.0]"),
    "decimal commas": ("m.csv", b"image;swc;voxel_size\nn1.tif;n1.swc;1 0,3 0,3\n", 2, "three finite numbers z y x"),
    "a column twice": ("m.csv", b"image,swc,swc\nn1.tif,n1.swc,x.swc\n", 2, "the column swc 2 times"),
    "more cells than names": ("m.csv", b"image,swc\nn1.tif,n1.swc,1 1 1\n", 2, "row 1 below the header has more cells"),
    "an id that is no text": ("m.yaml", b"- {id: true, image: n1.tif, swc: n1.swc}\n", 2, "a text is wanted"),
    "a date": ("m.yaml", b"- {id: 2026-11-30, image: n1.tif, swc: n1.swc, voxel_size: [1, 2, 3]}\n", 0, "2026-11-30"),
    "Norway": ("m.yaml", b"- {id: NO, image: n1.tif, swc: n1.swc, voxel_size: [1, 2, 3]}\n", 0, '"NO"'),
    "an exponent": (
        "m.yaml",
        b"- {id: 1e5, image: n1.tif, swc: n1.swc, voxel_size: 1 2 3}\n",
        0,
        '"1e5"',
    ),
}


@pytest.mark.parametrize("case", PAIR_CASES)
def test_what_describes_a_pair(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, code, text = PAIR_CASES[case]
    image = np.random.default_rng(0).integers(0, 255, (8, 16, 24), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "n1.tif", image, metadata={"axes": "ZYX"})
    (tmp_path / "n1.swc").write_text("1 3 8 8 4 1 -1\n2 3 16 8 4 1 1\n")
    (tmp_path / name).write_bytes(content)
    source = f"images={tmp_path}" if name == "meta.json" else f"manifest={tmp_path / name}"

    assert main(["prepare", source, f"out={tmp_path / 'out'}", "misaligned=warn"]) == code
    index = tmp_path / "out" / "dataset.json"
    volumes = json.loads(index.read_text())["volumes"] if index.exists() else {}
    sizes = [volume["voxel_size_um"] for volume in volumes.values()]
    assert text in f"{json.dumps(list(volumes))} {sizes} {capsys.readouterr().err}"


def test_the_first_entry_of_a_list_is_given_by_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f"model={tmp_path}", f"out={tmp_path / 'out'}", "inputs.0.image=a.tif", "inputs.0.range=[0,189]"]
    assert main(["infer", *keys, "inputs.2.image=c.tif"]) == 2
    assert "inputs.2.image: the list has 1 entries" in capsys.readouterr().err
    assert main(["infer", *keys]) == 2
    assert "inputs" not in capsys.readouterr().err


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_sparse(path: Path) -> None:
    with path.open("wb") as handle:
        handle.truncate(1 << 40)


@pytest.mark.parametrize("make", [make_fifo, make_device, make_sparse])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.swc", ["info", "FILE"]),
        ("a.swc", ["swc", "check", "FILE"]),
        ("a.swc", ["swc", "fix", "FILE"]),
        ("c.yaml", ["prepare", "FILE"]),
        ("dataset.json", ["evaluate", "store=FOLDER", "predictions=FOLDER", "out=FOLDER/out"]),
        ("predictions.json", ["infer", "serve", "FOLDER"]),
        ("m.yaml", ["prepare", "manifest=FILE", "out=FOLDER/out"]),
        ("m.csv", ["prepare", "manifest=FILE", "out=FOLDER/out"]),
    ],
)
def test_files_that_never_end(
    make: Callable[[Path], None], name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / name)
    arguments = [word.replace("FILE", str(tmp_path / name)).replace("FOLDER", str(tmp_path)) for word in words]
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_semicolons_have_the_right_length(tmp_path: Path) -> None:
    (tmp_path / "a.swc").write_text(SEMICOLONS)
    plain = SEMICOLONS.replace(",", ".").replace(";", " ")
    (tmp_path / "b.swc").write_text(plain)
    assert morphology.length(swc.read(tmp_path / "a.swc")) == morphology.length(swc.read(tmp_path / "b.swc"))


def test_files_of_systems_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "n1.swc").write_text("1 3 8 8 4 1 -1\n2 3 16 8 4 1 1\n")
    image = np.random.default_rng(0).integers(0, 255, (8, 16, 24), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "n1.ome.tif", image, metadata={"axes": "ZYX"})
    (tmp_path / "@eaDir").mkdir()
    for name in ("._n1.ome.tif", "._n1.swc", ".DS_Store", "~$n1.swc", "@eaDir/n1.tif"):
        (tmp_path / name).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    arguments = [f"images={tmp_path}", f"out={tmp_path / 'store'}", "voxel_size=[1,1,1]", "misaligned=warn"]
    assert main(["prepare", *arguments]) == 0
    assert list(json.loads((tmp_path / "store" / "dataset.json").read_text())["volumes"]) == ["n1"]
