"""A student that finds the neurites of a stack: its probability, read by box, as `trace` reads the foreground."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import distributed, stop_signals
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.data.foreground import HALF, KEPT_VOXELS, Foreground
from hpc_neuro.data.intensity import compute_intensity_range, normalize
from hpc_neuro.infer.predictor import choose_window, predict_black
from hpc_neuro.infer.progress import WindowProgress
from hpc_neuro.infer.tiling import Tiling
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import load_student
from hpc_neuro.models.student_folder import find_student, read_contrast

_OVERLAP = 0.25
"""Share of a window that the next one covers again, as in `infer`."""
_BATCH = 4
"""Windows at once; halved where the memory does not suffice."""
_BLOCK: Shape = (128, 512, 512)
"""[voxel] Predicted at once in a large volume."""
_WHOLE_VOXELS = 1 << 25
"""[voxel] A volume up to this size is predicted at once, so that no window runs twice."""


class StackPredictor:
    """A student, ready to predict stacks."""

    def __init__(self, model: Path, limits: tuple[float, float] | None = None) -> None:
        """`model` as of `find_student`; `limits` is the brightness that becomes 0 and 1, None: measured.

        Raises InputError and ConfigError for weights that cannot be used.
        """
        folder = find_student(model)
        self._limits = limits
        self.student, self.meta = load_student(folder)
        self.device = distributed.device()
        self.student.to(self.device)

        self.threshold = float(self.meta.get("threshold", 0.5))
        self.window = choose_window(folder, self.meta, self.student.patch, None)
        self.contrast = read_contrast(self.meta)
        self._batch = sliding_window.BatchSize(_BATCH)

    def predict(self, foreground: Foreground, label: str) -> NDArray[np.uint8]:
        """[Z, Y, X] probability of neurite in the image of a foreground; 128 stands for the student's threshold.

        Takes one byte a voxel: in memory, of a large stack in a temporary file. Raises InputError for an image without
        contrast.
        """
        shape = foreground.shape
        read = self._make_reader(foreground)
        tiling = Tiling(self.window, _OVERLAP, self.student.patch, self._choose_block(shape), (1, 1, 1))
        blocks = tiling.list_blocks(shape)
        scale = _make_scale(self.threshold)

        probability = _allocate(shape)
        with WindowProgress(label, tiling.count_all_windows(shape)) as progress:
            for block in stop_signals.until_stopped(blocks):
                values = sliding_window.predict(
                    self.student,
                    read(block.read),
                    tiling.window,
                    tiling.overlap,
                    self._batch,
                    self.device,
                    lambda count: _advance(progress, count),
                    skip_black=self.skips_black,
                )
                own = values[block.write.relative_to(block.read.start).slices]
                probability[block.write.slices] = scale[np.rint(own * 255).astype(np.uint8)]
        return probability

    def _make_reader(self, foreground: Foreground) -> Callable[[Box], NDArray[np.float32]]:
        """Reads what the student sees of a box, as in its training."""
        if self.contrast == "local":
            return foreground.local_contrast
        low, high = self._find_limits(foreground)
        return lambda box: normalize(foreground.read_image(box), low, high)

    def _find_limits(self, foreground: Foreground) -> tuple[float, float]:
        """The brightness of the image, bright on dark, that becomes 0 and 1."""
        if self._limits is None:
            return compute_intensity_range(foreground.read_image, foreground.shape)
        low, high = self._limits
        # An image that is dark on bright is read from its brightest value downwards.
        return (low, high) if foreground.top is None else (foreground.top - high, foreground.top - low)

    @functools.cached_property
    def skips_black(self) -> bool:
        """Whether windows of zeros need not be run, because the student finds nothing in them."""
        return predict_black(self.student, self.window, self.device) < self.threshold

    def _choose_block(self, shape: Shape) -> Shape:
        return shape if math.prod(shape) <= _WHOLE_VOXELS else _BLOCK


def _allocate(shape: Shape) -> NDArray[np.uint8]:
    """An array of bytes; one that is too large for the memory lies in a file without a name, which ends with it."""
    if math.prod(shape) <= KEPT_VOXELS:
        return np.empty(shape, dtype=np.uint8)
    return np.memmap(tempfile.TemporaryFile(), dtype=np.uint8, mode="w+", shape=shape)


def _advance(progress: WindowProgress, count: int) -> None:
    """Count windows; a stop request ends the block."""
    stop_signals.check()
    progress.advance(count)


def _make_scale(threshold: float) -> NDArray[np.uint8]:
    """[256] probability as one byte -> the same with the threshold moved to `HALF`, linear on both sides of it."""
    levels = np.linspace(0, 1, 256)
    below = levels / threshold * HALF
    above = HALF + (levels - threshold) / (1 - threshold) * (255 - HALF)
    return np.where(levels < threshold, np.minimum(below, HALF - 1), above).astype(np.uint8)
