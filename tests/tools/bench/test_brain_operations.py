"""The simulator counts the metadata operations that the code takes, as the kernel sees them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from hpc_neuro.data import ome_zarr
from hpc_neuro.infer.tiling import MASK
from tests.helpers.count_operations import BLOCKS, FILES, FULL_BLOCKS, PARTS, SHAPE
from tools.bench.brain import UnitCosts

SHARD = (8, 32, 32)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Stage -> calls of the kernel with the path of a shard, of its folder, or of a file that is written whole.

    Left out are those that make or look for a folder of shards, and the opening of a level by its metadata.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace counts the calls, and is not installed")
    folder = tmp_path_factory.mktemp("operations")
    out, trace = folder / "out", folder / "trace"
    command = ["strace", "-f", "-y", "-e", "trace=%file", "-o", str(trace), sys.executable, "-m"]
    done = subprocess.run(
        [*command, "tests.helpers.count_operations", str(out)], capture_output=True, text=True, check=False, timeout=250
    )
    if "ptrace" in done.stderr or not trace.exists():
        pytest.skip(f"strace may not trace here: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]

    runs, ranges, groups = map(int, done.stdout.split()[-3:])
    stage, counted = "start", {"number of runs": runs, "number of ranges": ranges, "groups": groups}
    for line in trace.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if mark := re.search(r'"/MARK/(\w+)"', line):
            stage = mark[1]
        # A look at an open file is none at its path.
        elif (
            call
            and re.search(rf"{out}/(a.ome.zarr/.*/c/|whole|journal|scratch)", call[2])
            and not re.match(r"\d+<", call[2])
        ):
            is_new_folder = call[1] == "mkdir" or ("O_DIRECTORY" in call[2] and not re.search(r"/c/\d+/\d+\"", call[2]))
            is_missing_folder = "O_DIRECTORY" in call[2] and "ENOENT" in call[2]
            if not is_new_folder and not is_missing_folder:
                counted[stage] = counted.get(stage, 0) + 1
    return counted


def test_a_block_takes_as_many_as_the_simulator_says(counts: dict[str, int]) -> None:
    assert BLOCKS > FULL_BLOCKS
    # The other blocks are empty, and take none; the folder of a new row is opened twice.
    rows = 2 * SHAPE[0] // SHARD[0] * SHAPE[1] // SHARD[1]
    assert 0 <= counts["blocks"] - FULL_BLOCKS * UnitCosts().block_operations <= rows + 2


def test_so_does_a_shard_of_the_pyramid(counts: dict[str, int]) -> None:
    levels = ome_zarr.plan_levels(SHAPE, (1.0, 1.0, 1.0))
    expected = 0
    for shard in (s for level in ome_zarr.plan_shards(SHAPE, (1.0, 1.0, 1.0), SHARD, MASK) for s in level):
        _, box = ome_zarr.locate_fine_box(levels, shard)
        below = list(ome_zarr.list_shards_in(box, SHARD, shard.level - 1, shard.label))
        is_full = box.start[2] * 2 ** (shard.level - 1) < SHAPE[2] // 2
        expected += (UnitCosts().shard_operations + len(below)) * is_full
    assert expected
    assert 0 <= counts["pyramid"] - expected <= 2 * levels[1].shape[1] // SHARD[1] + 2


def test_so_do_packs_and_what_is_read_from_them(counts: dict[str, int]) -> None:
    packs = (2 * 4 * 8) // (2 * 4 * 4)
    assert counts["packs"] == packs * UnitCosts().task_operations + FULL_BLOCKS
    assert counts["boxes"] == packs, "of 2048 boxes"


def test_so_do_runs_and_ranges(counts: dict[str, int]) -> None:
    runs, ranges, groups = (counts[name] for name in ("number of runs", "number of ranges", "groups"))
    assert runs > groups > 1
    task = UnitCosts().task_operations
    assert counts["runs"] == runs * (task + 1) + runs // groups * PARTS
    assert counts["ranges"] == ranges * (task + groups)


def test_so_does_a_file_that_is_written_whole(counts: dict[str, int]) -> None:
    assert counts["files"] == FILES * UnitCosts().task_operations


def test_a_record_takes_none(counts: dict[str, int]) -> None:
    assert counts.get("records", 0) == 0
