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

What hangs together over the borders is found super-block by super-block, each beside its neighbors. Union-find then
joins only the pieces that reach a border, or are bridged to one that does; what ends inside its super-block is known
there. Each group of joined pieces is then traced once more, from the little that is left of it, and becomes trees.
Groups share nothing, so they can be finished side by side; memory follows the largest one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize, tile_volume
from hpc_neuro.core.morphology import length
from hpc_neuro.core.schema import InputError
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
class SuperBlockLinks:
    """What joins the pieces of a super-block to those of its neighbors. T of its pieces may go on there.

    A piece of another super-block is given by the place of that one in the list of all, and its number in it.
    """

    voxels: Ints
    """[1] voxels that are left of the super-block."""
    pieces: Ints
    """[T] the pieces that touch a neighbor's, hold a root, or are bridged to such ones; ascending."""
    size: Ints
    """[T] voxels that are left of each."""
    count: Ints
    """[T] voxels of its foreground."""
    strong: Bools
    """[T]"""
    bridged: Ints
    """[B, 2] two of these pieces that are bridged."""
    touching: Ints
    """[L, 3] one of these pieces, and the super-block and number of a piece that touches it; each pair once."""
    crossing: Ints
    """[X, 3] the same for bridges."""
    roots: Ints
    """[Q, 3] number of a root in this super-block, and the super-block and number of the piece that it lies on."""
    root_voxels: NDArray[np.int32]
    """[Q, 3]"""
    inner: Ints
    """[I] the pieces that are kept and go on nowhere; they are finished by themselves."""


@dataclass(frozen=True)
class PieceGroups:
    """Which pieces are finished together: M pieces that go on beyond their super-block in batches, then the others."""

    starts: Ints
    """[J + 1] the pieces before each of the first J batches; pieces that belong together are in one."""
    owners: Ints
    """[M] super-block of each piece."""
    pieces: Ints
    """[M] its number there."""
    inner: Ints
    """[I] super-blocks whose inner pieces are one more batch each."""
    largest: Ints
    """[1] voxels that are left of the largest batch, which one process finishes in its memory."""
    root_batch: Ints
    """[R] batch of each root."""
    root_voxels: NDArray[np.int32]
    """[R, 3] the voxel from which the tree of each root grows."""

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self.starts) - 1 + len(self.inner)

    def list_members(self, batch: int, load: Callable[[int], SuperBlockLinks | None]) -> dict[int, Ints]:
        """The pieces of a batch by super-block; `load` gives the links of a super-block."""
        joined = len(self.starts) - 1
        if batch >= joined:
            owner = int(self.inner[batch - joined])
            links = load(owner)
            assert links is not None, f"super-block {owner} has no pieces"
            return {owner: links.inner}

        own = slice(*self.starts[batch : batch + 2].tolist())
        owners, pieces = self.owners[own], self.pieces[own]
        return {owner: pieces[owners == owner] for owner in np.unique(owners).tolist()}


def list_super_blocks(shape: Shape, cfg: TraceConfig) -> list[Box]:
    """The super-blocks of a volume: boxes of whole trace blocks."""
    return [block.write for block in tile_volume(shape, _measure_super_block(cfg))]


def has_super_blocks(shape: Shape, cfg: TraceConfig) -> bool:
    """Whether a volume has more than one super-block."""
    return any(n > edge for n, edge in zip(shape, _measure_super_block(cfg), strict=True))


def _measure_super_block(cfg: TraceConfig) -> Shape:
    z, y, x = (edge * blocks for edge, blocks in zip(cfg.block, cfg.super_block, strict=True))
    return z, y, x


