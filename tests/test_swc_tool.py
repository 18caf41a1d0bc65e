"""`hpc-neuro swc`: exit codes, what is printed, what is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_neuro.cli import main as command_line
from hpc_neuro.core import morphology
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.data import swc
from hpc_neuro.data.swc.writer import Unit
from hpc_neuro.swc_tool import main

GOOD = "1 1 0 0 0 5 -1\n2 3 6 0 0 1 1\n3 3 6 8 0 1 2\n"
CYCLE = "1 3 0 0 0 1 -1\n2 3 1 0 0 1 3\n3 3 2 0 0 1 2\n"
MILD = "2 3 6 0 0 1 1\n1 1 0 0 0 5 -1\n3 3 6 8 0 1 2\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("good", GOOD), ("cycle", CYCLE), ("mild", MILD), ("empty", "")):
        (tmp_path / f"{name}.swc").write_text(text)
    return tmp_path


def test_check_lists_place_and_finding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder / "good.swc")]) == 0
    assert "good.swc: clean, 3 nodes, length 14" in capsys.readouterr().out
    assert main(["check", str(folder / "good.swc"), str(folder / "cycle.swc")]) == 3
    out = capsys.readouterr().out
    assert f"{folder / 'cycle.swc'}:2: node 2 is its own ancestor  [not readable before `swc fix`]" in out
    assert main(["check", str(folder / "mild.swc")]) == 3
    assert "mild.swc:1: node 2 stands before its parent 1 (line 2)" in capsys.readouterr().out
    assert main(["check", str(folder / "mild.swc"), "strict=false"]) == 0
    assert main(["check", str(folder / "empty.swc")]) == 3
    assert "no node" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_counts_most_and_stops_no_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(folder / "none.swc"), str(folder / "cycle.swc"), str(folder / "good.swc")]) == 2
    captured = capsys.readouterr()
    assert "does not exist" in captured.err
    assert "clean" in captured.out


def test_fix_writes_beside_or_into_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "cycle.swc").read_bytes()
    assert main(["fix", str(folder / "cycle.swc"), f"out={folder / 'new'}"]) == 0
    out = capsys.readouterr().out
    assert "line 2: node 2 was its own ancestor, now a root" in out
    assert "joined by an edge of length 1" in out
    fixed = folder / "new" / "cycle.fixed.swc"
    assert swc.check(fixed) == []
    assert "# repaired from cycle.swc" in fixed.read_text()
    assert swc.read_header(fixed).unit == "voxel"
    assert (folder / "cycle.swc").read_bytes() == before
    assert main(["fix", str(folder / "good.swc"), "unit=um"]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert swc.read_header(folder / "good.fixed.swc").unit == "um"
    assert main(["fix", str(folder / "empty.swc")]) == 2
    assert not (folder / "empty.fixed.swc").exists()


def test_files_of_one_name_are_not_written_over_each_other(folder: Path, tmp_path: Path) -> None:
    twin = tmp_path / "other" / "good.swc"
    twin.parent.mkdir()
    twin.write_bytes((folder / "good.swc").read_bytes())
    with pytest.raises(ConfigError, match="same name"):
        main(["fix", str(folder / "good.swc"), str(twin), f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    assert main(["fix", str(folder / "good.swc"), str(twin)]) == 0


def test_fix_splits(folder: Path) -> None:
    (folder / "two.swc").write_text(GOOD + "7 3 50 0 0 1 -1\n8 3 70 0 0 1 7\n")
    assert main(["fix", str(folder / "two.swc"), "roots=split"]) == 0
    lengths = [morphology.length(swc.read(folder / f"two.fixed.{i}.swc")) for i in (1, 2)]
    assert lengths == [20, 14]
    assert main(["fix", str(folder / "two.swc"), "roots=largest"]) == 0
    assert morphology.length(swc.read(folder / "two.fixed.swc")) == 20


def test_convert_needs_the_voxel_size_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder / "good.swc")]) == 2
    assert "voxel_size=Z,Y,X" in capsys.readouterr().err
    assert main(["convert", str(folder / "good.swc"), "voxel_size=2,0.5,0.25"]) == 0
    um = folder / "good.um.swc"
    assert morphology.length(swc.read(um)) == 6 * 0.25 + 8 * 0.5
    assert main(["convert", str(um), "to=voxel"]) == 0  # the header knows
    assert morphology.length(swc.read(folder / "good.um.voxel.swc")) == 14
    assert main(["convert", str(um), "to=um"]) == 2
    assert "in um already" in capsys.readouterr().err


def test_transform(folder: Path) -> None:
    assert (
        main(["transform", str(folder / "good.swc"), "flip=y", "shape=10,20,30", "scale=1,1,2", "shift=[1,0,0]"]) == 0
    )
    moved = swc.read(folder / "good.moved.swc")
    assert moved.points.tolist() == [[1, 19, 0], [1, 19, 12], [1, 11, 12]]
    assert "flip y within (10, 20, 30), scale (1.0, 1.0, 2.0)" in (folder / "good.moved.swc").read_text()
    assert main(["transform", str(folder / "good.swc"), "flip=y"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["repair", "a.swc"], "swc repair is not one of: swc check, swc fix"),
        (["check"], "one SWC file or more"),
        (["fix", "good.swc", "root=join"], "root=join: swc fix knows out=, roots=, unit="),
        (["fix", "good.swc", "roots=all"], "roots=all is not one of join, keep, largest, split"),
        (["fix", "good.swc", "unit=mm"], "unit=mm is not one of um, voxel"),
        (["convert", "good.swc", "to=nm"], "to=nm is not one of um, voxel"),
        (["convert", "good.swc", "voxel_size=1,2"], "voxel_size=1,2 is not three numbers"),
        (["convert", "good.swc", "voxel_size=a,b,c"], "is not three numbers"),
        (["convert", "good.swc", "voxel_size=[1,2"], "voxel_size=\\[1,2: \\[1,2 is not readable"),
    ],
)
def test_wrong_words_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=message):
        main(argv)


def test_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["swc", "check", str(folder / "cycle.swc")]) == 3
    assert command_line(["swc", "nonsense"]) == 2
    assert command_line(["swc", "--help"]) == 0
    assert "usage: hpc-neuro swc check|fix|convert|transform" in capsys.readouterr().out
    assert command_line(["swc"]) == 2


def test_a_scaled_tree_states_no_voxel_size_that_is_not_its_own(tmp_path: Path) -> None:
    tree = swc.read(_write_tree(tmp_path / "v.swc", "voxel"))
    main(["transform", str(tmp_path / "v.swc"), "scale=1,0.5,0.5"])
    assert swc.read_header(tmp_path / "v.moved.swc").voxel_size == (2.0, 1.0, 1.0)
    main(["convert", str(tmp_path / "v.moved.swc"), "to=um"])
    want = morphology.length(morphology.scale_tree(tree, (2.0, 0.5, 0.5)))
    assert morphology.length(swc.read(tmp_path / "v.moved.um.swc")) == pytest.approx(want, rel=1e-4)
    _write_tree(tmp_path / "u.swc", "um")
    main(["transform", str(tmp_path / "u.swc"), "scale=2,2,2"])
    assert swc.read_header(tmp_path / "u.moved.swc").voxel_size is None
    main(["transform", str(tmp_path / "u.swc"), "shift=1,1,1", "out=" + str(tmp_path / "shifted")])
    assert swc.read_header(tmp_path / "shifted" / "u.moved.swc").voxel_size == (2.0, 0.5, 0.5)


def test_a_unit_is_not_relabelled(tmp_path: Path) -> None:
    _write_tree(tmp_path / "u.swc", "um")
    with pytest.raises(ConfigError, match=r"says um; `hpc-neuro swc convert` converts"):
        main(["fix", str(tmp_path / "u.swc"), "unit=voxel"])


def _write_tree(path: Path, unit: Unit) -> Path:
    (path.parent / "raw.swc").write_text(GOOD)
    swc.write(path, swc.read(path.parent / "raw.swc"), unit=unit, voxel_size=(2.0, 0.5, 0.5))
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "strict=maybe"], "strict=maybe is not one of true, false"),
        (["transform", "flip=z", "shape=1.5,2,3"], "not three whole numbers"),
        (["transform", "flip=z", "shape=0,2,3"], "not three whole numbers"),
        (["transform", "flip=zz", "shape=9,9,9"], "names an axis twice"),
        (["transform", "scale=1e300,1,1"], "of at most 1e"),
        (["transform", "shift=nan,0,0"], "of at most 1e"),
        (["convert", "voxel_size=inf,1,1"], "of at most 1e"),
    ],
)
def test_values_that_mean_nothing_are_refused(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *keys = words
    assert command_line(["swc", command, str(folder / "good.swc"), *keys]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["cycle.swc", "empty.swc", "good.swc", "mild.swc"]


def test_convert_says_which_unit_it_assumes_and_takes_the_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(folder / "good.swc")
    assert main(["convert", path, "voxel_size=1,0.5,0.5"]) == 0
    assert "taken to be in voxels; unit=um if it is not" in capsys.readouterr().out
    assert morphology.length(swc.read(folder / "good.um.swc")) == pytest.approx(7)

    # The advice, obeyed: nothing is scaled, and the unit is written.
    assert main(["convert", path, "unit=um"]) == 0
    assert "taken to be" not in capsys.readouterr().out
    assert swc.read_header(folder / "good.um.swc").unit == "um"
    assert morphology.length(swc.read(folder / "good.um.swc")) == pytest.approx(14)
    assert main(["convert", path, "to=voxel", "unit=voxel"]) == 0
    assert swc.read_header(folder / "good.voxel.swc").unit == "voxel"

    _write_tree(folder / "u.swc", "um")
    with pytest.raises(ConfigError, match="says um"):
        main(["convert", str(folder / "u.swc"), "unit=voxel"])
