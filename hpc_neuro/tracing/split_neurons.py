"""Split touching neurons: what holds several roots is cut between them, where it is least likely to go on.

The centerlines are taken apart into sections and the hubs where these meet: branch points and crossings, stretches
below the threshold, bridges. At a hub, every two sections have a worth: how well they lie in one line, times the lowest
probability on the path through the hub. The best pairs are joined first, unless that would join two roots. On a forest
this greedy choice keeps the largest sum of worths: it is Kruskal's algorithm with one root in every tree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hpc_neuro.tracing.graph import CenterlineGraph, measure_section_direction
from hpc_neuro.tracing.probability import Bools, Floats, Ints
from hpc_neuro.tracing.voxel_graph import VoxelGraph

_CROSSING_RATIO = 1.5
"""[sum of the radii] Distance of two branch points below which they are one crossing, plus `_CROSSING_MARGIN`."""
_CROSSING_MARGIN = 2.0
"""[voxel] See `_CROSSING_RATIO`."""
_ROOT_WORTH = 2.0
"""Factor on the worth of a root and a section that begins there: more than any other pair is worth."""
_BRIDGE_CERTAINTY = 0.5
"""[lower threshold] The probability that stands for a bridge."""


@dataclass(frozen=True)
class Dissection:
    """A graph taken apart into sections and hubs."""

    graph: CenterlineGraph
    neighbors: list[list[int]]
    """The neighbors of each node."""
    certainty: Floats
    """[K] probability at each node."""
    is_hub: Bools
    """[K]"""
    section: Ints
    """[K] number of each node's section, -1 at a hub."""
    root_of: dict[int, int]
    """Number of the root at a node."""

    @property
    def sections(self) -> int:
        """Number of sections."""
        return int(self.section.max()) + 1


class _Door(NamedTuple):
    """Where a section, or a root, meets a hub."""

    hub_node: int
    node: int
    """First node of the section; of a root, the hub's node itself."""
    section: int
    """Number of the section; that of a root comes after all sections."""


class _Pair(NamedTuple):
    """Two sections that meet at a hub."""

    worth: float
    path: tuple[int, ...]
    """Nodes from the last one of `a` to the first one of `b`, these included."""
    a: int
    b: int


def split_neurons(
    lines: CenterlineGraph, graph: VoxelGraph, roots: Sequence[int], floor: float, threshold: float
) -> CenterlineGraph:
    """The graph without what joins several of `roots` (nodes).

    Only what is connected to a root is kept. The nodes of a crossing occur once for each neuron. Root nodes keep their
    voxels, and no other node has those.
    """
    parts = dissect(lines, graph, roots, floor, threshold)
    chosen, owners = _join_sections(parts, len(roots))
    return _rebuild(parts, owners, chosen, roots)


def dissect(
    lines: CenterlineGraph, graph: VoxelGraph, roots: Sequence[int], floor: float, threshold: float
) -> Dissection:
    """Take a graph apart into hubs (branch points, crossings, roots, stretches below the threshold) and sections."""
    neighbors = lines.list_neighbors()
    certainty = np.where(lines.voxels >= 0, graph.probability[lines.voxels], np.float32(_BRIDGE_CERTAINTY * floor))

    # Neurons may touch where the probability is low, so a cut has to be possible there.
    is_hub = (lines.degree >= 3) | (certainty < threshold)
    is_hub[find_crossings(lines, neighbors)] = True
    is_hub[list(roots)] = True

    # Two roots on one section would leave no place for a cut.
    is_hub[_find_weakest_between_roots(lines, neighbors, is_hub, roots, certainty)] = True

    section = label_groups(lines, ~is_hub)
    return Dissection(lines, neighbors, certainty, is_hub, section, {node: i for i, node in enumerate(roots)})


def find_crossings(lines: CenterlineGraph, neighbors: Sequence[Sequence[int]]) -> list[int]:
    """The nodes between two branch points that are so near to each other that they are one crossing."""
    crossings = []
    for fork in np.flatnonzero(lines.degree >= 3).tolist():
        # The other branch point is not known yet. Twice the radius of this one bounds the walk.
        most = _CROSSING_RATIO * 2 * max(lines.thickness[fork], 1.0) + _CROSSING_MARGIN
        for first in neighbors[fork]:
            path, end, length = _walk_to_fork(lines, neighbors, fork, first, most)
            radii = lines.thickness[fork] + lines.thickness[end]
            if lines.degree[end] >= 3 and length <= _CROSSING_RATIO * radii + _CROSSING_MARGIN:
                crossings += path
    return crossings


