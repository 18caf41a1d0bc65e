"""What every format test asks of a volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.types import Array
from hpc_neuro.data.formats import open_volume

SHAPE = (5, 7, 9)
UM = (1.0, 0.33, 0.25)


def make_image(dtype: str = "uint16", shape: tuple[int, ...] = SHAPE) -> Array:
    """A field whose every voxel is different, so that a swapped axis or byte shows."""
    return (np.arange(np.prod(shape)).reshape(shape) % 60000 + 1).astype(dtype)


def assert_reads(path: Path, expected: Array, um: tuple[float, ...] | None = None, **options: object) -> None:
    volume = open_volume(path, **options)
    assert volume.shape == expected.shape
    assert volume.dtype == expected.dtype
    np.testing.assert_array_equal(volume[Box.whole(volume.shape)], expected)
    box = Box((1, 2, 3), tuple(min(n, n - 1) for n in expected.shape))
    part = volume[box]
    np.testing.assert_array_equal(part, expected[box.slices])
    assert part.flags.owndata
    assert part.flags.writeable
    assert (volume.voxel_size is None) if um is None else np.allclose(volume.voxel_size, um, rtol=1e-5)
    assert str(path) in volume.describe()


def write_tiff(path: Path, data: Array, **options: object) -> None:
    tifffile.imwrite(path, data, **options)
