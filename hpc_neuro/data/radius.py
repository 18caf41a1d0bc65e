"""The neurite's local radius: from the SWC, constant, or measured in the image around the centerline."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

MIN_SWC_RADIUS = 0.5
"""[fine voxel] Smaller radii of an SWC are raised to this."""

EDGE_LEVEL = 0.5
"""A measured neurite ends where the intensity falls to this share of its height above the background: half maximum."""

SMOOTHING_LENGTH = 9
"""[fine voxel] Length of the running median of measured radii along a branch."""

READ_BLOCK: Shape = (64, 128, 128)
"""[voxel] Nodes are measured block by block of this size, so that memory does not grow with the volume."""

RAYS = 16
"""Rays across the neurite at each node."""

SAMPLE_STEP = 0.5
"""[fine voxel] Distance between samples on a ray."""

RAY_QUANTILE = 0.4
"""Quantile of the rays' widths that is the radius: near a branch point half of the rays run into the sibling."""

COARSE_Z = 1.5
"""[fine voxel] A stack whose voxels are longer than this along one axis counts as coarse."""

MAX_RAY_SLOPE = 0.71
"""In a coarse stack, rays steeper than this (45 degrees) see the blur of the microscope, not the neurite."""

UPRIGHT_SLOPE = 0.8
"""Rays steeper than this measure the blur along the coarse axis."""

MIN_STRETCH_NODES = 20
"""The stretch is estimated from at least this many nodes; with fewer it is 1."""

SHIFT_STEPS = 3
"""Mean-shift steps that move the centerline onto the ridge."""


@config
class SwcRadius:
    """The radii that the SWC gives."""

    kind: Literal["swc"] = "swc"
    scale: float = Field(default=1.0, gt=0)
    """Factor on every radius; 0.5 for files that hold diameters."""


@config
class ConstantRadius:
    """One radius everywhere."""

    kind: Literal["constant"] = "constant"
    radius: float = Field(default=1.5, gt=0)
    """[fine voxel] The radius."""


@config
class ImageRadius:
    """Measured: where the intensity around the centerline falls to half of its height above the local background."""

    kind: Literal["image"] = "image"
    smallest: float = Field(default=1.0, ge=0)
    """[fine voxel] Lower bound."""
    largest: float = Field(default=8.0, gt=0)
    """[fine voxel] Upper bound."""
    recentre: float = Field(default=2.0, ge=0)
    """[fine voxel] How far the drawn centerline may move onto the ridge; the given tree is kept as it is. 0: never."""

    def __post_init__(self) -> None:
        if self.largest < self.smallest:
            raise ValueError(f"largest {self.largest} is below smallest {self.smallest}")


RadiusConfig = Annotated[SwcRadius | ConstantRadius | ImageRadius, Field(discriminator="kind")]


class FittedTree(NamedTuple):
    """The tree that is drawn."""

    tree: Tree  # voxels; radii in fine voxels
    stretch: float  # length of the neurite along the coarsest axis over its width across, as the image shows it


def fit_radii(
    tree: Tree, cfg: SwcRadius | ConstantRadius | ImageRadius, read: ReadBox, shape: Shape, size: VoxelSize
) -> FittedTree:
    """The tree to draw. `tree` is in voxels with radii in fine voxels, `size` in um per voxel (z y x)."""
    if isinstance(cfg, SwcRadius):
        return FittedTree(replace(tree, radii=np.maximum(tree.radii * cfg.scale, MIN_SWC_RADIUS)), 1.0)
    if isinstance(cfg, ConstantRadius):
        return FittedTree(replace(tree, radii=np.full(len(tree), cfg.radius)), 1.0)
    return measure_radii(tree, cfg, read, shape, size)


