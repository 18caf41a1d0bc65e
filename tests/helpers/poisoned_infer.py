"""A program for test_poisoned: goes at volumes again and again in processes of their own, which one part kills.

    python -m tests.helpers.poisoned_infer OUT

One volume is killed at a block; then, in folders of their own below OUT, one of two volumes at one of each kind of
PARTS. Prints for each process what the poison was, how the process ended (0, or minus the signal), the failures it
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

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import load
from hpc_neuro.infer import verb, volume_stages
from hpc_neuro.infer.block_pipeline import Work
from hpc_neuro.infer.config import EmptyConfig, InferConfig
from hpc_neuro.infer.done_markers import Marks
from hpc_neuro.infer.tiling import Plan
from hpc_neuro.infer.volumes import Source

SHAPE = (8, 64, 96)
WIDE = (8, 64, 300)  # has a pyramid
POISON = (0, 1, 1)
DEATHS, FEWER = 3, 2  # of a block, of another part
TRACE = ("trace.block=[8,64,128]", "trace.min_cable=10")
PARTS = {
    "pyramid_1_c_0_0_1": "shard 1/c/0/0/1 of the pyramid",
    "strands_0_0_128": "block of tracing at (0, 0, 128)",
    "trees": "its trees",
    "view_0_0_1": "second look at block (0, 0, 1)",
    "files": "its files",
}
"""Name of a part -> what it is for people."""


def a_block(out: Path, deaths: int) -> list[str]:
    """One process's work; killed without warning when the student sees the poisoned block."""
    plan = Plan((8, 32, 32), 0.5, (4, 16, 16), (8, 32, 32), (8, 32, 32))

    def read(box: Box) -> np.ndarray:
        z, y, x = np.indices(box.shape)
        return ((z + box.start[0]) * 64 * 96 + (y + box.start[1]) * 96 + x + box.start[2]).astype(np.float32) / 49152

    start = next(b.read.start for b in plan.blocks(SHAPE) if b.index == POISON)
    first = float(read(Box.at(start, (1, 1, 1)))[0, 0, 0])

    def predict(image: np.ndarray, seen: Callable[[int], None]) -> np.ndarray:
        if float(image[0, 0, 0]) == first:
            os.kill(os.getpid(), signal.SIGKILL)
        seen(1)
        return image

    source = Source("v", "made up", SHAPE, (1.0, 1.0, 1.0), (), "", read)
    work = Work.open(source, plan, predict, 0.5, "key", out, EmptyConfig(level=None), tries=2, deaths=deaths)
    return verb._predict(work, None, True)


class Job:
    """A student that gives the image back."""

    def __init__(self, out: Path) -> None:
        self.cfg = load(InferConfig, None, [f"out={out}", "model=x", "store=x", "flips=[flip_x]", *TRACE])

    def predict(self, image: np.ndarray, seen: Callable[[int], None], *_: object) -> np.ndarray:
        seen(1)
        return image


def later(out: Path, deaths: int, poison: str) -> list[str]:
    """One process's work on two volumes with a neurite each; killed in one part of the first one, `a`."""
    job, plan, begin = Job(out), Plan((8, 32, 32), 0.5, (4, 16, 16), (8, 64, 96), (8, 32, 32)), Marks.begin
    image = np.zeros(WIDE, np.float32)
    image[3:6, 30:33, 4:290] = 0.9

    def deadly(marks: Marks, name: Shape | str) -> None:
        begin(marks, name)
        if (marks.failed.name, name) == ("a", poison):
            os.kill(os.getpid(), signal.SIGKILL)

    Marks.begin = deadly
    works = [
        Work.open(
            Source(name, "made up", WIDE, (1.0, 1.0, 1.0), (), "", lambda box: image[box.slices]),
            plan, job.predict, 0.5, "key", out, EmptyConfig(level=None), deaths=deaths,
        )
        for name in "ab"
    ]  # fmt: skip
    lost = [verb._predict(work, None, True) for work in works]
    _, failures = volume_stages.traced(job, [w for w, lines in zip(works, lost, strict=True) if not lines], None)
    return [*lost[0], *lost[1], *failures]


def again_and_again(poison: str, once: Callable[[], list[str]], done: Callable[[], list[str]]) -> None:
    """Until it lists its failures, ten times at most."""
    for _ in range(10):
        report, told = os.pipe()
        child = os.fork()
        if child == 0:  # before tensorstore has threads
            code = 1
            try:
                os.write(told, json.dumps(once()).encode())
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        os.close(told)
        _, status = os.waitpid(child, 0)
        with os.fdopen(report, "rb") as handle:
            said = handle.read()
        failures, code = json.loads(said) if said else [], os.waitstatus_to_exitcode(status)
        print(json.dumps({"poison": poison, "code": code, "failures": failures, "done": done()}))
        if said:
            return


def main() -> None:
    """All kinds of poison."""
    out = Path(sys.argv[1])
    again_and_again(
        "block",
        lambda: a_block(out, DEATHS),
        lambda: sorted(p.stem for p in (out / "blocks" / "v").glob("[0-9]*.json")),
    )
    for poison in PARTS:
        folder = out / poison
        again_and_again(
            poison,
            lambda folder=folder, poison=poison: later(folder, FEWER, poison),
            lambda folder=folder: sorted(p.stem for p in (folder / "entries").glob("*.json")),
        )


if __name__ == "__main__":
    main()
