"""A tree drawn into voxels: mask, tubed centreline, distance and direction, box by box.

Every edge is a tapered cylinder with a sphere at each end, drawn in micrometres, so that a neurite is round in space
and flat in a stack with coarse z. A box is drawn without the rest of the volume, and is equal, voxel for voxel, to the
same part of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, VoxelSize, fine_voxel, to_um
from hpc_neuro.core.morphology import Tree


class Targets(NamedTuple):
    """What a box holds of a tree; Z, Y, X are the box's."""

    mask: NDArray[np.uint8]  # [Z, Y, X] 1 on neurite, 255 within the ignored margin, 0 elsewhere
    skeleton: NDArray[np.uint8]  # [Z, Y, X] 1 in the tube around the centreline
    distance: NDArray[np.float32]  # [Z, Y, X] distance to the centreline in fine voxels, at most the cap
    tangent: NDArray[np.int8]  # [3, Z, Y, X] 127 times the direction (z y x, in space) of the nearest edge, 0 beyond


@dataclass(frozen=True)
class Drawing:
    """How a tree is drawn. Lengths in fine voxels (`fine_voxel`)."""

    tube: float = 1.5
    """Radius of the tube around the centreline."""
    cap: float = 8.0
    """Distances end here, and so does the tangent."""
    ignore_margin: float = 0.0
    """Shell around the mask that is marked 255."""
    stretch: float = 1.0
    """Length of the mask along the coarsest axis over its width across: above 1 where the microscope blurs along z."""


@dataclass(frozen=True)
class Edges:
    """Edges in micrometres, cut short enough that their bounding boxes are tight."""

    start: NDArray[np.float64]  # [E, 3] parent end
    step: NDArray[np.float64]  # [E, 3] from parent end to child end
    radii: NDArray[np.float64]  # [E, 2] at the parent end and the child end
    child: NDArray[np.int64]  # [E] node of the (resampled) tree at the child end
    size: VoxelSize  # the voxel they are drawn in: as if compressed along z when the mask is stretched
    low: NDArray[np.int64]  # [E, 3] first voxel within reach of the edge
    high: NDArray[np.int64]  # [E, 3] one past the last

    def meeting(self, box: Box) -> NDArray[np.int64]:
        """Indices of the edges that reach into a box."""
        return np.flatnonzero(np.all((self.low < box.stop) & (self.high > box.start), axis=1))


@dataclass(frozen=True)
class Prepared:
    """A tree made ready for drawing any number of boxes."""

    tree: Tree
    drawing: Drawing
    unit: float  # um per fine voxel
    body: Edges  # with their radius and margin in reach
    line: Edges  # with the cap in reach

    def meets(self, box: Box) -> bool:
        """Whether anything is drawn in a box."""
        return len(self.body.meeting(box)) > 0 or len(self.line.meeting(box)) > 0


def prepared(tree: Tree, voxel_size: VoxelSize, drawing: Drawing) -> Prepared:
    """Make a tree (voxels; radii in fine voxels) ready for `draw`. ValueError for a stretch or tube not above 0."""
    if min(drawing.stretch, drawing.tube, drawing.cap) <= 0 or drawing.tube > drawing.cap:
        raise ValueError(f"{drawing} cannot be drawn: stretch and tube must be above 0 and the tube within the cap")
    unit = fine_voxel(voxel_size)
    coarse = int(np.argmax(voxel_size))
    z, y, x = (s / drawing.stretch if a == coarse else s for a, s in enumerate(voxel_size))
    body = _edges(tree, (z, y, x), unit, drawing.ignore_margin * unit, own_radius=True)
    reach = max(drawing.cap * unit, *voxel_size)  # never less than the voxels that the line itself runs through
    line = _edges(tree, voxel_size, unit, reach, own_radius=False)
    return Prepared(tree, drawing, unit, body, line)


def rasterize(tree: Tree, box: Box, voxel_size: VoxelSize, drawing: Drawing | None = None) -> Targets:
    """Draw the part of `tree` (voxels; radii in fine voxels) that lies in `box`; see `draw`."""
    return draw(prepared(tree, voxel_size, drawing or Drawing()), box)


