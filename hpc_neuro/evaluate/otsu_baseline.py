"""The baseline that needs no training: Otsu's threshold of the raw image, traced like the model's probability."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.filters import threshold_otsu

from hpc_neuro.core.geometry import Box, blocks
from hpc_neuro.data.store import StoredVolume

_BLOCK = (64, 512, 512)
_BINS = 1 << 16  # for images with more values than that


def threshold(volume: StoredVolume) -> float:
    """Otsu's threshold of the whole image (foreground is above it), from a histogram gathered block by block.

    Images of up to 16 bits have one bin per value: the result is that of scikit-image on the whole array. Others have
    65,536 bins between their extremes. Source: Otsu 1979.
    """
    dtype = volume.dtype
    if dtype.kind == "u" and dtype.itemsize <= 2:
        size = 1 << (8 * dtype.itemsize)
        counts = np.zeros(size, dtype=np.int64)
        for block in blocks(volume.shape, _BLOCK):
            counts += np.bincount(volume.image(block.write).ravel(), minlength=size)
        values: NDArray[np.float64] = np.arange(size, dtype=np.float64)
    else:
        ends = [(float(b.min()), float(b.max())) for b in (volume.image(t.write) for t in blocks(volume.shape, _BLOCK))]
        low, high = min(a for a, _ in ends), max(b for _, b in ends)
        counts = np.zeros(_BINS, dtype=np.int64)
        for block in blocks(volume.shape, _BLOCK):
            counts += np.histogram(volume.image(block.write), bins=_BINS, range=(low, high))[0]
        values = low + (np.arange(_BINS) + 0.5) * (high - low) / _BINS
    present = np.flatnonzero(counts)
    kept = slice(int(present[0]), int(present[-1]) + 1)
    return float(threshold_otsu(hist=(counts[kept], values[kept])))


class OtsuMask:
    """Where the raw image is above Otsu's threshold, read by box."""

    def __init__(self, volume: StoredVolume) -> None:
        self.threshold = threshold(volume)
        self._volume = volume

    def mask(self, box: Box) -> NDArray[np.bool_]:
        """[Z, Y, X] bool."""
        return np.greater(self._volume.image(box), self.threshold)

    def probability(self, box: Box) -> NDArray[np.float32]:
        """[Z, Y, X] 0 or 1, as the tracer wants it."""
        return self.mask(box).astype(np.float32)
