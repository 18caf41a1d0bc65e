"""The neurite's local radius: from the SWC, constant, or measured in the image around the centreline."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, fine_voxel, tile_volume, to_um, to_voxels
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import config
from hpc_neuro.data.intensity import ReadBox

Floats = NDArray[np.float64]
_BLOCK: Shape = (64, 128, 128)  # nodes are measured block by block, so that memory does not grow with the volume
_RAYS = 16
_STEP = 0.5  # fine voxels between samples
_STEEP = 0.71  # in a stack with coarse z, rays steeper than 45 degrees see the blur of the microscope, not the neurite
_ISOTROPIC = 1.5  # z counts as coarse above this many fine voxels
_UPRIGHT = 0.8  # rays steeper than this measure the blur along z
_ENOUGH = 20  # so many nodes make a stretch
_QUANTILE = (
    0.4  # of the rays' widths: below the median, since near a branch point half of the rays run into the sibling
)
_SHIFTS = 3  # steps of mean shift


@config
class SwcRadius:
    """The radii that the SWC gives."""

    kind: Literal["swc"] = "swc"
    scale: float = Field(default=1.0, gt=0)
    """Factor on every radius."""
    smallest: float = Field(default=0.5, ge=0)
    """[fine voxel] Radii below this are raised to it."""


@config
class ConstantRadius:
    """One radius everywhere."""

    kind: Literal["constant"] = "constant"
    radius: float = Field(default=1.5, gt=0)
    """[fine voxel] The radius."""


@config
class ImageRadius:
    """Measured: where the intensity around the centreline falls to a share of its height above the local background."""

    kind: Literal["image"] = "image"
    smallest: float = Field(default=1.0, ge=0)
    """[fine voxel] Lower bound."""
    largest: float = Field(default=8.0, gt=0)
    """[fine voxel] Upper bound."""
    level: float = Field(default=0.5, gt=0, lt=1)
    """Share of the height above background at which the neurite ends; 0.5 is the half maximum."""
    smooth: float = Field(default=9.0, ge=1)
    """[fine voxel] Length of the running median along a branch."""
    recentre: float = Field(default=2.0, ge=0)
    """[fine voxel] How far the drawn centreline may move onto the ridge; the given tree is kept as it is. 0: never."""

    def __post_init__(self) -> None:
        if self.largest < self.smallest:
            raise ValueError(f"largest {self.largest} is below smallest {self.smallest}")


Radius = Annotated[SwcRadius | ConstantRadius | ImageRadius, Field(discriminator="kind")]


class Fitted(NamedTuple):
    """What is drawn."""

    tree: Tree  # voxels; radii in fine voxels
    stretch: float  # length of the neurite along the coarsest axis over its width across, as the image shows it


def fitted(
    tree: Tree, cfg: SwcRadius | ConstantRadius | ImageRadius, read: ReadBox, shape: Shape, size: VoxelSize
) -> Fitted:
    """The tree to draw; `tree` is in voxels with radii in fine voxels, `size` in um per voxel (z y x)."""
    if isinstance(cfg, SwcRadius):
        return Fitted(replace(tree, radii=np.maximum(tree.radii * cfg.scale, cfg.smallest)), 1.0)
    if isinstance(cfg, ConstantRadius):
        return Fitted(replace(tree, radii=np.full(len(tree), cfg.radius)), 1.0)
    return measured(tree, cfg, read, shape, size)


def measured(tree: Tree, cfg: ImageRadius, read: ReadBox, shape: Shape, size: VoxelSize) -> Fitted:
    """`tree` cut into steps of one fine voxel, moved onto the ridge and given the radius measured there.

    Where the signal is broken or too faint, the radius is carried over from the nearest measured nodes of the branch.
    """
    unit = fine_voxel(size)
    um = morphology.resample_tree(replace(tree, points=to_um(tree.points, size)), unit)
    lines = paths(um)
    points = um.points
    for _ in range(_SHIFTS if cfg.recentre else 0):
        points = _onto_ridge(um.points, points, lines, cfg.recentre * unit, read, shape, size)
    radii, stretch = _half_width(points, lines, cfg, read, shape, size)
    return Fitted(replace(um, points=to_voxels(points, size), radii=radii), stretch)


class Line(NamedTuple):
    """One long path of a tree, root side first. A side path begins with the branch point it leaves from."""

    nodes: NDArray[np.int64]
    own: slice  # the part of `nodes` that belongs to this path


def paths(tree: Tree) -> list[Line]:
    """The tree cut into long paths (each goes on along its longest child); every node belongs to one."""
    lengths = morphology.edge_lengths(tree)
    height = np.zeros(len(tree))
    heir = np.full(len(tree), -1)  # the child on the longest way to a tip
    for i in range(len(tree) - 1, -1, -1):
        parent = tree.parents[i]
        if parent >= 0 and height[i] + lengths[i] >= height[parent]:
            height[parent], heir[parent] = height[i] + lengths[i], i
    found = []
    for i, parent in enumerate(tree.parents):
        if parent >= 0 and heir[parent] == i:
            continue
        nodes = [i] if parent < 0 else [int(parent), i]
        while heir[nodes[-1]] >= 0:
            nodes.append(int(heir[nodes[-1]]))
        found.append(Line(np.asarray(nodes, dtype=np.int64), slice(0 if parent < 0 else 1, None)))
    return found


def _frames(points: Floats, lines: list[Line], coarse: int) -> tuple[Floats, Floats]:
    """Two unit vectors [N, 3] across the neurite at each node: the first in the plane of the fine axes."""
    tangent = np.zeros_like(points)
    for line in lines:
        if len(line.nodes) > 1:
            smooth = ndimage.gaussian_filter1d(points[line.nodes], 2.0, axis=0, mode="nearest")
            tangent[line.nodes[line.own]] = np.gradient(smooth, axis=0)[line.own]
    axis = np.eye(3)[coarse]
    flat = np.cross(tangent, axis)
    steep = np.linalg.norm(flat, axis=1) < 1e-3 * np.maximum(np.linalg.norm(tangent, axis=1), 1e-9)
    flat[steep] = np.eye(3)[(coarse + 1) % 3]  # along the coarse axis any direction in the fine plane will do
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    tangent[steep] = axis
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    return flat, np.cross(tangent, flat)


def _onto_ridge(
    given: Floats, points: Floats, lines: list[Line], reach: float, read: ReadBox, shape: Shape, size: VoxelSize
) -> Floats:
    """One mean-shift step across the neurite, smoothed along it; nobody ends farther than `reach` (um) from `given`."""
    unit = fine_voxel(size)
    flat, steep = _frames(points, lines, int(np.argmax(size)))
    offsets = np.arange(-2, 2.01, 0.5) * max(reach / 2, unit)
    u, v = (g.ravel() for g in np.meshgrid(offsets, offsets, indexing="ij"))
    around = points[:, None] + u[:, None] * flat[:, None] + v[:, None] * steep[:, None]  # [N, M, 3]
    values = _sampled(around, read, shape, size)  # [N, M]
    bright = np.maximum(values - np.median(values, axis=1, keepdims=True), 0) ** 2
    weight = bright * np.exp(-(u * u + v * v) / (2 * (offsets[-1] / 2) ** 2)) + 1e-9
    total = weight.sum(axis=1)
    shift = ((weight @ u) / total)[:, None] * flat + ((weight @ v) / total)[:, None] * steep
    shift += points - given
    moved = np.empty_like(points)
    for line in lines:
        smooth = ndimage.gaussian_filter1d(shift[line.nodes], 2.0, axis=0, mode="nearest")
        moved[line.nodes[line.own]] = smooth[line.own]
        shift[line.nodes[line.own]] = smooth[line.own]  # side paths start from where their branch point went
    far = np.linalg.norm(moved, axis=1, keepdims=True)
    held: Floats = given + moved * np.minimum(1, reach / np.maximum(far, 1e-12))
    return held


def _half_width(
    points: Floats, lines: list[Line], cfg: ImageRadius, read: ReadBox, shape: Shape, size: VoxelSize
) -> tuple[Floats, float]:
    """[N] radius in fine voxels at which rays across the neurite fall to `level`, and the volume's stretch."""
    unit = fine_voxel(size)
    coarse = int(np.argmax(size))
    flat, steep = _frames(points, lines, coarse)
    angle = 2 * np.pi * np.arange(_RAYS) / _RAYS
    rays = np.cos(angle)[:, None] * flat[:, None] + np.sin(angle)[:, None] * steep[:, None]  # [N, R, 3]
    rho = np.arange(0, 2 * cfg.largest + _STEP / 2, _STEP)
    values = np.stack(
        [_sampled(points[:, None] + r * unit * rays, read, shape, size) for r in rho], axis=2
    )  # [N, R, S]
    slope = np.abs(rays[..., coarse])
    seen = (slope <= _STEEP) | (size[coarse] <= _ISOTROPIC * unit)  # [N, R]
    outer = np.where(seen[:, :, None], values, np.nan)[:, :, rho >= cfg.largest].reshape(len(points), -1)
    floor = np.nanpercentile(outer, 20, axis=1)
    noise = 1.5 * (np.nanpercentile(outer, 50, axis=1) - floor)
    radii = np.empty(len(points))
    ratios = []
    for line in lines:
        along = ndimage.gaussian_filter1d(values[line.nodes], 1.5, axis=0, mode="nearest")
        base = ndimage.median_filter(floor[line.nodes], size=15, mode="nearest")
        height = along[:, :, rho <= 1].mean(axis=(1, 2)) - base
        end = _first_below(along, base + cfg.level * height) * _STEP  # [n, R]
        width = np.nanquantile(np.where(seen[line.nodes], end, np.nan), _QUANTILE, axis=1)
        clear = height > np.maximum(3 * noise[line.nodes], 1e-6)
        up = slope[line.nodes].max(axis=1) > _UPRIGHT  # the neurite runs in the fine plane: one ray points along z
        deep = np.take_along_axis(end, slope[line.nodes].argmax(axis=1)[:, None], axis=1)[:, 0]
        ratios.append((deep / np.maximum(width, _STEP))[clear & up])
        if clear.any():
            width = np.interp(np.arange(len(width)), np.flatnonzero(clear), width[clear])
        else:
            width[:] = cfg.smallest
        width = ndimage.median_filter(width, size=round(cfg.smooth), mode="nearest")
        radii[line.nodes[line.own]] = ndimage.gaussian_filter1d(width, 1.0, mode="nearest")[line.own]
    ratio = np.concatenate(ratios)
    stretch = max(1.0, float(np.median(ratio))) if len(ratio) >= _ENOUGH else 1.0
    return np.clip(radii, cfg.smallest, cfg.largest), stretch


