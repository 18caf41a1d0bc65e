"""The skeleton of one block of a volume: the few voxels of its foreground that centerlines may run through.

Trees are made from the skeletons of all blocks, so memory is bounded by one block and the trees, and many processes can
skeletonize blocks. Blocks are read with a halo, so the probability and the border distance of a voxel do not depend on
the blocks. Neighboring blocks share a plane of voxels. Every patch of foreground on a shared plane has a portal, its
most central voxel (a long patch has several), and the skeletons of both blocks run through it. So what is connected in
the volume is connected in the skeletons.

    |<--- block --->|            the plane at the end of one block
                    |<--- block --->|     is the first of the next
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import edt
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label as label_patches
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.tracing.config import TraceConfig, measure_physical_spacing
from hpc_neuro.tracing.probability import Bools, Floats, Ints, ReadBox, as_probability
from hpc_neuro.tracing.voxel_graph import (
    BlockSkeleton,
    Indices,
    compute_cost,
    find_minimum_cost_paths,
    find_neighbor_pairs,
    sum_to_root,
)

REACH = 32.0
"""[voxel] Border distances are exact up to this, and a block is read with a halo of this width."""
_UPHILL_REACH = 8.0
"""[fine voxel] How far the physical middle of a neurite may lie beside a path."""
_UPHILL_SLACK = 1.0
"""[fine voxel] By how much the ball around a voxel may leave the ball around the middle, since voxels are coarse."""
_VOXELS_AT_ONCE = 16384
"""Voxels whose neighbors are held in memory together."""
_DENSE = 0.03
"""Share of foreground voxels above which a distance transform of the whole block is quicker than a search."""
_LEAST_DISTANCE = 0.5
"""[finest edge] Border distance of foreground below the threshold."""
_FIRST_REACH = 8.0
"""[voxel] Reach of the first search for the border, enough for all but thick places."""
_PORTAL_MARGIN = 2.0
"""[voxel] How far a patch may reach beyond the radius around its portal before it gets another portal."""
_BRANCH_RATIO = 1.0
"""Path length beyond a voxel, in border distances, from which a path may be a branch."""
_BRANCH_MARGIN = 0.5
"""[voxel] Added to that length. What is no branch is sorted out when all blocks are known (see branch_test)."""


def list_trace_blocks(shape: Shape, cfg: TraceConfig) -> list[Box]:
    """The blocks of a volume, to be skeletonized one by one."""
    spans = [
        [(start, min(start + edge, size)) for start in range(0, size, edge)]
        for size, edge in zip(shape, cfg.block, strict=True)
    ]
    # Built at once: a brain has millions of blocks.
    return [
        Box((z, y, x), (z_stop, y_stop, x_stop)) for (z, z_stop), (y, y_stop), (x, x_stop) in itertools.product(*spans)
    ]


def add_halo(box: Box, shape: Shape, voxel_size: VoxelSize, cfg: TraceConfig) -> Box:
    """The box that is read for a block."""
    # Wide enough for distances in the metric and for physical ones.
    finest = np.minimum(cfg.spacing(voxel_size), measure_physical_spacing(voxel_size))
    z, y, x = (int(np.ceil(REACH / s)) for s in finest)
    return _add_shared_planes(box, shape).grow((z, y, x)).clip(Box.whole(shape))


@dataclass(frozen=True)
class _Foreground:
    """N foreground voxels of a block in raster order, in C connected components."""

    voxels: NDArray[np.int32]
    """[N, 3] z y x in the block with its shared planes."""
    probability: NDArray[np.float32]
    """[N]"""
    distance: NDArray[np.float32]
    """[N] to the nearest voxel below the threshold; see BlockSkeleton."""
    width: NDArray[np.float32]
    """[N] distance to the nearest voxel that is not foreground."""
    pairs: Indices
    """[M, 2] pairs of 26-neighbors."""
    step: Floats
    """[M] their distances."""
    component: NDArray[np.int32]
    """[N] number of the component."""
    components: int
    """C."""

    def select_components(self, keep: Bools) -> _Foreground:
        """The foreground of the components to `keep` [C]."""
        keep_voxel = keep[self.component]
        # Both voxels of a pair are in one component, so testing one is enough.
        keep_pair = keep_voxel[self.pairs[:, 0]]

        # Voxels and components are renumbered, so that their numbers stay indices into the smaller arrays.
        return _Foreground(
            self.voxels[keep_voxel],
            self.probability[keep_voxel],
            self.distance[keep_voxel],
            self.width[keep_voxel],
            (np.cumsum(keep_voxel) - 1)[self.pairs[keep_pair]],
            self.step[keep_pair],
            (np.cumsum(keep) - 1)[self.component[keep_voxel]].astype(np.int32),
            int(keep.sum()),
        )


def skeletonize_block(
    read: ReadBox, shape: Shape, box: Box, voxel_size: VoxelSize, cfg: TraceConfig
) -> BlockSkeleton | None:
    """The skeleton of a block of a volume of `shape`; None when no voxel of it reaches the lower threshold.

    Raises InputError for values that are no probability.
    """
    spacing = cfg.spacing(voxel_size)

    # Distances near the border of the block depend on voxels beyond it, so more is read than is skeletonized.
    halo_box, closed_box = add_halo(box, shape, voxel_size, cfg), _add_shared_planes(box, shape)
    array = as_probability(read(halo_box), halo_box)
    inner_box = closed_box.relative_to(halo_box.start)
    foreground = _measure_foreground(array, inner_box, spacing, cfg)
    if foreground is None:
        return None

    # The shared planes belong to the next blocks, which count their voxels.
    is_own = np.all(foreground.voxels < np.array(box.shape), axis=1)
    count = np.bincount(foreground.component[is_own], minlength=foreground.components)

    # Hysteresis is decided for the whole component. This block can only tell whether its own part is strong.
    is_strong = is_own & (foreground.probability >= cfg.threshold)
    strong = np.bincount(foreground.component[is_strong], minlength=foreground.components) > 0

    is_portal = _find_portals(foreground, closed_box.shape, _list_shared_planes(box, closed_box))

    # A component that is too small is noise, unless it goes on in the next block.
    has_portal = np.bincount(foreground.component[is_portal], minlength=foreground.components) > 0
    keep = (strong & (count >= cfg.min_voxels)) | has_portal
    if not keep.any():
        return None

    is_portal = is_portal[keep[foreground.component]]
    foreground = foreground.select_components(keep)
    on = _select_centerlines(foreground, spacing, is_portal)

    # Radii are physical in every metric. A second measurement is spared where the two spacings are equal.
    physical_distance, physical_spacing = foreground.distance[on], measure_physical_spacing(voxel_size)
    if not np.array_equal(physical_spacing, spacing):
        halo_voxels = foreground.voxels[on].astype(np.int64) + inner_box.start
        physical_distance = _measure_physical_distance(array >= cfg.threshold, halo_voxels, physical_spacing)

    return BlockSkeleton(
        foreground.voxels[on] + np.array(closed_box.start, dtype=np.int32),
        foreground.probability[on],
        foreground.distance[on],
        physical_distance,
        foreground.component[on],
        count[keep],
        strong[keep],
    )


def _measure_foreground(array: NDArray[np.float32], box: Box, spacing: Floats, cfg: TraceConfig) -> _Foreground | None:
    """The foreground in a box of a probability that was read with a halo; None when there is none."""
    inner = array[box.slices]
    mask = inner >= cfg.floor
    if not mask.any():
        return None

    voxels = _find_true(mask).astype(np.int32)
    halo_voxels = voxels.astype(np.int64) + box.start

    # Distances stop at the upper threshold, not at the floor: the blurred rim of a neurite does not count as its
    # thickness.
    distance = _measure_border_distance(array >= cfg.threshold, halo_voxels, spacing)

    pairs, step = find_neighbor_pairs(voxels, box.shape, spacing)
    components, component = _label_components(len(voxels), pairs)

    # A voxel between the thresholds has distance 0, and a cost needs a positive one.
    return _Foreground(
        voxels,
        inner[mask],
        np.maximum(distance, np.float32(_LEAST_DISTANCE * spacing.min())),
        _measure_border_distance(array >= cfg.floor, halo_voxels, spacing),
        pairs,
        step,
        component,
        components,
    )


def _add_shared_planes(box: Box, shape: Shape) -> Box:
    """The block with the first plane of each next block."""
    z, y, x = (n + 1 for n in box.stop)
    return Box(box.start, (z, y, x)).clip(Box.whole(shape))


def _list_shared_planes(box: Box, closed_box: Box) -> Iterator[tuple[int, int]]:
    """(axis, index in the closed box) of each plane that the block shares with another one."""
    for axis in range(3):
        if box.start[axis] > 0:
            yield axis, 0
        if closed_box.stop[axis] > box.stop[axis]:
            yield axis, closed_box.shape[axis] - 1


def _label_components(count: int, pairs: Indices) -> tuple[int, NDArray[np.int32]]:
    """The number of connected components, and [count] the component of each voxel."""
    graph = csr_array((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    components, component = connected_components(graph, directed=False)
    return int(components), component


def _measure_border_distance(inside: Bools, voxels: Ints, spacing: Floats) -> NDArray[np.float32]:
    """[N] distance from each of `voxels` [N, 3] to the nearest voxel that is not `inside`, at most REACH.

    Where little is inside, a search among the voxels at the border is quicker than a transform of the whole array, and
    as exact. It searches near the voxels first, which is enough for all but thick places.
    """
    if np.count_nonzero(inside) > _DENSE * inside.size:
        transform = edt.edt(inside, anisotropy=tuple(spacing.tolist()), black_border=False, parallel=1)
        return np.asarray(np.minimum(transform[tuple(voxels.T)], REACH), dtype=np.float32)

    distance = np.zeros(len(voxels), dtype=np.float32)
    pending = np.flatnonzero(inside[tuple(voxels.T)])

    # A window around the pending voxels spares a look at the rest of the array.
    for reach in (_FIRST_REACH, REACH):
        if len(pending):
            margin = np.ceil(reach / spacing).astype(np.int64) + 1
            low = np.maximum(voxels[pending].min(axis=0) - margin, 0)
            high = voxels[pending].max(axis=0) + margin + 1
            part = inside[tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))]

            # What is farther than the margin of the window may have a nearer border outside it.
            measured = _search_border(part, voxels[pending] - low, spacing)
            distance[pending] = np.minimum(measured, REACH)
            pending = pending[measured > reach]
    return distance


def _measure_physical_distance(inside: Bools, voxels: Ints, spacing: Floats) -> NDArray[np.float32]:
    """[N] border distance at the physical middle of the neurite at each of `voxels` [N, 3], in fine voxels.

    Paths in the `voxel` metric run beside the physical middle where voxels are not cubes. So from each voxel the
    distance is followed uphill, as long as the ball around the voxel stays within the ball around the place reached:
    across the neurite to its middle, and not along it to a thicker place.
    """
    margin = np.ceil(_UPHILL_REACH / spacing).astype(np.int64)
    low, high = np.maximum(voxels.min(axis=0) - margin, 0), voxels.max(axis=0) + margin + 1
    window = inside[tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))]
    places = _find_true(window)

    # A border of one voxel spares the test whether a neighbor is in the window.
    field = np.zeros([n + 2 for n in window.shape], dtype=np.float32)
    field[tuple(places.T + 1)] = _measure_border_distance(inside, places + low, spacing)

    starts = voxels - low + 1

    # The neighbors of all voxels at once would take too much memory.
    parts = [
        _climb(field, starts[begin : begin + _VOXELS_AT_ONCE], spacing)
        for begin in range(0, len(starts), _VOXELS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _climb(field: NDArray[np.float32], starts: Ints, spacing: Floats) -> NDArray[np.float32]:
    """[n] the border distance that is reached uphill in a `field` of distances from each of `starts` [n, 3]."""
    here, least = starts.copy(), field[tuple(starts.T)]
    distance: NDArray[np.float32] = least.copy()
    climbing = np.flatnonzero(least > 0)
    steps = np.array([step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)])

    # The middle is expected within the reach, so the number of steps is bounded.
    for _ in range(int(2 * _UPHILL_REACH)):
        around = here[climbing, None] + steps  # [n, 26, 3]
        heights = field[tuple(np.moveaxis(around, 2, 0))]

        # A higher place whose ball does not hold the ball around the start is a thicker place along the neurite.
        away = np.linalg.norm((around - starts[climbing, None]) * spacing, axis=2)
        heights[away > heights - least[climbing, None] + _UPHILL_SLACK] = 0

        best = heights.argmax(axis=1)
        highest = heights[np.arange(len(best)), best]
        is_higher = highest > distance[climbing]
        climbing, best, highest = climbing[is_higher], best[is_higher], highest[is_higher]
        if not len(climbing):
            break

        here[climbing] += steps[best]
        distance[climbing] = highest
    return distance


def _search_border(inside: Bools, voxels: Ints, spacing: Floats) -> Floats:
    """[N] distance from each of `voxels`, all inside, to the nearest voxel of the array that is not; else infinite."""
    all_inside = _find_true(inside)

    # Only voxels beside the inside can be nearest, and they are few.
    border_indices = []
    for axis in range(3):
        for side in (-1, 1):
            beside = all_inside.copy()
            beside[:, axis] += side

            # What lies beyond the array is unknown, and no border.
            beside = beside[(beside[:, axis] >= 0) & (beside[:, axis] < inside.shape[axis])]
            outside = beside[~inside[tuple(beside.T)]]
            border_indices.append(np.ravel_multi_index(tuple(outside.T), inside.shape))

    # Sorting and comparing is many times quicker here than numpy's unique.
    indices = np.sort(np.concatenate(border_indices))
    border = np.unravel_index(indices[np.diff(indices, prepend=-1) > 0], inside.shape)
    if not len(border[0]):
        return np.full(len(voxels), np.inf)
    distance, _ = cKDTree(np.stack(border, axis=1) * spacing).query(voxels * spacing)
    return np.asarray(distance, dtype=np.float64)


def _find_true(array: Bools) -> Ints:
    """[N, 3] where an array is true, in raster order."""
    return np.stack(np.unravel_index(np.flatnonzero(array), array.shape), axis=1)


def _find_portals(foreground: _Foreground, shape: Shape, planes: Iterator[tuple[int, int]]) -> Bools:
    """[N] whether a foreground voxel of a block of `shape` is a portal.

    Of equally central voxels of a patch the first one in raster order is the portal. A long patch, where a tube runs
    along the plane, has more portals: every voxel is within about the radius of one.
    """
    index = tuple(foreground.voxels.T)
    mask, is_portal = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    mask[index] = True

    # Both blocks see the same values on the plane, so they choose the same portals without a message.
    centrality = np.zeros(shape, dtype=np.float32)
    centrality[index] = foreground.distance * foreground.probability

    for axis, position in planes:
        plane = np.take(mask, position, axis)
        labels, _ = label_patches(plane, np.ones((3, 3)))
        chosen = _choose_central(np.argwhere(plane), labels[plane], np.take(centrality, position, axis)[plane])
        is_portal[tuple(np.insert(chosen, axis, position, axis=1).T)] = True
    return np.asarray(is_portal[index])


def _choose_central(points: Ints, patch: Ints, centrality: NDArray[np.float32]) -> Ints:
    """[P, 2] the most central of the points [N, 2] of each patch, until each point is near a chosen one."""
    chosen = [np.zeros((0, 2), dtype=np.int64)]
    remaining = np.lexsort((-centrality, patch))

    # One portal a patch and round: patches are independent, so all are served together.
    while len(remaining):
        _, first = np.unique(patch[remaining], return_index=True)
        best = remaining[first]
        chosen.append(points[best])

        own_best = best[np.searchsorted(patch[best], patch[remaining])]
        away = np.linalg.norm(points[remaining] - points[own_best], axis=1)
        remaining = remaining[away > centrality[own_best] + _PORTAL_MARGIN]
    return np.concatenate(chosen)


def _select_centerlines(foreground: _Foreground, spacing: Floats, is_portal: Bools) -> Bools:
    """[N] whether a voxel is on the path of an end or a portal to the most central voxel of its component.

    An end is the farthest voxel beyond some voxel whose path goes on beyond it for longer than it takes to leave the
    tube there.
    """
    points, component = foreground.voxels * spacing, foreground.component
    sources = _find_most_central(foreground)

    # The paths should run like those of the trees, so the cost is the same.
    cost = compute_cost(foreground.distance, foreground.probability)
    following = find_minimum_cost_paths(component, foreground.pairs, foreground.step, cost, sources)
    length = sum_to_root(np.linalg.norm(points - points[following], axis=1), following)

    levels = _group_by_hops(following, sources, length)

    # A path that only leaves its tube is a ray to the surface. Every surface voxel has one.
    reach, end = _find_farthest_beyond(following, length, levels)
    goes_on = reach - length >= _BRANCH_RATIO * foreground.width + _BRANCH_MARGIN

    on = is_portal.copy()
    on[end[goes_on]] = on[end[sources]] = on[sources] = True

    # A bead is shorter than that, and yet has two ends: the second is the voxel farthest from the first.
    across = np.linalg.norm(points - points[end[sources]][component], axis=1)
    order = np.lexsort((across, component))
    last = np.searchsorted(component[order], np.arange(len(sources)), side="right") - 1
    on[order[last]] = True

    # Levels with most hops come first, so one pass carries a mark up to the source.
    for level in levels:
        on[following[level[on[level]]]] = True
    return on


def _find_most_central(foreground: _Foreground) -> Ints:
    """[C] the voxel of each component with the largest distance times probability; the first one of equals."""
    centrality = foreground.distance * foreground.probability

    # Ties are broken by the raster order, so that the result does not depend on the sort.
    order = np.lexsort((np.arange(len(centrality)), -centrality, foreground.component))
    _, first = np.unique(foreground.component[order], return_index=True)
    return order[first]


def _group_by_hops(following: Ints, sources: Ints, length: Floats) -> list[Ints]:
    """The voxels by the number of steps to their source, most steps first, without the sources; each by path length."""
    step: Floats = np.ones(len(following))
    step[sources] = 0
    hops = sum_to_root(step, following).astype(np.int64)

    order = np.lexsort((length, -hops))
    order = order[hops[order] > 0]
    return np.split(order, np.flatnonzero(np.diff(hops[order])) + 1)


def _find_farthest_beyond(following: Ints, length: Floats, levels: list[Ints]) -> tuple[Floats, Ints]:
    """[N] path length to the source of the farthest voxel whose path runs through each voxel, and [N] that voxel."""
    reach, end = length.copy(), np.arange(len(following))

    # All voxels beyond a level are final before it is reached.
    for level in levels:
        farther = level[reach[level] > reach[following[level]]]
        # Numpy keeps the last of several values for one place, here the largest.
        rising = farther[np.argsort(reach[farther], kind="stable")]
        reach[following[rising]], end[following[rising]] = reach[rising], end[rising]
    return reach, end
