"""Draw a tree into voxels, box by box: mask, tube around the centerline, distance and direction.

Every edge is a tapered cylinder with a sphere at each end, drawn in micrometers, so that a neurite is round in space
and flat in a stack with coarse z. A box is drawn without the rest of the volume and equals, voxel for voxel, the same
part of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import Box, VoxelSize, fine_voxel, to_um
from hpc_neuro.core.morphology import Tree


class Targets(NamedTuple):
    """The part of a tree in one box; Z, Y, X are the box's."""

    mask: NDArray[np.uint8]  # [Z, Y, X] 1 on neurite, 255 within the ignored margin, 0 elsewhere
    skeleton: NDArray[np.uint8]  # [Z, Y, X] 1 in the tube around the centerline
    distance: NDArray[np.float32]  # [Z, Y, X] distance to the centerline in fine voxels, at most the cap
    tangent: NDArray[np.int8]  # [3, Z, Y, X] 127 times the direction (z y x, in space) of the nearest edge, 0 beyond


@dataclass(frozen=True)
class DrawSettings:
    """How a tree is drawn. Lengths are in fine voxels (`core.geometry.fine_voxel`)."""

    tube: float = 1.5
    """Radius of the tube around the centerline."""
    cap: float = 8.0
    """Largest distance that is computed; the tangent is zero beyond it."""
    ignore_margin: float = 0.0
    """Thickness of the shell around the mask that is marked 255."""
    stretch: float = 1.0
    """Length of the mask along the coarsest axis over its width across: above 1 where the microscope blurs along z."""


@dataclass(frozen=True)
class Edges:
    """Edges in micrometers, cut so short that their bounding boxes are tight."""

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
class PreparedTree:
    """A tree whose edges are cut and measured, so that any number of boxes can be drawn."""

    tree: Tree
    settings: DrawSettings
    unit: float  # um per fine voxel
    body: Edges  # their reach is the radius and the ignored margin
    centerline: Edges  # their reach is the cap

    def meets(self, box: Box) -> bool:
        """Whether anything is drawn in a box."""
        return len(self.body.meeting(box)) > 0 or len(self.centerline.meeting(box)) > 0


def rasterize(tree: Tree, box: Box, voxel_size: VoxelSize, settings: DrawSettings | None = None) -> Targets:
    """Draw the part of `tree` (voxels; radii in fine voxels) that lies in `box`; see `draw_targets`."""
    return draw_targets(prepare_tree(tree, voxel_size, settings or DrawSettings()), box)


def prepare_tree(tree: Tree, voxel_size: VoxelSize, settings: DrawSettings) -> PreparedTree:
    """Prepare a tree (voxels; radii in fine voxels) for `draw_targets`. ValueError for settings not above 0."""
    if min(settings.stretch, settings.tube, settings.cap) <= 0 or settings.tube > settings.cap:
        raise ValueError(f"{settings} cannot be drawn: stretch and tube must be above 0 and the tube within the cap")
    unit = fine_voxel(voxel_size)

    # A mask that is stretched along the coarsest axis is a round one in voxels compressed along it.
    coarse_axis = int(np.argmax(voxel_size))
    z, y, x = (s / settings.stretch if axis == coarse_axis else s for axis, s in enumerate(voxel_size))
    body = _cut_edges(tree, (z, y, x), unit, settings.ignore_margin * unit, own_radius=True)

    # The reach is never less than the voxels that the centerline itself runs through.
    reach = max(settings.cap * unit, *voxel_size)
    centerline = _cut_edges(tree, voxel_size, unit, reach, own_radius=False)
    return PreparedTree(tree, settings, unit, body, centerline)


def draw_targets(prepared: PreparedTree, box: Box) -> Targets:
    """Draw one box.

    The voxels that the centerline runs through always belong to mask and skeleton, so that thin neurites never break.
    The tube never leaves the mask (as in Skeleton Recall, arXiv 2404.03010).
    """
    inside, in_margin = draw_body(prepared, box)
    skeleton, distance, tangent = _draw_centerline(prepared, box)

    # A neurite thinner than a voxel may cover no voxel center.
    z, y, x = (list_centerline_voxels(prepared.tree, box) - np.asarray(box.start)).T
    inside[z, y, x] = True
    skeleton &= inside
    skeleton[z, y, x] = True

    # A view instead of a copy: bool and uint8 have the same bytes.
    mask = inside.view(np.uint8)
    if in_margin is not None:
        mask[in_margin & ~inside] = UNLABELED
    return Targets(mask, skeleton.view(np.uint8), distance, tangent)


