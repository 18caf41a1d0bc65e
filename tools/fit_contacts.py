"""Fit the weights of the evidence at hubs (hpc_neuro.tracing.contact_evidence) to crowds and to lone neurons.

    python -m tools.fit_contacts [STORE ...] [--seeds 100 148] [--ratios 0.2 0.4 0.6 0.75 0.9] [--without ID ...]
                                 [--only lone crowd light]

Crowds are those of tools.bench.contacts, whose truth is known. Stores hold neurons without neighbors and with a root:
all their cable is own, so they teach what must not be cut. An arm weighs as much as the square root of the cable that
hangs on it, and all lone neurons together have `_LONE_SHARE` of the weight of the crowds. The weights are those of a
logistic regression; the table for the module is printed.

Two more tables follow. That of hpc_neuro.tracing.crowd_evidence is fitted to the crowds of the highest ratio alone, in
which each neuron in turn is the rooted one. That of hpc_neuro.tracing.neurite_light is fitted to the width and the
brightness of all neurites. --only limits the run to some of the three.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from hpc_neuro.tracing.crowd_evidence import CROWD_FEATURES, CrowdEvidence
from hpc_neuro.tracing.graph import build_centerline_graph
from hpc_neuro.tracing.neurite_light import average_along_sections, measure_scales
from hpc_neuro.tracing.trace import find_lines
from hpc_neuro.tracing.voxel_graph import VoxelGraph, merge_block_skeletons
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
_CROWD_RIDGE = 10.0
"""The same of the crowds that have each neuron in turn as the rooted one."""
_OWN_TOLERANCE = 3.0
"""[voxel] What is this near to the rooted neuron is its, whatever else is near."""
_EVERY = 5
"""[node] Neighboring nodes have the same light."""
_TOTAL = 1000.0
_STEPS = 12
"""Steps of Newton's method."""
TABLES = ("lone", "crowd", "light")
Floats = NDArray[np.float64]
ReadBox = Callable[[Box], NDArray[np.generic]]


class Example(NamedTuple):
    """One arm by which a hub is left."""

    features: Floats
    is_same: bool
    """Whether it belongs to the neuron of the entry."""
    cable: float
    """Nodes beyond it."""


def main() -> None:
    """Print the table of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="*")
    parser.add_argument("--seeds", type=int, nargs=2, default=(100, 148), help="first, and one after the last")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.75, 0.9])
    parser.add_argument("--neurons", type=int, nargs="+", default=[2, 3, 4, 6, 8, 12])
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables to fit")
    parser.add_argument("--without", nargs="+", default=[], help="lone neurons to leave out")
    args = parser.parse_args()

    gather = Gathering(set(args.only))
    for seed in range(*args.seeds):
        crowd = grow_crowd(seed, args.neurons[seed % len(args.neurons)])
        for ratio in args.ratios:
            image = render_crowd(crowd, ratio, seed)
            gather.add_crowd(
                crowd, ratio, find_graph(partial(_read_box, image), SHAPE, VOXEL), ratio == max(args.ratios)
            )
    if "lone" in args.only:
        for path in args.stores:
            for volume in Store(path):
                if volume.root is not None and volume.id not in args.without:
                    graph = find_graph(volume.image, volume.shape, volume.voxel_size)
                    gather.lone += list_examples(graph.take_apart(volume.root), None)
    gather.print_tables()


class Gathering:
    """The examples of all volumes, for the tables that are wanted."""

    def __init__(self, wanted: set[str]) -> None:
        """`wanted`: of "lone", "crowd" and "light"."""
        self.wanted = wanted
        self.crowds, self.lone = list[Example](), list[Example]()
        self.rooted = list[Example]()
        self.lights = list[LightExample]()

    def add_crowd(self, crowd: list[Tree], ratio: float, volume: VolumeGraph, is_alike: bool) -> None:
        """Add the examples of one image of a crowd; `is_alike`: the neighbors are as bright as the ratios allow."""
        first = volume.take_apart(_get_root(crowd[0]))
        if "lone" in self.wanted:
            self.crowds += list_examples(first, crowd)
        if "light" in self.wanted:
            self.lights += list_light_examples(first, volume, crowd, ratio)
        if "crowd" in self.wanted and is_alike:
            for number, tree in enumerate(crowd):
                others = crowd[:number] + crowd[number + 1 :]
                parts = first if number == 0 else volume.take_apart(_get_root(tree))
                evidence = CrowdEvidence(parts, volume.graph, volume.image)
                self.rooted += list_rooted_examples(evidence, tree, others)

    def print_tables(self) -> None:
        """Fit and print the tables as the modules have them."""
        if "lone" in self.wanted:
            print_table(FEATURES, *fit_weights(self.crowds, self.lone))
        if "crowd" in self.wanted:
            print_table(CROWD_FEATURES, *fit_weights(self.rooted, [], _CROWD_RIDGE))
        if "light" in self.wanted:
            print_light(self.lights)


def _get_root(tree: Tree) -> Point:
    z, y, x = tree.points[0].tolist()
    return z, y, x


def _read_box(image: NDArray[np.generic], box: Box) -> NDArray[np.generic]:
    return image[box.slices]


@dataclass(frozen=True)
class VolumeGraph:
    """The voxel graph of an image, and the image bright on dark."""

    graph: VoxelGraph
    image: ReadBox

    def take_apart(self, root: Point) -> RootedSections:
        """The sections of its centerlines from a root."""
        lines = find_lines(self.graph, [root], TraceConfig(), self.image)
        centerlines = build_centerline_graph(self.graph, lines.centerlines, lines.bridges)
        node = int(np.flatnonzero(centerlines.voxels == lines.root_voxels[0])[0])
        return RootedSections(centerlines, self.graph, [node], self.image)


def find_graph(read: ReadBox, shape: Shape, voxel_size: VoxelSize) -> VolumeGraph:
    """The voxel graph of an image, from the foreground of `trace`."""
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
    return VolumeGraph(graph, foreground.read_image)


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


def list_rooted_examples(evidence: CrowdEvidence, tree: Tree, others: list[Tree]) -> Iterator[Example]:
    """The arms of hubs that are reached by the rooted neuron; the trees are in voxels."""
    parts = evidence.parts
    beyond = _measure_cable(parts)
    indices = [SegmentIndex(neuron) for neuron in (tree, *others)]
    for hub in evidence.hubs:
        if not _is_own(parts, hub.hub.entry, indices):
            continue
        for group in hub.groups:
            for arm, features in zip(group.group.arms, group.features, strict=True):
                is_own = _is_own(parts, arm, indices)
                if is_own is not None:
                    yield Example(features, is_own, beyond[arm.section])


def _is_own(parts: RootedSections, arm: Arm, indices: list[SegmentIndex]) -> bool | None:
    """Whether the first stretch of an arm is the first tree's, which others may run beside; None where none is near."""
    radius = float(parts.lines.thickness[arm.hub_node])
    nodes, away = parts.follow_arm(arm.hub_node, arm.node, radius + _NEAR)
    points = parts.lines.points[nodes[away >= min(radius, away[-1] / 2)]]
    distances = [float(np.median(index.query(points))) for index in indices]
    if distances[0] <= _OWN_TOLERANCE:
        return True
    return False if min(distances) < _TOLERANCE else None


