"""From a volume to the teacher's input: which slices, cut into which tiles, stretched to square pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.types import Array
from hpc_neuro.data.feature_cache import ShardSpec, iter_tiles
from hpc_neuro.data.intensity import normalize
from hpc_neuro.data.orientation import VIEW_AXES, slice_layouts
from hpc_neuro.data.store import StoredVolume
from hpc_neuro.precompute.config import PrecomputeConfig, SliceView

READ_BYTES = 64 << 20
"""[bytes] Neighboring slices that are read at once: a chunk holds many slices."""


@dataclass(frozen=True)
class TeacherBatch:
    """One teacher forward: some slices of a shard, one tile of them. All in tokens but the pixel positions."""

    slices: slice
    rows: slice
    columns: slice
    inner_rows: slice  # the tile's own rows in the teacher's output, which has context around them
    inner_columns: slice
    pixel_rows: NDArray[np.float64]  # [voxel] centers of the pixels
    pixel_columns: NDArray[np.float64]


def plan_shards(cfg: PrecomputeConfig, volume: StoredVolume, view: SliceView, patch: int) -> list[ShardSpec]:
    """The shards of one view of one volume, as it is stored and in its augmented views, in slice order."""
    slice_axis, row_axis, column_axis = VIEW_AXES[view]

    # The coarser axis of a slice is stretched so that its pixels are square, as a photograph's are.
    finest = min(volume.voxel_size)
    row_factor = cfg.scale * (volume.voxel_size[row_axis] / finest)
    column_factor = cfg.scale * (volume.voxel_size[column_axis] / finest)
    rows = math.ceil(volume.shape[row_axis] * row_factor / patch)
    columns = math.ceil(volume.shape[column_axis] * column_factor / patch)
    cell = (patch / row_factor, patch / column_factor)

    # A slab without a full stride still has its slice.
    stride = cfg.stride_v
    count = math.ceil(volume.shape[slice_axis] / stride)
    return [
        ShardSpec(volume.id, view, i * stride, stride, min(cfg.slab, count - i), rows, columns, cell, layout)
        for layout in slice_layouts(cfg.augment_views, view)
        for i in range(0, count, cfg.slab)
    ]


def iter_teacher_batches(cfg: PrecomputeConfig, shard: ShardSpec, patch: int, batch: int) -> Iterator[TeacherBatch]:
    """Batches of slices, tile by tile."""
    # The config makes sure that tile and halo are multiples of the patch.
    halo = cfg.halo // patch

    for rows, columns in iter_tiles(shard.rows, shard.columns, cfg.tile // patch):
        # A tile with context around it; at the border of the slice there is none to have.
        input_rows = _grow(rows, halo, shard.rows)
        input_columns = _grow(columns, halo, shard.columns)
        for i in range(0, shard.count, batch):
            yield TeacherBatch(
                slices=slice(i, min(i + batch, shard.count)),
                rows=rows,
                columns=columns,
                inner_rows=slice(rows.start - input_rows.start, rows.stop - input_rows.start),
                inner_columns=slice(columns.start - input_columns.start, columns.stop - input_columns.start),
                pixel_rows=_pixel_centers(input_rows, shard.cell[0], patch),
                pixel_columns=_pixel_centers(input_columns, shard.cell[1], patch),
            )


def read_pixels(volume: StoredVolume, shard: ShardSpec, batch: TeacherBatch) -> NDArray[np.float32]:
    """The slices of a batch as the teacher sees them [s, H, W]: normalized, stretched, the border repeated.

    They lie as in the stored volume, whatever `shard.layout`.
    """
    _, row_axis, column_axis = VIEW_AXES[shard.view]
    row_taps = _interpolate(batch.pixel_rows, volume.shape[row_axis])
    column_taps = _interpolate(batch.pixel_columns, volume.shape[column_axis])

    # Normalized before it is stretched, so that values stay within [0, 1].
    values = _read_slices(volume, shard, batch, row_taps.voxels, column_taps.voxels)
    pixels = normalize(values, volume.low, volume.high)
    pixels = row_taps.apply(pixels, axis=1)
    return column_taps.apply(pixels, axis=2)


def _grow(tokens: slice, halo: int, count: int) -> slice:
    return slice(max(0, tokens.start - halo), min(count, tokens.stop + halo))


def _read_slices(volume: StoredVolume, shard: ShardSpec, batch: TeacherBatch, rows: slice, columns: slice) -> Array:
    """[s, rows, columns] of the batch's slices in the volume's own dtype, several neighbors at a time."""
    slice_axis, row_axis, column_axis = VIEW_AXES[shard.view]

    # The middle slice stands for its `stride` neighbors.
    numbers = np.arange(batch.slices.start, batch.slices.stop)
    middles = shard.first + numbers * shard.stride + shard.stride // 2
    middles = np.minimum(middles, volume.shape[slice_axis] - 1)

    # Several slices share a chunk: reading them one by one would read each chunk many times.
    plane_bytes = (rows.stop - rows.start) * (columns.stop - columns.start) * volume.dtype.itemsize
    group = max(1, READ_BYTES // (plane_bytes * shard.stride))
    start, stop = [0, 0, 0], [0, 0, 0]
    start[row_axis], stop[row_axis] = rows.start, rows.stop
    start[column_axis], stop[column_axis] = columns.start, columns.stop

    parts = []
    for i in range(0, len(middles), group):
        neighbors = middles[i : i + group]
        start[slice_axis], stop[slice_axis] = int(neighbors[0]), int(neighbors[-1]) + 1
        block = volume.image(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))

        # Moving the slice axis first keeps the order of rows and columns.
        parts.append(np.moveaxis(block, slice_axis, 0)[neighbors - neighbors[0]])
    return np.concatenate(parts)


def _pixel_centers(tokens: slice, cell: float, patch: int) -> NDArray[np.float64]:
    """[voxel] Centers of the pixels of some tokens, each `patch` pixels and `cell` voxels wide; voxel 0's is at 0."""
    # The grid of pixels begins at the volume's border, half a voxel before its first center.
    numbers = np.arange(tokens.start * patch, tokens.stop * patch, dtype=np.float64)
    centers: NDArray[np.float64] = (numbers + 0.5) * (cell / patch) - 0.5
    return centers


@dataclass(frozen=True)
class _LinearTaps:
    """Linear interpolation at positions along one axis."""

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    share: NDArray[np.float32]  # weight of `high`

    @property
    def voxels(self) -> slice:
        """The voxels of the axis that are needed."""
        return slice(int(self.low.min()), int(self.high.max()) + 1)

    def apply(self, values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """Interpolate values [s, H, W] of `voxels` along an axis, 1 or 2."""
        first = int(self.low.min())
        result = values.take(self.low - first, axis)

        # Where pixels are voxels there is nothing to blend.
        if self.share.any():
            weight = self.share[:, None] if axis == 1 else self.share
            result *= 1 - weight
            result += values.take(self.high - first, axis) * weight
        return result


def _interpolate(positions: NDArray[np.float64], count: int) -> _LinearTaps:
    """Neighbors and weight of linear interpolation at positions along an axis of `count` voxels, clamped to it."""
    # Beyond the border its value is repeated.
    inside = np.clip(positions, 0, count - 1)
    low = np.floor(inside).astype(np.int64)
    return _LinearTaps(low, np.minimum(low + 1, count - 1), (inside - low).astype(np.float32))
