"""How fast a level of a pyramid is made of the one below, on one core, in memory.

    python -m tools.bench.pyramid [--shape 128 512 512] [--repeats 5]

Last line: JSON with [million voxels/s] of the fine level for the mean and the maximum of uint8, and the same for the
plain definition in NumPy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from hpc_neuro.data.pooling import Bytes, halve

STEP = (2, 2, 2)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 512, 512), help="[voxel] even along each axis")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    values = np.random.default_rng(0).integers(0, 256, args.shape, dtype=np.uint8)
    z, y, x = (n // s for n, s in zip(args.shape, STEP, strict=True))
    cells = values.reshape(z, STEP[0], y, STEP[1], x, STEP[2])
    steps: dict[str, Callable[[], Bytes]] = {
        "mean": lambda: halve(values, STEP, "mean"),
        "max": lambda: halve(values, STEP, "max"),
        "mean_by_definition": lambda: np.rint(cells.mean((1, 3, 5))).astype(np.uint8),
        "max_by_definition": lambda: np.asarray(cells.max((1, 3, 5))),
    }

    rates = {}
    for name, step in steps.items():
        rates[name] = round(values.size / 1e6 / min(_time_step(step) for _ in range(args.repeats)), 1)
        print(f"{name:20} {rates[name]:8.1f} million voxels/s")
    print(json.dumps({"shape": list(args.shape), "mvoxel_per_s": rates}))


def _time_step(step: Callable[[], Bytes]) -> float:
    """[s] of CPU, which other processes of the machine do not lengthen."""
    start = time.process_time()
    step()
    return time.process_time() - start


if __name__ == "__main__":
    main()
