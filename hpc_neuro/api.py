"""Functions of the Python API that join several parts of the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Point, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from hpc_neuro.trace_stacks.tracer import trace_image
from hpc_neuro.tracing import TraceConfig


def trace(
    image: NDArray[Any] | Path | str,
    voxel_size: VoxelSize | None = None,
    *,
    root: Point | None = None,
    roots: Sequence[Point] = (),
    channel: int | None = None,
    cfg: TraceConfig | None = None,
) -> list[Tree]:
    """Trace an image without labels and without a network, as `hpc-neuro trace` does; trees in voxels, z y x.

    `image` is an array [Z, Y, X] or the path of any format that `open_volume` reads. `voxel_size` (um, z y x) None: as
    the file says, else voxels are taken for cubes. With `root` or `roots` (z y x voxels): one tree for each. Without:
    one for each soma, which has type 1, and for each other long piece from its thickest end.
    Raises InputError for an image that cannot be traced, and for a root outside it or off its foreground.
    """
    starts = [root] if root is not None else list(roots)
    if isinstance(image, np.ndarray):
        array = image
        if array.ndim != 3:
            raise InputError(f"an image has three axes z, y, x, found shape {array.shape}; drop the others")
        z, y, x = array.shape
        result = trace_image(lambda box: array[box.slices], (z, y, x), voxel_size, roots=starts, cfg=cfg)
    else:
        volume = open_volume(image, channel=channel)
        size = voxel_size or volume.voxel_size
        result = trace_image(volume.__getitem__, volume.shape, size, roots=starts, cfg=cfg)
    return result.trees
