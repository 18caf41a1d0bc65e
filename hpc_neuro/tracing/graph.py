"""The undirected forest of centerlines and bridges, and the directions of its ends and sections."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from hpc_neuro.tracing.centerlines import Centerlines
from hpc_neuro.tracing.probability import Bools, Floats, Ints
from hpc_neuro.tracing.voxel_graph import VoxelGraph

_BASE_LENGTH = 8.0
"""[voxel] Shortest stretch of a line that gives its direction."""
_SLENDERNESS = 3.0
"""[radius] How long that stretch must be for the line to be a tube with a direction."""
_ANCHOR_RATIO = 1.5
"""[radius] How far inside an end its direction starts: there the path runs in the middle."""


@dataclass(frozen=True)
class Bridges:
    """B bridges between two voxels of different components or pieces, and V points on them."""

    ends: Ints
    """[B] voxel of the graph at which each bridge begins."""
    targets: Ints
    """[B] voxel at which it arrives."""
    counts: Ints
    """[B] points between the two."""
    points: Floats
    """[V, 3] the points of all bridges from end to target, both excluded, in the metric's unit."""

    def __len__(self) -> int:
        return len(self.ends)


def no_bridges() -> Bridges:
    """No bridge."""
    none = np.zeros(0, dtype=np.int64)
    return Bridges(none, none, none, np.zeros((0, 3)))


def concatenate_bridges(parts: Sequence[Bridges]) -> Bridges:
    """All bridges of one part after the other."""
    if not parts:
        return no_bridges()
    return Bridges(
        np.concatenate([part.ends for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.points for part in parts]),
    )


def build_straight_bridges(graph: VoxelGraph, ends: Ints, targets: Ints) -> Bridges:
    """Straight bridges from `ends` [B] to `targets` [B], with a point about every voxel."""
    a, b = graph.points[ends], graph.points[targets]
    counts = np.maximum(np.ceil(measure_lengths(b - a)).astype(np.int64) - 1, 0)

    bridge = np.repeat(np.arange(len(ends)), counts)
    number = np.arange(len(bridge)) - np.repeat(np.cumsum(counts) - counts, counts)

    # Both ends are voxels of the graph already, so the points lie strictly between.
    share = ((number + 1) / (counts[bridge] + 1))[:, None]
    return Bridges(ends, targets, counts, a[bridge] * (1 - share) + b[bridge] * share)


def mark_first(*keys: Ints) -> Bools:
    """[n] whether a row of sorted `keys`, each [n] and not negative, differs from the row before it."""
    is_first = np.zeros(len(keys[0]), dtype=bool)
    for key in keys:
        is_first |= np.diff(key, prepend=-1) != 0
    return is_first


def measure_lengths(vectors: Floats) -> Floats:
    """[n] Euclidean length of each of [n, 3] vectors."""
    return np.asarray(np.sqrt(np.vecdot(vectors, vectors)))


@dataclass(frozen=True)
class CenterlineGraph:
    """K nodes and E edges, without a cycle. Lengths are in the metric's unit."""

    points: Floats
    """[K, 3]"""
    thickness: Floats
    """[K] radius of the neurite in the metric's unit, in which paths are measured."""
    radii: Floats
    """[K] radius of the neurite in fine voxels, as trees carry it."""
    edges: Ints
    """[E, 2]"""
    voxels: Ints
    """[K] voxel of each node, -1 on a bridge."""

    def __len__(self) -> int:
        return len(self.points)

    def select(self, keep: Bools) -> CenterlineGraph:
        """The nodes where `keep` [K] is true, and the edges between them."""
        index = np.cumsum(keep) - 1
        edges = index[self.edges[keep[self.edges].all(axis=1)]]
        return CenterlineGraph(
            self.points[keep], self.thickness[keep], self.radii[keep], edges.reshape(-1, 2), self.voxels[keep]
        )

    @functools.cached_property
    def degree(self) -> Ints:
        """[K] number of edges at each node."""
        return np.bincount(self.edges.ravel(), minlength=len(self.points))

    @functools.cached_property
    def edge_lengths(self) -> Floats:
        """[E]"""
        a, b = self.edges.T
        return measure_lengths(self.points[a] - self.points[b])

    @functools.cached_property
    def adjacency(self) -> Adjacency:
        """The neighbors of each node."""
        sources = self.edges.ravel()
        order = np.argsort(sources, kind="stable")

        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))

        starts = np.concatenate([[0], np.cumsum(self.degree)])
        # Neighbors in `edges` stand at places that differ in the last bit.
        return Adjacency(starts, self.edges[:, ::-1].ravel()[order], place[order ^ 1])

    @functools.cached_property
    def cable_behind(self) -> Floats:
        """[2 E] the cable beyond each directed edge of a piece that branches; 0 in others, where there is no choice.

        Most ways from an end meet no fork, so it is measured when the first one does.
        """
        return _measure_cable_at_forks(self)

    def list_neighbors(self) -> list[list[int]]:
        """The neighbors of each node, as lists."""
        neighbors, starts = self.adjacency.neighbors.tolist(), self.adjacency.starts.tolist()
        return [neighbors[begin:end] for begin, end in itertools.pairwise(starts)]

    def label_pieces(self) -> tuple[int, NDArray[np.int32]]:
        """The number of connected pieces, and [K] the piece of each node."""
        return self._pieces

    @functools.cached_property
    def _pieces(self) -> tuple[int, NDArray[np.int32]]:
        graph = csr_array((np.ones(len(self.edges)), (self.edges[:, 0], self.edges[:, 1])), shape=(len(self),) * 2)
        count, label = connected_components(graph, directed=False)
        return int(count), label