def draw(this: Prepared, box: Box) -> Targets:
    """Draw one box.

    The voxels that the centreline runs through always belong to mask and skeleton, so that thin neurites never break;
    the tube never leaves the mask (as in Skeleton Recall, arXiv 2404.03010).
    """
    inside, near = body(this, box)
    skeleton, distance, tangent = _line(this, box)
    z, y, x = (centreline_voxels(this.tree, box) - np.asarray(box.start)).T
    inside[z, y, x] = True
    skeleton &= inside
    skeleton[z, y, x] = True
    mask = inside.view(np.uint8)
    if near is not None:
        mask[near & ~inside] = 255
    return Targets(mask, skeleton.view(np.uint8), distance, tangent)


def body(this: Prepared, box: Box) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """[Z, Y, X] inside the neurite, and inside it or the margin around it (None without a margin)."""
    margin = this.drawing.ignore_margin * this.unit
    inside = np.zeros(box.shape, dtype=bool)
    near = np.zeros(box.shape, dtype=bool) if margin else None
    for i in this.body.meeting(box).tolist():
        window, squared, share = _reached(this.body, i, box)
        a, b = this.body.radii[i].tolist()
        radius = a + share * (b - a)
        inside[window] |= squared <= radius * radius
        if near is not None:
            radius += margin
            near[window] |= squared <= radius * radius
    return inside, near


def centreline_voxels(tree: Tree, box: Box) -> NDArray[np.int64]:
    """[N, 3] the different voxels (z y x) of `box` that the tree's edges run through, sorted; the tree is in voxels."""
    dense = np.rint(morphology.resample_tree(_near(tree, box), 0.25).points).astype(np.int64)
    return np.unique(dense[np.all((dense >= box.start) & (dense < box.stop), axis=1)], axis=0).reshape(-1, 3)


def paint_tree(tree: Tree, brightness: NDArray[np.floating], box: Box, voxel_size: VoxelSize) -> NDArray[np.float32]:
    """[Z, Y, X] a tree whose nodes glow with `brightness` [N], with a soft edge one fine voxel wide.

    Where neurites touch, the brighter one shows. `tree` is in voxels with radii in fine voxels, as for `rasterize`.
    """
    unit = fine_voxel(voxel_size)
    edges = _edges(tree, voxel_size, unit, 0.5 * unit, own_radius=True, whole=True)
    parent = np.where(tree.parents >= 0, tree.parents, np.arange(len(tree)))
    glow = np.stack([brightness[parent[edges.child]], brightness[edges.child]], axis=1)
    image = np.zeros(box.shape, dtype=np.float32)
    for i in edges.meeting(box).tolist():
        window, squared, share = _reached(edges, i, box)
        a, b = (edges.radii[i] / unit).tolist()
        c, d = glow[i].tolist()
        cover = np.clip(a + 0.5 + share * (b - a) - np.sqrt(squared) / unit, 0, 1)  # 1 half a voxel inside the surface
        np.maximum(image[window], cover * (c + share * (d - c)), out=image[window])
    return image


def _edges(tree: Tree, size: VoxelSize, unit: float, margin: float, *, own_radius: bool, whole: bool = False) -> Edges:
    """Each edge with the voxels within `margin` (um), its own radius added if asked; cut short unless `whole`."""
    radii = np.maximum(tree.radii * unit, 0)
    widest = margin + (float(radii.max(initial=0)) if own_radius else 0.0)
    um = replace(tree, points=to_um(tree.points, size), radii=radii)
    um = um if whole else morphology.resample_tree(um, max(2 * widest, 8 * unit))
    parent = np.where(um.parents >= 0, um.parents, np.arange(len(um)))
    lone = (um.parents < 0) & (morphology.child_counts(um) == 0)  # a tree of one node is a sphere
    child = np.flatnonzero((um.parents >= 0) | lone)
    a, b = um.points[parent[child]], um.points[child]
    ends = np.stack([um.radii[parent[child]], um.radii[child]], axis=1)
    around = margin + (ends.max(axis=1, initial=0)[:, None] if own_radius else np.zeros((len(child), 1)))
    low = np.ceil((np.minimum(a, b) - around) / np.asarray(size)).astype(np.int64)
    high = np.floor((np.maximum(a, b) + around) / np.asarray(size)).astype(np.int64) + 1
    return Edges(a, b - a, ends, child, size, low, high)


