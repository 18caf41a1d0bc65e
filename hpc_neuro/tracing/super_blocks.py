"""Trace a volume too large for one process in super-blocks, so that memory follows a super-block and not the volume.

A super-block is a box of whole trace blocks. It is traced with a margin of `MARGIN` voxels, side by side with the
others, by the same functions as a whole volume, and what is left of its skeleton is kept:

    lines   its centerlines and bridges
    seams   the whole skeleton within `_SEAM` voxels of a neighbor: both sides of a border keep the same voxels, so what
            is connected in the volume stays connected
    loops   where a ring is closed: each super-block would open the ring at another place

    |------ core ------|------ core ------|
              |~~ seam ~~|~~ seam ~~|
    |-------- core and margin ------|

Components of neighbors are joined by union-find over the voxels at the borders and over the bridges. Each group of
joined pieces is then traced once more, from the little that is left of it, and becomes trees. Groups share nothing, so
they can be finished side by side; memory follows the largest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize, tile_volume
from hpc_neuro.core.morphology import length
from hpc_neuro.core.schema import InputError
from hpc_neuro.tracing.block_skeleton import list_trace_blocks
from hpc_neuro.tracing.centerlines import Centerlines, find_far_ends
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.graph import Bridges, DisjointSets, build_centerline_graph
from hpc_neuro.tracing.probability import Bools, Floats, Ints, ReadBox
from hpc_neuro.tracing.trace import (
    TracedVolume,
    VolumeLines,
    check_inside,
    explain_shared_place,
    find_lines,
    find_lines_through,
    finish_lines,
    format_point,
)
from hpc_neuro.tracing.voxel_graph import (
    BlockSkeleton,
    VoxelGraph,
    find_neighbor_pairs,
    merge_block_skeletons,
    raster_keys,
    sum_to_root,
)

MARGIN = 96
"""[voxel] What is traced around a super-block: lines and bridges within `_SEAM` of it need their surroundings."""
_SEAM = 48
"""[voxel] Distance to a neighbor up to which the whole skeleton is kept; no bridge reaches farther."""
_RING = 32.0
"""[voxel] Two neighboring voxels whose paths meet farther back close a ring, beyond `_RING_RATIO` radii."""
_RING_RATIO = 4.0
"""[radius] See `_RING`."""


@dataclass(frozen=True)
class SuperBlockLines(BlockSkeleton):
    """What is left of the skeleton of a super-block: N voxels in raster order, in C pieces, and B bridges.

    A piece is a component of the voxels that hang together in the super-block and its margin. Its `count` is that of
    its foreground inside the super-block.
    """

    bridge_ends: NDArray[np.int32]
    """[B, 3] voxel at which each bridge begins; one end lies in this super-block."""
    bridge_targets: NDArray[np.int32]
    """[B, 3] voxel at which it arrives."""
    bridge_counts: Ints
    """[B] points between the two."""
    bridge_points: Floats
    """[V, 3] the points of all bridges, in the metric's unit."""
    root_numbers: Ints
    """[Q] the roots that lie in this super-block, by their place in the list of roots."""
    root_voxels: NDArray[np.int32]
    """[Q, 3] the voxel from which the tree of each grows."""


@dataclass(frozen=True)
class PieceGroups:
    """Which pieces are finished together. Pieces are numbered through all super-blocks with lines, in their order."""

    first: Ints
    """[S + 1] number of the first piece of each super-block."""
    batch: Ints
    """[P] batch of each piece; pieces that belong together are in one; -1: noise, or no root hangs on it."""
    root_batch: Ints
    """[R] batch of each root."""
    root_voxels: NDArray[np.int32]
    """[R, 3] the voxel from which the tree of each root grows."""

    @property
    def batches(self) -> int:
        """Number of batches."""
        return int(self.batch.max(initial=-1)) + 1


def list_super_blocks(shape: Shape, cfg: TraceConfig) -> list[Box]:
    """The super-blocks of a volume: boxes of whole trace blocks."""
    z, y, x = (edge * blocks for edge, blocks in zip(cfg.block, cfg.super_block, strict=True))
    return [block.write for block in tile_volume(shape, (z, y, x))]


