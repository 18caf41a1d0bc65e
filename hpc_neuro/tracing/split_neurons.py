"""Neurons that touch: what holds several roots is cut between them, where it is least likely to go on.

The centre lines are taken apart into sections and the hubs where these meet: forks and crossings, stretches below the
threshold, bridges. At a hub every two sections are worth as much as they lie in one line, times the lowest probability
on the way through the hub. The best pairs are joined first, unless that would join two roots (on a forest this greedy
choice keeps the largest sum of worths: it is Kruskal's algorithm with one root in every tree).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hpc_neuro.tracing.graph import Wires
from hpc_neuro.tracing.voxel_graph import Bools, Floats, Foreground, Ints

_BASE = 8.0  # [voxel] and
_SLENDER = 3.0  # radii: how much of a section gives its direction
_CROSSING = 1.5  # forks closer than this many times the sum of their radii
_MORE = 2.0  # [voxel] and this much belong to one crossing
_ROOT = 2.0  # more than any pair is worth
_BRIDGE = 0.5  # of the floor: the probability that stands for a bridge


@dataclass(frozen=True)
class _Pair:
    worth: float
    a: int  # section
    b: int
    way: tuple[int, ...]  # nodes from the last one of a to the first one of b, these included


def split(net: Wires, found: Foreground, roots: Sequence[int], floor: float, threshold: float) -> Wires:
    """The wires without what joins several of `roots` (nodes); a crossing's nodes stand there once for each neuron.

    Only what hangs on a root is kept. Root nodes keep their voxels, and no other node has those.
    """
    around = net.neighbor_lists()
    sure = np.where(net.voxels >= 0, found.probability[net.voxels], np.float32(_BRIDGE * floor))
    degree = np.array([len(beside) for beside in around])
    hub = (degree >= 3) | (sure < threshold)
    hub[_crossings(net, around, degree)] = True
    hub[list(roots)] = True
    hub[_between_roots(net, around, hub, roots, sure)] = True
    section = _labels(net, ~hub)
    root_of = {node: number for number, node in enumerate(roots)}
    pairs = list(_pairs(net, around, hub, section, sure, root_of))
    sections = int(section.max()) + 1
    joined = np.arange(sections + len(roots))  # a root counts as a section of its own
    owner = np.full(len(joined), -1)
    owner[sections:] = np.arange(len(roots))
    chosen: list[_Pair] = []
    for pair in sorted(pairs, key=lambda p: (-p.worth, p.way)):
        a, b = _top(joined, pair.a), _top(joined, pair.b)
        if a != b and min(owner[a], owner[b]) < 0:
            joined[b], owner[a] = a, max(owner[a], owner[b])
            chosen.append(pair)
    owners = np.array([owner[_top(joined, s)] for s in range(len(joined))])
    return _rebuilt(net, section, owners, chosen, roots)


def _top(joined: Ints, item: int) -> int:
    while joined[item] != item:
        joined[item] = joined[joined[item]]
        item = int(joined[item])
    return item


def _labels(net: Wires, inside: Bools) -> Ints:
    """[K] number of the connected group of each node that is `inside`, -1 for the others."""
    n = len(net.points)
    edges = net.edges[inside[net.edges].all(axis=1)]
    graph = csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(n, n))
    _, label = connected_components(graph, directed=False)
    found = np.full(n, -1, dtype=np.int64)
    _, found[inside] = np.unique(label[inside], return_inverse=True)
    return found


def _crossings(net: Wires, around: Sequence[Sequence[int]], degree: Ints) -> list[int]:
    """The nodes between two forks that are so near to each other that they are one crossing."""
    found = []
    for fork in np.flatnonzero(degree >= 3).tolist():
        for first in around[fork]:
            before, here, way, gone = fork, first, list[int](), 0.0
            most = _CROSSING * 2 * max(net.radii[fork], 1.0) + _MORE
            while True:
                gone += float(np.linalg.norm(net.points[here] - net.points[before]))
                if degree[here] != 2 or gone > most:
                    break
                way.append(here)
                before, here = here, next(node for node in around[here] if node != before)
            if degree[here] >= 3 and gone <= _CROSSING * (net.radii[fork] + net.radii[here]) + _MORE:
                found += way
    return found


def _between_roots(
    net: Wires, around: Sequence[Sequence[int]], hub: Bools, roots: Sequence[int], sure: Floats
) -> list[int]:
    """The weakest node of each section that leads from one root straight to another."""
    found = []
    for root in roots:
        for first in around[root]:
            before, here, way = root, first, list[int]()
            while not hub[here] and len(around[here]) == 2:
                way.append(here)
                before, here = here, next(node for node in around[here] if node != before)
            if way and here in roots and here != root:
                found.append(min(way, key=lambda node: (sure[node] * net.radii[node], node)))
    return found


def _pairs(
    net: Wires,
    around: Sequence[Sequence[int]],
    hub: Bools,
    section: Ints,
    sure: Floats,
    root_of: dict[int, int],
) -> Iterator[_Pair]:
    """Every two sections that meet at a hub, and each root with the sections that begin there."""
    label, sections = _labels(net, hub), int(section.max()) + 1
    order = np.argsort(label, kind="stable")
    order = order[label[order] >= 0]
    for group in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        doors = [(node, out) for node in group.tolist() for out in around[node] if not hub[out]]
        heads = {out: _direction(net, around, hub, node, out) for node, out in doors}
        ends = [(node, out, int(section[out])) for node, out in doors]
        ends += [(node, node, sections + root_of[node]) for node in group.tolist() if node in root_of]
        ways = {node: _ways(around, hub, node) for node, _, _ in ends}
        for (a, out_a, one), (b, out_b, other) in itertools.combinations(ends, 2):
            inner = ways[a][b]
            worth = float(sure[list(inner)].min())
            if max(one, other) < sections:
                worth *= float(1 - heads[out_a] @ heads[out_b]) / 2
                worth = worth if not any(node in root_of for node in inner) else 0.0
            else:
                worth = worth * _ROOT if min(one, other) < sections else 0.0
            way = [*([out_a] if out_a != a else []), *inner, *([out_b] if out_b != b else [])]
            yield _Pair(worth, one, other, tuple(way))


def _ways(around: Sequence[Sequence[int]], hub: Bools, start: int) -> dict[int, tuple[int, ...]]:
    """The way inside a hub from a node to each other one."""
    found: dict[int, tuple[int, ...]] = {start: (start,)}
    stack = [start]
    while stack:
        node = stack.pop()
        for other in around[node]:
            if hub[other] and other not in found:
                found[other] = (*found[node], other)
                stack.append(other)
    return found


def _direction(net: Wires, around: Sequence[Sequence[int]], hub: Bools, node: int, out: int) -> Floats:
    """Unit vector into a section from where it meets a hub; its first radius bends towards the hub and is left out."""
    before, here, gone, anchor = node, out, 0.0, out
    radius = float(net.radii[out])
    while gone < _BASE + _SLENDER * radius:
        onward = [other for other in around[here] if other != before and not hub[other]]
        if not onward:
            break
        before, here = here, onward[0]
        gone += float(np.linalg.norm(net.points[here] - net.points[before]))
        if gone <= radius:
            anchor = here
    ahead = net.points[here] - net.points[anchor if anchor != here else node]
    return np.asarray(ahead / max(float(np.linalg.norm(ahead)), 1e-9))


def _rebuilt(net: Wires, section: Ints, owners: Ints, chosen: Sequence[_Pair], roots: Sequence[int]) -> Wires:
    """The sections with an owner, and the ways that were chosen through the hubs, each owner's own."""
    sections = int(section.max()) + 1
    kept = (section >= 0) & (owners[np.maximum(section, 0)] >= 0) if sections else np.zeros(len(section), dtype=bool)
    copies = {(int(node), -1): i for i, node in enumerate(np.flatnonzero(kept))}
    for root in roots:
        copies.setdefault((root, owners[sections + list(roots).index(root)]), len(copies))
    edges = {
        (copies[a, -1], copies[b, -1])
        for a, b in net.edges.tolist()
        if section[a] >= 0 and section[a] == section[b] and kept[a]
    }
    for pair in chosen:
        who = int(owners[pair.a])
        if who < 0:
            continue
        nodes = [(n, -1) if section[n] >= 0 else (n, who) for n in pair.way]
        numbers = [copies.setdefault(node, len(copies)) for node in nodes]
        edges |= {(min(a, b), max(a, b)) for a, b in itertools.pairwise(numbers)}
    origin = np.array([node for node, _ in copies], dtype=np.int64)
    return Wires(
        net.points[origin],
        net.radii[origin],
        np.array(sorted(edges), dtype=np.int64).reshape(-1, 2),
        net.voxels[origin],
    )