def measure_radii(tree: Tree, cfg: ImageRadius, read: ReadBox, shape: Shape, size: VoxelSize) -> FittedTree:
    """Cut `tree` into steps of one fine voxel, move it onto the ridge and measure the radius there.

    Where the signal is broken or too faint, the radius is interpolated from the nearest measured nodes of the branch.
    """
    unit = fine_voxel(size)
    um = morphology.resample_tree(replace(tree, points=to_um(tree.points, size)), unit)
    paths = cut_into_paths(um)
    image = _Image(read, shape, size)

    points = um.points
    for _ in range(SHIFT_STEPS if cfg.recentre else 0):
        points = _shift_to_ridge(um.points, points, paths, cfg.recentre * unit, image)

    radii, stretch = _measure_half_widths(points, paths, cfg, image)
    return FittedTree(replace(um, points=to_voxels(points, size), radii=radii), stretch)


class TreePath(NamedTuple):
    """One long path of a tree, root side first. A side path begins with the branch point where it leaves."""

    nodes: NDArray[np.int64]
    own: slice  # the part of `nodes` that belongs to this path


def cut_into_paths(tree: Tree) -> list[TreePath]:
    """Cut a tree into long paths, each continuing along its longest child; every node belongs to one path."""
    # Long paths are smoothed and filtered as a whole; short ones have too few nodes for it.
    lengths = morphology.edge_lengths(tree)

    # Tips to root: the height of a node is its longest way to a tip, its heir the child on that way.
    height = np.zeros(len(tree))
    heir = np.full(len(tree), -1)
    for node in range(len(tree) - 1, -1, -1):
        parent = tree.parents[node]
        if parent >= 0 and height[node] + lengths[node] >= height[parent]:
            height[parent] = height[node] + lengths[node]
            heir[parent] = node

    # A path starts at every root and at every child that is no heir.
    paths = []
    for node, parent in enumerate(tree.parents):
        if parent >= 0 and heir[parent] == node:
            continue
        nodes = [node] if parent < 0 else [int(parent), node]
        while heir[nodes[-1]] >= 0:
            nodes.append(int(heir[nodes[-1]]))
        paths.append(TreePath(np.asarray(nodes, dtype=np.int64), slice(0 if parent < 0 else 1, None)))
    return paths


@dataclass(frozen=True)
class _Image:
    """A volume that is sampled at points in micrometers."""

    read: ReadBox
    shape: Shape
    size: VoxelSize  # um per voxel, z y x

    @property
    def unit(self) -> float:
        """Micrometers per fine voxel."""
        return fine_voxel(self.size)

    @property
    def coarse_axis(self) -> int:
        """The axis along which voxels are longest."""
        return int(np.argmax(self.size))

    def sample(self, points: Floats) -> Floats:
        """[N, M] trilinear values at points [N, M, 3] in um; outside the volume its border's. Reads block by block."""
        last_voxel = np.asarray(self.shape) - 1
        voxels = to_voxels(points, self.size)
        values = np.empty(points.shape[:2])

        # A node belongs to the block that holds the center of its samples.
        centers = np.clip(np.rint(voxels.mean(axis=1)), 0, last_voxel).astype(np.int64)

        for block in tile_volume(self.shape, READ_BLOCK):
            rows = np.flatnonzero(np.all((centers >= block.write.start) & (centers < block.write.stop), axis=1))
            if not len(rows):
                continue

            # Samples may reach past the block, so the box is that of the samples.
            positions = np.clip(voxels[rows], 0, last_voxel)
            low = np.floor(positions.min(axis=(0, 1))).astype(int)
            high = np.ceil(positions.max(axis=(0, 1))).astype(int) + 1
            image = self.read(Box(cast(Shape, tuple(low)), cast(Shape, tuple(high)))).astype(np.float64)
            coordinates = np.moveaxis(positions - low, -1, 0)
            values[rows] = ndimage.map_coordinates(image, coordinates, order=1, mode="nearest")

        return values