@dataclass(frozen=True)
class Adjacency:
    """The 2 E directed edges of a graph, sorted by the node they leave."""

    starts: Ints
    """[K + 1] where the edges of each node begin."""
    neighbors: Ints
    """[2 E] the node at which each edge arrives."""
    reverse: Ints
    """[2 E] the edge in the opposite direction."""

    def list_edges(self, nodes: Ints) -> tuple[Ints, Ints]:
        """All edges that leave `nodes` [n], and for each the place of its node in `nodes`."""
        counts = self.starts[nodes + 1] - self.starts[nodes]
        place = np.repeat(np.arange(len(nodes)), counts)

        return np.arange(len(place)) + np.repeat(self.starts[nodes] - np.cumsum(counts) + counts, counts), place


class CenterlineIndex:
    """The centerlines of a voxel graph, searchable by position."""

    def __init__(self, graph: VoxelGraph, centerlines: Centerlines) -> None:
        self._graph, self._voxels = graph, np.flatnonzero(centerlines.on_path)
        is_whole = len(self._voxels) == len(graph.voxels)
        self._kdtree = graph.kdtree if is_whole else cKDTree(graph.points[self._voxels])

    def find_beside(self, positions: Floats, components: Ints, flank: float) -> Ints:
        """[n] the centerline voxel nearest to each of `positions` [n, 3]; -1 where it is too far.

        It must belong to the given component [n], and be at most its radius and `flank` away.
        """
        away, index = self._kdtree.query(positions)
        voxels = self._voxels[index]
        is_near = (self._graph.component[voxels] == components) & (away <= self._graph.thickness[voxels] + flank)
        return np.where(is_near, voxels, -1)


def build_centerline_graph(graph: VoxelGraph, centerlines: Centerlines, bridges: Bridges) -> CenterlineGraph:
    """All centerlines and bridges as one forest.

    A bridge from or to a voxel that is on no centerline goes on by that voxel's path home.
    """
    on_path = centerlines.on_path.copy()
    open_ends = np.concatenate([bridges.ends, bridges.targets])
    while len(open_ends := open_ends[~on_path[open_ends]]):
        on_path[open_ends] = True
        open_ends = centerlines.following[open_ends]

    # Nodes are numbered by voxel. Sources lead to themselves and have no edge.
    voxels = np.flatnonzero(on_path)
    index = np.full(len(on_path), -1, dtype=np.int64)
    index[voxels] = np.arange(len(voxels))
    following = centerlines.following[voxels]

    is_inner = following != voxels
    edges = np.stack([index[voxels[is_inner]], index[following[is_inner]]], axis=1)

    # A bridge is as thick as the thinner of the two voxels that it joins.
    bridge = np.repeat(np.arange(len(bridges)), bridges.counts)
    thickness, radii = (
        np.concatenate([values[voxels], np.minimum(values[bridges.ends], values[bridges.targets])[bridge]])
        for values in (graph.thickness, graph.radii)
    )
    return CenterlineGraph(
        np.concatenate([graph.points[voxels], bridges.points]),
        thickness,
        radii,
        np.concatenate([edges, _list_bridge_edges(bridges, index, len(voxels))]),
        np.concatenate([voxels, np.full(len(bridge), -1)]),
    )


