"""Time and memory of `trace` on a large synthetic stack.

    python -m tools.bench.large_stack --folder FOLDER [--edges 250 500] [--occupied 0.01] [--model none] [--seed 0]

Writes stacks of EDGE^3 voxels, uint8 TIFF, one after the other, and traces each in a process of its own. A stack is
made of cubes of 125 voxels, each one of four scenes, mirrored at random: neurons that fill the given share of the
voxels, blurred, on a background with noise. Stacks that are there are not written again. CPU time and peak memory are
those of the process; seconds by the clock say little on a busy machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume
from hpc_neuro.core.morphology import Tree, concatenate_trees
from hpc_neuro.data.rasterize import paint_tree
from hpc_neuro.data.synthetic import TreeForm, grow_random_tree

_CUBE: Shape = (125, 125, 125)
"""[voxel] A scene."""
_SCENES = 4
"""Different scenes of a stack."""
_SIZE: VoxelSize = (0.4, 0.4, 0.4)
"""[um] Of a voxel."""
_FORM = TreeForm(cable=300.0, soma=0.0)
"""Shape of the neurons."""
_BACKGROUND, _BRIGHTNESS, _NOISE, _BLUR = 20.0, 120.0, 4.0, 0.8
"""Brightness of background, neurites and noise; [voxel] standard deviation of the blur."""
_OCCUPIED = 0.5
"""[brightness of a neurite] Brighter voxels are occupied."""
Image = NDArray[np.uint8]


def main() -> int:
    """Print a row for each stack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--edges", type=int, nargs="+", default=[250, 500])
    parser.add_argument("--occupied", type=float, default=0.01)
    parser.add_argument("--model", default="none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = []
    scenes = None
    for edge in args.edges:
        path = args.folder / f"stack_{edge}_{args.occupied:g}_{args.seed}.tif"
        if not path.exists():
            scenes = scenes or [draw_scene(args.seed + number, args.occupied) for number in range(_SCENES)]
            write_stack(path, edge, scenes, args.seed)

        row = {"edge": edge, "voxels": edge**3, **trace_stack(path, args.folder / f"traced_{edge}", args.model)}
        rows.append(row)
        print(
            f"{edge:>6} {edge**3 / 1e6:>8.0f} M voxels: {row['cpu_seconds']:.0f} s of CPU, {row['seconds']:.0f} s, "
            f"{files.format_bytes(row['peak_bytes'])}, {row['trees']} trees",
            flush=True,
        )
    print(json.dumps(rows))
    return 0


def draw_scene(seed: int, occupied: float) -> Image:
    """A cube with neurons that fill about a share `occupied` of its voxels."""
    light = np.zeros(_CUBE, dtype=np.float32)
    trees = list[Tree]()
    while np.count_nonzero(light > _OCCUPIED) < occupied * light.size:
        trees.append(grow_random_tree(1000 * seed + len(trees), _CUBE, _SIZE, _FORM))
        forest = concatenate_trees(trees)
        light = paint_tree(forest, np.ones(len(forest)), Box.whole(_CUBE), _SIZE)

    noise = np.random.default_rng(seed).normal(0, _NOISE, _CUBE)
    image = _BACKGROUND + _BRIGHTNESS * gaussian_filter(light, _BLUR) + noise
    return np.asarray(np.clip(image, 0, 255), dtype=np.uint8)


def write_stack(path: Path, edge: int, scenes: list[Image], seed: int) -> None:
    """Write a stack of scenes, whole or not at all; it is mapped, and never held in memory."""
    rng = np.random.default_rng(seed)
    with files.atomic(path) as part:
        stack = tifffile.memmap(part, shape=(edge, edge, edge), dtype=np.uint8, photometric="minisblack")
        for block in tile_volume((edge, edge, edge), _CUBE):
            axes = tuple(axis for axis in range(3) if rng.random() < 0.5)
            scene = np.flip(scenes[int(rng.integers(len(scenes)))], axes)
            stack[block.write.slices] = scene[Box.whole(block.write.shape).slices]
        stack.flush()


def trace_stack(path: Path, out: Path, model: str) -> dict[str, Any]:
    """Trace a stack anew in a process of its own, and measure it."""
    voxel_size = ",".join(map(str, _SIZE))
    words = ["trace", str(path), f"model={model}", f"voxel_size={voxel_size}", f"out={out}"]
    (out / "trace.json").unlink(missing_ok=True)
    (out / "entries" / f"{path.stem}.json").unlink(missing_ok=True)

    started_at = time.monotonic()
    process = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "hpc_neuro", *words])
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"hpc-neuro {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")

    result = files.read_json(out / "trace.json", "trace it again", dict)["stacks"][path.stem]
    return {
        "seconds": round(time.monotonic() - started_at, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "trees": result["figures"]["trees"],
        "mask_share": result["figures"]["mask_share"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
