"""One block of a volume reduced to strands: the few voxels of its foreground through which centre lines may run.

The strands of all blocks are what the trees are made of, so memory is bounded by one block and the trees, and many
processes can reduce blocks. What a voxel carries (probability, distance to the border) is read with context, so it does
not depend on the blocks. Neighbouring blocks share a plane of voxels; every patch of foreground on it has a voxel,
the most central (a long patch: several), through which both blocks' strands run: what hangs together in the volume
does so in the strands.

    |<--- block --->|            the plane at the end of one block
                    |<--- block --->|     is the first of the next
"""

from __future__ import annotations

from collections.abc import Iterator

import edt
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label as labelled
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import cKDTree

from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.voxel_graph import (
    BlockSkeleton,
    Bools,
    Floats,
    Ints,
    Read,
    accumulated,
    as_probability,
    cost,
    find_neighbor_pairs,
)

REACH = 32.0
"""[voxel] Distances to the border are told up to this, and a block is read with so much context."""
_FULL = 0.03  # of the voxels, from which distances are computed for all of them
_NEAR = 8.0  # [voxel] a first look
_DOOR = 2.0  # [voxel] more than its radius a patch may reach from its most central voxel
_LONGER = 1.0  # a way that goes on for this many times the border distance
_MORE = 0.5  # [voxel] and this much may be a branch; what is none is found out when all blocks are seen


def list_trace_blocks(shape: Shape, cfg: TraceConfig) -> list[Box]:
    """The blocks of a volume, to be reduced one by one."""
    return [block.write for block in tile_volume(shape, cfg.block)]


def add_halo(box: Box, shape: Shape, voxel_size: VoxelSize, cfg: TraceConfig) -> Box:
    """What is read for a block."""
    z, y, x = (int(np.ceil(REACH / s)) for s in cfg.spacing(voxel_size))
    return _closed(box, shape).grow((z, y, x)).clip(Box.whole(shape))


def skeletonize_block(
    read: Read, shape: Shape, box: Box, voxel_size: VoxelSize, cfg: TraceConfig
) -> BlockSkeleton | None:
    """The strands of a block of a volume of `shape`; None when nothing in it reaches the lower threshold.

    Raises InputError for what is no probability.
    """
    spacing = cfg.spacing(voxel_size)
    around, closed = add_halo(box, shape, voxel_size, cfg), _closed(box, shape)
    inner = closed.relative_to(around.start).slices
    array = as_probability(read(around), around)
    mask = array[inner] >= cfg.floor
    if not mask.any():
        return None
    voxels = _places(mask).astype(np.int32)
    places = voxels.astype(np.int64) + np.array(closed.start) - np.array(around.start)
    distance = np.maximum(_to_border(array >= cfg.threshold, places, spacing), np.float32(0.5))
    width = _to_border(array >= cfg.floor, places, spacing)
    probability = array[inner][mask]
    pairs, step = find_neighbor_pairs(voxels, closed.shape, spacing)
    half = csr_array((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(len(voxels),) * 2)
    components, component = connected_components(half, directed=False)
    own = np.all(voxels < np.array(box.shape), axis=1)
    count = np.bincount(component[own], minlength=components)
    strong = np.bincount(component[own & (probability >= cfg.threshold)], minlength=components) > 0
    centrality = np.zeros(mask.shape, dtype=np.float32)
    centrality[mask] = distance * probability
    shared = _doors(mask, centrality, _shared_planes(box, closed))
    door = np.zeros(mask.shape, dtype=bool)
    door[tuple(shared.T)] = True
    must = np.flatnonzero(door[mask])
    # what is too small is noise, unless it goes on in the next block
    keep = (strong & (count >= cfg.min_voxels)) | (np.bincount(component[must], minlength=components) > 0)
    kept = keep[component]
    if not kept.any():
        return None
    place = np.cumsum(kept) - 1
    part = BlockSkeleton(
        voxels[kept] + np.array(closed.start, dtype=np.int32),
        probability[kept],
        distance[kept],
        (np.cumsum(keep) - 1)[component[kept]].astype(np.int32),
        count[keep],
        strong[keep],
    )
    inside = kept[pairs[:, 0]]  # both ends of a pair are in one component
    on = _centre_lines(part, width[kept], spacing, place[pairs[inside]], step[inside], place[must])
    return BlockSkeleton(
        part.voxels[on], part.probability[on], part.distance[on], part.component[on], count[keep], strong[keep]
    )


def _to_border(inside: Bools, places: Ints, spacing: Floats) -> NDArray[np.float32]:
    """[N] distance from each of `places` [N, 3] to the nearest voxel that is not `inside`, at most REACH.

    Where little is inside, a search among the voxels that face it is quicker than a transform of all, and as exact; it
    looks near first, which is enough for all but thick places.
    """
    if np.count_nonzero(inside) > _FULL * inside.size:
        far = edt.edt(inside, anisotropy=tuple(spacing.tolist()), black_border=False, parallel=1)[tuple(places.T)]
        return np.asarray(np.minimum(far, REACH), dtype=np.float32)
    found = np.zeros(len(places), dtype=np.float32)
    todo = np.flatnonzero(inside[tuple(places.T)])
    for reach in (_NEAR, REACH):
        if len(todo):
            margin = np.ceil(reach / spacing).astype(np.int64) + 1
            low = np.maximum(places[todo].min(axis=0) - margin, 0)
            high = places[todo].max(axis=0) + margin + 1
            part = inside[tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))]
            far = _searched(part, places[todo] - low, spacing)
            found[todo] = np.minimum(far, REACH)
            todo = todo[far > reach]
    return found


