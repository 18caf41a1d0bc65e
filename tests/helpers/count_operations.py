"""A program for test_brain_operations, run under strace: the parts of an inference, with a mark before each.

    python -m tests.helpers.count_operations OUT

A mark is a look at a file /MARK/NAME that does not exist.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np

from hpc_neuro.core import files
from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.task_queue import RetryLimits, TaskLedger, try_all
from hpc_neuro.infer.block_pipeline import BlockPipeline, EmptyRule, VolumeRun
from hpc_neuro.infer.done_markers import make_block_task
from hpc_neuro.infer.progress import WindowProgress
from hpc_neuro.infer.tiling import Tiling
from hpc_neuro.infer.volume_stages import build_pyramid
from hpc_neuro.infer.volumes import InputVolume

SHAPE = (16, 128, 512)
BLOCKS, FULL_BLOCKS = 128, 64
FILES = 10


def mark(name: str) -> None:
    with contextlib.suppress(OSError):
        Path(f"/MARK/{name}").stat()


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
