"""Halving of uint8 images along some axes, at the speed of memory: what a level of a pyramid is made of."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Shape

Bytes = NDArray[np.uint8]
Sums = NDArray[np.uint16]


def halve(values: Bytes, step: Shape, method: Literal["mean", "max"]) -> Bytes:
    """Pool [Z, Y, X] by `step`, 1 or 2 along each axis; an odd end repeats its last voxel. Means round half to even."""
    padding = [(0, -n % s) for n, s in zip(values.shape, step, strict=True)]
    padded = np.pad(values, padding, mode="edge") if np.any(padding) else np.ascontiguousarray(values)
    z, y, x = (n // s for n, s in zip(padded.shape, step, strict=True))
    pooled = np.empty((z, y, x), np.uint8)

    # One or two planes at a time stay in the cache from the first sum to the last.
    for index in range(z):
        planes = padded[index * step[0] : (index + 1) * step[0]]
        pooled[index] = _average(planes, step) if method == "mean" else _find_largest(planes, step)
    return pooled


def _average(planes: Bytes, step: Shape) -> Bytes:
    """Mean of one or two planes [n, Y, X] over cells of `step`; [Y, X]."""
    # A sum of eight bytes fits 16 bits.
    sums = _add_neighbors_along_x(planes) if step[2] == 2 else planes.astype(np.uint16)
    if step[1] == 2:
        sums = sums[:, 0::2] + sums[:, 1::2]
    total = sums[0] + sums[1] if step[0] == 2 else sums[0]
    return _divide(total, step[0] * step[1] * step[2])


def _add_neighbors_along_x(planes: Bytes) -> Sums:
    """[n, Y, X] -> [n, Y, X / 2]: two bytes read as one number are taken apart without strides."""
    pairs = planes.view(np.uint16)
    sums = pairs & np.uint16(0xFF)
    sums += pairs >> np.uint16(8)
    return sums


def _divide(total: Sums, count: int) -> Bytes:
    """Divide by a power of two, rounding half to even as np.rint does."""
    bits = count.bit_length() - 1
    if bits == 0:
        return total.astype(np.uint8)

    # Just under a half, and the missing one where the quotient is odd.
    is_odd = (total >> np.uint16(bits)) & np.uint16(1)
    rounded = (total + np.uint16(count // 2 - 1) + is_odd) >> np.uint16(bits)
    return rounded.astype(np.uint8)


def _find_largest(planes: Bytes, step: Shape) -> Bytes:
    """Largest value of one or two planes [n, Y, X] over cells of `step`; [Y, X]."""
    largest: Bytes = np.maximum(planes[0], planes[1]) if step[0] == 2 else planes[0]
    if step[1] == 2:
        largest = np.maximum(largest[0::2], largest[1::2])
    # The strided axis comes last, when little is left.
    return np.maximum(largest[:, 0::2], largest[:, 1::2]) if step[2] == 2 else largest