def draw_body(prepared: PreparedTree, box: Box) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """[Z, Y, X] inside the neurite, and inside it or the margin around it (None without a margin)."""
    edges = prepared.body
    margin = prepared.settings.ignore_margin * prepared.unit
    inside = np.zeros(box.shape, dtype=bool)
    in_margin = np.zeros(box.shape, dtype=bool) if margin else None

    for edge in edges.meeting(box).tolist():
        window, squared, share = _measure_window(edges, edge, box)
        parent_radius, child_radius = edges.radii[edge].tolist()
        radius = parent_radius + share * (child_radius - parent_radius)
        inside[window] |= squared <= radius * radius

        if in_margin is not None:
            radius += margin
            in_margin[window] |= squared <= radius * radius

    return inside, in_margin


def list_centerline_voxels(tree: Tree, box: Box) -> NDArray[np.int64]:
    """[N, 3] the distinct voxels (z y x) of `box` that the tree's edges run through, sorted; the tree is in voxels."""
    # In steps of a quarter voxel, so that hardly a voxel that an edge runs through is missed.
    dense = np.rint(morphology.resample_tree(_crop_tree(tree, box), 0.25).points).astype(np.int64)
    inside = np.all((dense >= box.start) & (dense < box.stop), axis=1)
    return np.unique(dense[inside], axis=0).reshape(-1, 3)


def paint_tree(tree: Tree, brightness: NDArray[np.floating], box: Box, voxel_size: VoxelSize) -> NDArray[np.float32]:
    """[Z, Y, X] a tree whose nodes glow with `brightness` [N], with a soft edge one fine voxel wide.

    Where neurites touch, the brighter one shows. `tree` is in voxels with radii in fine voxels, as for `rasterize`.
    """
    unit = fine_voxel(voxel_size)
    edges = _cut_edges(tree, voxel_size, unit, 0.5 * unit, own_radius=True, whole=True)
    parent = np.where(tree.parents >= 0, tree.parents, np.arange(len(tree)))
    edge_brightness = np.stack([brightness[parent[edges.child]], brightness[edges.child]], axis=1)
    image = np.zeros(box.shape, dtype=np.float32)

    for edge in edges.meeting(box).tolist():
        window, squared, share = _measure_window(edges, edge, box)
        parent_radius, child_radius = (edges.radii[edge] / unit).tolist()
        parent_brightness, child_brightness = edge_brightness[edge].tolist()

        # The cover is 1 from half a voxel inside the surface on, and 0 from half a voxel outside it.
        depth = parent_radius + 0.5 + share * (child_radius - parent_radius) - np.sqrt(squared) / unit
        cover = np.clip(depth, 0, 1)
        glow = cover * (parent_brightness + share * (child_brightness - parent_brightness))
        np.maximum(image[window], glow, out=image[window])

    return image


def _cut_edges(
    tree: Tree, size: VoxelSize, unit: float, margin: float, *, own_radius: bool, whole: bool = False
) -> Edges:
    """The edges of a tree with the voxels within `margin` (um) of each.

    own_radius: the margin begins at the surface of the edge, not at its centerline. whole: long edges are not cut.
    """
    # Drawing is in micrometers, where distances are Euclidean.
    radii = np.maximum(tree.radii * unit, 0)
    um = replace(tree, points=to_um(tree.points, size), radii=radii)
    if not whole:
        # The bounding box of a long diagonal edge would hold mostly voxels out of its reach.
        widest = margin + (float(radii.max(initial=0)) if own_radius else 0.0)
        um = morphology.resample_tree(um, max(2 * widest, 8 * unit))

    # A tree of one node has no edge; it is drawn as a sphere.
    parent = np.where(um.parents >= 0, um.parents, np.arange(len(um)))
    is_single = (um.parents < 0) & (morphology.child_counts(um) == 0)
    child = np.flatnonzero((um.parents >= 0) | is_single)

    start, end = um.points[parent[child]], um.points[child]
    end_radii = np.stack([um.radii[parent[child]], um.radii[child]], axis=1)
    reach = margin + (end_radii.max(axis=1, initial=0)[:, None] if own_radius else np.zeros((len(child), 1)))
    low = np.ceil((np.minimum(start, end) - reach) / np.asarray(size)).astype(np.int64)
    high = np.floor((np.maximum(start, end) + reach) / np.asarray(size)).astype(np.int64) + 1
    return Edges(start, end - start, end_radii, child, size, low, high)


