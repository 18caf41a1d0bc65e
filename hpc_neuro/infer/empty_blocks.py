"""Which blocks hold nothing: by the brightest cell of what a block's windows would see."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Shape

_SLAB = 64  # planes at once: the copy in float64 stays small


def brightest(image: NDArray[np.float32], cell: Shape) -> float:
    """The largest mean of any cell of a normalised image [Z, Y, X]; cells at the end may be smaller.

    The mean over a cell sets a thin dim neurite off from noise, which the largest voxel of millions does not.
    """
    if not image.any():
        return 0.0
    highest = 0.0
    planes = max(_SLAB // cell[0], 1) * cell[0]
    for first in range(0, len(image), planes):
        sums, counts = image[first : first + planes].astype(np.float64), np.ones(1)
        for axis, size in enumerate(cell):
            starts = np.arange(0, sums.shape[axis], size)
            widths = np.diff(np.append(starts, sums.shape[axis]))
            sums = np.add.reduceat(sums, starts, axis=axis)
            counts = counts * widths.reshape([-1 if a == axis else 1 for a in range(3)])
        highest = max(highest, float((sums / counts).max()))
    return highest


def chosen(share: float, key: str, index: Shape) -> bool:
    """Whether a block belongs to a random `share` of all; the same blocks whoever asks."""
    drawn = int(hashlib.sha256(f"{key} {index}".encode()).hexdigest()[:8], 16) / 2**32
    return drawn < share
