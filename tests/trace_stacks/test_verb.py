"""`hpc-neuro trace` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from hpc_neuro import cli
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.morphology import (
    Tree,
    build_tree,
    child_counts,
    concatenate_trees,
    edge_lengths,
    length,
    select_nodes,
    tips,
)
from hpc_neuro.data import swc
from hpc_neuro.metrics.cable import match_cable
from tests.helpers.stacks import make_neuron, take_picture

SIZE = "voxel_size=1,0.5,0.5"


@pytest.fixture
def stacks(tmp_path: Path) -> Path:
    folder = tmp_path / "stacks"
    folder.mkdir()
    for seed, name in ((3, "n2"), (4, "n10")):
        tifffile.imwrite(folder / f"{name}.tif", take_picture(make_neuron(seed)))
    return folder


def read_index(out: Path) -> dict[str, object]:
    return dict(json.loads((out / "trace.json").read_text()))


def test_one_stack_gives_trees_pictures_and_advice(stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["trace", str(stacks / "n2.tif"), SIZE, f"out={out}"]) == EXIT_DONE

    gold = make_neuron(3)
    voxel, um = swc.read(out / "swc" / "n2.voxel.swc"), swc.read(out / "swc" / "n2.swc")
    assert match_cable(voxel, gold, 3.0).f1 > 0.95
    np.testing.assert_allclose(um.points, voxel.points * (1, 0.5, 0.5), atol=1e-4)
    assert swc.read_header(out / "swc" / "n2.swc").unit == "um"

    page = (out / "trace.html").read_text()
    assert "data:image/png" in page
    assert (out / "overlay" / "n2.png").read_bytes().startswith(b"\x89PNG")
    state = json.loads((out / "neuroglancer" / "n2.json").read_text())
    assert len(state["layers"][0]["annotations"]) == len(voxel.edges)
    for word in ("Fiji/SNT", "napari", "Neuroglancer", str(out / "swc" / "n2.swc"), "trace.html"):
        assert word in (out / "log.txt").read_text()


def test_a_dry_run_refuses_what_the_run_refuses(
    stacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"verb": "prepare", "config": {}}')
    for key, message in (
        (f"model={tmp_path / 'none'}", "holds no weights"),
        (f"out={tmp_path / 'file'}", "choose another `out`"),
        (f"out={tmp_path / 'other'}", "holds a `prepare` run; give `trace` another `out`"),
    ):
        words = ["trace", str(stacks / "n2.tif"), f"out={tmp_path / 'out'}", key]
        assert cli.main([*words, "--dry-run"]) == EXIT_BAD_INPUT
        assert message in capsys.readouterr().err


def test_a_folder_is_resumed_where_it_was_interrupted(stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["trace", str(stacks), SIZE, f"out={out}"]
    assert cli.main(command) == EXIT_DONE
    assert list(read_index(out)["stacks"]) == ["n2", "n10"]  # type: ignore[call-overload]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.swc")}

    # Nothing is done again; what is missing is, and nothing else.
    assert cli.main(command) == EXIT_DONE
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (out / "overlay" / "n2.png").unlink()
    assert cli.main(command) == EXIT_DONE
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = {path.name.partition(".")[0] for path in before if after[path] != before[path]}
    assert changed == {"n2"}

    # Other settings, or another image, are another result.
    assert cli.main([*command, "trace.min_branch=9"]) == EXIT_DONE
    assert all(path.stat().st_mtime_ns > after[path] for path in before)


def select_longest_branch(tree: Tree) -> NDArray[np.bool_]:
    """[N] the cable from the tip that is farthest from its branch point, without that point."""
    counts, lengths = child_counts(tree), edge_lengths(tree)
    best, most = np.zeros(len(tree), dtype=bool), 0.0
    for tip in tips(tree):
        branch, node = np.zeros(len(tree), dtype=bool), int(tip)
        while tree.parents[node] >= 0 and counts[node] <= 1:
            branch[node], node = True, int(tree.parents[node])
        if lengths[branch].sum() > most:
            best, most = branch, float(lengths[branch].sum())
    return best


def measure_share_near(tree: Tree, other: Tree) -> float:
    """The share of the cable of `tree` within 5 voxels of `other`."""
    return match_cable(tree, other, 5.0).precision


@pytest.mark.parametrize("kind", ["swc", "voxel.swc"])
def test_the_tracer_goes_on_from_a_corrected_tree(stacks: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={out}", "edits=keep"]
    assert cli.main(command) == EXIT_DONE
    first = swc.read(out / "swc" / "n2.voxel.swc")

    # A person deletes one branch, and draws another where the image shows nothing.
    is_deleted = select_longest_branch(first)
    deleted = select_nodes(first, is_deleted)
    assert length(deleted) > 15
    rest = select_nodes(first, ~is_deleted)
    corner = np.array([38.0, 94.0, 126.0])
    drawn = build_tree(np.linspace(rest.points[0], corner, 40), np.arange(-1, 39), 1.0, 2)
    corrected = concatenate_trees([rest, drawn])
    scale = np.array([1.0, 0.5, 0.5]) if kind == "swc" else np.ones(3)
    unit = "um" if kind == "swc" else "voxel"
    swc.write(out / "swc" / f"n2.{kind}", replace(corrected, points=corrected.points * scale), unit=unit)

    assert cli.main(command) == EXIT_DONE
    merged = swc.read(out / "swc" / "n2.voxel.swc")
    assert measure_share_near(corrected, merged) == 1.0
    assert measure_share_near(deleted, merged) < 0.5
    assert measure_share_near(merged, corrected) > 0.98
    assert (merged.types == 2).sum() == len(drawn)

    # The edits outlast other settings, and the same command is complete.
    before = (out / "swc" / "n2.swc").stat().st_mtime_ns
    assert cli.main(command) == EXIT_DONE
    assert (out / "swc" / "n2.swc").stat().st_mtime_ns == before
    assert cli.main([*command, "trace.min_branch=9"]) == EXIT_DONE
    again = swc.read(out / "swc" / "n2.voxel.swc")
    assert measure_share_near(corrected, again) == 1.0
    assert measure_share_near(deleted, again) < 0.5


def test_what_the_tracer_finds_beside_a_corrected_tree_is_joined(stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={out}"]
    assert cli.main([*command, "trace.min_branch=60"]) == EXIT_DONE
    short = swc.read(out / "swc" / "n2.voxel.swc")
    swc.write(out / "swc" / "n2.voxel.swc", replace(short, types=np.full(len(short), 2)), unit="voxel")

    # Shorter branches are now allowed: they hang on the corrected tree.
    assert cli.main([*command, "edits=keep"]) == EXIT_DONE
    merged, gold = swc.read(out / "swc" / "n2.voxel.swc"), make_neuron(3)
    assert length(merged) > length(short) + 10
    assert len(merged.roots) == 1
    assert (merged.types == 2).sum() == len(short)
    assert match_cable(merged, gold, 3.0).f1 > 0.95


def make_edits(stacks: Path, out: Path) -> list[str]:
    """The command that keeps the edits of a person who has deleted a branch."""
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={out}", "edits=keep"]
    assert cli.main(command) == EXIT_DONE
    tree = swc.read(out / "swc" / "n2.voxel.swc")
    swc.write(out / "swc" / "n2.voxel.swc", select_nodes(tree, ~select_longest_branch(tree)), unit="voxel")
    assert cli.main(command) == EXIT_DONE
    return command


@pytest.mark.parametrize("harm", ["flip a node", "flip the unit", "cut"])
@pytest.mark.parametrize("name", ["n2.swc", "n2.deleted.swc"])
@pytest.mark.parametrize("remedy", ["remove its line", "remove the file"])
def test_a_damaged_edit_is_named_and_the_advice_helps(
    harm: str, name: str, remedy: str, stacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command, path = make_edits(stacks, out), out / "edits" / name
    content = path.read_bytes()
    damage = {
        "flip a node": content[:-8] + bytes([content[-8] ^ 1]) + content[-7:],
        "flip the unit": content.replace(b"voxel", b"vexel", 1),
        "cut": content[:-20],
    }
    path.write_bytes(damage[harm])
    capsys.readouterr()
    assert cli.main(command) != EXIT_DONE
    message = " ".join(capsys.readouterr().err.split())
    assert f"{path} is not as `trace` wrote it" in message
    assert remedy in message

    # Of a file without its digest, what is left must still be a tree in voxels.
    if remedy == "remove the file":
        path.unlink()
        (out / "edits" / "n2.swc").unlink(missing_ok=True)
    else:
        lines = content.splitlines(keepends=True)
        path.write_bytes(b"".join(line for line in lines if not line.startswith(b"# sha256 of the other lines:")))
    assert cli.main(command) == EXIT_DONE


@pytest.mark.parametrize("remedy", ["put it back", "remove"])
def test_deleted_cable_that_is_lost_is_missed(
    remedy: str, stacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command, deleted = make_edits(stacks, out), out / "edits" / "n2.deleted.swc"
    deleted.rename(tmp_path / "away.swc")
    capsys.readouterr()
    assert cli.main(command) != EXIT_DONE
    assert f"{deleted} is missing" in " ".join(capsys.readouterr().err.split())
    if remedy == "put it back":
        (tmp_path / "away.swc").rename(deleted)
    else:
        (out / "edits" / "n2.swc").unlink()
    assert cli.main(command) == EXIT_DONE


def read_edit(out: Path) -> Tree:
    """The tree that the tracer goes on from, in voxels."""
    return swc.read(out / "edits" / "n2.swc")


def assert_same_cable(tree: Tree, other: Tree) -> None:
    """Without its header a file keeps the node of length 0 that was added for other readers."""
    assert length(tree) == pytest.approx(length(other), rel=1e-4)
    np.testing.assert_allclose(tree.points[-1], other.points[-1], atol=1e-3)


def replace_header(path: Path, header: str) -> str:
    """Put other comment lines into a tree; its new text."""
    nodes = [line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#")]
    path.write_text("".join([header, *nodes]))
    return path.read_text()


@pytest.mark.parametrize("unit", ["um", "nm", "voxel"])
def test_a_corrected_tree_in_another_unit_is_read_in_its_own(stacks: Path, tmp_path: Path, unit: str) -> None:
    """A program may save what it opened in micrometers in its own unit, under the same name."""
    out = tmp_path / "out"
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={out}", "edits=keep"]
    assert cli.main(command) == EXIT_DONE
    tree = swc.read(out / "swc" / "n2.voxel.swc")
    scale = {"um": [1.0, 0.5, 0.5], "nm": [1000.0, 500.0, 500.0], "voxel": [1.0, 1.0, 1.0]}[unit]
    other = replace(tree, points=tree.points * scale, types=np.full(len(tree), 2))
    swc.write(out / "swc" / "n2.swc", other)
    replace_header(out / "swc" / "n2.swc", f"# unit: {unit}\n")
    assert cli.main(command) == EXIT_DONE
    assert_same_cable(read_edit(out), tree)


def test_a_corrected_tree_keeps_its_place_when_the_voxel_size_changes(stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["trace", str(stacks / "n2.tif"), f"out={out}", "edits=keep"]
    assert cli.main([*command, SIZE]) == EXIT_DONE
    tree, path = swc.read(out / "swc" / "n2.voxel.swc"), out / "swc" / "n2.swc"
    # Other programs drop the header.
    replace_header(path, "")
    assert cli.main([*command, "voxel_size=2,1,1"]) == EXIT_DONE
    assert_same_cable(read_edit(out), tree)


def test_a_corrected_tree_outside_the_image_is_refused(
    stacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={out}", "edits=keep"]
    assert cli.main(command) == EXIT_DONE
    tree, path = swc.read(out / "swc" / "n2.voxel.swc"), out / "swc" / "n2.voxel.swc"
    swc.write(path, replace(tree, points=tree.points * [1000, 500, 500]))
    content = replace_header(path, "")
    assert cli.main(command) == EXIT_BAD_INPUT
    assert "lie outside the image; state its unit in its first line" in capsys.readouterr().err
    assert path.read_text() == content

    # The advice.
    replace_header(path, "# unit: nm\n")
    assert cli.main(command) == EXIT_DONE
    assert_same_cable(read_edit(out), tree)


def test_two_corrected_files_of_one_tree_are_refused(
    stacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={out}", "edits=keep"]
    assert cli.main(command) == EXIT_DONE
    for kind in ("swc", "voxel.swc"):
        with (out / "swc" / f"n2.{kind}").open("a") as file:
            file.write("# mine\n")
    assert cli.main(command) == EXIT_BAD_INPUT
    assert "delete the one that is not yours" in capsys.readouterr().err
    (out / "swc" / "n2.swc").unlink()
    assert cli.main(command) == EXIT_DONE


def test_a_tree_that_a_person_changed_is_set_aside(stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={out}"]
    assert cli.main(command) == EXIT_DONE
    tree = out / "swc" / "n2.swc"
    tree.write_text(tree.read_text() + "# mine\n")
    assert cli.main([*command, "trace.min_branch=9"]) == EXIT_DONE
    assert "# mine" in (out / "set_aside" / "swc" / "n2.swc").read_text()
    assert "# mine" not in tree.read_text()


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 3])


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x84
    path.write_bytes(data)


def test_the_same_command_repairs_what_is_damaged(stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={out}"]
    assert cli.main(command) == EXIT_DONE
    names = ["swc/n2.swc", "swc/n2.voxel.swc", "entries/n2.swc", "overlay/n2.png", "neuroglancer/n2.json"]
    for number, name in enumerate([*names, "entries/n2.json", "trace.json", "trace.html"]):
        damage = (cut_file, empty_file, flip_byte, Path.unlink)[number % 4]
        path = out / name
        before = path.read_bytes()
        damage(path)
        if name in names:
            assert cli.main(["history", str(out)]) == EXIT_FAILURES, name
        assert cli.main(command) == EXIT_DONE
        assert cli.main(["history", str(out)]) == EXIT_DONE, name
        # Pages and entries hold times.
        if name in names:
            assert path.read_bytes() == before, name


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["result"].pop("swc"),
        lambda entry: entry["result"].update(figures=None),
        lambda entry: entry["result"].update(swc_voxel="../../victim.swc"),
        lambda entry: entry["files"].pop("swc/n2.swc"),
        lambda entry: entry.update(digest=""),
        lambda entry: entry.pop("digest"),
    ],
)
def test_an_entry_that_is_not_as_written_is_made_again(
    stacks: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={tmp_path / 'out'}"]
    assert cli.main(command) == EXIT_DONE
    index = read_index(tmp_path / "out")
    path = tmp_path / "out" / "entries" / "n2.json"
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))
    assert cli.main(command) == EXIT_DONE
    stack, again = index["stacks"]["n2"], read_index(tmp_path / "out")["stacks"]["n2"]  # type: ignore[index]
    assert {**stack, "seconds": 0} == {**again, "seconds": 0}


def test_a_corrected_tree_is_kept_and_said(
    stacks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["trace", str(stacks / "n2.tif"), SIZE, f"out={out}"]
    assert cli.main(command) == EXIT_DONE
    path = out / "swc" / "n2.swc"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    cli.log.propagate = True
    try:
        assert cli.main(command) == EXIT_DONE
    finally:
        cli.log.propagate = False
    assert f"{path} was changed since it was traced; edits=keep" in caplog.text
    assert path.read_text() == "".join(lines[:-1])
    assert cli.main(["history", str(out)]) == EXIT_DONE
    assert "swc/n2.swc was changed since it was traced" in capsys.readouterr().out


def test_without_a_voxel_size_no_micrometers_are_written(stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["trace", str(stacks / "n2.tif"), f"out={out}"]) == EXIT_DONE
    assert (out / "swc" / "n2.voxel.swc").exists()
    assert not (out / "swc" / "n2.swc").exists()
    assert "voxel_size=z,y,x" in (out / "log.txt").read_text()
    entry = read_index(out)["stacks"]["n2"]  # type: ignore[index]
    assert entry["unit"] == "voxels"
    assert entry["swc"] is None


def test_a_bad_stack_is_listed_and_the_others_are_done(stacks: Path, tmp_path: Path) -> None:
    (stacks / "bad.tif").write_bytes(b"II*\x00" + bytes(20))
    out = tmp_path / "out"
    assert cli.main(["trace", str(stacks), SIZE, f"out={out}"]) == EXIT_FAILURES
    index = read_index(out)
    assert len(index["stacks"]) == 2  # type: ignore[arg-type]
    assert "bad.tif" in index["failures"][0]  # type: ignore[index]
    assert "bad.tif" in (out / "trace.html").read_text()


def test_a_single_bad_stack_writes_nothing(stacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stacks / "bad.tif").write_bytes(b"II*\x00" + bytes(20))
    assert cli.main(["trace", str(stacks / "bad.tif"), f"out={tmp_path / 'out'}"]) == EXIT_BAD_INPUT
    assert "bad.tif" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no stack is given"),
        (["absent.tif"], "absent.tif does not exist"),
        (["no_*.tif"], "no file matches"),
        (["STACK", "root=1,2"], "root"),
        (["STACK", "root=1,2,900"], "lies outside"),
        (["STACK", "voxel_size=1,0,1"], "above 0"),
        (["STACK", "root=1,2,3", "seeds=a.marker"], "not both"),
        (["STACK", "STACK10", "root=1,2,3"], "holds for one stack"),
        (["STACK", "colour=3"], "colour"),
    ],
)
def test_a_faulty_command_is_one_sentence(
    stacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    paths = {"STACK": str(stacks / "n2.tif"), "STACK10": str(stacks / "n10.tif")}
    out = tmp_path / "out"
    assert cli.main(["trace", *(paths.get(word, word) for word in words), f"out={out}"]) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_seed_file_beside_the_stack_gives_the_roots(stacks: Path, tmp_path: Path) -> None:
    z, y, x = make_neuron(3).points[-1]
    (stacks / "n2.marker").write_text(f"{x + 1},{y + 1},{z + 1}\n")
    out = tmp_path / "out"
    assert cli.main(["trace", str(stacks / "n2.tif"), SIZE, f"out={out}"]) == EXIT_DONE
    np.testing.assert_allclose(swc.read(out / "swc" / "n2.voxel.swc").points[0], (z, y, x), atol=1e-3)


def test_stacks_whose_trees_would_share_a_file_get_names_of_their_own(tmp_path: Path) -> None:
    """The tree of `a` in voxels is a.voxel.swc, which is that of `a.voxel` in micrometers."""
    (tmp_path / "data").mkdir()
    for seed, name in ((3, "a"), (4, "a.voxel")):
        tifffile.imwrite(tmp_path / "data" / f"{name}.tif", take_picture(make_neuron(seed)))
    assert cli.main(["trace", str(tmp_path / "data"), SIZE, f"out={tmp_path / 'out'}"]) == EXIT_DONE
    assert list(read_index(tmp_path / "out")["stacks"]) == ["a_tif", "a_voxel_tif"]
    assert len(list((tmp_path / "out" / "swc").glob("*.swc"))) == 4


def test_stacks_that_differ_in_capitals_are_not_written_into_one_folder(
    stacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stacks / "n10.tif").rename(stacks / "N2.tif")
    assert cli.main(["trace", str(stacks), SIZE, f"out={tmp_path / 'out'}"]) == EXIT_BAD_INPUT
    assert "differ in capitals only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    # The advice: another name for one of them.
    (stacks / "N2.tif").rename(stacks / "n3.tif")
    assert cli.main(["trace", str(stacks), SIZE, f"out={tmp_path / 'out'}"]) == EXIT_DONE
    assert list(read_index(tmp_path / "out")["stacks"]) == ["n2", "n3"]  # type: ignore[call-overload]


def test_a_link_in_circles_is_listed_and_the_others_are_done(stacks: Path, tmp_path: Path) -> None:
    (stacks / "n3.tif").symlink_to("n3.tif")
    (stacks / "n4.tif").symlink_to("nowhere.tif")
    (stacks / "n10.tif").unlink()
    assert cli.main(["trace", str(stacks), SIZE, f"out={tmp_path / 'out'}"]) == EXIT_FAILURES
    index = read_index(tmp_path / "out")
    assert list(index["stacks"]) == ["n2"]
    assert len(index["failures"]) == 2


def test_stacks_of_one_stem_get_names_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        tifffile.imwrite(tmp_path / folder / "n.tif", take_picture(make_neuron(3)))
    out = tmp_path / "out"
    assert cli.main(["trace", str(tmp_path / "*" / "n.tif"), SIZE, f"out={out}"]) == EXIT_DONE
    assert list(read_index(out)["stacks"]) == ["a_n_tif", "b_n_tif"]  # type: ignore[call-overload]


def test_no_torch_is_imported(stacks: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from hpc_neuro import cli; "
        f"code = cli.main(['trace', {str(stacks / 'n2.tif')!r}, 'out={tmp_path / 'out'}']); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
