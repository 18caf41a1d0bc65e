"""Synthetic data with the names, formats and folders of a data set, to try the whole kit without the data."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Shape
from hpc_neuro.data import swc
from hpc_neuro.data.synthetic.microscope import Microscope, render_stack
from hpc_neuro.data.synthetic.trees import TreeForm, grow_random_tree

VOXEL_SIZE = (0.38, 0.38, 0.38)
"""[um] That of BigNeuron's fly light stacks."""


def write_bigneuron(folder: Path, count: int, shape: Shape) -> None:
    """A release of BigNeuron: a folder for each neuron with its v3draw, its gold tree, and an earlier tree."""
    for number in range(1, count + 1):
        neuron = folder / "gold166_wids" / "checked7_janelia_flylight_part1" / f"{number}"
        _write_neuron(neuron / f"{number}.v3draw", neuron / f"{number}.v3draw.ano.swc_sorted.swc", number, shape)
        (neuron / f"{number}.v3draw_raw.swc").write_text("# an earlier stage\n1 2 1 1 1 1 -1\n", encoding="utf-8")


def write_pairs(folder: Path, count: int, shape: Shape) -> None:
    """Pairs of one stem in one folder, as other data sets come."""
    for number in range(1, count + 1):
        _write_neuron(folder / f"block_{number:03d}.v3draw", folder / f"block_{number:03d}.swc", number, shape)


def _write_neuron(image_path: Path, tree_path: Path, seed: int, shape: Shape) -> None:
    tree = grow_random_tree(seed, shape, VOXEL_SIZE, TreeForm())
    image = render_stack(tree, shape, VOXEL_SIZE, Microscope(), seed)

    image_path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(image_path) as part:
        part.write_bytes(encode_v3draw(image))
    swc.write(tree_path, tree, unit="voxel", voxel_size=VOXEL_SIZE)


def encode_v3draw(image: NDArray[np.generic]) -> bytes:
    """A v3draw of one channel: name, byte order, bytes of a voxel, sizes x y z c, voxels."""
    z, y, x = image.shape
    header = b"raw_image_stack_by_hpeng" + b"L" + struct.pack("<h4i", image.dtype.itemsize, x, y, z, 1)
    voxels = np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("<"))
    return header + voxels.tobytes()