def _walk_to_fork(
    lines: CenterlineGraph, neighbors: Sequence[Sequence[int]], start: int, first: int, most: float
) -> tuple[list[int], int, float]:
    """The nodes between `start` and the next fork or tip by way of `first`, that node, and the length of the path.

    The walk ends early where it is longer than `most`.
    """
    before, here, path, walked = start, first, list[int](), 0.0

    while True:
        walked += float(np.linalg.norm(lines.points[here] - lines.points[before]))
        if lines.degree[here] != 2 or walked > most:
            return path, here, walked

        path.append(here)
        before, here = here, _step_on(neighbors, before, here)


def _find_weakest_between_roots(
    lines: CenterlineGraph,
    neighbors: Sequence[Sequence[int]],
    is_hub: Bools,
    roots: Sequence[int],
    certainty: Floats,
) -> list[int]:
    """The weakest node of each section that leads from one root straight to another."""
    weakest, root_nodes = [], set(roots)
    for root in roots:
        for first in neighbors[root]:
            before, here, path = root, first, list[int]()
            while not is_hub[here] and len(neighbors[here]) == 2:
                path.append(here)
                before, here = here, _step_on(neighbors, before, here)

            # A thin place is as likely a false contact as a faint one. The number of the node breaks ties.
            if path and here in root_nodes and here != root:
                weakest.append(min(path, key=lambda node: (certainty[node] * lines.thickness[node], node)))
    return weakest


def _step_on(neighbors: Sequence[Sequence[int]], before: int, here: int) -> int:
    """The neighbor of a node on which a walk that comes from another one goes on."""
    return next(node for node in neighbors[here] if node != before)


def label_groups(lines: CenterlineGraph, is_inside: Bools) -> Ints:
    """[K] number of the connected group of each node that `is_inside` [K], -1 for the others."""
    edges = lines.edges[is_inside[lines.edges].all(axis=1)]

    graph = csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(lines), len(lines)))
    _, label = connected_components(graph, directed=False)

    # Numbers without holes can serve as indices.
    group = np.full(len(lines), -1, dtype=np.int64)
    _, group[is_inside] = np.unique(label[is_inside], return_inverse=True)
    return group


def _join_sections(parts: Dissection, roots: int) -> tuple[list[_Pair], Ints]:
    """The pairs that are joined, best first, and the root to which each section belongs (-1: none), roots last."""
    # A root counts as a section of its own.
    joined = np.arange(parts.sections + roots)
    owner = np.full(len(joined), -1)
    owner[parts.sections :] = np.arange(roots)

    chosen = []

    # Equal worths are ordered by path, so that the result does not depend on the order of hubs.
    for pair in sorted(_list_pairs(parts), key=lambda pair: (-pair.worth, pair.path)):
        a, b = _find_top(joined, pair.a), _find_top(joined, pair.b)

        # Two groups that both have a root must stay apart.
        if a != b and min(owner[a], owner[b]) < 0:
            joined[b], owner[a] = a, max(owner[a], owner[b])
            chosen.append(pair)
    return chosen, np.array([owner[_find_top(joined, section)] for section in range(len(joined))])


def _find_top(joined: Ints, item: int) -> int:
    while joined[item] != item:
        # Halving the path on the way keeps later searches short.
        joined[item] = joined[joined[item]]
        item = int(joined[item])
    return item


def list_hubs(parts: Dissection) -> list[list[int]]:
    """The nodes of each hub."""
    label = label_groups(parts.graph, parts.is_hub)
    order = np.argsort(label, kind="stable")
    order = order[label[order] >= 0]
    return [hub.tolist() for hub in np.split(order, np.flatnonzero(np.diff(label[order])) + 1)]