def list_blocks_of(core: Box, shape: Shape, voxel_size: VoxelSize, cfg: TraceConfig) -> list[Box]:
    """The trace blocks whose skeletons a super-block is traced from."""
    box = _add_margin(core, shape, voxel_size, cfg)

    # Two boxes overlap where each starts before the other stops.
    return [
        block
        for block in list_trace_blocks(shape, cfg)
        if all(a < d and c < b for a, b, c, d in zip(block.start, block.stop, box.start, box.stop, strict=True))
    ]


def trace_super_block(
    skeletons: Mapping[Box, BlockSkeleton],
    read: ReadBox,
    shape: Shape,
    core: Box,
    voxel_size: VoxelSize,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
    image: ReadBox | None = None,
) -> SuperBlockLines | None:
    """Trace one super-block of a volume of `shape`; None where it has no foreground.

    `skeletons` are those of `list_blocks_of`, as far as these have one. `roots` are all roots of the volume. Raises
    InputError for a root that is too far from any foreground.
    """
    cfg = cfg or TraceConfig()
    check_inside(roots, shape)
    box = _add_margin(core, shape, voxel_size, cfg)
    numbers = _list_roots_inside(roots, core, shape)

    own = [skeleton for block, skeleton in skeletons.items() if core.contains(block)]
    # What lies in the margin alone is its neighbors'; a root looks for foreground across the border.
    if not own and not numbers:
        return None

    parts = [_crop_skeleton(skeleton, box, shape, cfg.min_voxels) for skeleton in skeletons.values()]
    parts = [part for part in parts if len(part.voxels)]
    spacing = cfg.spacing(voxel_size)
    graph = merge_block_skeletons(parts, read, shape, spacing, cfg.floor, cfg.min_voxels)
    if graph is None:
        if numbers:
            raise InputError(
                f"the root {format_point(roots[numbers[0]])} (z y x voxels) lies more than root_snap = "
                f"{cfg.root_snap:g} voxels off any foreground; move the root, or lower the threshold (trace.threshold)"
            )
        return None

    lines = find_lines(graph, [roots[number] for number in numbers], cfg, image)
    kept = _mark_kept(graph, lines, core, _measure_seam(voxel_size, cfg))
    if not kept.any():
        return None

    count, strong = _measure_pieces(graph, own)
    return _pack_lines(graph, lines, kept, core, count, strong, numbers)


def _pack_lines(
    graph: VoxelGraph, lines: VolumeLines, kept: Bools, core: Box, count: Ints, strong: Bools, numbers: Sequence[int]
) -> SuperBlockLines:
    """The kept voxels with their pieces renumbered, and the bridges with an end in the core."""
    present, piece = np.unique(graph.component[kept], return_inverse=True)

    ends, targets = graph.voxels[lines.bridges.ends], graph.voxels[lines.bridges.targets]
    # A bridge across a border may be kept on both sides: the second is dropped when pieces are joined.
    is_own = _is_inside(ends, core) | _is_inside(targets, core)
    is_own_point = np.repeat(is_own, lines.bridges.counts)

    return SuperBlockLines(
        graph.voxels[kept],
        graph.probability[kept],
        graph.distance[kept].astype(np.float32),
        graph.physical_distance[kept].astype(np.float32),
        piece.astype(np.int32),
        count[present],
        strong[present],
        ends[is_own],
        targets[is_own],
        lines.bridges.counts[is_own],
        lines.bridges.points[is_own_point],
        np.array(numbers, dtype=np.int64),
        graph.voxels[lines.root_voxels].reshape(-1, 3),
    )


def _add_margin(core: Box, shape: Shape, voxel_size: VoxelSize, cfg: TraceConfig) -> Box:
    z, y, x = (int(np.ceil(MARGIN / s)) for s in cfg.spacing(voxel_size))
    return core.grow((z, y, x)).clip(Box.whole(shape))


def _measure_seam(voxel_size: VoxelSize, cfg: TraceConfig) -> Shape:
    z, y, x = (int(np.ceil(_SEAM / s)) for s in cfg.spacing(voxel_size))
    return z, y, x


def _list_roots_inside(roots: Sequence[Point], core: Box, shape: Shape) -> list[int]:
    """The numbers of the roots whose voxel lies in a box."""
    if not roots:
        return []
    voxels = np.clip(np.rint(np.array(roots)).astype(np.int64), 0, np.array(shape) - 1)
    return [int(number) for number in np.flatnonzero(_is_inside(voxels, core))]