def _make_frames(points: Floats, paths: list[TreePath], coarse_axis: int) -> tuple[Floats, Floats]:
    """Two unit vectors [N, 3] across the neurite at each node: the first in the plane of the fine axes."""
    tangent = np.zeros_like(points)
    for path in paths:
        if len(path.nodes) > 1:
            # The direction between neighboring nodes is dominated by the annotator's steps.
            smooth = ndimage.gaussian_filter1d(points[path.nodes], 2.0, axis=0, mode="nearest")
            tangent[path.nodes[path.own]] = np.gradient(smooth, axis=0)[path.own]

    axis = np.eye(3)[coarse_axis]
    first = np.cross(tangent, axis)

    # Along the coarse axis any direction in the fine plane will do.
    is_steep = np.linalg.norm(first, axis=1) < 1e-3 * np.maximum(np.linalg.norm(tangent, axis=1), 1e-9)
    first[is_steep] = np.eye(3)[(coarse_axis + 1) % 3]
    tangent[is_steep] = axis

    first /= np.linalg.norm(first, axis=1, keepdims=True)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    return first, np.cross(tangent, first)


def _shift_to_ridge(start: Floats, points: Floats, paths: list[TreePath], reach: float, image: _Image) -> Floats:
    """One mean-shift step across the neurite, smoothed along it; no node ends more than `reach` um from `start`."""
    first, second = _make_frames(points, paths, image.coarse_axis)

    # Sample a square grid across the neurite at each node.
    offsets = np.arange(-2, 2.01, 0.5) * max(reach / 2, image.unit)
    u, v = (grid.ravel() for grid in np.meshgrid(offsets, offsets, indexing="ij"))
    across = points[:, None] + u[:, None] * first[:, None] + v[:, None] * second[:, None]  # [N, M, 3]
    values = image.sample(across)  # [N, M]

    # Bright voxels near the node attract it.
    brightness = np.maximum(values - np.median(values, axis=1, keepdims=True), 0) ** 2
    weight = brightness * np.exp(-(u * u + v * v) / (2 * (offsets[-1] / 2) ** 2)) + 1e-9
    total = weight.sum(axis=1)
    shift = ((weight @ u) / total)[:, None] * first + ((weight @ v) / total)[:, None] * second
    shift += points - start

    # Side paths start from the shift of their branch point, so the smoothed shift goes back into `shift`.
    smooth_shift = np.empty_like(points)
    for path in paths:
        smooth = ndimage.gaussian_filter1d(shift[path.nodes], 2.0, axis=0, mode="nearest")
        smooth_shift[path.nodes[path.own]] = smooth[path.own]
        shift[path.nodes[path.own]] = smooth[path.own]

    distance = np.linalg.norm(smooth_shift, axis=1, keepdims=True)
    shifted: Floats = start + smooth_shift * np.minimum(1, reach / np.maximum(distance, 1e-12))
    return shifted


@dataclass(frozen=True)
class _RaySamples:
    """Intensities on rays across the neurite at each node."""

    distances: Floats  # [S] of the samples from the node, in fine voxels
    values: Floats  # [N, R, S]
    slopes: Floats  # [N, R] component of each ray along the coarse axis
    is_valid: NDArray[np.bool_]  # [N, R] rays that see the neurite and not the blur of the microscope
    background: Floats  # [N] intensity far from the neurite
    noise: Floats  # [N] spread of the background


def _sample_rays(points: Floats, paths: list[TreePath], cfg: ImageRadius, image: _Image) -> _RaySamples:
    first, second = _make_frames(points, paths, image.coarse_axis)

    # Rays go around the neurite in the plane across it.
    angle = 2 * np.pi * np.arange(RAYS) / RAYS
    rays = np.cos(angle)[:, None] * first[:, None] + np.sin(angle)[:, None] * second[:, None]  # [N, R, 3]

    distances = np.arange(0, 2 * cfg.largest + SAMPLE_STEP / 2, SAMPLE_STEP)
    values = np.stack([image.sample(points[:, None] + d * image.unit * rays) for d in distances], axis=2)  # [N, R, S]

    slopes = np.abs(rays[..., image.coarse_axis])
    is_coarse_stack = image.size[image.coarse_axis] > COARSE_Z * image.unit
    is_valid = (slopes <= MAX_RAY_SLOPE) | (not is_coarse_stack)

    # Samples beyond the largest radius show the background.
    outer = np.where(is_valid[:, :, None], values, np.nan)[:, :, distances >= cfg.largest].reshape(len(points), -1)
    background = np.nanpercentile(outer, 20, axis=1)
    noise = 1.5 * (np.nanpercentile(outer, 50, axis=1) - background)
    return _RaySamples(distances, values, slopes, is_valid, background, noise)


