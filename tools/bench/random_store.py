"""Training stores of noise, of any size, for programs that look at nothing but speed, memory and sameness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.rasterize import DrawSettings
from hpc_neuro.data.store import VolumeRecord, write_index, write_volume


def write_store(folder: Path, names: Sequence[str], shape: Shape) -> Path:
    """Volumes of uint8 noise with one straight neurite along x, all in `train`; memory does not grow with `shape`."""
    folder.mkdir(parents=True)
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

        def noise(box: Box, number: int = number) -> NDArray[np.uint8]:
            return np.random.default_rng([number, *box.start]).integers(0, 201, box.shape, dtype=np.uint8)

        ends = [(shape[0] / 2, shape[1] / 2, x) for x in (3.0, shape[2] - 4.0)]
        tree = Tree(np.array(ends), np.full(2, 2.0), np.array([-1, 0]), np.full(2, 2))
        write_volume(folder / f"{name}.h5", volume, noise, tree, tree, DrawSettings())
        volumes.append(volume)
    write_index(folder, volumes)
    return folder
