"""From a volume to what the teacher sees: which slices, cut into which tiles, stretched to square pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box
from hpc_neuro.data import feature_cache as cache
from hpc_neuro.data.intensity import normalize
from hpc_neuro.data.orientation import slice_layouts
from hpc_neuro.data.store import StoredVolume
from hpc_neuro.precompute.config import PrecomputeConfig, View

_READ = 64 << 20  # bytes of neighbouring slices read at once, for chunks hold many of them


@dataclass(frozen=True)
class Job:
    """One teacher forward: some slices of a shard, one tile of them. All in tokens but the pixel positions."""

    slices: slice
    rows: slice
    columns: slice
    inner_rows: slice  # where the tile lies in what the teacher sees, which has context around it
    inner_columns: slice
    pixel_rows: NDArray[np.float64]  # [voxel] where the pixels' middles lie
    pixel_columns: NDArray[np.float64]


def plan(cfg: PrecomputeConfig, volume: StoredVolume, view: View, patch: int) -> list[cache.Unit]:
    """The shards of one view of one volume, as it stands and in its augmented views, in slice order."""
    across, down, right = cache.VIEW_AXES[view]
    size, finest = volume.voxel_size, min(volume.voxel_size)
    factors = [cfg.scale * (size[a] / finest if cfg.isotropic else 1.0) for a in (down, right)]
    rows, columns = (math.ceil(volume.shape[a] * f / patch) for a, f in zip((down, right), factors, strict=True))
    cell = (patch / factors[0], patch / factors[1])
    count, stride = math.ceil(volume.shape[across] / cfg.stride_v), cfg.stride_v
    return [
        cache.Unit(volume.id, view, i * stride, stride, min(cfg.slab, count - i), rows, columns, cell, how)
        for how in slice_layouts(cfg.augment_views, view)
        for i in range(0, count, cfg.slab)
    ]


def jobs(cfg: PrecomputeConfig, unit: cache.Unit, patch: int, batch: int) -> Iterator[Job]:
    """Batches of slices, tile by tile."""
    halo = cfg.halo // patch
    for rows, columns in cache.tiles(unit.rows, unit.columns, cfg.tile // patch):
        grown = [
            slice(max(0, s.start - halo), min(n, s.stop + halo))
            for s, n in ((rows, unit.rows), (columns, unit.columns))
        ]
        inner = [slice(s.start - g.start, s.stop - g.start) for s, g in zip((rows, columns), grown, strict=True)]
        pixels = [_middles(g, cell, patch) for g, cell in zip(grown, unit.cell, strict=True)]
        for i in range(0, unit.count, batch):
            slices = slice(i, min(i + batch, unit.count))
            yield Job(slices, rows, columns, inner[0], inner[1], pixels[0], pixels[1])


def pixels(volume: StoredVolume, unit: cache.Unit, job: Job) -> NDArray[np.float32]:
    """The slices of a job as the teacher sees them [s, H, W]: normalised, stretched, the border repeated.

    They lie as the volume stands, whatever `unit.how`.
    """
    across, down, right = cache.VIEW_AXES[unit.view]
    taps = [
        _linear(job.pixel_rows, volume.shape[down]),
        _linear(job.pixel_columns, volume.shape[right]),
    ]
    start, stop = [0, 0, 0], [0, 0, 0]
    for axis, (low, high, _) in zip((down, right), taps, strict=True):
        start[axis], stop[axis] = int(low.min()), int(high.max()) + 1
    # the middle slice stands for its `stride` neighbours
    middles = unit.first + np.arange(job.slices.start, job.slices.stop) * unit.stride + unit.stride // 2
    middles = np.minimum(middles, volume.shape[across] - 1)
    plane = (stop[down] - start[down]) * (stop[right] - start[right]) * volume.dtype.itemsize
    group = max(1, _READ // (plane * unit.stride))
    picked = []
    for i in range(0, len(middles), group):
        near = middles[i : i + group]
        start[across], stop[across] = int(near[0]), int(near[-1]) + 1
        block = volume.image(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
        picked.append(np.moveaxis(block, across, 0)[near - near[0]])  # rows and columns keep their order
    result: NDArray[np.float32] = normalize(np.concatenate(picked), volume.low, volume.high)
    for place, (low, high, share) in enumerate(taps, start=1):
        first = int(low.min())
        near = result.take(low - first, place)
        if share.any():  # where pixels are voxels there is nothing to blend
            weight = share[:, None] if place == 1 else share
            near *= 1 - weight
            near += result.take(high - first, place) * weight
        result = near
    return result


def _middles(tokens: slice, cell: float, patch: int) -> NDArray[np.float64]:
    """[voxel] Middles of the pixels of some tokens, each `patch` pixels and `cell` voxels wide; voxel 0's is at 0."""
    numbers = np.arange(tokens.start * patch, tokens.stop * patch, dtype=np.float64)
    middles: NDArray[np.float64] = (numbers + 0.5) * (cell / patch) - 0.5
    return middles


def _linear(
    position: NDArray[np.float64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Neighbours and weight of linear interpolation at positions along an axis of `count` voxels, clamped to it."""
    inside = np.clip(position, 0, count - 1)
    low = np.floor(inside).astype(np.int64)
    return low, np.minimum(low + 1, count - 1), (inside - low).astype(np.float32)