def _searched(inside: Bools, places: Ints, spacing: Floats) -> Floats:
    """[N] distance from each of `places`, all inside, to the nearest voxel of the array that is not; else infinite."""
    shell, voxels = [], _places(inside)
    for axis in range(3):
        for side in (-1, 1):
            beside = voxels.copy()
            beside[:, axis] += side
            beside = beside[(beside[:, axis] >= 0) & (beside[:, axis] < inside.shape[axis])]
            shell.append(np.ravel_multi_index(tuple(beside[~inside[tuple(beside.T)]].T), inside.shape))
    flat = np.sort(np.concatenate(shell))  # many times quicker here than numpy's unique
    border = np.unravel_index(flat[np.diff(flat, prepend=-1) > 0], inside.shape)
    if not len(border[0]):
        return np.full(len(places), np.inf)
    return np.asarray(cKDTree(np.stack(border, axis=1) * spacing).query(places * spacing)[0], dtype=np.float64)


def _places(inside: Bools) -> Ints:
    """[N, 3] where an array is true, in raster order."""
    return np.stack(np.unravel_index(np.flatnonzero(inside), inside.shape), axis=1)


def _closed(box: Box, shape: Shape) -> Box:
    """A block with the first plane of each next one."""
    z, y, x = (n + 1 for n in box.stop)
    return Box(box.start, (z, y, x)).clip(Box.whole(shape))


def _shared_planes(box: Box, closed: Box) -> Iterator[tuple[int, int]]:
    """(axis, index in the closed box) of the planes that a block shares with another."""
    for axis in range(3):
        if box.start[axis] > 0:
            yield axis, 0
        if closed.stop[axis] > box.stop[axis]:
            yield axis, closed.shape[axis] - 1


def _doors(mask: Bools, centrality: NDArray[np.float32], planes: Iterator[tuple[int, int]]) -> Ints:
    """[D, 3] the most central voxel of every patch on a shared plane, the first one in raster order of equals.

    A long patch, where a tube runs along the plane, has more of them: every voxel is within about the radius of one.
    """
    found = [np.zeros((0, 3), dtype=np.int64)]
    for axis, at in planes:
        plane = np.take(mask, at, axis)
        label = labelled(plane, np.ones((3, 3)))[0][plane]
        places, value = np.argwhere(plane), np.take(centrality, at, axis)[plane]
        chosen, left = [], np.lexsort((-value, label))
        while len(left):
            _, first = np.unique(label[left], return_index=True)
            best = left[first]  # one in each patch
            mine = best[np.searchsorted(label[best], label[left])]
            away = np.linalg.norm(places[left] - places[mine], axis=1)
            chosen.append(places[best])
            left = left[away > value[mine] + _DOOR]
        if chosen:
            found.append(np.insert(np.concatenate(chosen), axis, at, axis=1))
    return np.concatenate(found)


def _centre_lines(
    part: BlockSkeleton, width: NDArray[np.float32], spacing: Floats, pairs: Ints, step: Floats, must: Ints
) -> Bools:
    """[N] voxels on the cheapest ways from every end, and from `must`, to the most central voxel of their component.

    An end is the farthest voxel beyond some voxel whose way goes on beyond it for longer than out of the tube it is in,
    whose border is `width` [N] away.
    """
    order = np.lexsort((np.arange(len(part.voxels)), -part.distance * part.probability, part.component))
    _, first = np.unique(part.component[order], return_index=True)
    sources = order[first]
    way, hops = _ways_home(part, pairs, step, sources)
    points = part.voxels * spacing
    length = accumulated(np.linalg.norm(points - points[way], axis=1), way)
    levels = np.lexsort((length, -hops))
    levels = levels[hops[levels] > 0]
    groups = np.split(levels, np.flatnonzero(np.diff(hops[levels])) + 1)
    reach, end = length.copy(), np.arange(len(way))  # the farthest voxel beyond each one
    for group in groups:  # from the ends home; in a group by length
        above = way[group]
        farther = reach[group] > reach[above]
        rising = group[farther][np.argsort(reach[group[farther]], kind="stable")]
        reach[way[rising]], end[way[rising]] = reach[rising], end[rising]  # the last one of equal places stays
    goes_on = reach - length >= _LONGER * width + _MORE
    on = np.zeros(len(way), dtype=bool)
    on[end[goes_on]] = on[end[sources]] = on[sources] = on[must] = True
    # a bead is shorter than that, and yet has two ends
    across = np.linalg.norm(points - points[end[sources]][part.component], axis=1)
    order = np.lexsort((across, part.component))
    on[order[np.searchsorted(part.component[order], np.arange(len(sources)), side="right") - 1]] = True
    for group in groups:
        on[way[group[on[group]]]] = True
    return on


def _ways_home(part: BlockSkeleton, pairs: Ints, step: Floats, sources: Ints) -> tuple[Ints, Ints]:
    """[N] next voxel on the cheapest way to the component's source, and [N] the number of steps to it."""
    price = cost(part.distance, part.probability)
    n = len(part.voxels)
    weight = step * (price[pairs[:, 0]] + price[pairs[:, 1]]) / 2
    graph = csr_array((weight, (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, before, _ = dijkstra(graph, directed=False, indices=sources, min_only=True, return_predecessors=True)
    way: Ints = np.asarray(before, dtype=np.int64)
    way[sources] = sources
    steps: Floats = np.ones(n)
    steps[sources] = 0
    return way, accumulated(steps, way).astype(np.int64)
