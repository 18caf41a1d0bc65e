"""The skeletons of all blocks as one sparse graph of voxels, and minimum-cost paths on it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import cKDTree

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.tracing.probability import Bools, Floats, Ints, ProbabilitySampler, ReadBox

Indices = NDArray[np.signedinteger[Any]]
"""Indices of voxels: 32 bits where these are enough, else 64."""

_BORDER = 0.25
"""[voxel] From the border of a neurite to the nearest background voxel: half a voxel, less because the nearest of many
is nearer than most."""
_THINNEST = 0.5
"""[voxel] Smallest radius."""
_SEARCH_TILE = 32
"""[voxel] Edge of the tiles in which the voxels of a box are looked up."""
_THIN = 2.0
"""[voxel] Radius up to which neurites are searched together; each further class is twice as thick."""
_BALL_RATIO = 1.25
"""Ratio of the largest and the smallest radius of balls that are searched together."""
_BALL_MARGIN = 1e-9
"""Share of a radius that rounding may take from a distance."""
_DIJKSTRA_VOXELS = 1 << 28
"""Voxels searched at once: the indices of scipy's graphs have 32 bits."""


@dataclass(frozen=True)
class BlockSkeleton:
    """N voxels of a block that centerlines may run through, in C components of its foreground (see block_skeleton)."""

    voxels: NDArray[np.int32]
    """[N, 3] z y x in the volume."""
    probability: NDArray[np.float32]
    """[N]"""
    distance: NDArray[np.float32]
    """[N] to the nearest voxel below the threshold, in the metric's unit; half a voxel where it is below itself."""
    physical_distance: NDArray[np.float32]
    """[N] the same in fine voxels."""
    component: NDArray[np.int32]
    """[N] number of the component, from 0."""
    count: Ints
    """[C] voxels of the whole component that belong to this block."""
    strong: Bools
    """[C] whether any of them reaches the threshold."""