def list_blocks_of(core: Box, shape: Shape, voxel_size: VoxelSize, cfg: TraceConfig) -> list[Box]:
    """The trace blocks whose skeletons a super-block is traced from."""
    box = _add_margin(core, shape, voxel_size, cfg)

    ranges = [range(a // edge, -(-b // edge)) for a, b, edge in zip(box.start, box.stop, cfg.block, strict=True)]
    starts = itertools.product(*ranges)
    z, y, x = cfg.block
    return [Box.at((i * z, j * y, k * x), cfg.block).clip(Box.whole(shape)) for i, j, k in starts]


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


def _overlap(one: Box, other: Box) -> bool:
    """Whether each of two boxes starts before the other stops."""
    return all(a < d and c < b for a, b, c, d in zip(one.start, one.stop, other.start, other.stop, strict=True))


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


def link_super_block(
    load: Callable[[int], SuperBlockLines | None],
    number: int,
    cores: Sequence[Box],
    shape: Shape,
    voxel_size: VoxelSize,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
) -> SuperBlockLinks | None:
    """Find what joins the pieces of one super-block to those of others; None where it has no lines.

    `load` gives the lines of a super-block by its place in `cores`; besides its own, those of one neighbor at a time
    are in memory. With roots, only what may hang on a root is kept.
    """
    cfg = cfg or TraceConfig()
    lines = load(number)
    if lines is None:
        return None

    finder = _LinkFinder(lines, number, cores[number], shape)
    reach = _add_margin(cores[number], shape, voxel_size, cfg)
    for other, core in enumerate(cores):
        if other != number and _overlap(core, reach) and (neighbor := load(other)) is not None:
            finder.add_neighbor(other, neighbor)
    return finder.finish(roots, cfg)


class _LinkFinder:
    """The links of one super-block, found neighbor by neighbor."""

    def __init__(self, lines: SuperBlockLines, number: int, core: Box, shape: Shape) -> None:
        self._lines, self._number, self._core, self._shape = lines, number, core, shape
        self._keys = raster_keys(lines.voxels, shape)
        self._goes_on = np.zeros(len(lines.count), dtype=bool)

        # The piece at each end of a bridge and at each root, as super-block and number; -1 where the voxel is not kept.
        wanted = (lines.bridge_ends, lines.bridge_targets, lines.root_voxels)
        self._wanted = raster_keys(np.concatenate(wanted).reshape(-1, 3), shape)
        self._at = np.full((len(self._wanted), 2), -1, dtype=np.int64)
        self._look_up(number, self._keys, lines.component)

        rim = _mark_border(lines.voxels, core, shape)
        self._rims = [(lines.voxels[rim], lines.component[rim], np.full(int(rim.sum()), number))]

    def add_neighbor(self, number: int, lines: SuperBlockLines) -> None:
        """Look at what a neighbor has in common with the super-block."""
        self._look_up(number, raster_keys(lines.voxels, self._shape), lines.component)

        # A bridge or root of the neighbor may lie on a piece of this one.
        ends = np.concatenate([lines.bridge_ends, lines.bridge_targets, lines.root_voxels]).reshape(-1, 3)
        place, is_present = _find_keys(self._keys, raster_keys(ends, self._shape))
        self._goes_on[self._lines.component[place[is_present]]] = True

        beside = _is_inside(lines.voxels, self._core.grow((1, 1, 1)))
        self._rims.append((lines.voxels[beside], lines.component[beside], np.full(int(beside.sum()), number)))

    def finish(self, roots: Sequence[Point], cfg: TraceConfig) -> SuperBlockLinks:
        """The links, once all neighbors are added."""
        lines, number = self._lines, self._number
        touching = self._find_touching()
        at_root = self._at[2 * len(lines.bridge_ends) :]
        at_bridge = self._at[: 2 * len(lines.bridge_ends)].reshape(2, -1, 2).swapaxes(0, 1)

        is_whole = (at_bridge[:, :, 0] >= 0).all(axis=1)
        is_inner = (at_bridge[:, :, 0] == number).all(axis=1)
        crossing = self._orient(at_bridge[is_whole & ~is_inner])
        self._goes_on[crossing[:, 0]] = self._goes_on[touching[:, 0]] = True
        self._goes_on[at_root[at_root[:, 0] == number, 1]] = True

        # What goes on nowhere is known whole: noise, or kept.
        is_kept = lines.strong & (lines.count >= cfg.min_voxels)
        bridged = at_bridge[is_inner][:, :, 1]
        bridged = bridged[(self._goes_on | is_kept)[bridged].all(axis=1)]

        # A group with one piece that goes on is decided with the neighbors.
        group = _label_pieces(len(lines.count), bridged)
        group_goes_on = np.zeros(len(lines.count), dtype=bool)
        group_goes_on[group[self._goes_on]] = True
        travels = group_goes_on[group]

        # With roots, what hangs on none is no neuron, and what hangs on one goes on to it.
        inner = np.flatnonzero(is_kept & ~travels) if not roots else np.zeros(0, dtype=np.int64)
        pieces = np.flatnonzero(travels)
        return SuperBlockLinks(
            np.array([len(lines.voxels)]),
            pieces,
            np.bincount(lines.component, minlength=len(lines.count))[pieces],
            lines.count[pieces],
            lines.strong[pieces],
            np.unique(bridged[travels[bridged[:, 0]]], axis=0),
            touching[touching[:, 1] > number],
            np.unique(crossing, axis=0),
            np.column_stack([lines.root_numbers, at_root]),
            lines.root_voxels,
            inner,
        )

    def _look_up(self, number: int, keys: Ints, pieces: NDArray[np.int32]) -> None:
        """Note which of the wanted voxels a super-block holds."""
        place, is_present = _find_keys(keys, self._wanted)
        self._at[is_present, 0] = number
        self._at[is_present, 1] = pieces[place[is_present]]

    def _find_touching(self) -> Ints:
        """[L, 3] the own piece, super-block and piece of all neighbors across a border."""
        voxels, pieces, owners = (np.concatenate(columns) for columns in zip(*self._rims, strict=True))
        order = np.argsort(raster_keys(voxels, self._shape), kind="stable")
        pairs, _ = find_neighbor_pairs(voxels[order], self._shape, np.ones(3))
        ends = np.stack([owners[order][pairs], pieces[order][pairs]], axis=2)
        return np.unique(self._orient(ends[(ends[:, :, 0] == self._number).sum(axis=1) == 1]), axis=0)

    def _orient(self, ends: Ints) -> Ints:
        """[n, 3] own piece, other super-block and its piece, of [n, 2, 2] pairs of super-block and piece."""
        is_own_first = ends[:, 0, 0] == self._number
        own = np.where(is_own_first, ends[:, 0, 1], ends[:, 1, 1])
        other = np.where(is_own_first[:, None], ends[:, 1], ends[:, 0])
        return np.column_stack([own, other])


def group_pieces(
    load: Callable[[int], SuperBlockLinks | None],
    count: int,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
) -> PieceGroups:
    """Join the pieces of `count` super-blocks that hang together or are bridged, and put them into batches.

    `load` gives the links of a super-block. With roots, only what hangs on a root is kept. Raises InputError for two
    roots at one place.
    """
    cfg = cfg or TraceConfig()
    overview = _Overview.read(load, count)
    pieces = len(overview.keys)
    component = _label_pieces(pieces, overview.touching)

    # Hysteresis and size are those of the whole component, over all super-blocks.
    voxels = np.bincount(component, weights=overview.count, minlength=pieces)
    strong = np.bincount(component[overview.strong], minlength=pieces) > 0
    kept = (strong & (voxels >= cfg.min_voxels))[component]

    bridged = overview.bridged[kept[overview.bridged].all(axis=1)]
    group = _label_pieces(pieces, np.concatenate([overview.touching, bridged]))

    _check_roots(overview.root_voxels, overview.at_root, roots, kept, cfg)
    if roots:
        has_root = np.zeros(pieces, dtype=bool)
        has_root[group[overview.at_root]] = True
        kept &= has_root[group]

    batch = _pack_batches(group, kept, overview.size, max(overview.most, 1))
    order = np.argsort(batch, kind="stable")
    order = order[batch[order] >= 0]
    starts = np.searchsorted(batch[order], np.arange(int(batch.max(initial=-1)) + 2))
    owners, numbers = np.divmod(overview.keys[order], _OWNER)
    # Inner pieces are a part of their super-block.
    sizes = np.bincount(batch[order], weights=overview.size[order])
    largest = np.array([max(int(sizes.max(initial=0)), overview.most if len(overview.inner) else 0)])
    root_batch = batch[overview.at_root]
    return PieceGroups(starts, owners, numbers, overview.inner, largest, root_batch, overview.root_voxels)


_OWNER = 1 << 32
"""Factor of the super-block in the key of a piece, to which its number there is added."""


@dataclass(frozen=True)
class _Overview:
    """The P pieces of all super-blocks that go on beyond them."""

    keys: Ints
    """[P] super-block and number of each, ascending."""
    size: Ints
    """[P] voxels that are left of each."""
    count: Ints
    """[P] voxels of its foreground."""
    strong: Bools
    """[P]"""
    touching: Ints
    """[L, 2]"""
    bridged: Ints
    """[B, 2]"""
    at_root: Ints
    """[R] the piece at each root."""
    root_voxels: NDArray[np.int32]
    """[R, 3]"""
    inner: Ints
    """[I] the super-blocks with inner pieces."""
    most: int
    """Most voxels of a super-block."""

    @classmethod
    def read(cls, load: Callable[[int], SuperBlockLinks | None], count: int) -> _Overview:
        """Read the links of all super-blocks."""
        parts = [(number, links) for number in range(count) if (links := load(number)) is not None]
        keys = _concatenate([number * _OWNER + links.pieces for number, links in parts])

        def find(owners: Ints | int, numbers: Ints) -> Ints:
            return np.searchsorted(keys, owners * _OWNER + numbers)

        touching, bridged = [np.zeros((0, 2), np.int64)], [np.zeros((0, 2), np.int64)]
        for number, links in parts:
            bridged.append(find(number, links.bridged))
            for pairs, rows in ((touching, links.touching), (bridged, links.crossing)):
                pairs.append(np.stack([find(number, rows[:, 0]), find(rows[:, 1], rows[:, 2])], axis=1))

        roots = np.concatenate([np.zeros((0, 3), np.int64), *(links.roots for _, links in parts)])
        root_voxels = np.concatenate([np.zeros((0, 3), np.int32), *(links.root_voxels for _, links in parts)])
        by_number = np.argsort(roots[:, 0])
        return cls(
            keys,
            _concatenate([links.size for _, links in parts]),
            _concatenate([links.count for _, links in parts]),
            np.concatenate([np.zeros(0, bool), *(links.strong for _, links in parts)]),
            np.concatenate(touching),
            np.concatenate(bridged),
            find(roots[by_number, 1], roots[by_number, 2]),
            root_voxels[by_number],
            np.array([number for number, links in parts if len(links.inner)], dtype=np.int64),
            max((int(links.voxels[0]) for _, links in parts), default=0),
        )


def _concatenate(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _label_pieces(count: int, links: Ints) -> Ints:
    """[count] number of the group of each piece; `links` [L, 2] join two pieces."""
    graph = csr_array((np.ones(len(links), dtype=np.int8), (links[:, 0], links[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


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
    members: Mapping[int, Ints],
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
    """Make the trees of one batch of pieces, as `trace_volume` makes those of a volume.

    `members`: its pieces by super-block (see PieceGroups).
    """
    cfg = cfg or TraceConfig()
    numbers = [int(number) for number in np.flatnonzero(groups.root_batch == batch)]

    parts, bridges = list[BlockSkeleton](), list[SuperBlockLines]()
    for owner, pieces in members.items():
        lines = load(owner)
        assert lines is not None, f"super-block {owner} has no lines"
        is_own = np.zeros(len(lines.count), dtype=bool)
        is_own[pieces] = True
        parts.append(_select_pieces(lines, is_own, shape, cfg.min_voxels))
        bridges.append(lines)

    graph = merge_block_skeletons(parts, read, shape, cfg.spacing(voxel_size), cfg.floor, cfg.min_voxels)
    assert graph is not None, f"batch {batch} has no voxels"

    keys = raster_keys(graph.voxels, shape)
    root_voxels = _find_keys(keys, raster_keys(groups.root_voxels[numbers], shape))[0].tolist()
    sources, _ = find_far_ends(graph)
    centerlines = find_lines_through(graph, sources, root_voxels, cfg)

    volume_lines = VolumeLines(centerlines, _join_bridges(graph, centerlines, keys, bridges), root_voxels)
    batch_roots = [roots[number] for number in numbers]
    return finish_lines(
        graph, volume_lines, batch_roots, voxel_size, cfg, image, is_only_root=len(groups.root_voxels) == 1
    )


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
    decisions = [batch.crowd for batch in batches if batch.crowd is not None]
    contacts = [contact for batch in batches for contact in batch.contacts]
    return TracedVolume(trees, contacts, decisions[0] if decisions else None)
