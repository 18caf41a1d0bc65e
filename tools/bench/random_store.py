"""Training stores of noise, of any size, for programs that measure speed, memory and reproducibility."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.rasterize import DrawSettings
from hpc_neuro.data.store import VolumeRecord, write_index, write_volume


def write_store(folder: Path, names: Sequence[str], shape: Shape) -> Path:
    """Write volumes of uint8 noise with one straight neurite along x, all in `train`; streamed. Returns the folder."""
    folder.mkdir(parents=True)
    ends = [(shape[0] / 2, shape[1] / 2, x) for x in (3.0, shape[2] - 4.0)]
    tree = Tree(np.array(ends), np.full(2, 2.0), np.array([-1, 0]), np.full(2, 2))

    volumes = []
    for number, name in enumerate(names):
        volume = VolumeRecord(
            id=name,
            shape=shape,
            voxel_size=(1.0, 1.0, 1.0),
            dtype=np.dtype(np.uint8),
            low=0.0,
            high=200.0,
            root=None,
            split="train",
            digest=f"noise {number} of {shape}",
            sources={"image": str(number), "swc": str(number)},
        )
        read = functools.partial(_draw_noise, number)
        write_volume(folder / f"{name}.h5", volume, read, tree, tree, DrawSettings())
        volumes.append(volume)

    write_index(folder, volumes)
    return folder


def _draw_noise(number: int, box: Box) -> NDArray[np.uint8]:
    return np.random.default_rng([number, *box.start]).integers(0, 201, box.shape, dtype=np.uint8)