def _list_bridge_edges(bridges: Bridges, index: Ints, first: int) -> Ints:
    """[V + B, 2] the edges along all bridges; `index` is the node of each voxel, `first` that of the first point."""
    # One chain a bridge: its end, its points, its target.
    lengths = bridges.counts + 2
    starts = np.cumsum(lengths) - lengths

    is_point = np.ones(int(lengths.sum()), dtype=bool)
    is_point[starts] = is_point[starts + lengths - 1] = False

    chain = np.empty(len(is_point), dtype=np.int64)
    chain[starts], chain[starts + lengths - 1] = index[bridges.ends], index[bridges.targets]
    chain[is_point] = np.arange(len(bridges.points)) + first

    is_last = np.zeros(len(chain), dtype=bool)
    is_last[starts + lengths - 1] = True
    begins = np.flatnonzero(~is_last)
    return np.stack([chain[begins], chain[begins + 1]], axis=1)


@dataclass(frozen=True)
class LineEnds:
    """The E ends of the lines of a graph: the nodes with one neighbor or none."""

    anchors: Ints
    """[E] node near each end, a radius or so inside, where the path runs in the middle."""
    directions: Floats
    """[E, 3] unit vector out of the piece; zero where the end is that of a blob and not of a tube."""


def measure_ends(graph: CenterlineGraph) -> LineEnds:
    """The ends of a graph, with the directions from a place inside to the anchor.

    The way inside is the one that holds most cable. It is followed until it is long for its largest radius.
    """
    ends = np.flatnonzero(graph.degree <= 1)
    here, anchors, thick = ends.copy(), ends.copy(), graph.thickness[ends]
    away, arrived_by = np.zeros(len(ends)), np.full(len(ends), -1)

    moving, tips = np.arange(len(ends)), graph.points[ends]
    while len(moving):
        node = here[moving]
        points = graph.points[node]
        is_anchor = measure_lengths(points - tips) <= _ANCHOR_RATIO * graph.thickness[node]

        # A bridge starts at a voxel, and points on bridges are none.
        is_anchor &= graph.voxels[node] >= 0
        anchors[moving[is_anchor]] = node[is_anchor]
        length = measure_lengths(graph.points[anchors[moving]] - points)
        away[moving] = length

        # A thick line needs a longer stretch, since its path may wander within its radius.
        is_short = length < np.maximum(_BASE_LENGTH, _SLENDERNESS * thick[moving])
        edge = _choose_onward(graph, node[is_short], arrived_by[moving[is_short]])
        is_short[is_short] = edge >= 0
        moving, tips, edge = moving[is_short], tips[is_short], edge[edge >= 0]

        arrived_by[moving] = edge
        here[moving] = graph.adjacency.neighbors[edge]
        thick[moving] = np.maximum(thick[moving], graph.thickness[here[moving]])

    # A stretch that is short for its thickness belongs to a blob, and its direction would be chance.
    is_tube = away >= np.maximum(_BASE_LENGTH / 2, _SLENDERNESS * thick)
    directions = np.zeros((len(ends), 3))
    out = graph.points[anchors[is_tube]] - graph.points[here[is_tube]]
    directions[is_tube] = out / away[is_tube, None]
    return LineEnds(anchors, directions)


def _choose_onward(graph: CenterlineGraph, nodes: Ints, arrived_by: Ints) -> Ints:
    """[n] of the edges that leave each node, the one with most cable behind; never back; -1 where there is none.

    The way with most cable behind is most likely the neurite, and not a side branch near its end.
    """
    adjacency = graph.adjacency
    back = np.where(arrived_by >= 0, adjacency.reverse[arrived_by], -1)

    # Most nodes lie on an unbranched path, and leave no choice: one of two edges leads back.
    first, degree = adjacency.starts[nodes], graph.degree[nodes]
    is_first_back = first == back
    chosen = np.where(degree > is_first_back, first + is_first_back, -1)

    forks = np.flatnonzero(degree - (back >= 0) > 1)
    if len(forks):
        chosen[forks] = _choose_at_forks(graph, nodes[forks], back[forks])
    return chosen


