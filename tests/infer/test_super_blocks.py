"""The trees of a volume of many super-blocks: on one rank or two, at once or after a stop, those of one process."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tifffile

from hpc_neuro import infer
from hpc_neuro.core import morphology, sorted_parts
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data import shard_packs, swc
from hpc_neuro.infer import forest_files, skeleton_groups, super_blocks
from hpc_neuro.infer.predictor import Predictor
from hpc_neuro.infer.trees import VolumeTrees
from hpc_neuro.tracing import TracedVolume
from tests.helpers.small_volumes import KEYS, configure

SAVE_SKELETONS = skeleton_groups.save_skeletons
WHOLE = ["trees=true", "trace.signal_gap=0", "trace.gap=0"]
IN_PARTS = [*WHOLE, "trace.block=[16,16,32]", "trace.super_block=[1,1,2]"]


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    """An image of two neurites, one of them with a branch, through three super-blocks."""
    image = np.zeros((16, 32, 192), dtype=np.uint8)
    image[6:11, 6:11, 4:188] = image[6:11, 22:27, 4:188] = 255
    image[6:11, 6:16, 90:95] = 255
    tifffile.imwrite(tmp_path / "cells.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    return f"inputs=[{{image: {tmp_path / 'cells.tif'}, voxel_size: [1, 1, 1]}}]"


@pytest.fixture
def right_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "predict", lambda self, image, *others: image)


def read_files(out: Path) -> dict[str, bytes]:
    """The files of all trees, and what the entries say of them."""
    paths = [path for kind in ("swc", "proofread", "entries") for path in sorted((out / kind).rglob("*"))]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths if path.is_file()}


@pytest.mark.usefixtures("right_student")
def test_blocks_of_tracing_that_are_read_in_groups_give_the_same_files(
    model: Path, inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name, grouped_from in (("one by one", 50_000), ("groups", 0)):
        monkeypatch.setattr(skeleton_groups, "GROUPED_FROM", grouped_from)
        monkeypatch.setattr(skeleton_groups, "GROUP", (1, 2, 4))
        saved = list[Path]()
        monkeypatch.setattr(
            skeleton_groups,
            "save_skeletons",
            lambda path, skeletons, save=SAVE_SKELETONS, saved=saved: (saved.append(path), save(path, skeletons)),
        )
        out = tmp_path / name
        assert infer.run(configure(model, out, inputs, *IN_PARTS)) == 0
        results.append((len(saved), read_files(out)))
    (single, files), (grouped, files_of_groups) = results
    assert files == files_of_groups
    assert single > grouped > 1


@pytest.mark.usefixtures("right_student")
def test_the_trees_are_those_of_one_process(model: Path, inputs: str, tmp_path: Path) -> None:
    assert infer.run(configure(model, tmp_path / "whole", inputs, *WHOLE)) == 0
    assert infer.run(configure(model, tmp_path / "parts", inputs, *IN_PARTS)) == 0
    whole, parts = (swc.read(tmp_path / name / "swc/cells.voxel.swc") for name in ("whole", "parts"))
    assert len(whole.roots) == len(parts.roots) == 2
    np.testing.assert_allclose(parts.points, whole.points, atol=1.0)
    assert not (tmp_path / "parts" / "strands").exists()


@pytest.mark.usefixtures("right_student")
@pytest.mark.parametrize(
    ("module", "step", "calls"),
    [
        (shard_packs, "write_pack", 1),
        (super_blocks, "trace_lines", 2),
        (super_blocks, "link", 1),
        (super_blocks, "group", 0),
        (super_blocks, "finish", 0),
        (forest_files, "order", 0),
        (forest_files, "write_batch", 0),
        (forest_files, "plan", 3),
        (forest_files, "write_range", 4),
        (forest_files, "hash_range", 2),
        (forest_files, "finish", 0),
    ],
)
def test_a_step_that_is_done_is_not_done_again(
    model: Path, inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str, calls: int
) -> None:
    monkeypatch.setattr(shard_packs, "PACK", (1, 1, 2))
    assert infer.run(configure(model, tmp_path / "quiet", inputs, *IN_PARTS)) == 0
    cfg = configure(model, tmp_path / "o", inputs, *IN_PARTS)
    take, taken = getattr(module, step), []

    def take_or_stop(*args: object) -> object:
        if len(taken) == calls:
            raise KeyboardInterrupt
        taken.append(args)
        return take(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, step, take_or_stop)
        infer.run(cfg)

    # What comes before the step that was interrupted is on the disk.
    paths = [path for kind in ("*.np[zy]", "pack_*") for path in (tmp_path / "o/strands").rglob(kind)]
    kept = {path: path.stat().st_mtime_ns for path in paths}
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **more: None)
        patch.setattr(VolumeTrees, "list_scratch", lambda trees: [])
        assert infer.run(cfg) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert read_files(tmp_path / "o") == read_files(tmp_path / "quiet")


@pytest.mark.usefixtures("right_student")
@pytest.mark.parametrize("flips", ["flips=[]", "flips=[flip_x]"])
def test_the_files_are_those_of_one_process_for_the_same_trees(
    model: Path, inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flips: str
) -> None:
    out, cfg = tmp_path / "o", configure(model, tmp_path / "o", inputs, *IN_PARTS, flips)
    monkeypatch.setattr(sorted_parts, "RANGE_BYTES", 256)
    monkeypatch.setattr(sorted_parts, "RUN_BYTES", 1024)
    monkeypatch.setattr(sorted_parts, "_RUNS_FROM", 0)
    forests = list[Tree]()

    def keep(trees: VolumeTrees) -> None:
        # The trees in the order of one process.
        batches = [trees.load_batch(batch) for batch in range(super_blocks.count_batches(trees))]
        single = [tree for batch in batches for tree in morphology.split_components(batch)]
        forests.append(morphology.concatenate_trees(sorted(single, key=morphology.length, reverse=True)))
        order(trees)

    order = forest_files.order
    with monkeypatch.context() as patch:
        patch.setattr(forest_files, "order", keep)
        assert infer.run(cfg) == 0
    in_parts = read_files(out)
    assert len(in_parts) == 13, "two trees in two units, six tables, the files of all and the entry"

    # One process gets the same trees, and the views that belong to them.
    for folder in ("swc", "proofread", "entries"):
        shutil.rmtree(out / folder)
    (out / "predictions.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(VolumeTrees, "is_large", False)
        patch.setattr(VolumeTrees, "trace", lambda trees: trees.keep_forest(TracedVolume([*forests], [])))
        assert infer.run(cfg) == 0
    assert read_files(out) == in_parts


@pytest.mark.usefixtures("right_student")
def test_a_batch_of_pieces_that_are_too_short_adds_nothing(model: Path, inputs: str, tmp_path: Path) -> None:
    assert infer.run(configure(model, tmp_path / "without", inputs, *IN_PARTS)) == 0
    image = tifffile.imread(tmp_path / "cells.tif")
    image[13:16, 14:18, 100:112] = 255
    tifffile.imwrite(tmp_path / "cells.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    assert infer.run(configure(model, tmp_path / "with", inputs, *IN_PARTS)) == 0
    without, with_speck = (read_files(tmp_path / name) for name in ("without", "with"))
    assert with_speck.keys() == without.keys()
    assert {name for name in without if with_speck[name] != without[name]} == {"entries/cells.json"}


@pytest.mark.usefixtures("right_student")
def test_trees_of_given_roots_stand_in_their_order(model: Path, inputs: str, tmp_path: Path) -> None:
    roots = [(8.0, 24.0, 186.0), (8.0, 8.0, 6.0)]
    given = inputs.replace("}]", f", roots: {[list(root) for root in roots]}}}]")
    assert infer.run(configure(model, tmp_path / "o", given, *IN_PARTS)) == 0
    first, second = (swc.read(tmp_path / f"o/swc/cells/000{number}.voxel.swc") for number in (1, 2))
    assert [tuple(tree.points[0]) for tree in (first, second)] == roots
    forest = swc.read(tmp_path / "o/swc/cells.voxel.swc")
    assert [tuple(point) for point in forest.points[forest.roots]] == roots
    np.testing.assert_array_equal(forest.points, np.concatenate([first.points, second.points]))


@pytest.mark.usefixtures("right_student")
def test_more_trees_than_tree_files_share_one_file(model: Path, inputs: str, tmp_path: Path) -> None:
    for name, keys in {"whole": WHOLE, "parts": IN_PARTS}.items():
        assert infer.run(configure(model, tmp_path / name, inputs, *keys, "tree_files=1", "page=true")) == 0
        assert not (tmp_path / name / "swc/cells").exists()
        forest = swc.read(tmp_path / name / "swc/cells.swc")
        rows = list(csv.DictReader((tmp_path / name / "proofread/cells.neurons.csv").open()))
        lines = (tmp_path / name / "swc/cells.swc").read_text().splitlines()
        ids = {line.split()[0] for line in lines if not line.startswith("#") and line.split()[-1] in ("-1", "1")}
        assert {row["node"] for row in rows} <= ids, "each tree begins at its root"
        assert len(rows) == len(forest.roots) == 2


@pytest.mark.usefixtures("right_student")
def test_a_volume_without_neurite_has_no_trees(model: Path, tmp_path: Path) -> None:
    image = np.zeros((16, 32, 192), dtype=np.uint8)
    image[8, 8, 8] = 255
    tifffile.imwrite(tmp_path / "cells.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    given = f"inputs=[{{image: {tmp_path / 'cells.tif'}, voxel_size: [1, 1, 1]}}]"
    assert infer.run(configure(model, tmp_path / "o", given, *IN_PARTS)) == 0
    assert [*read_files(tmp_path / "o")] == ["entries/cells.json"]


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_make_the_files_of_one(model: Path, inputs: str, tmp_path: Path, ranks: int) -> None:
    keys = [inputs, *IN_PARTS, "trace.threshold=0.3"]
    assert infer.run(configure(model, tmp_path / "one", *keys)) == 0
    start = [
        str(Path(sys.executable).with_name("mpiexec")),
        "-n",
        str(ranks),
        sys.executable,
        "-m",
        "hpc_neuro",
        "infer",
    ]
    ended = subprocess.run(
        [*start, f"model={model}", f"out={tmp_path / 'many'}", *KEYS, *keys],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert read_files(tmp_path / "one")
    assert read_files(tmp_path / "many") == read_files(tmp_path / "one")


def test_the_memory_of_the_largest_group_is_stated(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hpc_neuro")
    super_blocks.log_memory("cells", 2_000_000, 64 << 30)
    assert "2000000 voxels of centerlines, about 1.1 GB of memory on one rank" in caplog.text
    assert "more than" not in caplog.text
    super_blocks.log_memory("cells", 400_000_000, 64 << 30)
    assert "GB of this node; if a rank is killed there, give `roots`" in caplog.text
