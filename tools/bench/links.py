"""What links along the image are worth where neurites are crowded and the mask breaks: missed cable, splits, merges.

    python -m tools.bench.links [--neurons 4 12] [--seeds 3] [--size 64 256 256]

Synthetic neurons (hpc_neuro.data.synthetic) share a volume, with breaks in their light every 30 um and stretches of
neurites that the truth leaves out. Otsu's mask, times 0.7, 1 and 1.4, is traced without roots, once by itself and once
with the image, and compared with the truth at 4 voxels. Last line: JSON with the means over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu

from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree, concatenate_trees
from hpc_neuro.data.synthetic import Microscope, TreeForm, grow_random_tree, render_stack
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.metrics.topology import compare_topology
from hpc_neuro.tracing import trace

_VOXEL: VoxelSize = (1.0, 0.33, 0.33)  # [um]
_LEVELS = (0.7, 1.0, 1.4)  # of Otsu's threshold: a mask that is wide, fair, broken
_TOLERANCE = 4.0  # [voxel]
_COLUMNS = ("precision", "recall", "splits", "merges", "seconds")


def main() -> None:
    """Print a line for each kind of volume, without and with the image."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--neurons", type=int, nargs="+", default=[4, 12])
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--size", type=int, nargs=3, default=(64, 256, 256), help="[voxel]")
    args = ask.parse_args()
    z, y, x = args.size
    rows = []
    print(f"{'neurons':>7} {'level':>5} {'image':>5} " + " ".join(f"{name:>9}" for name in _COLUMNS))
    for neurons, level in itertools.product(args.neurons, _LEVELS):
        scores = [compared(seed, neurons, level, (z, y, x)) for seed in range(args.seeds)]
        for image in ("no", "yes"):
            mean = {name: float(np.mean([score[image][name] for score in scores])) for name in _COLUMNS}
            rows.append({"neurons": neurons, "level": level, "image": image, **mean})
            print(
                f"{neurons:7} {level:5} {image:>5} " + " ".join(f"{mean[name]:9.3f}" for name in _COLUMNS), flush=True
            )
    print(json.dumps(rows))


def compared(seed: int, neurons: int, level: float, shape: Shape) -> dict[str, dict[str, float]]:
    """Scores of one volume's mask traced without ("no") and with ("yes") its image."""
    gold = concatenate_trees(
        [grow_random_tree(1000 * seed + n, shape, _VOXEL, TreeForm(cable=150.0)) for n in range(neurons)]
    )
    light = Microscope(gap_every=30.0, fragments=3)
    image = render_stack(gold, shape, _VOXEL, light, seed).astype(np.float32)
    smooth = gaussian_filter(image, 0.7)
    mask = smooth > level * threshold_otsu(smooth)
    scores = {}
    for name, seen in (("no", None), ("yes", image)):
        begun = time.perf_counter()
        trees = trace(mask, _VOXEL, image=seen)
        scores[name] = {"seconds": time.perf_counter() - begun, **_scores(concatenate_trees(trees), gold)}
    return scores


def _scores(tree: Tree, gold: Tree) -> dict[str, Any]:
    near, connected = match_cable(tree, gold, _TOLERANCE), compare_topology(tree, gold, _TOLERANCE)
    return {
        "precision": near.precision,
        "recall": near.recall,
        "splits": connected.splits,
        "merges": connected.merges,
    }


if __name__ == "__main__":
    main()
