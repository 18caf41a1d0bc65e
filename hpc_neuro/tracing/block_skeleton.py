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

from collections.abc import Iterator

import edt
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label as label_patches
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume
from hpc_neuro.tracing.config import TraceConfig
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
_DENSE = 0.03
"""Share of foreground voxels above which a distance transform of the whole block is quicker than a search."""
_LEAST_DISTANCE = 0.5
"""[voxel] Border distance of foreground below the threshold."""
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
    return [block.write for block in tile_volume(shape, cfg.block)]


def add_halo(box: Box, shape: Shape, voxel_size: VoxelSize, cfg: TraceConfig) -> Box:
    """The box that is read for a block."""
    z, y, x = (int(np.ceil(REACH / s)) for s in cfg.spacing(voxel_size))
    return _add_shared_planes(box, shape).grow((z, y, x)).clip(Box.whole(shape))


def skeletonize_block(
    read: ReadBox, shape: Shape, box: Box, voxel_size: VoxelSize, cfg: TraceConfig
) -> BlockSkeleton | None:
    """The skeleton of a block of a volume of `shape`; None when no voxel of it reaches the lower threshold.

    Raises InputError for values that are no probability.
    """
    spacing = cfg.spacing(voxel_size)
    halo_box, closed_box = add_halo(box, shape, voxel_size, cfg), _add_shared_planes(box, shape)
    array = as_probability(read(halo_box), halo_box)
    inner = array[closed_box.relative_to(halo_box.start).slices]
    mask = inner >= cfg.floor
    if not mask.any():
        return None

    # Voxels are relative to the closed box, `halo_voxels` are the same relative to the box with its halo.
    voxels = _find_true(mask).astype(np.int32)
    halo_voxels = voxels.astype(np.int64) + np.array(closed_box.start) - np.array(halo_box.start)
    probability = inner[mask]
    distance = np.maximum(
        _measure_border_distance(array >= cfg.threshold, halo_voxels, spacing), np.float32(_LEAST_DISTANCE)
    )
    width = _measure_border_distance(array >= cfg.floor, halo_voxels, spacing)
    pairs, step = find_neighbor_pairs(voxels, closed_box.shape, spacing)
    components, component = _label_components(len(voxels), pairs)

    # The shared planes belong to the next blocks, which count their voxels.
    is_own = np.all(voxels < np.array(box.shape), axis=1)
    count = np.bincount(component[is_own], minlength=components)
    strong = np.bincount(component[is_own & (probability >= cfg.threshold)], minlength=components) > 0
    portals = _find_portals(mask, distance * probability, _list_shared_planes(box, closed_box))

    # A component that is too small is noise, unless it goes on in the next block.
    keep_component = (strong & (count >= cfg.min_voxels)) | (np.bincount(component[portals], minlength=components) > 0)
    keep = keep_component[component]
    if not keep.any():
        return None

    index = np.cumsum(keep) - 1
    foreground = BlockSkeleton(
        voxels[keep] + np.array(closed_box.start, dtype=np.int32),
        probability[keep],
        distance[keep],
        (np.cumsum(keep_component) - 1)[component[keep]].astype(np.int32),
        count[keep_component],
        strong[keep_component],
    )
    # Both voxels of a pair are in one component, so testing one is enough.
    keep_pair = keep[pairs[:, 0]]
    on = _select_centerlines(foreground, width[keep], spacing, index[pairs[keep_pair]], step[keep_pair], index[portals])
    return BlockSkeleton(
        foreground.voxels[on],
        foreground.probability[on],
        foreground.distance[on],
        foreground.component[on],
        foreground.count,
        foreground.strong,
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
    for reach in (_FIRST_REACH, REACH):
        if len(pending):
            margin = np.ceil(reach / spacing).astype(np.int64) + 1
            low = np.maximum(voxels[pending].min(axis=0) - margin, 0)
            high = voxels[pending].max(axis=0) + margin + 1
            part = inside[tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))]
            measured = _search_border(part, voxels[pending] - low, spacing)
            distance[pending] = np.minimum(measured, REACH)
            pending = pending[measured > reach]
    return distance


