"""A program for test_poisoned: infers volumes again and again in processes of their own, which one task kills.

    python -m tests.helpers.poisoned_infer OUT

One volume is killed at a block; then, in folders of their own below OUT, one of two volumes at one of each kind of
TASKS. Prints for each process what the poison was, how the process ended (0, or minus the signal), the failures it
listed, and what is done by then: blocks, or the volumes that were finished.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import load
from hpc_neuro.core.task_queue import RetryLimits
from hpc_neuro.infer import verb, volume_stages
from hpc_neuro.infer.block_pipeline import EmptyRule, VolumeRun
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.done_markers import DoneMarkers
from hpc_neuro.infer.tiling import Tiling
from hpc_neuro.infer.volumes import InputVolume
from tests.helpers.journal import list_blocks

SHAPE = (8, 64, 96)
LONG_SHAPE = (8, 64, 300)
"""Large enough for a pyramid."""
POISONED_BLOCK = (0, 1, 1)
BLOCK_DEATHS, TASK_DEATHS = 3, 2
"""Limits of deaths at a block, and at another task."""
TRACE_KEYS = ("trace.block=[8,64,128]", "trace.min_cable=10")
TASKS = {
    "pyramid_1_c_0_0_1": "shard 1/c/0/0/1 of the pyramid",
    "strands_0_0_128": "block of tracing at (0, 0, 128)",
    "trees": "its trees",
    "view_0_0_1": "second look at block (0, 0, 1)",
    "files": "its files",
}
"""Name of a task -> what it is for people."""


def infer_poisoned_block(out: Path, deaths: int) -> list[str]:
    """The work of one process; killed without warning when the student sees the poisoned block."""
    tiling = Tiling((8, 32, 32), 0.5, (4, 16, 16), (8, 32, 32), (8, 32, 32))

    def read(box: Box) -> np.ndarray:
        z, y, x = np.indices(box.shape)
        return ((z + box.start[0]) * 64 * 96 + (y + box.start[1]) * 96 + x + box.start[2]).astype(np.float32) / 49152

    start = next(b.read.start for b in tiling.list_blocks(SHAPE) if b.index == POISONED_BLOCK)
    first = float(read(Box.at(start, (1, 1, 1)))[0, 0, 0])

    def predict(image: np.ndarray, count_windows: Callable[[int], None]) -> np.ndarray:
        if float(image[0, 0, 0]) == first:
            os.kill(os.getpid(), signal.SIGKILL)
        count_windows(1)
        return image

    source = InputVolume("v", "made up", SHAPE, (1.0, 1.0, 1.0), (), "", read)
    limits = RetryLimits(tries=2, deaths=deaths)
    volume = VolumeRun.open(source, tiling, predict, 0.5, "key", out, EmptyRule(level=None), limits)
    return verb.predict_volume(volume, Ranks())


class EchoPredictor:
    """A student that gives the image back."""

    def __init__(self, out: Path) -> None:
        self.cfg = load(InferConfig, None, [f"out={out}", "model=x", "store=x", "flips=[flip_x]", *TRACE_KEYS])

    def predict(self, image: np.ndarray, count_windows: Callable[[int], None], *_: object) -> np.ndarray:
        count_windows(1)
        return image


def infer_poisoned_task(out: Path, deaths: int, poison: str) -> list[str]:
    """The work of one process on two volumes with a neurite each; killed in one task of the first one, `a`."""
    predictor, begin = EchoPredictor(out), DoneMarkers.begin
    tiling = Tiling((8, 32, 32), 0.5, (4, 16, 16), (8, 64, 96), (8, 32, 32))
    image = np.zeros(LONG_SHAPE, np.float32)
    image[3:6, 30:33, 4:290] = 0.9

    def begin_or_die(markers: DoneMarkers, name: str) -> None:
        begin(markers, name)
        if (markers.name, name) == ("a", poison):
            os.kill(os.getpid(), signal.SIGKILL)

    DoneMarkers.begin = begin_or_die
    volumes = [
        VolumeRun.open(
            InputVolume(name, "made up", LONG_SHAPE, (1.0, 1.0, 1.0), (), "", lambda box: image[box.slices]),
            tiling,
            predictor.predict,
            0.5,
            "key",
            out,
            EmptyRule(level=None),
            RetryLimits(tries=1, deaths=deaths),
        )
        for name in "ab"
    ]
    failed = [verb.predict_volume(volume, Ranks()) for volume in volumes]
    whole = [volume for volume, lines in zip(volumes, failed, strict=True) if not lines]
    _, failures = volume_stages.trace_volumes(predictor, whole, Ranks())
    return [*failed[0], *failed[1], *(failure.line for failure in failures)]


def start_until_it_ends(poison: str, work: Callable[[], list[str]], list_done: Callable[[], list[str]]) -> None:
    """Start processes until one lists its failures, ten at most."""
    for _ in range(10):
        read_end, write_end = os.pipe()
        child = os.fork()
        # The child is forked before tensorstore has threads.
        if child == 0:
            code = 1
            try:
                os.write(write_end, json.dumps(work()).encode())
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)

        os.close(write_end)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read_end, "rb") as handle:
            output = handle.read()
        failures, code = json.loads(output) if output else [], os.waitstatus_to_exitcode(status)
        print(json.dumps({"poison": poison, "code": code, "failures": failures, "done": list_done()}))
        if output:
            return


def main() -> None:
    """All kinds of poison."""
    out = Path(sys.argv[1])
    start_until_it_ends(
        "block",
        lambda: infer_poisoned_block(out, BLOCK_DEATHS),
        lambda: list_blocks(out, "v"),
    )
    for poison in TASKS:
        folder = out / poison
        start_until_it_ends(
            poison,
            lambda folder=folder, poison=poison: infer_poisoned_task(folder, TASK_DEATHS, poison),
            lambda folder=folder: sorted(path.stem for path in (folder / "entries").glob("*.json")),
        )


if __name__ == "__main__":
    main()
