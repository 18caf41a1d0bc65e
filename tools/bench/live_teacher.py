"""What a training without a cache would do in every step: compute the features of a crop with the teacher."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.data.feature_cache import CropCells
from hpc_neuro.data.orientation import VIEW_AXES
from hpc_neuro.data.store import StoredVolume
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute import PrecomputeConfig
from hpc_neuro.precompute.build import run_teacher
from hpc_neuro.precompute.slices import iter_teacher_batches, plan_shards, read_pixels

BATCH = 8
"""Slices per forward."""


def compute_as_cached(
    cfg: PrecomputeConfig, volume: StoredVolume, teacher: Teacher, box: Box, patch: Shape
) -> dict[str, Tensor]:
    """view -> [L, D, z, y, x] float16: exactly what `FeatureCache.read_crop` gives.

    A token's features depend on everything the teacher sees around it. So every tile that the crop touches (tile and
    halo of `cfg`) is computed whole, in each slice that the crop touches, along each view.
    """
    layers = [n % teacher.depth for n in cfg.layers]
    features: dict[str, Tensor] = {}

    for view in cfg.views:
        shards = plan_shards(cfg, volume, view, teacher.patch)
        cells = CropCells.for_box(box, patch, shards)
        first = cells.slices.start * cfg.stride_v
        shard = dataclasses.replace(shards[0], first=first, count=cells.slices.stop - cells.slices.start)

        maps = torch.zeros(shard.count, len(layers), shard.rows, shard.columns, teacher.dim, dtype=torch.float16)
        for batch in iter_teacher_batches(cfg, shard, teacher.patch, BATCH):
            if _overlap(batch.rows, cells.rows) and _overlap(batch.columns, cells.columns):
                values = run_teacher(teacher, read_pixels(volume, shard, batch), layers, cfg.position_free)()
                inner = torch.from_numpy(values[:, :, batch.inner_rows, batch.inner_columns])
                maps[batch.slices, :, batch.rows, batch.columns] = inner

        features[view] = cells.average_onto_tokens(maps[:, :, cells.rows, cells.columns]).half()
    return features


def compute_from_crop(
    cfg: PrecomputeConfig, volume: StoredVolume, teacher: Teacher, box: Box, patch: Shape
) -> dict[str, Tensor]:
    """view -> [L, D, z, y, x] float16 of a teacher that sees nothing but the crop: cheaper, and other features."""
    layers = [n % teacher.depth for n in cfg.layers]
    grid = [n // p for n, p in zip(box.shape, patch, strict=True)]
    image = torch.from_numpy(volume.normalized_image(box))
    features: dict[str, Tensor] = {}

    for view in cfg.views:
        slice_axis = VIEW_AXES[view][0]
        slices = image.movedim(slice_axis, 0)[cfg.stride_v // 2 :: cfg.stride_v]
        padding = [n for size in reversed(slices.shape[1:]) for n in (0, -size % teacher.patch)]
        padded = torch.nn.functional.pad(slices[None], padding, mode="replicate")[0]

        values = run_teacher(teacher, padded.numpy(), layers, cfg.position_free)()
        maps = torch.from_numpy(values).float()  # [s, L, h, w, D]
        maps = maps.permute(1, 4, 0, 2, 3).movedim(2, 2 + slice_axis)  # [L, D, z, y, x]
        features[view] = torch.nn.functional.interpolate(maps, size=grid, mode="trilinear").half()
    return features


def _overlap(a: slice, b: slice) -> bool:
    return bool(a.start < b.stop and b.start < a.stop)
