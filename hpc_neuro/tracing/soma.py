"""Find the somas among the thick places of a foreground: large, round, with neurites, and not dimmer than these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import edt
import numpy as np

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.tracing.config import TraceConfig, measure_physical_spacing
from hpc_neuro.tracing.probability import Floats, Ints, ReadBox, as_probability
from hpc_neuro.tracing.voxel_graph import BlockSkeleton

_RATIO = 3.0
"""[median radius of the neurites] Radius of a soma, at least, and at least `_LEAST_RADIUS`."""
_LEAST_RADIUS = 5.0
"""[fine voxel] Smallest radius of a soma."""
_CORE = 0.6
"""[radius] The core of a thick place is what lies this deep inside the foreground."""
_ELONGATION = 2.2
"""Longest over shortest axis of the core of a soma, at most; a thick trunk is longer."""
_REACH = 3.0
"""[radius] Half the side of the box that is looked at."""
_LEAVES = 1.8
"""[radius] Foreground that hangs together with a soma reaches this far from its middle: a neurite leaves it."""
_DIMMEST = 0.6
"""[median brightness of the neurites nearby] Median brightness of the core, at least."""
_MOST_CANDIDATES = 200
"""Thick places that are looked at, thickest first."""


@dataclass(frozen=True)
class Soma:
    """One soma."""

    point: tuple[float, float, float]
    """[voxel] z y x of its middle."""
    radius: float
    """[fine voxel]"""


def find_somas(
    skeletons: Sequence[BlockSkeleton],
    probability: ReadBox,
    image: ReadBox,
    shape: Shape,
    voxel_size: VoxelSize,
    cfg: TraceConfig,
) -> list[Soma]:
    """The somas of a volume from the skeletons of its blocks, thickest first.

    `probability` and `image` (any scale, bright on dark) are read only around thick places.
    """
    if not skeletons:
        return []
    voxels = np.concatenate([skeleton.voxels for skeleton in skeletons]).astype(np.int64)
    radii = np.concatenate([skeleton.physical_distance for skeleton in skeletons]).astype(np.float64)
    least = max(_RATIO * float(np.median(radii)), _LEAST_RADIUS)
    spacing = measure_physical_spacing(voxel_size)

    somas = list[Soma]()
    for voxel in _list_thick_places(voxels, radii, spacing, least):
        soma = _examine(voxels[voxel], radii[voxel], voxels, probability, image, shape, spacing, cfg)
        # A bent or waisted soma has several thickest places.
        if soma and not any(_is_near(soma, other, spacing) for other in somas):
            somas.append(soma)
    return somas


def _list_thick_places(voxels: Ints, radii: Floats, spacing: Floats, least: float) -> list[int]:
    """The thick voxels that lie outside the balls of thicker ones, thickest first."""
    order = np.argsort(-radii, kind="stable")
    order = order[radii[order] >= least]
    points = voxels * spacing

    chosen = list[int]()
    while len(order) and len(chosen) < _MOST_CANDIDATES:
        best = int(order[0])
        chosen.append(best)
        away = np.linalg.norm(points[order] - points[best], axis=1)
        order = order[away > 2 * radii[best]]
    return chosen


def _examine(
    voxel: Ints,
    radius: float,
    skeleton: Ints,
    probability: ReadBox,
    image: ReadBox,
    shape: Shape,
    spacing: Floats,
    cfg: TraceConfig,
) -> Soma | None:
    """The soma at a thick voxel; None where the place is long or dim."""
    reach = np.ceil(_REACH * radius / spacing).astype(np.int64)
    (z0, y0, x0), (z1, y1, x1) = (voxel - reach).tolist(), (voxel + reach + 1).tolist()
    box = Box((z0, y0, x0), (z1, y1, x1)).clip(Box.whole(shape))

    values = as_probability(probability(box), box)
    depth = edt.edt(values >= cfg.threshold, anisotropy=tuple(spacing.tolist()), black_border=False, parallel=1)
    labels = cc3d.connected_components(depth >= _CORE * radius, connectivity=26)
    center = tuple((voxel - box.start).tolist())
    if not labels[center]:
        return None

    core = np.argwhere(labels == labels[center])
    axes = np.sqrt(np.linalg.eigvalsh(np.cov((core * spacing).T) + np.diag(spacing**2) / 12))
    if axes[-1] > _ELONGATION * axes[0]:
        return None

    # A bright bead without a neurite is debris.
    pieces = cc3d.connected_components(values >= cfg.floor, connectivity=26)
    away = np.linalg.norm((np.argwhere(pieces == pieces[center]) - center) * spacing, axis=1)
    if away.max() < _LEAVES * radius:
        return None

    # Glia and debris are often large and dim.
    brightness = np.asarray(image(box), dtype=np.float32)
    nearby = skeleton[np.all((skeleton >= box.start) & (skeleton < box.stop), axis=1)] - box.start
    nearby = nearby[depth[tuple(nearby.T)] < _CORE * radius]
    if len(nearby):
        background = float(np.median(brightness))
        neurites = float(np.median(brightness[tuple(nearby.T)])) - background
        if float(np.median(brightness[tuple(core.T)])) - background < _DIMMEST * neurites:
            return None

    z, y, x = (core.mean(axis=0) + box.start).tolist()
    return Soma((z, y, x), round(float(radius), 2))


def _is_near(soma: Soma, other: Soma, spacing: Floats) -> bool:
    away = np.linalg.norm((np.array(soma.point) - other.point) * spacing)
    return bool(away < soma.radius + other.radius)