def _first_below(values: Floats, level: Floats) -> Floats:
    """values [n, R, S], level [n] -> [n, R] index, between samples, at which each ray first falls below the level."""
    below = values < level[:, None, None]
    below[..., -1] = True
    after = np.maximum(below.argmax(axis=2), 1)
    b = np.take_along_axis(values, after[..., None], axis=2)[..., 0]
    a = np.take_along_axis(values, after[..., None] - 1, axis=2)[..., 0]
    share = (a - level[:, None]) / np.where(a > b, a - b, 1)
    crossing: Floats = after - 1 + np.clip(share, 0, 1)
    return crossing


def _sampled(points: Floats, read: ReadBox, shape: Shape, size: VoxelSize) -> Floats:
    """Trilinear values at points [N, M, 3] in um; outside the volume its border's. Reads block by block."""
    voxels = to_voxels(points, size)
    values = np.empty(points.shape[:2])
    middle = np.clip(np.rint(voxels.mean(axis=1)), 0, np.asarray(shape) - 1).astype(np.int64)
    for block in tile_volume(shape, _BLOCK):
        here = np.flatnonzero(np.all((middle >= block.write.start) & (middle < block.write.stop), axis=1))
        if not len(here):
            continue
        mine = np.clip(voxels[here], 0, np.asarray(shape) - 1)
        low, high = np.floor(mine.min(axis=(0, 1))).astype(int), np.ceil(mine.max(axis=(0, 1))).astype(int) + 1
        box = Box(cast(Shape, tuple(low)), cast(Shape, tuple(high)))
        image = read(box).astype(np.float64)
        values[here] = ndimage.map_coordinates(image, np.moveaxis(mine - low, -1, 0), order=1, mode="nearest")
    return values
