"""What a store's files hold: header, chunks, settings, and how they are opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.schema import InputError

FORMAT = 1
"""Raised when files written by an older version can no longer be read or would hold other targets."""

SPLITS = ("train", "val", "test")
CHUNK: Shape = (32, 64, 64)
INDEX = "dataset.json"
REMAKE = "make the store with `hpc-neuro prepare`"


@dataclass(frozen=True)
class VolumeRecord:
    """What the index says of one volume, and the header of its file."""

    id: str
    shape: Shape
    voxel_size: VoxelSize  # um, z y x
    dtype: np.dtype[Any]
    low: float
    high: float
    root: tuple[float, float, float] | None  # z y x voxel
    split: str
    digest: str  # of the image's content, the tree and the settings of the targets
    sources: Mapping[str, str]  # "image", "swc": SHA-256


def open_file(path: Path) -> Any:
    """An HDF5 file for reading, without locks: shared file systems refuse or hang on them, and nobody writes here."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise InputError(f"{path} cannot be read as HDF5 ({error}); {REMAKE} again") from error
