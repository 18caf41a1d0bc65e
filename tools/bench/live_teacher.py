"""What a training without a cache would do in every step: ask the teacher for the features of a crop."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.data.feature_cache import VIEW_AXES, Cells
from hpc_neuro.data.store import StoredVolume
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute import PrecomputeConfig, plan
from hpc_neuro.precompute.build import look
from hpc_neuro.precompute.slices import jobs, pixels

_BATCH = 8


def same_as_cache(
    cfg: PrecomputeConfig, volume: StoredVolume, teacher: Teacher, box: Box, patch: Shape
) -> dict[str, Tensor]:
    """view -> [L, D, z, y, x] float16: just what `FeatureCache.crop` gives.

    A token's features depend on all that the teacher sees around it, so every tile that the crop touches (tile and halo
    as `cfg` has them) is looked at whole, in each slice that the crop touches, along each view.
    """
    layers, found = [n % teacher.depth for n in cfg.layers], dict[str, Tensor]()
    for view in cfg.views:
        units = plan(cfg, volume, view, teacher.patch)
        cells = Cells.under(box, patch, units)
        touched = dataclasses.replace(
            units[0],
            first=cells.slices.start * cfg.stride_v,
            count=cells.slices.stop - cells.slices.start,
        )
        maps = torch.zeros(touched.count, len(layers), touched.rows, touched.columns, teacher.dim, dtype=torch.float16)
        for job in jobs(cfg, touched, teacher.patch, _BATCH):
            if _meet(job.rows, cells.rows) and _meet(job.columns, cells.columns):
                values = look(teacher, pixels(volume, touched, job), layers)()
                inner = torch.from_numpy(values[:, :, job.inner_rows, job.inner_columns])
                maps[job.slices, :, job.rows, job.columns] = inner
        found[view] = cells.on_tokens(maps[:, :, cells.rows, cells.columns]).half()
    return found


def crop_alone(
    cfg: PrecomputeConfig, volume: StoredVolume, teacher: Teacher, box: Box, patch: Shape
) -> dict[str, Tensor]:
    """view -> [L, D, z, y, x] float16 of a teacher that sees nothing but the crop: cheaper, and other features."""
    layers, found = [n % teacher.depth for n in cfg.layers], dict[str, Tensor]()
    grid = [n // p for n, p in zip(box.shape, patch, strict=True)]
    image = torch.from_numpy(volume.normalized_image(box))
    for view in cfg.views:
        across = VIEW_AXES[view][0]
        slices = image.movedim(across, 0)[cfg.stride_v // 2 :: cfg.stride_v]
        padding = [n for size in reversed(slices.shape[1:]) for n in (0, -size % teacher.patch)]
        padded = torch.nn.functional.pad(slices[None], padding, mode="replicate")[0]
        maps = torch.from_numpy(look(teacher, padded.numpy(), layers)()).float()  # [s, L, h, w, D]
        standing = maps.permute(1, 4, 0, 2, 3).movedim(2, 2 + across)
        found[view] = torch.nn.functional.interpolate(standing, size=grid, mode="trilinear").half()
    return found


def _meet(a: slice, b: slice) -> bool:
    return bool(a.start < b.stop and b.start < a.stop)