class _EdgeWindow(NamedTuple):
    """The voxels of a box within reach of one edge."""

    window: tuple[slice, slice, slice]  # in the box's array
    squared: NDArray[np.float32]  # [z, y, x] squared distance to the edge, um^2
    share: NDArray[np.float32]  # [z, y, x] position of the nearest point, 0 at the parent end to 1 at the child end


def _measure_window(edges: Edges, edge: int, box: Box) -> _EdgeWindow:
    """Distance and nearest point of an edge for the voxels within its reach.

    Coordinates are relative to the start of the edge, so that float32 holds them however large the volume is.
    """
    low, high = edges.low[edge].tolist(), edges.high[edge].tolist()
    spans = [(max(a, b), min(c, d)) for a, b, c, d in zip(low, box.start, high, box.stop, strict=True)]
    z, y, x = (
        (np.arange(a, b) * s - p).astype(np.float32)
        for (a, b), s, p in zip(spans, edges.size, edges.start[edge].tolist(), strict=True)
    )

    # Project each voxel onto the edge: `along` is the dot product, `share` the clipped position along the edge.
    dz, dy, dx = edges.step[edge].tolist()
    along = (z * dz)[:, None, None] + ((y * dy)[:, None] + x * dx)
    squared = (z * z)[:, None, None] + ((y * y)[:, None] + x * x)
    squared_length = dz * dz + dy * dy + dx * dx
    share = np.clip(along / squared_length, 0, 1) if squared_length > 0 else np.zeros_like(along)

    # |p - share * d|^2 = |p|^2 - share * (2 p.d - share * |d|^2), in place: memory decides the speed.
    along *= 2
    along -= share * squared_length
    along *= share
    squared -= along
    np.maximum(squared, 0, out=squared)

    zs, ys, xs = (slice(a - start, b - start) for (a, b), start in zip(spans, box.start, strict=True))
    return _EdgeWindow((zs, ys, xs), squared, share)


def _draw_centerline(
    prepared: PreparedTree, box: Box
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.int8]]:
    """[Z, Y, X] within the tube; distance in fine voxels, capped; [3, Z, Y, X] 127 times the nearest edge's direction.

    A direction takes one byte per axis, as in the store: touching memory for the first time takes most of the time.
    """
    edges = prepared.centerline
    tube = np.zeros(box.shape, dtype=bool)
    distance = np.full(box.shape, prepared.settings.cap, dtype=np.float32)
    tangent = np.zeros((3, *box.shape), dtype=np.int8)

    # Directions are unit vectors; an edge without length has none.
    length = np.linalg.norm(edges.step, axis=1, keepdims=True)
    directions = np.rint(127 * edges.step / np.where(length > 0, length, 1)).astype(np.int8)

    for edge in edges.meeting(box).tolist():
        window, squared, _ = _measure_window(edges, edge, box)
        edge_distance = np.sqrt(squared, out=squared)
        edge_distance *= 1 / prepared.unit
        tube[window] |= edge_distance <= prepared.settings.tube

        # Only voxels near the tree are touched: memory of the rest is never paged in.
        is_closer = edge_distance < distance[window]
        np.copyto(distance[window], edge_distance, where=is_closer)
        for axis in range(3):
            np.copyto(tangent[axis][window], directions[edge][axis], where=is_closer)

    return tube, distance, tangent


def _crop_tree(tree: Tree, box: Box) -> Tree:
    """The edges of a tree whose bounding box comes within a voxel of `box`, and their nodes."""
    parent = np.where(tree.parents >= 0, tree.parents, np.arange(len(tree)))

    # Resampling the whole tree for every box would cost more than drawing it.
    low = np.minimum(tree.points, tree.points[parent])
    high = np.maximum(tree.points, tree.points[parent])
    is_near = np.all((high >= np.asarray(box.start) - 1) & (low <= np.asarray(box.stop)), axis=1)
    if is_near.all():
        return tree

    keep = is_near.copy()
    keep[parent[is_near]] = True
    new_index = np.cumsum(keep) - 1
    new_parents = np.where(is_near & (tree.parents >= 0), new_index[parent], -1)[keep]
    return Tree(tree.points[keep], tree.radii[keep], new_parents, tree.types[keep])
