"""The grid on which a student sees an image: that of the image, or another with voxels like those of its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.data.resample import Resampling
from hpc_neuro.models.student_folder import fit_voxel_size, format_sides


def choose_grid(
    extra: Mapping[str, Any], model: Path, shape: Shape, size: VoxelSize | None, image: str
) -> Resampling | None:
    """The grid for the student `model` of an image of `shape`; None: that of the image.

    `extra`, `size` (um, z y x; None where it is unknown) and errors as of `fit_voxel_size`.
    """
    factor = fit_voxel_size(extra, model, size, image)
    return None if factor is None or size is None else Resampling(shape, size, factor)


def describe_grid(grid: Resampling) -> str:
    """In words, what happens to the voxels of an image."""
    return (
        f"voxels of {format_sides(grid.voxel_size)} um are resampled to {format_sides(grid.new_voxel_size)} um for "
        f"this student, {' x '.join(map(str, grid.shape))} voxels to {' x '.join(map(str, grid.new_shape))} "
        "(any_voxel_size=true takes them as they are)"
    )
