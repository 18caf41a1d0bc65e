"""How volumes are cut: blocks to write, context to read, windows to look at, and who does which.

The windows lie on one lattice over the whole volume (see models.sliding_window), and a block is read with the context
of every window that touches it, so the blocks' borders do not show: the result is that of the whole volume at once.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Block, Shape, tile_volume
from hpc_neuro.models import sliding_window

MASK = "mask"


@dataclass(frozen=True)
class Plan:
    """How volumes are cut. All in voxels, z y x."""

    window: Shape
    overlap: float
    patch: Shape
    block: Shape  # as asked for
    chunk: Shape

    @property
    def step(self) -> Shape:
        """From one window to the next."""
        return sliding_window.step(self.window, self.overlap, self.patch)

    @property
    def write(self) -> Shape:
        """The block rounded up to whole window steps and whole chunks."""
        unit = [math.lcm(s, c) for s, c in zip(self.step, self.chunk, strict=True)]
        z, y, x = (math.ceil(b / u) * u for b, u in zip(self.block, unit, strict=True))
        return z, y, x

    @property
    def halo(self) -> Shape:
        """Context read around a block: all that the windows touching it see, which is what its voxels depend on."""
        return sliding_window.halo(self.window, self.overlap, self.patch)

    def blocks(self, shape: Shape) -> list[Block]:
        """The blocks of a volume."""
        return list(tile_volume(shape, self.write, self.halo))

    def second(self, shape: Shape) -> list[Block]:
        """The blocks for a second look (views.py), where a place also depends on the voxels next to it: read a step
        farther."""
        z, y, x = (h + s for h, s in zip(self.halo, self.step, strict=True))
        return list(tile_volume(shape, self.write, (z, y, x)))

    def cost(self, block: Block) -> int:
        """How often the student runs for a block."""
        pairs = zip(block.read.shape, self.window, self.step, strict=True)
        return math.prod(max(math.ceil((n - w) / s), 0) + 1 for n, w, s in pairs)

    def windows(self, shape: Shape) -> int:
        """How often the student runs on a volume of this shape."""
        return sum(self.cost(block) for block in self.blocks(shape))

    def share(self, found: Sequence[Block], share: tuple[int, int] | None) -> list[Block]:
        """The i-th of n shares (i, n) of blocks, of nearly equal cost; all of them for None.

        The dearest block goes to whoever has least so far, so neighbours, which tend to be empty together, are spread.
        """
        if share is None:
            return list(found)
        mine, load = [], [(0, i) for i in range(share[1])]
        for block in sorted(found, key=lambda b: (-self.cost(b), b.index)):
            total, who = heapq.heappop(load)
            heapq.heappush(load, (total + self.cost(block), who))
            if who == share[0]:
                mine.append(block)
        return sorted(mine, key=lambda b: b.index)


def quantised(probability: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Probability [0, 1] as 0 to 255."""
    levels: NDArray[np.uint8] = np.rint(probability * 255).astype(np.uint8)
    return levels


def least(threshold: float) -> int:
    """The smallest of 0 to 255 that counts as at least `threshold`."""
    return math.ceil(threshold * 255 - 1e-9)