def _is_inside(voxels: NDArray[np.signedinteger], box: Box) -> Bools:
    """[N] whether voxels [N, 3] lie in a box."""
    return np.asarray(((voxels >= box.start) & (voxels < box.stop)).all(axis=1))


def _crop_skeleton(skeleton: BlockSkeleton, box: Box, shape: Shape, min_voxels: int) -> BlockSkeleton:
    """The part of a skeleton inside a box. A component that goes on beyond the box counts as large and strong."""
    part = _select_voxels(skeleton, _is_inside(skeleton.voxels, box), shape)

    goes_on = np.unique(part.component[_mark_border(part.voxels, box, shape)])
    part.strong[goes_on] = True
    part.count[goes_on] = np.maximum(part.count[goes_on], min_voxels)
    return part


def _select_voxels(skeleton: BlockSkeleton, keep: Bools, shape: Shape) -> BlockSkeleton:
    """The voxels to `keep` [N]. A component may fall apart, and what is one component must hang together."""
    voxels = skeleton.voxels[keep]
    component, whole = _relabel(voxels, skeleton.component[keep], shape)
    return BlockSkeleton(
        voxels,
        skeleton.probability[keep],
        skeleton.distance[keep],
        skeleton.physical_distance[keep],
        component,
        skeleton.count[whole],
        skeleton.strong[whole],
    )


def _mark_border(voxels: NDArray[np.int32], box: Box, shape: Shape, width: Shape = (1, 1, 1)) -> Bools:
    """[N] whether voxels of a box lie within `width` of a border of it that is none of the volume."""
    is_near = np.zeros(len(voxels), dtype=bool)
    for axis in range(3):
        place = voxels[:, axis]
        is_near |= (place < box.start[axis] + width[axis]) & (box.start[axis] > 0)
        is_near |= (place >= box.stop[axis] - width[axis]) & (box.stop[axis] < shape[axis])
    return is_near


def _relabel(voxels: NDArray[np.int32], label: NDArray[np.int32], shape: Shape) -> tuple[NDArray[np.int32], Ints]:
    """[N] component of each of [N, 3] voxels in raster order, by neighborhood, and [C] the `label` of each."""
    pairs, _ = find_neighbor_pairs(voxels, shape, np.ones(3))
    # Two components of a block never touch, but two parts of one may.
    pairs = pairs[label[pairs[:, 0]] == label[pairs[:, 1]]]
    graph = csr_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(voxels), len(voxels)))
    _, component = connected_components(graph, directed=False)

    _, first = np.unique(component, return_index=True)
    return component.astype(np.int32), label[first].astype(np.int64)


def _measure_pieces(graph: VoxelGraph, blocks: Iterable[BlockSkeleton]) -> tuple[Ints, Bools]:
    """[C] voxels of each component of the graph in some blocks, and [C] whether any reaches the threshold."""
    count, strong = np.zeros(graph.components, dtype=np.int64), np.zeros(graph.components, dtype=bool)
    keys = raster_keys(graph.voxels, graph.shape)

    for skeleton in blocks:
        _, first = np.unique(skeleton.component, return_index=True)
        voxel, is_present = _find_keys(keys, raster_keys(skeleton.voxels[first], graph.shape))

        # A component that is noise in the whole volume is not in the graph.
        component = graph.component[voxel[is_present]]
        np.add.at(count, component, skeleton.count[is_present])
        strong[component[skeleton.strong[is_present]]] = True
    return count, strong


