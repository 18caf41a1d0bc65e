"""Skeletons of neighboring blocks of tracing: read at once, made by one task, and kept in one file.

A brain has millions of blocks of tracing, and each touches several shards. Of a large volume a task reads a group of
blocks with one halo, which opens each shard for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.tracing import BlockSkeleton

GROUPED_FROM = 50_000
"""[block] A volume of more is skeletonized in groups; of fewer, each block is a task, so that all ranks have some."""
GROUP: Shape = (2, 4, 4)
"""[block] of one group; 270 MB of probability at the blocks of the defaults."""
Skeletons = dict[str, BlockSkeleton]
"""Name of a block -> its skeleton; a block without neurite is left out."""


def choose_group(shape: Shape, block: Shape) -> Shape:
    """[voxel] z y x of the groups of a volume of `shape`."""
    count = math.prod(math.ceil(n / b) for n, b in zip(shape, block, strict=True))
    z, y, x = (b * g if count > GROUPED_FROM else b for b, g in zip(block, GROUP, strict=True))
    return z, y, x


def group_boxes(boxes: Iterable[Box], group: Shape) -> list[list[Box]]:
    """Boxes by the group that they begin in; groups and boxes keep their order."""
    groups = dict[Shape, list[Box]]()
    for box in boxes:
        groups.setdefault(find_corner(box, group), []).append(box)
    return list(groups.values())


def find_corner(box: Box, group: Shape) -> Shape:
    """[voxel] The first voxel of the group that a box begins in."""
    z, y, x = (start // size * size for start, size in zip(box.start, group, strict=True))
    return z, y, x


def read_at_once(read: Callable[[Box], NDArray[np.uint8]], halos: Sequence[Box]) -> Callable[[Box], NDArray[np.uint8]]:
    """Reads boxes inside `halos`, of which the voxels are read now."""
    starts, stops = (np.array([getattr(halo, end) for halo in halos]) for end in ("start", "stop"))
    whole = Box(tuple(starts.min(axis=0)), tuple(stops.max(axis=0)))
    values = read(whole)
    return lambda box: values[box.relative_to(whole.start).slices]


def save_skeletons(path: Path, skeletons: Skeletons) -> None:
    """Keep the skeletons of a group in one npz file, whole or not at all; without arrays where all are empty."""
    arrays = {
        f"{name}.{field.name}": getattr(skeleton, field.name)
        for name, skeleton in skeletons.items()
        for field in fields(skeleton)
    }
    files.write_npz(path, arrays)


def load_skeletons(path: Path) -> Skeletons:
    """What `save_skeletons` wrote; {} where nothing was to be skeletonized and no file is."""
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        return {}
    with handle, np.load(handle) as arrays:
        names = dict.fromkeys(key.partition(".")[0] for key in arrays.files)
        return {name: BlockSkeleton(*_pick(arrays, name)) for name in names}


def name_box(box: Box) -> str:
    """A block's name in the file of its group."""
    return "_".join(map(str, box.start))


def _pick(arrays: Mapping[str, Any], name: str) -> Iterator[Any]:
    """The fields of one skeleton, in their order."""
    for field in fields(BlockSkeleton):
        yield arrays[f"{name}.{field.name}"]