def _choose_at_forks(graph: CenterlineGraph, nodes: Ints, back: Ints) -> Ints:
    """[n] the edge with most cable behind, of the two or more that leave each node and are not the one `back`."""
    edges, place = graph.adjacency.list_edges(nodes)
    is_onward = edges != back[place]
    edges, place = edges[is_onward], place[is_onward]

    # The first of equals wins.
    order = np.lexsort((np.arange(len(edges)), -graph.cable_behind[edges], place))
    return np.asarray(edges[order[np.diff(place[order], prepend=-1) > 0]])


def _measure_cable_at_forks(graph: CenterlineGraph) -> Floats:
    """As `_measure_cable_behind`, and 0 in pieces that do not branch."""
    count, label = graph.label_pieces()
    branches = np.zeros(count, dtype=bool)
    branches[label[graph.degree > 2]] = True
    if branches.all():
        return _measure_cable_behind(graph)

    # The directed edges stand in the order of the nodes, which a selection keeps.
    behind = np.zeros(len(graph.adjacency.neighbors))
    keep = branches[label]
    behind[np.repeat(keep, graph.degree)] = _measure_cable_behind(graph.select(keep))
    return behind


def _measure_cable_behind(graph: CenterlineGraph) -> Floats:
    """[2 E] for each directed edge, the cable beyond the node at which it arrives."""
    adjacency = graph.adjacency
    _, label = graph.label_pieces()
    _, roots = np.unique(label, return_index=True)

    # Level by level from the roots; `edges` lead down.
    levels, nodes = [], roots
    came_by = np.full(len(graph), -1, dtype=np.int64)
    while len(nodes):
        edges, place = adjacency.list_edges(nodes)
        back = came_by[nodes]

        # The edge back to the parent would lead up again.
        edges = edges[edges != np.where(back >= 0, adjacency.reverse[back], -1)[place]]
        levels.append(edges)

        nodes = adjacency.neighbors[edges]
        came_by[nodes] = edges

    # Children are summed before their parents, so the levels are taken from the tips.
    below = np.zeros(len(graph))
    for edges in reversed(levels):
        children, parents = adjacency.neighbors[edges], adjacency.neighbors[adjacency.reverse[edges]]
        step = measure_lengths(graph.points[children] - graph.points[parents])
        np.add.at(below, parents, below[children] + step)

    # Against the direction of the search, what lies behind is the rest of the piece.
    behind = np.zeros(len(adjacency.neighbors))
    down = np.concatenate([np.zeros(0, dtype=np.int64), *levels])
    child = adjacency.neighbors[down]
    behind[down] = below[child]
    behind[adjacency.reverse[down]] = below[roots][label[child]] - below[child]
    return behind


def measure_section_direction(
    graph: CenterlineGraph, neighbors: Sequence[Sequence[int]], is_hub: Bools, node: int, first: int
) -> Floats:
    """[3] unit vector into the section that begins with node `first`, from the `node` of the hub where it begins.

    The first radius bends towards the hub and is left out.
    """
    before, here, walked, anchor = node, first, 0.0, first
    radius = float(graph.thickness[first])

    # A thick section needs a longer stretch, since its path may wander within its radius.
    while walked < _BASE_LENGTH + _SLENDERNESS * radius:
        onward = [other for other in neighbors[here] if other != before and not is_hub[other]]
        if not onward:
            break

        before, here = here, onward[0]
        walked += float(np.linalg.norm(graph.points[here] - graph.points[before]))
        if walked <= radius:
            anchor = here

    # A section within the first radius has no other place to measure from than the hub.
    out = graph.points[here] - graph.points[anchor if anchor != here else node]
    return np.asarray(out / max(float(np.linalg.norm(out)), 1e-9))


class DisjointSets:
    """Disjoint sets of the numbers 0 to n - 1, merged two by two in almost constant time (union by size)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))
        self._size = [1] * count

    def find(self, item: int) -> int:
        """The number that stands for the set of `item`."""
        parent = self._parent

        # Halving the path on the way keeps later searches short.
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def merge(self, a: int, b: int) -> bool:
        """Merge the sets of two numbers; False if they were one already."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return False

        # The smaller set goes below the larger one, so paths stay short.
        if self._size[a] < self._size[b]:
            a, b = b, a
        self._parent[b] = a
        self._size[a] += self._size[b]
        return True