def _find_keys(keys: Ints, wanted: Ints) -> tuple[Ints, Bools]:
    """[n] place of each `wanted` key among sorted `keys`, and [n] whether it is there; at least one key exists."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return place, keys[place] == wanted


def _mark_kept(graph: VoxelGraph, lines: VolumeLines, core: Box, seam: Shape) -> Bools:
    """[N] the voxels of the core that are kept: lines, seams, and what closes a ring, each with its path home."""
    following = lines.centerlines.following
    drawn = build_centerline_graph(graph, lines.centerlines, lines.bridges)
    kept = np.zeros(len(graph.voxels), dtype=bool)
    kept[drawn.voxels[drawn.voxels >= 0]] = True

    in_seam = _mark_border(graph.voxels, core, graph.shape, seam) & _is_inside(graph.voxels, core)
    # With the path home, what hangs together in the volume hangs together in what is kept.
    here = np.concatenate([np.flatnonzero(in_seam), _find_rings(graph, following)])
    while len(here := here[~kept[here]]):
        kept[here] = True
        here = following[here]
    return kept & _is_inside(graph.voxels, core)


def _find_rings(graph: VoxelGraph, following: Ints) -> Ints:
    """The voxels with a neighbor whose path home meets theirs only far back: there a ring is closed."""
    step = np.linalg.norm(graph.points - graph.points[following], axis=1)
    home = sum_to_root(step, following)
    a, b = graph.pairs[:, 0].astype(np.int64), graph.pairs[:, 1].astype(np.int64)

    is_step = (following[a] == b) | (following[b] == a)
    a, b = a[~is_step], b[~is_step]
    limit = _RING + _RING_RATIO * np.maximum(graph.thickness[a], graph.thickness[b])

    # The one that is farther from home takes a step, until both are at one voxel or one has gone too far.
    rings, at_a, at_b = [np.zeros(0, dtype=np.int64)], a, b
    while len(a):
        is_a = home[at_a] >= home[at_b]
        at_a, at_b = np.where(is_a, following[at_a], at_a), np.where(is_a, at_b, following[at_b])

        is_far = np.maximum(home[a] - home[at_a], home[b] - home[at_b]) > limit
        rings += [a[is_far], b[is_far]]
        going = (at_a != at_b) & ~is_far
        a, b, at_a, at_b, limit = a[going], b[going], at_a[going], at_b[going], limit[going]
    return np.unique(np.concatenate(rings))


def group_pieces(
    load: Callable[[int], SuperBlockLines | None],
    cores: Sequence[Box],
    shape: Shape,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
) -> PieceGroups:
    """Join the pieces of all super-blocks that hang together or are bridged, and put them into batches.

    `load` gives the lines of a super-block by its place in `cores`; one at a time is in memory, and of all of them only
    the voxels at the borders and the ends of bridges. With roots, only what hangs on a root is kept. Raises InputError
    for two roots at one place.
    """
    cfg = cfg or TraceConfig()
    overview = _Overview.read(load, cores, shape)
    pieces = int(overview.first[-1])

    # Voxels at both sides of a border that are neighbors join their pieces.
    order = np.argsort(overview.rim_keys, kind="stable")
    pairs, _ = find_neighbor_pairs(overview.rim_voxels[order], shape, np.ones(3))
    links = overview.rim_pieces[order][pairs]
    component = _label_pieces(pieces, links)

    # Hysteresis and size are those of the whole component, over all super-blocks.
    count = np.bincount(component, weights=overview.count, minlength=pieces)
    strong = np.bincount(component[overview.strong], minlength=pieces) > 0
    kept = (strong & (count >= cfg.min_voxels))[component]

    # The second pass: which piece is at each end of a bridge, and at each root.
    at_bridge, at_root = _look_up_pieces(load, overview, cores, shape)
    is_whole = (at_bridge >= 0).all(axis=1)
    is_whole &= kept[np.maximum(at_bridge, 0)].all(axis=1)
    group = _label_pieces(pieces, np.concatenate([links, at_bridge[is_whole]]))

    _check_roots(overview.root_voxels, at_root, roots, kept, cfg)
    if roots:
        has_root = np.zeros(pieces, dtype=bool)
        has_root[group[at_root]] = True
        kept &= has_root[group]

    batch = _pack_batches(group, kept, overview.size, int(np.diff(overview.extent).max(initial=1)))
    return PieceGroups(
        overview.first, batch, batch[at_root] if roots else np.zeros(0, dtype=np.int64), overview.root_voxels
    )


@dataclass(frozen=True)
class _Overview:
    """What of all super-blocks is in memory at once; P pieces in S super-blocks."""

    first: Ints
    """[S + 1] number of the first piece of each super-block."""
    extent: Ints
    """[S + 1] number of voxels of all super-blocks before each."""
    size: Ints
    """[P] voxels that are left of each piece."""
    count: Ints
    """[P] voxels of its foreground."""
    strong: Bools
    """[P]"""
    rim_voxels: NDArray[np.int32]
    """[M, 3] the voxels at borders between super-blocks."""
    rim_keys: Ints
    """[M] their raster keys."""
    rim_pieces: Ints
    """[M] their pieces."""
    bridge_keys: Ints
    """[B, 2] the raster keys of both ends of all bridges."""
    root_voxels: NDArray[np.int32]
    """[R, 3]"""

    @classmethod
    def read(cls, load: Callable[[int], SuperBlockLines | None], cores: Sequence[Box], shape: Shape) -> _Overview:
        """Read all super-blocks, one after the other."""
        first, extent = [0], [0]
        sizes, counts, strong = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, bool)]
        rims, rim_pieces = [np.zeros((0, 3), np.int32)], [np.zeros(0, np.int64)]
        bridges, roots = [np.zeros((0, 2), np.int64)], dict[int, NDArray[np.int32]]()

        for number, core in enumerate(cores):
            lines = load(number)
            if lines is not None:
                rim = _mark_border(lines.voxels, core, shape)
                rims.append(lines.voxels[rim])
                rim_pieces.append(lines.component[rim].astype(np.int64) + first[-1])

                sizes.append(np.bincount(lines.component, minlength=len(lines.count)))
                counts.append(lines.count)
                strong.append(lines.strong)
                ends = (raster_keys(lines.bridge_ends, shape), raster_keys(lines.bridge_targets, shape))
                bridges.append(np.stack(ends, axis=1))
                roots |= dict(zip(lines.root_numbers.tolist(), lines.root_voxels, strict=True))
            first.append(first[-1] + (0 if lines is None else len(lines.count)))
            extent.append(extent[-1] + (0 if lines is None else len(lines.voxels)))

        voxels = np.concatenate(rims)
        return cls(
            np.array(first),
            np.array(extent),
            np.concatenate(sizes),
            np.concatenate(counts),
            np.concatenate(strong),
            voxels,
            raster_keys(voxels, shape),
            np.concatenate(rim_pieces),
            np.concatenate(bridges),
            np.array([roots[number] for number in sorted(roots)], dtype=np.int32).reshape(-1, 3),
        )


def _label_pieces(count: int, links: Ints) -> Ints:
    """[count] number of the group of each piece; `links` [L, 2] join two pieces."""
    graph = csr_array((np.ones(len(links), dtype=np.int8), (links[:, 0], links[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _look_up_pieces(
    load: Callable[[int], SuperBlockLines | None], overview: _Overview, cores: Sequence[Box], shape: Shape
) -> tuple[Ints, Ints]:
    """[B, 2] the piece at each end of all bridges, and [R] at each root; -1 where the voxel is not kept."""
    wanted = np.concatenate([overview.bridge_keys.ravel(), raster_keys(overview.root_voxels, shape)])
    pieces = np.full(len(wanted), -1, dtype=np.int64)

    for number in range(len(cores) if len(wanted) else 0):
        lines = load(number)
        if lines is not None:
            place, is_present = _find_keys(raster_keys(lines.voxels, shape), wanted)
            pieces[is_present] = lines.component[place[is_present]] + overview.first[number]

    ends = overview.bridge_keys.size
    return pieces[:ends].reshape(-1, 2), pieces[ends:]


def _check_roots(
    voxels: NDArray[np.int32], pieces: Ints, roots: Sequence[Point], kept: Bools, cfg: TraceConfig
) -> None:
    """Raise InputError for two roots at one place, and for a root at what is noise in the whole volume."""
    first_at: dict[bytes, Point] = {}
    for root, voxel, piece in zip(roots, voxels, pieces.tolist(), strict=True):
        if not kept[piece]:
            raise InputError(
                f"what lies at the root {format_point(root)} (z y x voxels) has fewer than {cfg.min_voxels} "
                f"voxels or never reaches the probability {cfg.threshold}; move the root, or lower trace.threshold"
            )
        if voxel.tobytes() in first_at:
            raise InputError(explain_shared_place(first_at[voxel.tobytes()], root))
        first_at[voxel.tobytes()] = root


def _pack_batches(group: Ints, kept: Bools, size: Ints, most: int) -> Ints:
    """[P] batch of each piece, -1 for those not kept; a batch has about `most` voxels, or a single group."""
    batch = np.full(len(group), -1, dtype=np.int64)
    if not kept.any():
        return batch

    # In the order of their first pieces, so that what is read for a batch lies together.
    _, number = np.unique(group[kept], return_inverse=True)
    voxels = np.bincount(number, weights=size[kept]).astype(np.int64)
    of_group = (np.cumsum(voxels) - voxels) // most

    # A group that is larger than a batch leaves numbers out.
    _, of_group = np.unique(of_group, return_inverse=True)
    batch[kept] = of_group[number]
    return batch


def finish_batch(
    load: Callable[[int], SuperBlockLines | None],
    groups: PieceGroups,
    batch: int,
    read: ReadBox,
    shape: Shape,
    voxel_size: VoxelSize,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
    image: ReadBox | None = None,
) -> TracedVolume:
    """Make the trees of one batch of pieces, as `trace_volume` makes those of a volume."""
    cfg = cfg or TraceConfig()
    numbers = [int(number) for number in np.flatnonzero(groups.root_batch == batch)]

    parts, bridges = list[BlockSkeleton](), list[SuperBlockLines]()
    for place in np.flatnonzero(np.diff(groups.first)).tolist():
        is_own = groups.batch[groups.first[place] : groups.first[place + 1]] == batch
        if is_own.any() and (lines := load(place)) is not None:
            parts.append(_select_pieces(lines, is_own, shape, cfg.min_voxels))
            bridges.append(lines)

    graph = merge_block_skeletons(parts, read, shape, cfg.spacing(voxel_size), cfg.floor, cfg.min_voxels)
    assert graph is not None, f"batch {batch} has no voxels"

    keys = raster_keys(graph.voxels, shape)
    root_voxels = _find_keys(keys, raster_keys(groups.root_voxels[numbers], shape))[0].tolist()
    sources, _ = find_far_ends(graph)
    centerlines = find_lines_through(graph, sources, root_voxels, cfg)

    volume_lines = VolumeLines(centerlines, _join_bridges(graph, centerlines, keys, bridges), root_voxels)
    return finish_lines(graph, volume_lines, [roots[number] for number in numbers], voxel_size, cfg, image)


def _select_pieces(lines: SuperBlockLines, is_own: Bools, shape: Shape, min_voxels: int) -> BlockSkeleton:
    """The voxels of some pieces [C]; hysteresis and size are decided already."""
    part = _select_voxels(lines, is_own[lines.component], shape)
    return replace(part, count=np.full_like(part.count, min_voxels), strong=np.ones_like(part.strong))


def _join_bridges(graph: VoxelGraph, centerlines: Centerlines, keys: Ints, parts: Sequence[SuperBlockLines]) -> Bridges:
    """The bridges of several super-blocks, shortest first, without a cycle: both sides of a border may bridge a gap."""
    ends, is_end = _find_keys(keys, raster_keys(np.concatenate([part.bridge_ends for part in parts]), graph.shape))
    targets, is_target = _find_keys(
        keys, raster_keys(np.concatenate([part.bridge_targets for part in parts]), graph.shape)
    )
    counts = np.concatenate([part.bridge_counts for part in parts])
    points = np.concatenate([part.bridge_points for part in parts])

    # Equal lengths are ordered by voxels, so that the choice does not depend on the super-blocks.
    order = np.lexsort((targets, ends, counts))
    sets = DisjointSets(graph.components)
    chosen = np.zeros(len(counts), dtype=bool)
    for number in order[(is_end & is_target)[order]].tolist():
        chosen[number] = sets.merge(int(graph.component[ends[number]]), int(graph.component[targets[number]]))
    return Bridges(ends[chosen], targets[chosen], counts[chosen], points[np.repeat(chosen, counts)])


def collect_trees(batches: Sequence[TracedVolume], groups: PieceGroups) -> TracedVolume:
    """All trees: in the order of the roots, or without roots longest first."""
    trees = [tree for batch in batches for tree in batch.trees]
    if len(groups.root_batch):
        # Within a batch the trees are in the order of its roots.
        order = np.argsort(np.argsort(groups.root_batch, kind="stable"))
        trees = [trees[place] for place in order.tolist()]
    else:
        trees = sorted(trees, key=length, reverse=True)
    return TracedVolume(trees, [contact for batch in batches for contact in batch.contacts])
