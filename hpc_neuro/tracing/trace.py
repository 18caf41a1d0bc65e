"""Trace neurons: from a probability to trees.

block_skeleton   block by block: the few voxels that centerlines may run through, with their border distance
voxel_graph      the skeletons of all blocks as one sparse graph; hysteresis chooses its components
centerlines      centered paths, longest first; each is kept only if it is a branch of its own (branch_test)
gaps             pieces are joined along what the image shows (image_links), then by straight bridges
split_neurons    what holds several roots is cut between them
contact_evidence what speaks for one neuron on both sides of a branch point or crossing
contacts         what hangs on a root and is a neighbor's is cut off
finish_tree      trees are rooted, pruned and smoothed
super_blocks     a volume too large for one process is traced in parts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Point, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree, length, select_nodes
from hpc_neuro.core.schema import InputError
from hpc_neuro.tracing.block_skeleton import list_trace_blocks, skeletonize_block
from hpc_neuro.tracing.centerlines import Centerlines, find_centerlines, find_far_ends
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.contacts import Contact, find_neighbors
from hpc_neuro.tracing.crowd_labels import CrowdDecision
from hpc_neuro.tracing.finish_tree import (
    decimate_tree,
    find_main_side,
    is_cable_end,
    prune_tree,
    root_trees,
    smooth_tree,
)
from hpc_neuro.tracing.gaps import join_gaps
from hpc_neuro.tracing.graph import Bridges, CenterlineGraph, build_centerline_graph
from hpc_neuro.tracing.probability import Bools, Floats, Ints, ReadBox, measure_confidence, read_neighborhood_max
from hpc_neuro.tracing.split_neurons import split_neurons
from hpc_neuro.tracing.support import find_supported_nodes
from hpc_neuro.tracing.voxel_graph import BlockSkeleton, VoxelGraph, merge_block_skeletons

_SPECK_PENALTY = 5.0
"""[voxel] How much farther away a component without length counts when a root looks for its neurite."""


@dataclass(frozen=True)
class TracedVolume:
    """The trees of a volume, where neighbors were cut off them, and whether it was taken for a crowd."""

    trees: list[Tree]
    contacts: list[Contact]
    crowd: CrowdDecision | None = None


def trace(
    probability: NDArray[np.generic],
    voxel_size: VoxelSize,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
    image: NDArray[np.generic] | None = None,
) -> list[Tree]:
    """Trees in voxels (z y x) from a probability [Z, Y, X]: float in [0, 1], uint8 (255 is 1), or a bool mask.

    With `roots` (z y x voxels): one tree for each, in their order; its first node is the root. A root may lie up to
    `cfg.root_snap` off the foreground. What several roots are connected to is cut between them (see split_neurons), and
    with `cfg.contacts` what seems to be a neighbor's is cut off (see contacts).
    Without roots: a tree for each piece with at least `cfg.min_cable` of cable, longest first, rooted in its soma
    (where it is far thicker than elsewhere), else at its thickest end; dim ends count as thinner.

    With `image` [Z, Y, X] (any intensity scale, bright on dark), gaps are also bridged along neurites that it shows.
    Types are 0 (undefined), and 1 at a root that is a soma. Radii are physical distances to the
    border in fine voxels (the middle edge, see core.geometry.fine_voxel), whatever the metric.

    Raises InputError for values outside [0, 1], NaN, other dtypes or axes, a root outside the volume or too far from
    any foreground, two roots at one place, and a root where there is no foreground at all.
    """
    if probability.ndim != 3:
        raise InputError(f"a probability has three axes z y x, found shape {probability.shape}; drop the others")
    if image is not None and image.shape != probability.shape:
        raise InputError(
            f"the image is {image.shape} and the probability {probability.shape} voxels, they must be equal"
        )

    z, y, x = probability.shape
    return trace_reader(
        lambda box: probability[box.slices],
        (z, y, x),
        voxel_size,
        roots=roots,
        cfg=cfg,
        image=None if image is None else lambda box: image[box.slices],
    )


def trace_reader(
    read: ReadBox,
    shape: Shape,
    voxel_size: VoxelSize,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
    image: ReadBox | None = None,
) -> list[Tree]:
    """As `trace`, for a volume that is read box by box: memory is bounded by one block and the trees."""
    cfg = cfg or TraceConfig()

    # Most blocks of a sparse volume hold nothing, and are not kept.
    skeletons = []
    for box in list_trace_blocks(shape, cfg):
        skeleton = skeletonize_block(read, shape, box, voxel_size, cfg)
        if skeleton is not None:
            skeletons.append(skeleton)

    return trace_block_skeletons(skeletons, read, shape, voxel_size, roots=roots, cfg=cfg, image=image)


def trace_block_skeletons(
    skeletons: Sequence[BlockSkeleton],
    read: ReadBox,
    shape: Shape,
    voxel_size: VoxelSize,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
    image: ReadBox | None = None,
    shown: ReadBox | None = None,
    keep_rest: bool = False,
) -> list[Tree]:
    """As `trace_reader`, from the skeletons of all blocks (`list_trace_blocks`, `skeletonize_block`).

    keep_rest: with roots, the pieces that hang on none of them become trees as without roots, after the others.
    shown: what the image says by itself, a probability. Ends of trees that it does not show are dropped (see support).
    """
    return trace_volume(
        skeletons, read, shape, voxel_size, roots=roots, cfg=cfg, image=image, shown=shown, keep_rest=keep_rest
    ).trees


def trace_volume(
    skeletons: Sequence[BlockSkeleton],
    read: ReadBox,
    shape: Shape,
    voxel_size: VoxelSize,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
    image: ReadBox | None = None,
    shown: ReadBox | None = None,
    keep_rest: bool = False,
) -> TracedVolume:
    """As `trace_block_skeletons`, with the contacts at which neighbors were cut off the trees of given roots."""
    cfg = cfg or TraceConfig()
    check_inside(roots, shape)
    graph = merge_block_skeletons(skeletons, read, shape, cfg.spacing(voxel_size), cfg.floor, cfg.min_voxels)

    # Without roots no tree is a valid result. A root without any foreground is a mistake.
    if graph is None:
        if not roots:
            return TracedVolume([], [])
        raise InputError(
            f"no piece of {cfg.min_voxels} connected voxels reaches the probability {cfg.threshold}, so nothing can be "
            "traced from the root; lower threshold (trace.threshold) or look at the probability"
        )

    lines = find_lines(graph, roots, cfg, image)
    return finish_lines(graph, lines, roots, voxel_size, cfg, image, shown, keep_rest, is_only_root=len(roots) == 1)


@dataclass(frozen=True)
class VolumeLines:
    """The centerlines of a voxel graph, what bridges their gaps, and the voxel at which each root has its tree."""

    centerlines: Centerlines
    bridges: Bridges
    root_voxels: list[int]


def find_lines(graph: VoxelGraph, roots: Sequence[Point], cfg: TraceConfig, image: ReadBox | None) -> VolumeLines:
    """Find the centerlines and bridges of a graph. InputError for a root that is too far from any foreground."""
    sources, extent = find_far_ends(graph)
    root_voxels = _snap_roots(graph, extent, roots, cfg)

    centerlines = find_lines_through(graph, sources, root_voxels, cfg)
    return VolumeLines(centerlines, join_gaps(graph, centerlines, cfg, image, root_voxels), root_voxels)


def find_lines_through(graph: VoxelGraph, sources: Ints, root_voxels: Sequence[int], cfg: TraceConfig) -> Centerlines:
    """Find centerlines from `sources` [C], one voxel of each component; a component with roots begins at its first."""
    sources = sources.copy()
    # Of several roots in one component the first one is its source.
    for voxel in reversed(root_voxels):
        sources[graph.component[voxel]] = voxel

    # A tree must pass through its root, so paths to the roots are required.
    return find_centerlines(graph, sources, cfg, root_voxels)


def finish_lines(
    graph: VoxelGraph,
    volume_lines: VolumeLines,
    roots: Sequence[Point],
    voxel_size: VoxelSize,
    cfg: TraceConfig,
    image: ReadBox | None = None,
    shown: ReadBox | None = None,
    keep_rest: bool = False,
    is_only_root: bool = True,
) -> TracedVolume:
    """Make trees of centerlines and bridges: split between roots, cut at contacts, rooted, pruned and smoothed.

    is_only_root: whether the volume has no roots beside these.
    """
    lines = build_centerline_graph(graph, volume_lines.centerlines, volume_lines.bridges)
    rest = _select_rest(lines, _find_nodes(lines, volume_lines.root_voxels)) if roots and keep_rest else None
    lines = _split_roots(lines, graph, volume_lines.root_voxels, cfg)

    # Without a root nothing tells the neuron from its neighbors, and in a projection its own branches cross.
    neighbors = None
    if roots and cfg.contacts and min(graph.shape) > 1:
        nodes = _find_nodes(lines, volume_lines.root_voxels)
        # Of several neurons with roots of their own, what hangs together is cut between them already.
        crowd = False if cfg.crowd is None and not is_only_root else cfg.crowd
        neighbors = find_neighbors(lines, graph, nodes, voxel_size, image, crowd)
    if neighbors is not None and not neighbors.keep.all():
        graph, volume_lines = _trace_again(graph, neighbors.keep, volume_lines.root_voxels, cfg, image)
        lines = build_centerline_graph(graph, volume_lines.centerlines, volume_lines.bridges)
        lines = _split_roots(lines, graph, volume_lines.root_voxels, cfg)

    root_voxels = volume_lines.root_voxels
    trees = _finish_trees(lines, root_voxels, roots, graph, cfg, shown)
    if rest is not None:
        trees += _finish_trees(rest, [], (), graph, cfg, shown)
    if neighbors is None:
        return TracedVolume(trees, [])
    return TracedVolume(trees, neighbors.contacts, neighbors.crowd)


def _split_roots(
    lines: CenterlineGraph, graph: VoxelGraph, root_voxels: Sequence[int], cfg: TraceConfig
) -> CenterlineGraph:
    """The graph without what joins several roots."""
    if len(root_voxels) < 2:
        return lines
    return split_neurons(lines, graph, _find_nodes(lines, root_voxels), cfg.floor, cfg.threshold)


def _trace_again(
    graph: VoxelGraph, keep: Bools, root_voxels: Sequence[int], cfg: TraceConfig, image: ReadBox | None
) -> tuple[VoxelGraph, VolumeLines]:
    """The voxels to keep, and their centerlines: what was reached by way of a neighbor is joined over the gap."""
    index = np.cumsum(keep) - 1
    root_voxels = [int(index[voxel]) for voxel in root_voxels]
    graph = graph.select(keep)
    sources, _ = find_far_ends(graph)

    centerlines = find_lines_through(graph, sources, root_voxels, cfg)
    return graph, VolumeLines(centerlines, join_gaps(graph, centerlines, cfg, image, root_voxels), list(root_voxels))


def _select_rest(lines: CenterlineGraph, root_nodes: Sequence[int]) -> CenterlineGraph:
    """The pieces without a root."""
    count, label = lines.label_pieces()
    has_root = np.zeros(count, dtype=bool)
    has_root[label[list(root_nodes)]] = True
    return lines.select(~has_root[label])


def _finish_trees(
    lines: CenterlineGraph,
    root_voxels: Sequence[int],
    roots: Sequence[Point],
    graph: VoxelGraph,
    cfg: TraceConfig,
    shown: ReadBox | None,
) -> list[Tree]:
    """The trees of all roots in their order, or without roots the trees with enough cable, longest first."""
    trees: list[Tree] = []
    # Voxel centers lie at whole numbers, so the last one is at the far border.
    extent = (np.array(graph.shape) - 1) * graph.spacing

    certainty = None if roots else _measure_certainty(lines, graph, shown)
    for tree, nodes in root_trees(lines, _find_nodes(lines, root_voxels), cfg.min_branch, cfg.min_cable, certainty):
        # A side of the root that only the probability sees must not count as a branch of the neuron below.
        if shown is not None:
            in_voxels = replace(tree, points=tree.points / graph.spacing)
            keep = find_supported_nodes(in_voxels, measure_confidence(in_voxels, shown, graph.shape))
            tree, nodes = select_nodes(tree, keep), nodes[keep]

        # What is left of a branch may be a stub.
        keep = prune_tree(tree, cfg.min_branch)
        tree, nodes = select_nodes(tree, keep), nodes[keep]

        # Pruning may have made a tree too short, so its cable is measured again.
        if not roots and length(tree) < cfg.min_cable:
            continue

        is_end = cfg.root_is_end
        if roots and (is_cable_end(tree, extent) if is_end is None else is_end):
            keep = find_main_side(tree)
            tree, nodes = select_nodes(tree, keep), nodes[keep]

        # So far the radii were in the metric's unit, as lengths are.
        tree = replace(tree, radii=lines.radii[nodes])
        tree = decimate_tree(smooth_tree(tree, cfg.smooth))
        points = tree.points / graph.spacing
        # The root stays where it was given, which may be off the foreground.
        if roots:
            points[0] = roots[len(trees)]

        trees.append(replace(tree, points=points))
    return trees if roots else sorted(trees, key=length, reverse=True)


def _measure_certainty(lines: CenterlineGraph, graph: VoxelGraph, shown: ReadBox | None) -> Floats:
    """[K] the probability at each node, or what the image shows by itself there; 0 on bridges."""
    if shown is None or not len(lines):
        return np.where(lines.voxels >= 0, graph.probability[lines.voxels], np.float32(0)).astype(np.float64)
    voxels = np.clip(np.rint(lines.points / graph.spacing).astype(np.int64), 0, np.array(graph.shape) - 1)
    return read_neighborhood_max(voxels, shown, graph.shape)


def check_inside(roots: Sequence[Point], shape: Shape) -> None:
    """Raise InputError for a root outside the volume."""
    for root in roots:
        if not all(-0.5 <= r <= n - 0.5 for r, n in zip(root, shape, strict=True)):
            raise InputError(
                f"the root {format_point(root)} (z y x voxels) lies outside the volume of {shape} voxels; move it"
            )


def _snap_roots(graph: VoxelGraph, extent: Floats, roots: Sequence[Point], cfg: TraceConfig) -> list[int]:
    """The voxel from which the tree of each root grows."""
    voxels: list[int] = []
    for root in roots:
        voxel = _snap_root(graph, extent, root, cfg)
        if voxel in voxels:
            raise InputError(explain_shared_place(roots[voxels.index(voxel)], root))
        voxels.append(voxel)
    return voxels


def _snap_root(graph: VoxelGraph, extent: Floats, root: Point, cfg: TraceConfig) -> int:
    """The voxel with the nearest surface; of equals, the nearest voxel.

    A speck beside the root must not win over the neurite next to it: a component shorter than `min_cable` counts as up
    to five voxels farther away. `extent` [C] is the length of each component.
    """
    position = np.asarray(root) * graph.spacing

    # The limit holds for surfaces, but the search is between centers.
    near = graph.kdtree.query_ball_point(position, cfg.root_snap + graph.thickness.max())
    voxels = np.array(near, dtype=np.int64)

    to_middle = np.linalg.norm(graph.points[voxels] - position, axis=1)
    to_surface = np.maximum(to_middle - graph.thickness[voxels], 0)

    is_near = to_surface <= cfg.root_snap
    voxels, to_middle, to_surface = voxels[is_near], to_middle[is_near], to_surface[is_near]
    if not len(voxels):
        away, nearest = graph.kdtree.query(position)
        raise InputError(
            f"the root {format_point(root)} (z y x voxels) lies {away - graph.thickness[nearest]:.1f} voxels off the "
            f"nearest foreground, expected at most root_snap = {cfg.root_snap:g}; move the root, lower the threshold, "
            "or raise trace.root_snap"
        )

    shortness = 1 - np.minimum(extent[graph.component[voxels]] / max(cfg.min_cable, 1e-6), 1)
    return int(voxels[np.lexsort((to_middle, to_surface + _SPECK_PENALTY * shortness))[0]])


def explain_shared_place(root: Point, other: Point) -> str:
    """Why two roots cannot grow from one voxel, and what to do."""
    return (
        f"the roots {format_point(root)} and {format_point(other)} (z y x voxels) lie at one place of one neurite, "
        "and a neuron has one root; remove one, or lower trace.root_snap"
    )


def format_point(point: Point) -> str:
    """A point as messages write it: z y x."""
    return " ".join(f"{v:g}" for v in point)


def _find_nodes(lines: CenterlineGraph, voxels: Sequence[int]) -> list[int]:
    """The nodes at some voxels of the graph, each of which has one."""
    order: Ints = np.argsort(lines.voxels, kind="stable")
    places = np.searchsorted(lines.voxels[order], voxels)
    return [int(node) for node in order[places]]
