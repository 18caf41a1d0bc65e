"""Fit the weights of the evidence at hubs (hpc_neuro.tracing.contact_evidence) to crowds and to lone neurons.

    python -m tools.fit_contacts [STORE ...] [--seeds 100 148] [--ratios 0.2 0.4 0.6 0.75 0.9] [--without ID ...]

Crowds are those of tools.bench.contacts, whose truth is known. Stores hold neurons without neighbors and with a root:
all their cable is own, so they teach what must not be cut. An arm weighs as much as the square root of the cable that
hangs on it, and all lone neurons together have `_LONE_SHARE` of the weight of the crowds. The weights are those of a
logistic regression; the table for the module is printed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.store import Store
from hpc_neuro.metrics.segments import SegmentIndex
from hpc_neuro.tracing import TraceConfig, list_trace_blocks, skeletonize_block
from hpc_neuro.tracing.contact_evidence import CLIP, FEATURES, Arm, RootedSections
from hpc_neuro.tracing.graph import build_centerline_graph
from hpc_neuro.tracing.trace import find_lines
from hpc_neuro.tracing.voxel_graph import merge_block_skeletons
from tools.bench.contacts import SHAPE, VOXEL, grow_crowd, render_crowd

_LONE_SHARE = 0.3
"""[weight of the crowds] Weight of all lone neurons together."""
_CABLE = (10.0, 400.0)
"""[voxel] Less and more cable beyond an arm weighs as much as this."""
_NEAR = 15.0
"""[voxel] Stretch of an arm that tells whose it is."""
_TOLERANCE = 4.0
"""[voxel] An arm farther from every tree belongs to none, and is left out."""
_RIDGE = 3.0
"""Penalty on the squares of the weights, for a total weight of `_TOTAL`."""
_TOTAL = 1000.0
_STEPS = 12
"""Steps of Newton's method."""
Floats = NDArray[np.float64]


class Example(NamedTuple):
    """One arm by which a hub is left."""

    features: Floats
    is_same: bool
    """Whether it belongs to the neuron of the entry."""
    cable: float
    """Nodes beyond it."""