def _list_pairs(parts: Dissection) -> Iterator[_Pair]:
    """Every two sections that meet at a hub, and each root with the sections that begin there."""
    for hub in list_hubs(parts):
        doors = _list_doors(parts, hub)
        directions = {
            door.node: measure_section_direction(parts.graph, parts.neighbors, parts.is_hub, door.hub_node, door.node)
            for door in doors
            if door.node != door.hub_node
        }

        # A hub may have many doors at one node, so paths are searched once a node.
        paths = {door.hub_node: _find_paths_inside(parts, door.hub_node) for door in doors}

        for one, other in itertools.combinations(doors, 2):
            inner = paths[one.hub_node][other.hub_node]
            yield _Pair(
                _measure_worth(parts, one, other, inner, directions),
                (*_outer_node(one), *inner, *_outer_node(other)),
                one.section,
                other.section,
            )


def _list_doors(parts: Dissection, hub: Sequence[int]) -> list[_Door]:
    """The sections that begin at a hub, then its roots."""
    doors = [
        _Door(node, other, int(parts.section[other]))
        for node in hub
        for other in parts.neighbors[node]
        if not parts.is_hub[other]
    ]
    return doors + [_Door(node, node, parts.sections + parts.root_of[node]) for node in hub if node in parts.root_of]


def _outer_node(door: _Door) -> tuple[int, ...]:
    """The node of the section; nothing for a root."""
    return () if door.node == door.hub_node else (door.node,)


def _measure_worth(
    parts: Dissection, one: _Door, other: _Door, inner: tuple[int, ...], directions: dict[int, Floats]
) -> float:
    """Worth of two sections; of two roots, and of sections that meet through a root, it is 0."""
    lowest = float(parts.certainty[list(inner)].min())

    # A root goes with the sections that begin there, rather than these with one another.
    if max(one.section, other.section) >= parts.sections:
        return lowest * _ROOT_WORTH if min(one.section, other.section) < parts.sections else 0.0

    # What runs through a root belongs to it already.
    if any(node in parts.root_of for node in inner):
        return 0.0

    # Both directions lead away from the hub, so sections in one line point in opposite directions.
    return lowest * (float(1 - directions[one.node] @ directions[other.node]) / 2)


def _find_paths_inside(parts: Dissection, start: int) -> dict[int, tuple[int, ...]]:
    """The path inside a hub from a node to each other one."""
    paths: dict[int, tuple[int, ...]] = {start: (start,)}

    # A forest has one path between two nodes, so any order of search finds it.
    stack = [start]
    while stack:
        node = stack.pop()
        for other in parts.neighbors[node]:
            if parts.is_hub[other] and other not in paths:
                paths[other] = (*paths[node], other)
                stack.append(other)
    return paths


def _rebuild(parts: Dissection, owners: Ints, chosen: Sequence[_Pair], roots: Sequence[int]) -> CenterlineGraph:
    """The sections with an owner, and the chosen paths through the hubs, of which each owner has copies of its own."""
    lines, section, sections = parts.graph, parts.section, parts.sections
    is_kept = np.zeros(len(section), dtype=bool)
    if sections:
        is_kept = (section >= 0) & (owners[np.maximum(section, 0)] >= 0)

    # The new number of each node, for each owner where it belongs to a hub.
    copies = {(node, -1): number for number, node in enumerate(np.flatnonzero(is_kept).tolist())}
    for number, root in enumerate(roots):
        copies.setdefault((root, int(owners[sections + number])), len(copies))

    a, b = lines.edges.T
    inside = (section[a] >= 0) & (section[a] == section[b]) & is_kept[a]
    edges = {(copies[a, -1], copies[b, -1]) for a, b in lines.edges[inside].tolist()}

    # Groups without a root belong to no neuron and are left out.
    for pair in chosen:
        owner = int(owners[pair.a])
        if owner >= 0:
            nodes = [(node, -1 if section[node] >= 0 else owner) for node in pair.path]
            numbers = [copies.setdefault(node, len(copies)) for node in nodes]
            edges |= {(min(a, b), max(a, b)) for a, b in itertools.pairwise(numbers)}

    # Dictionaries keep their order, so the keys stand in the order of the new numbers.
    origin = np.array([node for node, _ in copies], dtype=np.int64)
    return CenterlineGraph(
        lines.points[origin],
        lines.thickness[origin],
        lines.radii[origin],
        np.array(sorted(edges), dtype=np.int64).reshape(-1, 2),
        lines.voxels[origin],
    )
