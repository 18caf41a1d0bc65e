"""Tracing: a probability in, neurons as trees out.

strands      block by block: the few voxels through which centre lines may run, with their distance to the border
foreground   the strands of all blocks, in pieces chosen by hysteresis, as one sparse graph
paths        centred paths, longest first, each kept only if it is a branch of its own (evidence)
bridge       pieces joined over breaks
split        what holds several roots is cut between them
tree         rooted, pruned, smoothed, thinned
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree, length
from hpc_neuro.core.schema import InputError
from hpc_neuro.tracing.block_skeleton import list_trace_blocks, skeletonize_block
from hpc_neuro.tracing.centerlines import far_ends, skeleton
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.finish_tree import main_side, pruned, rooted, smoothed, thinned
from hpc_neuro.tracing.gaps import bridges
from hpc_neuro.tracing.graph import Wires, wires
from hpc_neuro.tracing.split_neurons import split
from hpc_neuro.tracing.voxel_graph import BlockSkeleton, Floats, Foreground, Read, foreground

Point = tuple[float, float, float]
_SPECK = 5.0  # [voxel] how much farther away a piece without length counts when a root looks for its neurite


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
    `cfg.root_snap` off the foreground. What several roots hang together in is cut between them (see split). Without: a
    tree for each piece with at least `cfg.min_cable` of cable, longest first, rooted in its soma (where it is far
    thicker than elsewhere), else at its thickest end.
    With `image` [Z, Y, X] (any intensity scale, bright on dark) breaks are also bridged along neurites that it
    shows.
    Types are 0 (undefined), 1 at a root that is a soma; radii are distances to the border, in (finest) voxels.
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
    look = None if image is None else (lambda box: image[box.slices])
    return trace_reader(lambda box: probability[box.slices], (z, y, x), voxel_size, roots=roots, cfg=cfg, image=look)


def trace_reader(
    read: Read,
    shape: Shape,
    voxel_size: VoxelSize,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
    image: Read | None = None,
) -> list[Tree]:
    """As `trace`, for a volume that is read box by box: memory is bounded by one block and the trees."""
    cfg = cfg or TraceConfig()
    found = (skeletonize_block(read, shape, box, voxel_size, cfg) for box in list_trace_blocks(shape, cfg))
    parts = [part for part in found if part is not None]
    return trace_block_skeletons(parts, read, shape, voxel_size, roots=roots, cfg=cfg, image=image)


def trace_block_skeletons(
    parts: Sequence[BlockSkeleton],
    read: Read,
    shape: Shape,
    voxel_size: VoxelSize,
    *,
    roots: Sequence[Point] = (),
    cfg: TraceConfig | None = None,
    image: Read | None = None,
) -> list[Tree]:
    """As `trace_reader`, where the blocks (`list_trace_blocks`) have been reduced to strands already."""
    cfg = cfg or TraceConfig()
    for root in roots:
        if not all(-0.5 <= r <= n - 0.5 for r, n in zip(root, shape, strict=True)):
            raise InputError(
                f"the root {_text(root)} (z y x voxels) lies outside the volume of {shape} voxels; move it"
            )
    spacing = cfg.spacing(voxel_size)
    found = foreground(parts, read, shape, spacing, cfg.floor, cfg.min_voxels)
    if found is None:
        if not roots:
            return []
        raise InputError(
            f"no piece of {cfg.min_voxels} connected voxels reaches the probability {cfg.threshold}, so nothing can be "
            "traced from the root; lower threshold (trace.threshold) or look at the probability"
        )
    sources, extent = far_ends(found)
    starts = _snapped_all(found, extent, roots, cfg)
    for start in reversed(starts):  # of several in one piece the first one
        sources[found.component[start]] = start
    traced = skeleton(found, sources, cfg, starts)
    net = wires(found, traced, bridges(found, traced, cfg, image, starts))
    if len(roots) > 1:
        net = split(net, found, [_node(net, start) for start in starts], cfg.floor, cfg.threshold)
    trees: list[Tree] = []
    for raw in rooted(net, [_node(net, start) for start in starts], cfg.min_branch):
        tree = pruned(raw, cfg.min_branch)
        if not roots and length(tree) < cfg.min_cable:
            continue
        if roots and cfg.root_is_end:
            tree = main_side(tree)
        tree = thinned(smoothed(tree, cfg.smooth), cfg.step)
        points = tree.points / spacing
        if roots:
            points[0] = roots[len(trees)]
        trees.append(replace(tree, points=points))
    return trees if roots else sorted(trees, key=length, reverse=True)


def _snapped_all(found: Foreground, extent: Floats, roots: Sequence[Point], cfg: TraceConfig) -> list[int]:
    starts: list[int] = []
    for root in roots:
        start = _snapped(found, extent, root, cfg)
        if start in starts:
            other = _text(roots[starts.index(start)])
            raise InputError(
                f"the roots {other} and {_text(root)} (z y x voxels) lie at one place of one neurite, and a neuron has "
                "one root; remove one, or lower trace.root_snap"
            )
        starts.append(start)
    return starts


def _snapped(found: Foreground, extent: Floats, root: Point, cfg: TraceConfig) -> int:
    """The strand voxel from which a given root's tree grows.

    The one with the nearest surface, but a speck beside the root must not win over the neurite next to it: a piece
    shorter than `min_cable` counts as up to five voxels farther away.
    """
    place = np.asarray(root) * found.spacing
    near = found.near.query_ball_point(place, cfg.root_snap + found.thickness.max())
    reachable = np.array(near, dtype=np.int64)
    middle = np.linalg.norm(found.points[reachable] - place, axis=1)
    away = np.maximum(middle - found.thickness[reachable], 0)
    inside = away <= cfg.root_snap
    reachable, middle, away = reachable[inside], middle[inside], away[inside]
    if not len(reachable):
        away, nearest = found.near.query(place)
        away -= found.thickness[nearest]
        raise InputError(
            f"the root {_text(root)} (z y x voxels) lies {away:.1f} voxels off the nearest foreground, wanted at most "
            f"root_snap = {cfg.root_snap:g}; move the root, lower the threshold, or raise trace.root_snap"
        )
    short = 1 - np.minimum(extent[found.component[reachable]] / max(cfg.min_cable, 1e-6), 1)
    return int(reachable[np.lexsort((middle, away + _SPECK * short))[0]])


def _text(point: Point) -> str:
    return " ".join(f"{v:g}" for v in point)


def _node(net: Wires, voxel: int) -> int:
    """The node at a strand voxel."""
    return int(np.flatnonzero(net.voxels == voxel)[0])
