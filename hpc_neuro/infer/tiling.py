"""How volumes are cut: blocks to write, context to read, windows to predict, and shares of the blocks.

The windows lie on one lattice over the whole volume (see models.sliding_window), and a block is read with the context
of every window that touches it, so the blocks' borders do not show: the result is that of the whole volume at once.

A student that needs other voxels than those of the image sees another grid (see data.resample). Blocks are then written
on the grid of the image and read on that of the student, where the lattice of windows lies.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Block, Box, Shape, tile_volume
from hpc_neuro.data.resample import Resampling
from hpc_neuro.models import sliding_window

MASK = "mask"
"""Name of the label image: 1 where the probability is at least the threshold."""


@dataclass(frozen=True)
class Tiling:
    """How volumes are cut. All in voxels, z y x."""

    window: Shape
    overlap: float
    """Share of a window that the next one covers again."""
    patch: Shape
    block: Shape
    """As configured; `write` is what is used."""
    chunk: Shape
    resampling: Resampling | None = None
    """The grid that the student sees; None: that of the image."""

    @property
    def step(self) -> Shape:
        """From one window to the next."""
        return sliding_window.step(self.window, self.overlap, self.patch)

    @property
    def write(self) -> Shape:
        """The block rounded up to whole window steps and whole chunks; on a resampled image to whole chunks."""
        if self.resampling is not None:
            # Where the student sees more voxels than the image has, smaller blocks keep the memory bounded.
            shares = [min(factor, 1.0) for factor in self.resampling.factor]
            sizes = zip(self.block, shares, self.chunk, strict=True)
            z, y, x = (math.ceil(size * share / chunk) * chunk for size, share, chunk in sizes)
            return z, y, x

        # Blocks of whole steps share one lattice of windows, and a shard holds whole chunks.
        units = [math.lcm(step, chunk) for step, chunk in zip(self.step, self.chunk, strict=True)]
        z, y, x = (math.ceil(size / unit) * unit for size, unit in zip(self.block, units, strict=True))
        return z, y, x

    @property
    def halo(self) -> Shape:
        """Context read around a block: all that the windows touching it see, which is what its voxels depend on."""
        return sliding_window.halo(self.window, self.overlap, self.patch)

    def list_blocks(self, shape: Shape) -> list[Block]:
        """The blocks of a volume; `read` of a block of a resampled image is on the student's grid."""
        if self.resampling is None:
            return list(tile_volume(shape, self.write, self.halo))
        blocks = tile_volume(shape, self.write)
        return [Block(block.index, block.write, self._find_read_box(block.write, self.resampling)) for block in blocks]

    def _find_read_box(self, write: Box, resampling: Resampling) -> Box:
        """All that the windows see which touch a box of the image, on the student's grid."""
        box, step = resampling.find_new_box(write), self.step

        # A box of whole steps lies on the lattice of windows.
        start = tuple(a // s * s for a, s in zip(box.start, step, strict=True))
        stop = tuple(-(-b // s) * s for b, s in zip(box.stop, step, strict=True))
        around = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])).grow(self.halo)
        return around.clip(Box.whole(resampling.new_shape))

    def select_own(self, block: Block, probability: NDArray[np.float32]) -> NDArray[np.float32]:
        """The probability of what a block writes, from that of what it reads."""
        # The context belongs to other blocks, which write it.
        return self.make_reader(block, probability)(block.write)

    def make_reader(self, block: Block, probability: NDArray[np.float32]) -> Callable[[Box], NDArray[np.float32]]:
        """Reads boxes on the grid of the image, from the probability of what a block reads."""

        def read(box: Box) -> NDArray[np.float32]:
            return probability[box.relative_to(block.read.start).slices]

        return read if self.resampling is None else self.resampling.read_back(read)

    def find_neighborhoods(
        self, voxels: NDArray[np.int64], shape: Shape
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[M, 3] the first and the last voxels of the student's grid on which the neighborhoods of voxels [M, 3] of an
        image of `shape` depend: a voxel and those next to it."""
        low, high = np.maximum(voxels - 1, 0), np.minimum(voxels + 1, np.array(shape) - 1)
        if self.resampling is None:
            return low, high
        return self.resampling.find_new_voxels(low)[0], self.resampling.find_new_voxels(high)[1]

    def list_flip_blocks(self, shape: Shape) -> list[Block]:
        """The blocks for flipped views (flip_tta.py), read a step farther: there a place also depends on the voxels
        next to it. `read` of a block of a resampled image is on the student's grid."""
        if self.resampling is not None:
            blocks = tile_volume(shape, self.write, (1, 1, 1))
            return [Block(b.index, b.write, self._find_read_box(b.read, self.resampling)) for b in blocks]
        z, y, x = (halo + step for halo, step in zip(self.halo, self.step, strict=True))
        return list(tile_volume(shape, self.write, (z, y, x)))

    def count_windows(self, block: Block) -> int:
        """How often the student runs for a block."""
        axes = zip(block.read.shape, self.window, self.step, strict=True)
        return math.prod(max(math.ceil((size - window) / step), 0) + 1 for size, window, step in axes)

    def count_all_windows(self, shape: Shape) -> int:
        """How often the student runs on a volume of this shape."""
        return sum(self.count_windows(block) for block in self.list_blocks(shape))

    def take_share(self, blocks: Sequence[Block], share: tuple[int, int] | None) -> list[Block]:
        """Share i of n (i, n) of blocks; shares cost nearly the same. All blocks for None."""
        if share is None:
            return list(blocks)

        index, count = share
        own = list[Block]()

        # The dearest block goes to the share with the least load, so neighbors, which tend to be empty together, are
        # spread.
        loads = [(0, i) for i in range(count)]

        # The index breaks ties, so that all shares sort alike.
        for block in sorted(blocks, key=lambda b: (-self.count_windows(b), b.index)):
            load, lightest = heapq.heappop(loads)
            heapq.heappush(loads, (load + self.count_windows(block), lightest))

            if lightest == index:
                own.append(block)
        return sorted(own, key=lambda b: b.index)


def quantize(probability: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Probability [0, 1] as 0 to 255."""
    levels: NDArray[np.uint8] = np.rint(probability * 255).astype(np.uint8)
    return levels


def quantize_threshold(threshold: float) -> int:
    """The smallest of 0 to 255 that counts as at least `threshold`."""
    # The product may exceed a whole number by its rounding alone.
    return math.ceil(threshold * 255 - 1e-9)