class _Reached(NamedTuple):
    """The voxels of one edge's window in a box."""

    window: tuple[slice, slice, slice]  # in the box's array
    squared: NDArray[np.float32]  # [z, y, x] squared distance to the edge, um^2
    share: NDArray[np.float32]  # [z, y, x] place of the nearest point, 0 at the parent end to 1 at the child end


def _reached(edges: Edges, i: int, box: Box) -> _Reached:
    """Coordinates start at the edge, so that float32 holds them however large the volume is."""
    spans = [
        (max(a, b), min(c, d))
        for a, b, c, d in zip(edges.low[i].tolist(), box.start, edges.high[i].tolist(), box.stop, strict=True)
    ]
    z, y, x = (
        (np.arange(a, b) * s - p).astype(np.float32)
        for (a, b), s, p in zip(spans, edges.size, edges.start[i].tolist(), strict=True)
    )
    dz, dy, dx = edges.step[i].tolist()
    along = (z * dz)[:, None, None] + ((y * dy)[:, None] + x * dx)  # dot product with the edge
    squared = (z * z)[:, None, None] + ((y * y)[:, None] + x * x)  # to the parent end
    length = dz * dz + dy * dy + dx * dx
    share = np.clip(along / length, 0, 1) if length > 0 else np.zeros_like(along)
    along *= 2
    along -= share * length
    along *= share
    squared -= along  # to the nearest point of the edge
    np.maximum(squared, 0, out=squared)
    zs, ys, xs = (slice(a - o, b - o) for (a, b), o in zip(spans, box.start, strict=True))
    return _Reached((zs, ys, xs), squared, share)


def _line(this: Prepared, box: Box) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.int8]]:
    """[Z, Y, X] within the tube; distance in fine voxels, capped; [3, Z, Y, X] 127 times the nearest edge's direction.

    A direction takes one byte per axis, as in the store: time goes into memory that is touched for the first time.
    """
    tube = np.zeros(box.shape, dtype=bool)
    distance = np.full(box.shape, this.drawing.cap, dtype=np.float32)
    tangent = np.zeros((3, *box.shape), dtype=np.int8)
    length = np.linalg.norm(this.line.step, axis=1, keepdims=True)
    directions = np.rint(127 * this.line.step / np.where(length > 0, length, 1)).astype(np.int8)
    for i in this.line.meeting(box).tolist():
        window, squared, _ = _reached(this.line, i, box)
        apart = np.sqrt(squared, out=squared)
        apart *= 1 / this.unit
        tube[window] |= apart <= this.drawing.tube
        closer = apart < distance[window]
        np.copyto(distance[window], apart, where=closer)
        for axis in range(3):  # only voxels near the tree are touched: memory of the rest is never paged in
            np.copyto(tangent[axis][window], directions[i][axis], where=closer)
    return tube, distance, tangent


def _near(tree: Tree, box: Box) -> Tree:
    """The edges of a tree whose bounding box comes within a voxel of `box`, and their nodes."""
    parent = np.where(tree.parents >= 0, tree.parents, np.arange(len(tree)))
    low = np.minimum(tree.points, tree.points[parent])
    high = np.maximum(tree.points, tree.points[parent])
    hit = np.all((high >= np.asarray(box.start) - 1) & (low <= np.asarray(box.stop)), axis=1)
    if hit.all():
        return tree
    keep = hit.copy()
    keep[parent[hit]] = True
    index = np.cumsum(keep) - 1
    above = np.where(hit & (tree.parents >= 0), index[parent], -1)[keep]
    return Tree(tree.points[keep], tree.radii[keep], above, tree.types[keep])
