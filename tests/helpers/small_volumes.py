"""A tiny student, and inference with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from hpc_neuro import infer
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.schema import load
from hpc_neuro.core.task_queue import RetryLimits
from hpc_neuro.data import ome_zarr
from hpc_neuro.infer.block_pipeline import EmptyRule, VolumeRun, predict_blocks
from hpc_neuro.infer.progress import WindowProgress
from hpc_neuro.infer.tiling import Tiling
from hpc_neuro.infer.volumes import InputVolume
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import load_student

WINDOW = (8, 32, 32)
KEYS = ["block=[8,32,32]", "chunk=[4,16,16]", "trees=false", "page=false"]


def configure(model: Path, out: Path, *keys: str) -> infer.InferConfig:
    return load(infer.InferConfig, None, [f"model={model}", f"out={out}", *KEYS, *keys])


def probability(out: Path, name: str) -> np.ndarray:
    return np.asarray(ome_zarr.open_level(out / f"{name}.ome.zarr").read().result())


def write_crossing(path: Path) -> str:
    """Write an image of two neurites that cross; its entry of `inputs`, with a root for each."""
    image = np.zeros((16, 64, 64), dtype=np.uint8)
    for i in range(4, 60):
        image[6:11, i - 2 : i + 3, i - 2 : i + 3] = 255
        image[6:11, 61 - i : 66 - i, i - 2 : i + 3] = 255
    tifffile.imwrite(path, image, photometric="minisblack", metadata={"axes": "ZYX"})
    return f"{{image: {path}, voxel_size: [1, 0.5, 0.5], roots: [[8, 4, 4], [8, 60, 4]]}}"


@dataclass(frozen=True)
class ArrayVolume:
    """A volume that is an array."""

    image: np.ndarray
    voxel_size: VoxelSize = (1.0, 1.0, 1.0)

    @property
    def shape(self) -> Shape:
        z, y, x = self.image.shape
        return z, y, x

    def normalized_image(self, box: Box) -> np.ndarray:
        return self.image[box.slices]


def open_run(
    model: Path,
    volume: Any,
    out: Path,
    read: Callable[[Box], Any] | None = None,
    tries: int = 1,
    empty: EmptyRule | None = None,
) -> VolumeRun:
    """A run of one volume, whose folder exists."""
    student, _ = load_student(model / "weights" / "best")
    tiling = Tiling(WINDOW, 0.5, student.patch, (8, 32, 32), (4, 16, 16))
    source = InputVolume("a", "a", volume.shape, volume.voxel_size, (), "d", read or volume.normalized_image)

    def predict(image: np.ndarray, seen: Callable[[int], None]) -> np.ndarray:
        return sliding_window.predict(student, image, WINDOW, seen=seen)

    run = VolumeRun.open(source, tiling, predict, 0.45, "key", out, empty, RetryLimits(tries=tries))
    run.create_folder()
    return run


def predict_missing(run: VolumeRun) -> WindowProgress:
    """Predict the missing blocks; the progress that counted their windows."""
    missing = run.markers.list_missing(run.list_blocks())
    progress = WindowProgress("a", sum(map(run.tiling.count_windows, missing)))
    predict_blocks(run, missing, progress)
    return progress