def _search_border(inside: Bools, voxels: Ints, spacing: Floats) -> Floats:
    """[N] distance from each of `voxels`, all inside, to the nearest voxel of the array that is not; else infinite."""
    all_inside = _find_true(inside)
    border_indices = []
    for axis in range(3):
        for side in (-1, 1):
            beside = all_inside.copy()
            beside[:, axis] += side
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


def _find_portals(mask: Bools, centrality: NDArray[np.float32], planes: Iterator[tuple[int, int]]) -> Ints:
    """Indices of the foreground voxels of `mask` that are portals, ascending; `centrality` [N] is of its N voxels.

    Of equally central voxels of a patch the first one in raster order is the portal. A long patch, where a tube runs
    along the plane, has more portals: every voxel is within about the radius of one.
    """
    volume = np.zeros(mask.shape, dtype=np.float32)
    volume[mask] = centrality
    is_portal = np.zeros(mask.shape, dtype=bool)
    for axis, position in planes:
        plane = np.take(mask, position, axis)
        labels, _ = label_patches(plane, np.ones((3, 3)))
        chosen = _choose_central(np.argwhere(plane), labels[plane], np.take(volume, position, axis)[plane])
        is_portal[tuple(np.insert(chosen, axis, position, axis=1).T)] = True
    return np.flatnonzero(is_portal[mask])


def _choose_central(points: Ints, patch: Ints, centrality: NDArray[np.float32]) -> Ints:
    """[P, 2] the most central of the points [N, 2] of each patch, until each point is near a chosen one."""
    chosen = [np.zeros((0, 2), dtype=np.int64)]
    remaining = np.lexsort((-centrality, patch))
    while len(remaining):
        _, first = np.unique(patch[remaining], return_index=True)
        best = remaining[first]
        chosen.append(points[best])

        own_best = best[np.searchsorted(patch[best], patch[remaining])]
        away = np.linalg.norm(points[remaining] - points[own_best], axis=1)
        remaining = remaining[away > centrality[own_best] + _PORTAL_MARGIN]
    return np.concatenate(chosen)


def _select_centerlines(
    foreground: BlockSkeleton,
    width: NDArray[np.float32],
    spacing: Floats,
    pairs: Indices,
    step: Floats,
    portals: Ints,
) -> Bools:
    """[N] whether a voxel is on the path of an end or a portal to the most central voxel of its component.

    An end is the farthest voxel beyond some voxel whose path goes on beyond it for longer than it takes to leave the
    tube there, whose border is `width` [N] away.
    """
    points = foreground.voxels * spacing
    sources = _find_most_central(foreground)
    cost = compute_cost(foreground.distance, foreground.probability)
    following = find_minimum_cost_paths(foreground.component, pairs, step, cost, sources)
    length = sum_to_root(np.linalg.norm(points - points[following], axis=1), following)
    levels = _group_by_hops(following, sources, length)

    reach, end = _find_farthest_beyond(following, length, levels)
    goes_on = reach - length >= _BRANCH_RATIO * width + _BRANCH_MARGIN
    on = np.zeros(len(following), dtype=bool)
    on[end[goes_on]] = on[end[sources]] = on[sources] = on[portals] = True

    # A bead is shorter than that, and yet has two ends: the second is the voxel farthest from the first.
    across = np.linalg.norm(points - points[end[sources]][foreground.component], axis=1)
    order = np.lexsort((across, foreground.component))
    last = np.searchsorted(foreground.component[order], np.arange(len(sources)), side="right") - 1
    on[order[last]] = True

    for level in levels:
        on[following[level[on[level]]]] = True
    return on


def _find_most_central(foreground: BlockSkeleton) -> Ints:
    """[C] the voxel of each component with the largest distance times probability; the first one of equals."""
    centrality = foreground.distance * foreground.probability
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
    for level in levels:
        farther = level[reach[level] > reach[following[level]]]
        # Numpy keeps the last of several values for one place, here the largest.
        rising = farther[np.argsort(reach[farther], kind="stable")]
        reach[following[rising]], end[following[rising]] = reach[rising], end[rising]
    return reach, end
