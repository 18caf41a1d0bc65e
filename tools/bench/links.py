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

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu

from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree, concatenate_trees
from hpc_neuro.data.synthetic import Microscope, TreeForm, grow_random_tree, render_stack
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.metrics.topology import compare_topology
from hpc_neuro.tracing import trace

_VOXEL: VoxelSize = (1.0, 0.33, 0.33)
"""[um] z y x."""
_LEVELS = (0.7, 1.0, 1.4)
"""[Otsu's threshold] Of the masks: wide, fair and broken."""
_TOLERANCE = 4.0
"""[voxel] Of matched cable."""
_COLUMNS = ("precision", "recall", "splits", "merges", "seconds")


def main() -> None:
    """Print a line for each kind of volume, without and with the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=3, default=(64, 256, 256), help="[voxel]")
    args = parser.parse_args()
    z, y, x = args.size

    rows = []
    print(f"{'neurons':>7} {'level':>5} {'image':>5} " + " ".join(f"{name:>9}" for name in _COLUMNS))
    for neurons, level in itertools.product(args.neurons, _LEVELS):
        scores = [score_volume(seed, neurons, level, (z, y, x)) for seed in range(args.seeds)]
        for image in ("no", "yes"):
            mean = {name: float(np.mean([score[image][name] for score in scores])) for name in _COLUMNS}
            rows.append({"neurons": neurons, "level": level, "image": image, **mean})
            print(f"{neurons:7} {level:5} {image:>5} " + " ".join(f"{mean[n]:9.3f}" for n in _COLUMNS), flush=True)
    print(json.dumps(rows))


def score_volume(seed: int, neurons: int, level: float, shape: Shape) -> dict[str, dict[str, float]]:
    """Scores of one volume's mask traced without ("no") and with ("yes") its image."""
    gold = concatenate_trees(
        [grow_random_tree(1000 * seed + n, shape, _VOXEL, TreeForm(cable=150.0)) for n in range(neurons)]
    )
    microscope = Microscope(gap_every=30.0, fragments=3)
    image = render_stack(gold, shape, _VOXEL, microscope, seed).astype(np.float32)
    smooth = gaussian_filter(image, 0.7)
    mask = smooth > level * threshold_otsu(smooth)

    scores = {}
    for name, visible in (("no", None), ("yes", image)):
        start = time.perf_counter()
        trees = trace(mask, _VOXEL, image=visible)
        seconds = time.perf_counter() - start
        scores[name] = {"seconds": seconds, **score_tree(concatenate_trees(trees), gold)}
    return scores


def score_tree(tree: Tree, gold: Tree) -> dict[str, float]:
    """Matched cable, splits and merges."""
    cable = match_cable(tree, gold, _TOLERANCE)
    topology = compare_topology(tree, gold, _TOLERANCE)
    return {
        "precision": cable.precision,
        "recall": cable.recall,
        "splits": topology.splits,
        "merges": topology.merges,
    }


if __name__ == "__main__":
    main()