class LightExample(NamedTuple):
    """One node of a neurite whose width and brightness are known."""

    logs: Floats
    """[3] of hpc_neuro.tracing.neurite_light.measure_scales."""
    radius: float
    """Logarithm of the radius in fine voxels."""
    labeling: float
    """Logarithm of the share of the brightness that the neuron has."""


def list_light_examples(
    parts: RootedSections, volume: VolumeGraph, crowd: list[Tree], ratio: float
) -> Iterator[LightExample]:
    """Every few nodes of the sections; the first tree of the crowd is bright."""
    logs = measure_scales(parts.lines, volume.graph, volume.image)
    logs = average_along_sections(parts.lines, parts.section, logs)
    nodes = np.flatnonzero(parts.section >= 0)[::_EVERY]
    distances = np.stack([SegmentIndex(tree).query(parts.lines.points[nodes]) for tree in crowd])

    for node, nearest in zip(nodes.tolist(), distances.argmin(axis=0).tolist(), strict=True):
        tree, point = crowd[nearest], parts.lines.points[node]
        away = np.linalg.norm(tree.points - point, axis=1)
        if away.min() <= _OWN_TOLERANCE:
            labeling = 0.0 if nearest == 0 else float(np.log(ratio))
            yield LightExample(logs[node], float(np.log(tree.radii[away.argmin()])), labeling)


def print_light(examples: list[LightExample]) -> None:
    """Fit width and brightness by least squares, and print the constants as the module has them."""
    logs = np.array([example.logs for example in examples])
    one = np.ones(len(logs))
    width = np.linalg.lstsq(np.column_stack([logs, one]), [example.radius for example in examples])[0].tolist()
    shown = logs[:, 0] - [example.labeling for example in examples]
    glow = np.linalg.lstsq(np.column_stack([logs[:, 1:] - logs[:, :1], one]), shown)[0].tolist()
    print("_WIDTH = ({:.3f}, {:.3f}, {:.3f})\n_WIDTH_BIAS = {:.3f}".format(*width))
    print("_GLOW = ({:.3f}, {:.3f})\n_GLOW_BIAS = {:.3f}".format(*glow))


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


def fit_weights(
    crowds: list[Example], lone: list[Example], ridge: float = _RIDGE
) -> tuple[Floats, Floats, Floats, float]:
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
    penalty = np.diag([ridge] * features.shape[1] + [0.0])
    fit = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        share = 1 / (1 + np.exp(-design @ fit))
        slope = design.T @ (weight * (share - is_same)) + penalty @ fit
        fit -= np.linalg.solve((design * (weight * share * (1 - share))[:, None]).T @ design + penalty, slope)
    return center, scale, fit[:-1], float(fit[-1])


def print_table(names: Sequence[str], center: Floats, scale: Floats, weights: Floats, bias: float) -> None:
    """Print the table as the module has it."""
    for row in zip(names, center.tolist(), scale.tolist(), weights.tolist(), strict=True):
        print('    "{}": ({:.3f}, {:.3f}, {:.3f}),'.format(*row))
    print(f"_BIAS = {bias:.3f}")


if __name__ == "__main__":
    main()