def _measure_half_widths(
    points: Floats, paths: list[TreePath], cfg: ImageRadius, image: _Image
) -> tuple[Floats, float]:
    """[N] radius in fine voxels at which rays across the neurite fall to EDGE_LEVEL, and the volume's stretch."""
    samples = _sample_rays(points, paths, cfg, image)
    radii = np.empty(len(points))
    stretches = []

    for path in paths:
        widths, path_stretches = _measure_path(path, samples, cfg)
        radii[path.nodes[path.own]] = widths[path.own]
        stretches.append(path_stretches)

    # The blur along z is a property of the microscope: one value for the whole volume.
    every_stretch = np.concatenate(stretches)
    stretch = max(1.0, float(np.median(every_stretch))) if len(every_stretch) >= MIN_STRETCH_NODES else 1.0
    return np.clip(radii, cfg.smallest, cfg.largest), stretch


def _measure_path(path: TreePath, samples: _RaySamples, cfg: ImageRadius) -> tuple[Floats, Floats]:
    """[n] smooth radii of a path's nodes, and the stretch at those of its nodes where it can be measured."""
    nodes = path.nodes
    values = ndimage.gaussian_filter1d(samples.values[nodes], 1.5, axis=0, mode="nearest")
    background = ndimage.median_filter(samples.background[nodes], size=15, mode="nearest")
    height = values[:, :, samples.distances <= 1].mean(axis=(1, 2)) - background
    is_clear = height > np.maximum(3 * samples.noise[nodes], 1e-6)

    # The surface of a blurred tube is where its profile falls to the half maximum.
    ends = _first_below(values, background + EDGE_LEVEL * height) * SAMPLE_STEP  # [n, R]
    widths = np.nanquantile(np.where(samples.is_valid[nodes], ends, np.nan), RAY_QUANTILE, axis=1)

    # Where the neurite runs in the fine plane, its steepest ray points along the coarse axis and shows the blur there.
    slopes = samples.slopes[nodes]
    steepest_end = np.take_along_axis(ends, slopes.argmax(axis=1)[:, None], axis=1)[:, 0]
    has_upright_ray = slopes.max(axis=1) > UPRIGHT_SLOPE
    stretches = (steepest_end / np.maximum(widths, SAMPLE_STEP))[is_clear & has_upright_ray]

    if is_clear.any():
        # Unclear nodes take the width between their clear neighbors.
        widths = np.interp(np.arange(len(widths)), np.flatnonzero(is_clear), widths[is_clear])
    else:
        widths[:] = cfg.smallest
    widths = ndimage.median_filter(widths, size=SMOOTHING_LENGTH, mode="nearest")
    return ndimage.gaussian_filter1d(widths, 1.0, mode="nearest"), stretches


def _first_below(values: Floats, level: Floats) -> Floats:
    """values [n, R, S], level [n] -> [n, R] index, between samples, at which each ray first falls below the level."""
    below = values < level[:, None, None]

    # A ray that never falls ends at its last sample.
    below[..., -1] = True
    after = np.maximum(below.argmax(axis=2), 1)

    value_after = np.take_along_axis(values, after[..., None], axis=2)[..., 0]
    value_before = np.take_along_axis(values, after[..., None] - 1, axis=2)[..., 0]
    is_falling = value_before > value_after
    share = (value_before - level[:, None]) / np.where(is_falling, value_before - value_after, 1)
    crossing: Floats = after - 1 + np.clip(share, 0, 1)
    return crossing