def main() -> None:
    """Print the table of weights."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("stores", type=Path, nargs="*")
    ask.add_argument("--seeds", type=int, nargs=2, default=(100, 148), help="first, and one after the last")
    ask.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.75, 0.9])
    ask.add_argument("--neurons", type=int, nargs="+", default=[2, 3, 4, 6, 8, 12])
    ask.add_argument("--without", nargs="+", default=[], help="lone neurons to leave out")
    args = ask.parse_args()

    crowds = list[Example]()
    for seed in range(*args.seeds):
        crowd = grow_crowd(seed, args.neurons[seed % len(args.neurons)])
        z, y, x = crowd[0].points[0].tolist()
        for ratio in args.ratios:
            image = render_crowd(crowd, ratio, seed)
            parts = take_apart(partial(_read_box, image), SHAPE, VOXEL, (z, y, x))
            crowds += list_examples(parts, crowd)

    lone = list[Example]()
    for path in args.stores:
        for volume in Store(path):
            if volume.root is not None and volume.id not in args.without:
                lone += list_examples(take_apart(volume.image, volume.shape, volume.voxel_size, volume.root), None)

    print_table(*fit_weights(crowds, lone))


def _read_box(image: NDArray[np.generic], box: Box) -> NDArray[np.generic]:
    return image[box.slices]


def take_apart(
    read: Callable[[Box], NDArray[np.generic]], shape: Shape, voxel_size: VoxelSize, root: Point
) -> RootedSections:
    """The rooted sections of an image, from the foreground of `trace`."""
    cfg = TraceConfig()
    foreground = measure_foreground(read, shape)
    blocks = (
        skeletonize_block(foreground.probability, shape, box, voxel_size, cfg) for box in list_trace_blocks(shape, cfg)
    )
    skeletons = [block for block in blocks if block is not None]
    graph = merge_block_skeletons(
        skeletons, foreground.probability, shape, cfg.spacing(voxel_size), cfg.floor, cfg.min_voxels
    )
    assert graph is not None, "the image shows nothing"
    lines = find_lines(graph, [root], cfg, foreground.read_image)
    centerlines = build_centerline_graph(graph, lines.centerlines, lines.bridges)
    node = int(np.flatnonzero(centerlines.voxels == lines.root_voxels[0])[0])
    return RootedSections(centerlines, graph, [node], foreground.read_image)


def list_examples(parts: RootedSections, crowd: list[Tree] | None) -> Iterator[Example]:
    """The arms by which hubs are left; `crowd` are the true trees in voxels, None of a lone neuron."""
    beyond = _measure_cable(parts)
    indices = [] if crowd is None else [SegmentIndex(tree) for tree in crowd]
    for hub in parts.hubs:
        owner = _find_owner(parts, hub.entry, indices)
        for group in hub.groups:
            for arm, features in zip(group.arms, group.features, strict=True):
                other = _find_owner(parts, arm, indices)
                if min(owner, other) >= 0:
                    yield Example(features, owner == other, beyond[arm.section])


def _find_owner(parts: RootedSections, arm: Arm, indices: list[SegmentIndex]) -> int:
    """Number of the tree that is nearest to the first stretch of an arm, 0 without trees; -1 where none is near."""
    if not indices:
        return 0
    nodes = np.flatnonzero(parts.section == arm.section)
    away = np.linalg.norm(parts.lines.points[nodes] - arm.foot, axis=1)
    points = parts.lines.points[nodes[away <= max(_NEAR, away.min())]]
    distances = [float(np.median(index.query(points))) for index in indices]
    return int(np.argmin(distances)) if min(distances) < _TOLERANCE else -1


def _measure_cable(parts: RootedSections) -> list[float]:
    """Nodes of each section and of all sections beyond it."""
    is_section = parts.section >= 0
    cable: list[float] = np.bincount(parts.section[is_section], minlength=parts.sections).astype(np.float64).tolist()
    onward = defaultdict[int, list[int]](list)
    for hub in parts.hubs:
        onward[hub.entry.section] += [section for group in hub.groups for section in group.sections]

    order, pending = list[int](), list(parts.first)
    while pending:
        order.append(pending.pop())
        pending += onward[order[-1]]
    for section in reversed(order):
        cable[section] += sum(cable[other] for other in onward[section])
    return cable


def fit_weights(crowds: list[Example], lone: list[Example]) -> tuple[Floats, Floats, Floats, float]:
    """Mean, standard deviation and weight of each feature, and the log-odds where all features have their means."""
    examples = crowds + lone
    features = np.array([example.features for example in examples])
    is_same = np.array([example.is_same for example in examples], dtype=np.float64)
    weight = np.sqrt(np.clip([example.cable for example in examples], *_CABLE))
    weight[: len(crowds)] /= weight[: len(crowds)].sum()
    if lone:
        weight[len(crowds) :] *= _LONE_SHARE / weight[len(crowds) :].sum()
    weight *= _TOTAL / weight.sum()

    center, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    design = np.column_stack([np.clip((features - center) / scale, -CLIP, CLIP), np.ones(len(features))])
    penalty = np.diag([_RIDGE] * features.shape[1] + [0.0])
    fit = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        share = 1 / (1 + np.exp(-design @ fit))
        slope = design.T @ (weight * (share - is_same)) + penalty @ fit
        fit -= np.linalg.solve((design * (weight * share * (1 - share))[:, None]).T @ design + penalty, slope)
    return center, scale, fit[:-1], float(fit[-1])


def print_table(center: Floats, scale: Floats, weights: Floats, bias: float) -> None:
    """Print the table as the module has it."""
    for row in zip(FEATURES, center.tolist(), scale.tolist(), weights.tolist(), strict=True):
        print('    "{}": ({:.3f}, {:.3f}, {:.3f}),'.format(*row))
    print(f"_BIAS = {bias:.3f}")


if __name__ == "__main__":
    main()
