"""What the contact rule does to crops of neurons without neighbors, whose branches leave the volume on all sides.

    python -m tools.bench.crops STORE... [--only ID ...] [--sizes 64 96 128 192] [--crops 8]

A crop is a column around a random node of the gold tree, of some voxels along y and x (and z, where the voxels are
about cubes). Its gold tree is the largest connected part of that of the neuron, and its root the node where that part
begins. Each crop is traced from the foreground of `trace`: as trace.crowd decides, as a lone neuron, and without the
rule; the cable is compared at 4 voxels. The crowds of tools.bench.contacts are the counterpart. One row for each
neuron and size; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree, length, select_nodes, split_components
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.tracing import TraceConfig, list_trace_blocks, skeletonize_block, trace_volume

_RULES = {"decided": TraceConfig(), "lone": TraceConfig(crowd=False), "off": TraceConfig(contacts=False)}
_TOLERANCE = 4.0
"""[voxel]"""
_LEAST_CABLE = 150.0
"""[voxel] A crop with less than this, or than its width, is drawn again."""
_DRAWS = 60
"""Draws for all crops of one size."""
_CUBE = 1.5
"""Largest ratio of the edges of a voxel that is about a cube."""
_SEED = 7


class Crop(NamedTuple):
    """A box of a volume with one connected tree."""

    image: NDArray[np.generic]
    tree: Tree
    voxel_size: VoxelSize


def main() -> None:
    """Print a row for each neuron and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 192])
    parser.add_argument("--crops", type=int, default=8, help="of each neuron and size")
    args = parser.parse_args()

    rows = []
    print(f"{'neuron':>16} {'size':>5} {'crops':>5} {'crowds':>6} " + " ".join(f"{rule:>8}" for rule in _RULES))
    for volume in (volume for path in args.stores for volume in Store(path)):
        if volume.root is None or (args.only and volume.id not in args.only):
            continue
        rng = np.random.default_rng(_SEED)
        for size in args.sizes:
            scores = [score for crop in draw_crops(volume, size, args.crops, rng) if (score := score_crop(crop))]
            if scores:
                mean = {key: float(np.mean([score[key] for score in scores])) for key in _RULES}
                crowds = int(sum(score["is_crowd"] for score in scores))
                rows.append({"neuron": volume.id, "size": size, "crops": len(scores), "crowds": crowds, **mean})
                f1 = " ".join(f"{mean[rule]:8.3f}" for rule in _RULES)
                print(f"{volume.id:>16} {size:5} {len(scores):5} {crowds:6} {f1}", flush=True)
    print(json.dumps(rows))


def draw_crops(volume: StoredVolume, size: int, count: int, rng: np.random.Generator) -> Iterator[Crop]:
    """At most `count` crops of a volume, each with enough cable."""
    gold, shape = volume.tree(), np.array(volume.shape)
    is_cube = max(volume.voxel_size) <= _CUBE * min(volume.voxel_size)
    drawn = 0
    for _ in range(_DRAWS):
        center = gold.points[rng.integers(len(gold))]
        low = np.maximum((center - size / 2).astype(int), 0)
        high = np.minimum(low + size, shape)
        if not is_cube:
            low[0], high[0] = 0, shape[0]

        is_inside = np.all((gold.points >= low) & (gold.points <= high - 1), axis=1)
        parts = split_components(select_nodes(gold, is_inside))
        part = max(parts, key=length, default=None)
        if part is None or length(part) < min(size, _LEAST_CABLE):
            continue

        box = Box(_to_shape(low), _to_shape(high))
        tree = Tree(part.points - low, part.radii, part.parents, part.types)
        yield Crop(np.asarray(volume.image(box)), tree, volume.voxel_size)
        drawn += 1
        if drawn == count:
            return


def _to_shape(corner: NDArray[np.int64]) -> Shape:
    z, y, x = corner.tolist()
    return z, y, x


def score_crop(crop: Crop) -> dict[str, Any]:
    """F1 with each rule, and whether the crop was taken for a crowd; empty where the root is off the foreground."""
    shape = _to_shape(np.array(crop.image.shape))
    foreground = measure_foreground(lambda box: crop.image[box.slices], shape)
    read, cfg = foreground.probability, TraceConfig()
    blocks = [skeletonize_block(read, shape, box, crop.voxel_size, cfg) for box in list_trace_blocks(shape, cfg)]
    skeletons = [block for block in blocks if block is not None]

    z, y, x = np.clip(crop.tree.points[0], 0, np.array(shape) - 1).tolist()
    row = dict[str, Any]()
    for rule, settings in _RULES.items():
        try:
            traced = trace_volume(
                skeletons, read, shape, crop.voxel_size, roots=[(z, y, x)], cfg=settings, image=foreground.read_image
            )
        except InputError:
            return {}
        row[rule] = match_cable(traced.trees[0], crop.tree, _TOLERANCE).f1
        if rule == "decided":
            row["is_crowd"] = traced.crowd is not None and traced.crowd.is_crowd
    return row


if __name__ == "__main__":
    main()
