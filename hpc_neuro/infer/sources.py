"""Where the volumes come from: a store, or files of any format; each is normalised by one range for all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro import files, runs
from hpc_neuro.data.intensity import intensity_range, normalise
from hpc_neuro.data.store import Store
from hpc_neuro.data.volume import open_volume
from hpc_neuro.geometry import Box, Shape, VoxelSize
from hpc_neuro.infer.config import InferConfig, VolumeConfig
from hpc_neuro.schema import InputError


@dataclass(frozen=True)
class Source:
    """One volume to look at."""

    id: str
    image: str  # where it came from
    shape: Shape
    voxel_size: VoxelSize
    root: tuple[float, float, float] | None  # [voxel] z y x
    digest: str  # of what the result depends on
    read: Callable[[Box], NDArray[np.float32]]
    """Normalised voxels of a box inside the volume, float32 [Z, Y, X]."""
    file: Path | None = None
    """The image file, when it is one that is in no store ..."""
    content: str = ""
    """... and the SHA-256 of its bytes."""


def sources(cfg: InferConfig) -> Iterator[Source]:
    """All volumes, opened lazily. Raises InputError for what cannot be read or has no voxel size."""
    if cfg.store is not None:
        store = Store(cfg.store)
        if not store.split(cfg.split):
            raise InputError(f"{cfg.store} has no volume in the split {cfg.split}; choose another with split=NAME")
        for name in runs.share_of(store.split(cfg.split), cfg.share):
            v = store[name]
            yield Source(name, f"{cfg.store}:{name}", v.shape, v.voxel_size, v.root, v.digest, v.normalised)
    for item in runs.share_of(cfg.inputs, cfg.share):
        yield _from_file(item)


def _from_file(item: VolumeConfig) -> Source:
    volume = open_volume(item.image, channel=item.channel, axes=item.axes, dataset=item.dataset)
    size = item.voxel_size or volume.voxel_size
    if size is None:
        raise InputError(
            f"{item.image} does not say its voxel size, and trees are written in micrometres; give voxel_size=[z, y, x]"
        )
    if item.root is not None and any(not -0.5 <= r < n for r, n in zip(item.root, volume.shape, strict=True)):
        raise InputError(f"the root {item.root} lies outside {item.image}, whose shape is {volume.shape} (z y x)")
    low, high = intensity_range(lambda box: volume[box], volume.shape)
    content = files.sha256(item.image) if item.image.is_file() else str(item.image.resolve())
    digest = hashlib.sha256(f"{content} {item.channel} {item.axes} {item.dataset} {low} {high}".encode()).hexdigest()
    return Source(
        id=item.id or Path(item.image).name.partition(".")[0],
        image=str(item.image),
        shape=volume.shape,
        voxel_size=size,
        root=item.root,
        digest=digest,
        read=lambda box: normalise(volume[box], low, high),
        file=item.image if item.image.is_file() else None,
        content=content,
    )
