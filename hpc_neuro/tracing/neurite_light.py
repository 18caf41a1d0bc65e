"""Width and brightness of neurites in an image, each without the other.

A mask at one level shows a bright neurite thicker than a dim one of the same width, and blur takes light from thin
neurites. Here the image is averaged around each node with three Gaussians in the plane. Their ratios tell the width,
whatever the brightness; the brightness is then that of the narrowest Gaussian, made up for the width. Both are linear
in the logarithms of the three averages, and were fitted to synthetic neurites whose width and brightness are known
(tools.fit_contacts).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from hpc_neuro.tracing.graph import CenterlineGraph
from hpc_neuro.tracing.probability import CellCache, Floats, Ints, ReadBox
from hpc_neuro.tracing.voxel_graph import VoxelGraph

_SIGMAS = (0.7, 1.5, 3.0)
"""[voxel] Standard deviations of the Gaussians along y and x."""
_SIGMA_Z = 0.7
"""[voxel] The same along z, where slices are far apart."""
_REACH = (1, 6, 6)
"""[voxel] Where the Gaussians end, along z, y, x."""
_DARKEST = 0.01
"""[bright node] Smallest average, so that its logarithm is finite."""
_SMOOTHING = 12
"""Rounds in which each node is averaged with its neighbors in its section."""
_KEPT_CELLS = 256
"""Cells of the image that stay in memory."""

_WIDTH = (-3.567, 4.626, -1.072)
"""Weights of the three logarithms in that of the radius in fine voxels."""
_WIDTH_BIAS = 0.962
"""Logarithm of the radius where the three are 0."""
_GLOW = (9.777, -3.164)
"""Weights of the second and third logarithm, less the first, in what the width adds to the first."""
_GLOW_BIAS = 5.461
"""The same where all are equal."""


@dataclass(frozen=True)
class NeuriteLight:
    """Width and brightness at the K nodes of a graph."""

    width: Floats
    """[K] logarithm of the radius in voxels of the plane."""
    glow: Floats
    """[K] logarithm of the brightness, made up for the width; 0 without an image."""
    is_measured: bool
    """Whether there is an image. If not, the width is that of the mask."""


def measure_neurite_light(
    lines: CenterlineGraph, graph: VoxelGraph, section: Ints, image: ReadBox | None
) -> NeuriteLight:
    """Width and brightness of an image that is read by box, averaged along each section; `section` [K], -1 at hubs."""
    if image is None or not len(lines):
        return NeuriteLight(np.log(lines.thickness), np.zeros(len(lines)), False)
    logs = average_along_sections(lines, section, measure_scales(lines, graph, image))
    width = logs @ np.array(_WIDTH) + _WIDTH_BIAS
    glow = logs[:, 0] - (logs[:, 1:] - logs[:, :1]) @ np.array(_GLOW) - _GLOW_BIAS
    return NeuriteLight(width, glow, True)


def measure_scales(lines: CenterlineGraph, graph: VoxelGraph, image: ReadBox) -> Floats:
    """[K, 3] logarithms of the averages above the local background, the narrowest Gaussian first."""
    cells = CellCache(image, graph.shape, _KEPT_CELLS)
    voxels = np.clip(np.rint(lines.points / graph.spacing).astype(np.int64), 0, np.array(graph.shape) - 1)

    offsets = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in _REACH), indexing="ij"), axis=-1).reshape(-1, 3)
    along, across = offsets[:, 0] ** 2, (offsets[:, 1:] ** 2).sum(axis=1)
    weights = np.stack([np.exp(-along / (2 * _SIGMA_Z**2) - across / (2 * s**2)) for s in _SIGMAS], axis=1)
    means = cells.sample_means(voxels, offsets, weights / weights.sum(axis=0))

    # Neurites fill little of a cell, so its median is background.
    means -= cells.sample_medians(voxels)[:, None]
    darkest = max(_DARKEST * float(np.percentile(means[:, 0], 90)), 1e-12)
    return np.asarray(np.log(np.maximum(means, darkest)))


def average_along_sections(lines: CenterlineGraph, section: Ints, values: Floats) -> Floats:
    """[K, W] values averaged with those of nearby nodes of the same section."""
    a, b = lines.edges.T
    is_inside = (section[a] >= 0) & (section[a] == section[b])
    a, b = a[is_inside], b[is_inside]
    every = np.arange(len(values))
    row, column = np.concatenate([every, a, b]), np.concatenate([every, b, a])
    share = 1 / np.bincount(row, minlength=len(values))[row]

    average = csr_array((share, (row, column)), shape=(len(values), len(values)))
    for _ in range(_SMOOTHING):
        values = average @ values
    return values
