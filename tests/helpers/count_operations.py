"""A program for test_brain_operations, run under strace: the parts of an inference, with a mark before each.

    python -m tests.helpers.count_operations OUT

A mark is a look at a file /MARK/NAME that does not exist.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path

import numpy as np

from hpc_neuro.core import files, sorted_parts
from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.geometry import tile_volume
from hpc_neuro.core.sorted_parts import Items, Stream
from hpc_neuro.core.task_queue import RetryLimits, TaskLedger, try_all
from hpc_neuro.data import ome_zarr, shard_packs
from hpc_neuro.data.ome_zarr import shard_path
from hpc_neuro.infer.block_pipeline import BlockPipeline, EmptyRule, VolumeRun
from hpc_neuro.infer.done_markers import make_block_task
from hpc_neuro.infer.progress import WindowProgress
from hpc_neuro.infer.tiling import Tiling
from hpc_neuro.infer.volume_stages import build_pyramid
from hpc_neuro.infer.volumes import InputVolume

SHAPE = (16, 128, 512)
BLOCKS, FULL_BLOCKS = 128, 64
FILES = 10
PARTS = 12


def mark(name: str) -> None:
    with contextlib.suppress(OSError):
        Path(f"/MARK/{name}").stat()


def count_packs(image: Path, scratch: Path) -> None:
    """Copy the shards into packs, and read all of the image from these, box by box."""
    scratch.mkdir()
    mark("packs")
    packs = shard_packs.group_shards((*row, x) for row in itertools.product(*map(range, (2, 4))) for x in range(8))
    for pack, shards in packs.items():
        shard_packs.write_pack(scratch / shard_packs.name_pack(pack), image, shards)
    mark("boxes")
    with shard_packs.PackReader(scratch) as reader:
        read = ome_zarr.ShardReader(image, 1, {shard_path(s) for own in packs.values() for s in own}, reader.read)
        for block in tile_volume(SHAPE, (4, 16, 16)):
            read(block.write)
    mark("other")


def count_runs(scratch: Path) -> None:
    """Put the texts of parts in order by runs."""
    sorted_parts.RANGE_BYTES, sorted_parts.RUN_BYTES, sorted_parts._RUNS_FROM = 1000, 10_000, 0
    for part in range(PARTS):
        keys = np.arange(part, 1000 * PARTS, PARTS)
        sorted_parts.write_part(scratch, part, {"table": Items([keys], [b"%d\n" % key for key in keys])}, {})
    stream = Stream("table", scratch / "table.csv")
    sorted_parts.plan_stream(scratch, PARTS, stream)
    runs, ranges = (
        listed(scratch, stream) for listed in (sorted_parts.list_missing_runs, sorted_parts.list_missing_ranges)
    )
    print(len(runs), len(ranges), sorted_parts._read_runs(scratch, stream).groups)
    mark("runs")
    for number in runs:
        sorted_parts.write_run(scratch, stream, number)
    mark("ranges")
    for number in ranges:
        sorted_parts.write_range(scratch, stream, number)
    mark("other")


def main() -> None:
    """Blocks, of which half are empty; the pyramid; files that are written whole; records."""
    out = Path(sys.argv[1])
    image = np.zeros(SHAPE, np.float32)
    image[:, :, : SHAPE[2] // 2] = 0.9
    source = InputVolume("a", "made up", SHAPE, (1.0, 1.0, 1.0), (), "", lambda box: image[box.slices])
    tiling = Tiling((8, 32, 32), 0.0, (8, 32, 32), (8, 32, 32), (8, 32, 32))
    volume = VolumeRun.open(source, tiling, lambda image, count: image, 0.5, "key", out, EmptyRule(0.0), RetryLimits())
    volume.create_folder()
    blocks = volume.list_blocks()
    pipeline = BlockPipeline(volume, WindowProgress("a", 0, show=False), is_fresh=True)
    volume.markers.begin("warm")
    volume.markers.end("warm")

    mark("blocks")
    with TaskLedger({"a": volume.markers}, volume.limits) as ledger:
        try_all((make_block_task(block, "a") for block in blocks), pipeline.run, ledger)
    mark("pyramid")
    build_pyramid(volume, Ranks(), is_fresh=True)
    count_packs(volume.folder, out / "scratch")
    count_runs(out / "scratch")
    (out / "whole").mkdir()
    mark("files")
    for number in range(FILES):
        files.write_text(out / "whole" / f"file_{number}", "text")
    mark("records")
    for number in range(1000):
        volume.markers.begin(f"task {number}")
        volume.markers.succeed(f"task {number}")
    mark("end")


if __name__ == "__main__":
    main()
