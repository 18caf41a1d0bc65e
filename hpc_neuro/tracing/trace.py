"""Tracing: a probability in, neurons as trees out.

foreground   voxels by hysteresis, as a sparse graph; distance to the border
paths        centred paths, longest first, each kept only if it is a branch of its own (evidence)
bridge       pieces joined over breaks
tree         rooted, pruned, smoothed, thinned
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.geometry import Shape, VoxelSize
from hpc_neuro.morphology import Tree, length
from hpc_neuro.schema import InputError
from hpc_neuro.tracing.bridge import bridges
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.foreground import Floats, Foreground, Read, foreground
from hpc_neuro.tracing.paths import far_ends, skeleton
from hpc_neuro.tracing.tree import main_side, pruned, rooted, smoothed, thinned
from hpc_neuro.tracing.wires import wires

Point = tuple[float, float, float]
_SPECK = 0.5  # of root_snap: how much farther away a piece without length counts when a root looks for its neurite


def trace(
    probability: NDArray[np.generic],
    voxel_size: VoxelSize,
    *,
    root: Point | None = None,
    cfg: TraceConfig | None = None,
    image: NDArray[np.generic] | None = None,
) -> list[Tree]:
    """Trees in voxels (z y x) from a probability [Z, Y, X]: float in [0, 1], uint8 (255 is 1), or a bool mask.

    With `root` (z y x voxels): exactly one tree; its first node is the root. The root may lie up to `cfg.root_snap` off
    the foreground. Without: a tree for each piece with at least `cfg.min_cable` of cable, longest first, rooted in its
    soma (where it is far thicker than elsewhere), else at its thickest end.
    With `image` [Z, Y, X] (any intensity scale), breaks are also bridged along signal that shows in it.
    Types are 0 (undefined), 1 at a root that is a soma; radii are distances to the border, in (finest) voxels.
    Raises InputError for values outside [0, 1], NaN, other dtypes or axes, a root outside the volume or too far from
    any foreground, and a root where there is no foreground at all.
    """
    if probability.ndim != 3:
        raise InputError(f"a probability has three axes z y x, found shape {probability.shape}; drop the others")
    if image is not None and image.shape != probability.shape:
        raise InputError(
            f"the image is {image.shape} and the probability {probability.shape} voxels, they must be equal"
        )
    z, y, x = probability.shape
    look = None if image is None else (lambda box: image[box.slices])
    return trace_read(lambda box: probability[box.slices], (z, y, x), voxel_size, root=root, cfg=cfg, image=look)


def trace_read(
    read: Read,
    shape: Shape,
    voxel_size: VoxelSize,
    *,
    root: Point | None = None,
    cfg: TraceConfig | None = None,
    image: Read | None = None,
) -> list[Tree]:
    """As `trace`, for a volume that is read box by box: memory follows the foreground, not the volume."""
    cfg = cfg or TraceConfig()
    if root is not None and not all(-0.5 <= r <= n - 0.5 for r, n in zip(root, shape, strict=True)):
        raise InputError(f"the root {_text(root)} (z y x voxels) lies outside the volume of {shape} voxels; move it")
    spacing = cfg.spacing(voxel_size)
    found = foreground(read, shape, cfg.floor, cfg.threshold, spacing, cfg.min_voxels)
    if found is None:
        if root is None:
            return []
        raise InputError(
            f"no piece of {cfg.min_voxels} connected voxels reaches the probability {cfg.threshold}, so nothing can be "
            "traced from the root; lower threshold (trace.threshold) or look at the probability"
        )
    sources, extent = far_ends(found)
    start = None if root is None else _snapped(found, extent, root, cfg)
    if start is not None:
        sources[found.component[start]] = start
    traced = skeleton(found, sources, cfg)
    net = wires(found, traced, bridges(found, traced, read, cfg, image))
    trees = []
    for raw in rooted(net, None if start is None else int(np.flatnonzero(net.voxels == start)[0])):
        tree = pruned(raw, cfg.min_branch)
        if root is None and length(tree) < cfg.min_cable:
            continue
        if root is not None and cfg.root_is_end:
            tree = main_side(tree)
        tree = thinned(smoothed(tree, cfg.smooth), cfg.step)
        points = tree.points / spacing
        if root is not None:
            points[0] = root
        trees.append(replace(tree, points=points))
    return sorted(trees, key=length, reverse=True)


def _snapped(found: Foreground, extent: Floats, root: Point, cfg: TraceConfig) -> int:
    """The foreground voxel from which a given root's tree grows.

    The nearest one, but a speck beside the root must not win over the neurite next to it: a piece shorter than
    `min_cable` counts as up to half of `root_snap` farther away.
    """
    place = np.asarray(root) * found.spacing
    reachable = np.array(found.near.query_ball_point(place, cfg.root_snap), dtype=np.int64)
    if not len(reachable):
        away, _ = found.near.query(place)
        raise InputError(
            f"the root {_text(root)} (z y x voxels) lies {away:.1f} voxels off the nearest foreground, wanted at most "
            f"root_snap = {cfg.root_snap:g}; move the root, lower the threshold, or raise trace.root_snap"
        )
    away = np.linalg.norm(found.points[reachable] - place, axis=1)
    short = 1 - np.minimum(extent[found.component[reachable]] / max(cfg.min_cable, 1e-6), 1)
    return int(reachable[(away + _SPECK * cfg.root_snap * short).argmin()])


def _text(point: Point) -> str:
    return " ".join(f"{v:g}" for v in point)
