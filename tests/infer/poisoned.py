"""A program for test_engine: goes at one volume again and again in processes of their own, which one block kills.

    python -m tests.infer.poisoned OUT DEATHS

Prints for each process how it ended (0, or minus the signal), the failures it listed, and which blocks are done.
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

from hpc_neuro.geometry import Box
from hpc_neuro.infer import verb
from hpc_neuro.infer.blocks import Plan
from hpc_neuro.infer.config import EmptyConfig
from hpc_neuro.infer.engine import Work
from hpc_neuro.infer.sources import Source

SHAPE = (8, 64, 96)
POISON = (0, 1, 1)


def once(out: Path, deaths: int) -> list[str]:
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


def main() -> None:
    """Go at it until it lists its failures, ten times at most."""
    out, deaths = Path(sys.argv[1]), int(sys.argv[2])
    for _ in range(10):
        report, told = os.pipe()
        child = os.fork()
        if child == 0:  # before tensorstore has threads
            code = 1
            try:
                os.write(told, json.dumps(once(out, deaths)).encode())
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        os.close(told)
        _, status = os.waitpid(child, 0)
        with os.fdopen(report, "rb") as handle:
            said = handle.read()
        done = sorted(p.stem for p in (out / "blocks" / "v").glob("[0-9]*.json"))
        failures = json.loads(said) if said else []
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "failures": failures, "done": done}))
        if said:
            return


if __name__ == "__main__":
    main()
