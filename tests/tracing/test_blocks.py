"""The tree does not depend on the blocks in which the volume is read."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.geometry import Box, Shape
from hpc_neuro.morphology import Tree
from hpc_neuro.tracing import TraceConfig, foreground, trace_read

SHAPE = (40, 96, 130)


def _neurites() -> np.ndarray:
    """Three winding tubes, one with a break, through a volume."""
    z, y, x = np.indices(SHAPE, dtype=np.float32)
    found = np.zeros(SHAPE, np.float32)
    for a, b, c in ((12, 30, 0.0), (26, 60, 1.0), (20, 84, 2.5)):
        away = (z - a - 5 * np.sin(x / 15 + c)) ** 2 + (y - b - 6 * np.sin(x / 21 + c)) ** 2
        found = np.maximum(found, np.exp(-away / 8))
    found[:, 50:70, 62:68] = 0
    return found


@pytest.mark.parametrize("block", [(40, 96, 130), (16, 32, 32), (7, 11, 13)])
def test_the_same_trees_whatever_the_blocks(block: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    image = _neurites()
    largest = 0

    def read(box: Box) -> np.ndarray:
        nonlocal largest
        largest = max(largest, box.size)
        return image[box.slices]

    def trees() -> list[Tree]:
        return trace_read(read, SHAPE, (1.0, 1.0, 1.0), cfg=TraceConfig())

    once = trees()
    assert len(once) == 3  # the break is bridged
    largest = 0
    monkeypatch.setattr(foreground, "_BLOCK", block)
    again = trees()
    assert largest <= int(np.prod(block)) or largest < 40**3  # a bridge looks at the box round its ends
    assert len(again) == len(once)
    for a, b in zip(once, again, strict=True):
        assert np.array_equal(a.points, b.points)
        assert np.array_equal(a.radii, b.radii)
        assert np.array_equal(a.parents, b.parents)