@dataclass(frozen=True)
class VoxelGraph:
    """N voxels in raster order, in C connected components, and the pairs of 26-neighbors among them."""

    shape: Shape
    """Voxels of the volume along z, y, x."""
    spacing: Floats
    """[3] length of a voxel along z, y, x in the metric's unit."""
    sampler: ProbabilitySampler
    """The probability anywhere in the volume."""
    voxels: NDArray[np.int32]
    """[N, 3] z y x."""
    probability: NDArray[np.float32]
    """[N] in (0, 1]."""
    distance: Floats
    """[N] to the nearest background voxel, in the metric's unit; what lies outside the volume is not background."""
    physical_distance: Floats
    """[N] the same in fine voxels."""
    pairs: Indices
    """[M, 2] neighbors, each pair once."""
    step: Floats
    """[M] distance between the two voxels of a pair."""
    component: Ints
    """[N] number of the component, from 0 in raster order of the first voxels."""
    components: int
    """C."""

    @functools.cached_property
    def points(self) -> Floats:
        """[N, 3] positions in the metric's unit."""
        return self.voxels * self.spacing

    @functools.cached_property
    def kdtree(self) -> cKDTree:
        """The search tree of `points`."""
        return cKDTree(self.points)

    @functools.cached_property
    def surfaces(self) -> SurfaceIndex:
        """All voxels, searchable by the distance to their surface."""
        return SurfaceIndex(self, np.arange(len(self.voxels)))

    @functools.cached_property
    def thickness(self) -> Floats:
        """[N] radius of the neurite, in the metric's unit, in which paths and gaps are measured."""
        return np.maximum(self.distance - _BORDER, _THINNEST)

    @functools.cached_property
    def radii(self) -> Floats:
        """[N] radius of the neurite in fine voxels, as trees carry it whatever the metric."""
        return np.maximum(self.physical_distance - _BORDER, _THINNEST)

    def select(self, keep: Bools) -> VoxelGraph:
        """The voxels to `keep` [N] with the pairs among them; components that fall apart are numbered anew."""
        index = np.cumsum(keep) - 1
        is_kept = keep[self.pairs].all(axis=1)
        pairs = index[self.pairs[is_kept]].astype(self.pairs.dtype)
        count = int(keep.sum())
        links = csr_array((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))

        # Scipy numbers components by their first node, which is the raster order.
        components, component = connected_components(links, directed=False)
        return VoxelGraph(
            self.shape,
            self.spacing,
            self.sampler,
            self.voxels[keep],
            self.probability[keep],
            self.distance[keep],
            self.physical_distance[keep],
            pairs,
            self.step[is_kept],
            component.astype(np.int64),
            int(components),
        )

    def voxels_of_component(self, component: int) -> Ints:
        """Indices of the voxels of one component, ascending."""
        order, starts = self._component_order
        return order[starts[component] : starts[component + 1]]

    def voxels_in_box(self, box: Box) -> Ints:
        """Indices of the voxels in a box of the volume."""
        order, keys, (_, rows, columns) = self._tile_order
        z, y, x = (
            range(start // _SEARCH_TILE, (stop - 1) // _SEARCH_TILE + 1)
            for start, stop in zip(box.start, box.stop, strict=True)
        )

        # The tiles of one row along x stand next to one another in the sorted keys.
        row = np.array([(i * rows + j) * columns for i, j in itertools.product(z, y)])
        begins, ends = np.searchsorted(keys, row + x.start), np.searchsorted(keys, row + x.stop)
        near = np.concatenate([order[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)])

        # Tiles reach beyond the box.
        voxels = self.voxels[near]
        is_inside = (voxels >= box.start) & (voxels < box.stop)
        # Quicker than numpy's `all` along so short an axis.
        inner: Ints = near[is_inside[:, 0] & is_inside[:, 1] & is_inside[:, 2]]
        return inner

    @functools.cached_property
    def _component_order(self) -> tuple[Ints, Ints]:
        """[N] voxels sorted by component, and [C + 1] where each component begins."""
        order = np.argsort(self.component, kind="stable")
        return order, np.searchsorted(self.component[order], np.arange(self.components + 1))

    @functools.cached_property
    def _tile_order(self) -> tuple[Ints, Ints, Shape]:
        """[N] voxels sorted by tile, [N] their sorted tile numbers, and the number of tiles along z, y, x."""
        z, y, x = (-(-n // _SEARCH_TILE) for n in self.shape)
        tiles = np.ravel_multi_index(tuple((self.voxels // _SEARCH_TILE).T.astype(np.int64)), (z, y, x))

        order = np.argsort(tiles, kind="stable")
        return order, tiles[order], (z, y, x)


class SurfaceIndex:
    """Some voxels of a graph, searchable by the distance to the surface of the neurite around them.

    One thick place must not widen the search among all the thin ones, so there is a search tree for each class of
    thickness.
    """

    def __init__(self, graph: VoxelGraph, voxels: Ints) -> None:
        thickness = graph.thickness[voxels]
        doublings = np.ceil(np.log2(np.maximum(thickness / _THIN, 1))).astype(np.int64)

        self._classes: list[tuple[cKDTree, Ints, float]] = []
        for number in np.unique(doublings).tolist():
            members = voxels[doublings == number]
            points = graph.points[members] if len(members) < len(graph.voxels) else None
            kdtree = graph.kdtree if points is None else cKDTree(points)
            self._classes.append((kdtree, members, float(thickness[doublings == number].max())))

    def mark_near(self, positions: Floats, reach: float) -> Bools:
        """[n] whether a surface may be within `reach` of each of `positions` [n, 3]: a look-up, no search."""
        edge = reach + max((thickest for _, _, thickest in self._classes), default=0.0)
        cells = [(kdtree.data // edge).astype(np.int64) for kdtree, _, _ in self._classes]
        own = (positions // edge).astype(np.int64)
        if not (len(cells) and len(own)):
            return np.zeros(len(own), dtype=bool)

        # Cells have a border, so that all their neighbors have numbers.
        shape = np.max([cell.max(axis=0) for cell in (own, *cells)], axis=0) + 3
        weights = np.array([shape[1] * shape[2], shape[2], 1])
        occupied = np.unique(np.concatenate([(cell + 1) @ weights for cell in cells]))

        # Within one edge of a position lie only its cell and the neighbors of that.
        steps = np.array(list(itertools.product((-1, 0, 1), repeat=3))) @ weights
        return np.isin((own + 1) @ weights, np.unique(occupied[:, None] + steps))

    def find_within(self, positions: Floats, reach: Floats) -> tuple[Ints, Ints]:
        """The pairs of a position and a voxel whose surface may be within the position's `reach` [n].

        [m] places in `positions` [n, 3], and [m] voxels; in no order. All pairs that are within reach are among them.
        """
        places, voxels, _ = self.find_in_balls(lambda thickest: (positions, reach + thickest))
        return places, voxels

    def find_in_balls(self, choose_balls: Callable[[float], tuple[Floats, Floats]]) -> tuple[Ints, Ints, Floats]:
        """The pairs of a ball and a voxel in it, in no order.

        `choose_balls` gives the centers [n, 3] and radii [n] in which voxels of a certain thickness, or less, are
        wanted. Returned are [m] balls, [m] voxels, and [m] the thickness for which each ball was chosen.
        """
        places, voxels = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        limits = [np.zeros(0)]
        for kdtree, members, thickest in self._classes:
            centers, radii = choose_balls(thickest)
            place, index = _find_in_balls(kdtree, centers, radii)
            places.append(place)
            voxels.append(members[index])
            limits.append(np.full(len(index), thickest))
        return np.concatenate(places), np.concatenate(voxels), np.concatenate(limits)


def _find_in_balls(kdtree: cKDTree, centers: Floats, radii: Floats) -> tuple[Ints, Ints]:
    """The pairs of a ball, of `centers` [n, 3] and `radii` [n], and a point of the tree in it."""
    places, points = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]

    # One search takes one radius, so balls of about the same size are searched together.
    sizes = np.ceil(np.log(np.maximum(radii, 1e-3)) / np.log(_BALL_RATIO)).astype(np.int64)
    for size in np.unique(sizes).tolist():
        own = np.flatnonzero(sizes == size)
        pairs = cKDTree(centers[own]).sparse_distance_matrix(kdtree, float(radii[own].max()), output_type="ndarray")
        place = own[pairs["i"]]
        is_inside = pairs["v"] <= radii[place] * (1 + _BALL_MARGIN)
        places.append(place[is_inside])
        points.append(pairs["j"][is_inside])
    return np.concatenate(places), np.concatenate(points)


def merge_block_skeletons(
    blocks: Sequence[BlockSkeleton], read: ReadBox, shape: Shape, spacing: Floats, floor: float, min_voxels: int
) -> VoxelGraph | None:
    """Join the skeletons of all blocks of a volume.

    Components that never reach the threshold, or hold fewer than `min_voxels` foreground voxels, are dropped. Returns
    None when none is left.
    """
    if not blocks:
        return None

    # Neighboring blocks share a plane of voxels, so a voxel may occur several times.
    all_voxels = np.concatenate([block.voxels for block in blocks])
    _, once, copy_of = np.unique(raster_keys(all_voxels, shape), return_index=True, return_inverse=True)
    voxels = all_voxels[once]

    # Blocks do not carry their pairs, and neighbors may lie in different blocks.
    pairs, step = find_neighbor_pairs(voxels, shape, spacing)

    firsts = np.cumsum([0, *(len(block.count) for block in blocks)])
    block_component = np.concatenate(
        [block.component + first for block, first in zip(blocks, firsts, strict=False)]
    ).astype(np.int64)
    label_of_block_component, labels = _merge_components(block_component, once, copy_of, pairs, int(firsts[-1]))

    label = label_of_block_component[block_component[once]]

    # Hysteresis and size are those of the whole component, over all blocks.
    counts = np.concatenate([block.count for block in blocks])
    count = np.bincount(label_of_block_component, weights=counts, minlength=labels)
    is_strong = np.concatenate([block.strong for block in blocks])
    has_strong = np.bincount(label_of_block_component[is_strong], minlength=labels) > 0
    keep_label = has_strong & (count >= min_voxels)
    keep = keep_label[label]
    if not keep.any():
        return None

    # What is dropped leaves holes in the numbers, and indices must have none.
    index = np.cumsum(keep) - 1
    # Both voxels of a pair are in one component, so testing one is enough.
    keep_pair = keep[pairs[:, 0]]

    return VoxelGraph(
        shape,
        spacing,
        ProbabilitySampler(read, shape, floor),
        voxels[keep],
        np.concatenate([block.probability for block in blocks])[once][keep],
        np.concatenate([block.distance for block in blocks])[once][keep].astype(np.float64),
        np.concatenate([block.physical_distance for block in blocks])[once][keep].astype(np.float64),
        index[pairs[keep_pair]].astype(pairs.dtype),
        step[keep_pair],
        (np.cumsum(keep_label) - 1)[label[keep]],
        int(keep_label.sum()),
    )


def _merge_components(block_component: Ints, once: Ints, copy_of: Ints, pairs: Indices, count: int) -> tuple[Ints, int]:
    """[count] component of the volume of each block's component, and the number of components.

    `once` are the first occurrences of the distinct voxels among all occurrences, `copy_of` the distinct voxel of each
    occurrence. The voxels of one block's component hang together, so a graph of the components is enough: it is small,
    and its indices do not follow the number of voxels. Components are numbered by their first voxel in raster order.
    """
    owner = block_component[once]

    # Copies of one voxel, and neighbors in different blocks, join components.
    links = np.concatenate([np.stack([block_component, owner[copy_of]], axis=1), owner[pairs]])
    links = links[links[:, 0] != links[:, 1]]
    graph = csr_array((np.ones(len(links), dtype=np.int8), (links[:, 0], links[:, 1])), shape=(count, count))

    labels, label = connected_components(graph, directed=False)

    _, first_voxel = np.unique(label[owner], return_index=True)

    # The numbers of scipy depend on the blocks. The raster order does not.
    rank = np.empty(labels, dtype=np.int64)
    rank[np.argsort(first_voxel)] = np.arange(labels)
    return rank[label], labels


def find_neighbor_pairs(voxels: NDArray[np.int32], shape: Shape, spacing: Floats) -> tuple[Indices, Floats]:
    """[M, 2] all pairs of 26-neighbors among [N, 3] voxels in raster order, each once, and [M] their distances."""
    keys = raster_keys(voxels, shape)
    dtype = np.int32 if len(keys) <= np.iinfo(np.int32).max else np.int64

    row, plane = shape[2] + 2, (shape[1] + 2) * (shape[2] + 2)
    # Searches may end behind the last key.
    padded = np.concatenate([keys, np.full(3, -1)])

    after = np.arange(len(keys)) + 1
    first = np.flatnonzero(padded[after] == keys + 1)
    firsts, seconds, steps = [first.astype(dtype)], [after[first].astype(dtype)], [np.full(len(first), spacing[2])]

    # Half of the 26 directions are enough, since each pair is wanted once.
    for dz, dy in ((0, 1), (1, -1), (1, 0), (1, 1)):
        # The three x neighbors of a line stand next to one another in the sorted keys, so one search finds all three.
        wanted = keys + dz * plane + dy * row
        candidate = np.searchsorted(keys, wanted - 1)
        for dx in (-1, 0, 1):
            is_match = padded[candidate] == wanted + dx
            first = np.flatnonzero(is_match)
            firsts.append(first.astype(dtype))
            seconds.append(candidate[first].astype(dtype))
            steps.append(np.full(len(first), np.linalg.norm(np.array([dz, dy, dx]) * spacing)))

            # A match moves the search on to the next key. Without one the same key may match the next neighbor.
            candidate = candidate + is_match
    return np.stack([np.concatenate(firsts), np.concatenate(seconds)], axis=1), np.concatenate(steps)


def raster_keys(voxels: NDArray[np.integer[Any]], shape: Shape) -> Ints:
    """[N] one integer per voxel, in raster order; a border of one voxel keeps the neighbors of a line's end apart."""
    z, y, x = voxels.astype(np.int64).T
    keys: Ints = ((z + 1) * (shape[1] + 2) + (y + 1)) * (shape[2] + 2) + (x + 1)
    return keys


def compute_cost(distance: NDArray[np.floating], probability: NDArray[np.floating]) -> Floats:
    """[N] cost of one unit of length at each voxel.

    The inverse square of the border distance keeps a path in the middle of thick and thin branches alike; a cost
    normalized by the thickest place, as in TEASAR, has no effect in thin ones. The probability acts where the border is
    blurred or two branches touch.
    """
    cost: Floats = 1.0 / (distance.astype(np.float64) * probability.astype(np.float64)) ** 2
    return cost


def find_minimum_cost_paths(component: Indices, pairs: Indices, step: Floats, cost: Floats, sources: Ints) -> Ints:
    """[N] next voxel on the minimum-cost path from each voxel to its component's source; a source leads to itself.

    `sources` [C] are one voxel of each component. A step costs its length times the mean `cost` [N] of its two voxels.
    """
    weight = step * (cost[pairs[:, 0]] + cost[pairs[:, 1]]) / 2
    if len(cost) <= _DIJKSTRA_VOXELS:
        return _run_dijkstra(pairs, weight, len(cost), sources)

    # Paths stay within a component, so groups of components can be searched one after the other.
    following = np.empty(len(cost), dtype=np.int64)
    index = np.empty(len(cost), dtype=np.int64)
    for voxels, pair_numbers, components in _split_components(component, pairs):
        index[voxels] = np.arange(len(voxels))

        local = _run_dijkstra(index[pairs[pair_numbers]], weight[pair_numbers], len(voxels), index[sources[components]])
        following[voxels] = voxels[local]
    return following


def find_cheapest_path(pairs: Indices, step: Floats, cost: Floats, starts: Ints, goals: Ints) -> Ints:
    """[k] the voxels of the path of least cost from one of `starts` to one of `goals`, of which it can reach one.

    Steps cost as in `find_minimum_cost_paths`.
    """
    weight = step * (cost[pairs[:, 0]] + cost[pairs[:, 1]]) / 2
    graph = csr_array((weight, (pairs[:, 0], pairs[:, 1])), shape=(len(cost), len(cost)))
    total, previous, _ = dijkstra(graph, directed=False, indices=starts, min_only=True, return_predecessors=True)

    path = [int(goals[total[goals].argmin()])]
    # Scipy marks a start by a negative number.
    while (before := int(previous[path[-1]])) >= 0:
        path.append(before)
    return np.array(path[::-1], dtype=np.int64)


def _run_dijkstra(pairs: Indices, weight: Floats, count: int, sources: Ints) -> Ints:
    graph = csr_array((weight, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, previous, _ = dijkstra(graph, directed=False, indices=sources, min_only=True, return_predecessors=True)

    # Scipy marks a source by a negative number, which would be taken for an index.
    following: Ints = np.asarray(previous, dtype=np.int64)
    following[sources] = sources
    return following


def _split_components(component: Indices, pairs: Indices) -> Iterator[tuple[Ints, Ints, slice]]:
    """Groups of whole components with about `_DIJKSTRA_VOXELS` voxels: their voxels, pairs and component numbers."""
    pair_component = component[pairs[:, 0]]
    voxel_order, pair_order = np.argsort(component, kind="stable"), np.argsort(pair_component, kind="stable")

    # A component is never split, as its paths may run anywhere in it.
    sizes = np.bincount(component)
    group = (np.cumsum(sizes) - 1) // _DIJKSTRA_VOXELS

    for number in np.unique(group).tolist():
        low, high = np.searchsorted(group, number), np.searchsorted(group, number, side="right")
        voxels = slice(*np.searchsorted(component[voxel_order], [low, high]))
        own_pairs = slice(*np.searchsorted(pair_component[pair_order], [low, high]))

        yield voxel_order[voxels], pair_order[own_pairs], slice(int(low), int(high))


def sum_to_root(step: Floats, parent: Ints) -> Floats:
    """[N] sum of `step` from each node up to its root (its own parent, with step 0), by pointer doubling."""
    total, above = step.copy(), parent

    # Each round doubles the way that is summed, so long chains take few rounds.
    while True:
        total += total[above]

        further = above[above]
        if np.array_equal(further, above):
            return total
        above = further


def follow_to_end(following: Ints) -> Ints:
    """[N] where the path that goes from each node to `following` [N] ends (at its own `following`)."""
    while not np.array_equal(further := following[following], following):
        following = further
    return following
