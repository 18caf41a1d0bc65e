"""Widths of neurites, against tubes of known width."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.neurite_width import (
    NeuriteWidths,
    has_square_voxels,
    list_widths,
    measure_widths,
    summarize_widths,
)

SHAPE: Shape = (48, 96, 128)
FULL_WIDTH = 2 * np.sqrt(2 * np.log(2))
"""Width of a Gaussian at half of its height, in standard deviations."""


def draw_line(start: tuple[float, ...], stop: tuple[float, ...]) -> Tree:
    """A straight cable of 60 nodes."""
    points = np.linspace(start, stop, 60)
    return Tree(points, np.ones(60), np.arange(-1, 59), np.zeros(60, dtype=np.int64))


def paint_tube(cable: Tree, depth: float, plane: float, shape: Shape = SHAPE) -> NDArray[np.float32]:
    """A Gaussian tube around a straight cable in the plane, of these full widths at half maximum, along z and in it."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).astype(float)
    start, direction = cable.points[0], cable.points[-1] - cable.points[0]
    direction = direction / np.linalg.norm(direction)
    across = np.cross(direction, [1.0, 0.0, 0.0])
    off = grid - start
    shown = (off[..., 0] * FULL_WIDTH / depth) ** 2 + (off @ across * FULL_WIDTH / plane) ** 2
    return (10 + 100 * np.exp(-shown / 2)).astype(np.float32)


def measure(image: NDArray[np.float32], cable: Tree) -> NeuriteWidths:
    z, y, x = image.shape
    return measure_widths(cable, lambda box: image[box.slices], (z, y, x))


@pytest.mark.parametrize(("depth", "plane"), [(2.0, 2.0), (3.0, 6.0), (9.0, 4.0), (5.0, 14.0)])
@pytest.mark.parametrize("end", [(24.0, 48.0, 120.0), (24.0, 88.0, 100.0), (24.0, 90.0, 20.0)])
def test_the_widths_are_those_of_the_tube(depth: float, plane: float, end: tuple[float, float, float]) -> None:
    cable = draw_line((24.0, 20.0, 12.0), end)
    widths = measure(paint_tube(cable, depth, plane), cable).median
    # Linear interpolation between voxels makes a narrow tube a little wider.
    assert widths == pytest.approx((depth, plane), rel=0.12)


def test_noise_and_a_cable_beside_its_ridge_change_little() -> None:
    cable = draw_line((24.0, 20.0, 12.0), (24.0, 80.0, 110.0))
    image = paint_tube(cable, 4.0, 4.0) + np.random.default_rng(0).normal(0, 25, SHAPE).astype(np.float32)
    beside = draw_line((24.6, 20.8, 11.2), (24.6, 80.8, 109.2))
    assert measure(image, beside).median == pytest.approx((4.0, 4.0), rel=0.2)


def test_reading_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cable = draw_line((24.0, 20.0, 12.0), (24.0, 80.0, 110.0))
    image = paint_tube(cable, 3.0, 5.0)
    whole = measure(image, cable)
    monkeypatch.setattr("hpc_neuro.data.neurite_width._READ_BLOCK", (16, 32, 32))
    boxes = list[Box]()

    def read(box: Box) -> NDArray[np.float32]:
        boxes.append(box)
        return image[box.slices]

    blocked = measure_widths(cable, read, SHAPE)
    np.testing.assert_allclose(np.sort(blocked.plane), np.sort(whole.plane), rtol=1e-5)
    assert max(box.size for box in boxes) < image.size / 2


def test_the_width_along_z_is_measured_beside_the_z_axis_only() -> None:
    cable = draw_line((4.0, 48.0, 64.0), (44.0, 48.0, 64.0))
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    tube = 100 * np.exp(-(FULL_WIDTH**2) * ((y - 48) ** 2 + (x - 64) ** 2) / (2 * 5.0**2))
    widths = measure(np.broadcast_to(tube, SHAPE).astype(np.float32), cable)
    assert len(widths.depth) == 0
    assert widths.median[1] == pytest.approx(5.0, rel=0.1)

    # A projection has no such width.
    flat = draw_line((0.0, 20.0, 12.0), (0.0, 80.0, 110.0))
    image = paint_tube(flat, 3.0, 5.0, (1, *SHAPE[1:]))
    assert measure(image, flat).median == (None, pytest.approx(5.0, rel=0.1))


def test_what_cannot_be_measured_stays_unknown() -> None:
    # Flat, and hardly any cable; what is wider than the ruler is wide.
    wide = draw_line((24.0, 48.0, 12.0), (24.0, 48.0, 120.0))
    assert (measure(paint_tube(wide, 3.0, 200.0), wide).median[1] or 0) > 20
    assert measure(np.full(SHAPE, 7, np.float32), wide).median == (None, None)
    short = draw_line((24.0, 48.0, 12.0), (24.0, 48.0, 20.0))
    assert measure(paint_tube(short, 3.0, 3.0), short).median == (None, None)


def test_volumes_weigh_the_same_and_a_depth_may_be_unknown() -> None:
    none = np.zeros(0)
    small, large = NeuriteWidths(none, np.full(20, 2.0)), NeuriteWidths(none, np.full(900, 4.0))
    quartiles = summarize_widths([small, large, NeuriteWidths(none, none)])
    assert quartiles == ((None, 2.0), (None, 3.0), (None, 4.0))
    assert list_widths(quartiles) == [[None, 2.0], [None, 3.0], [None, 4.0]]
    assert summarize_widths([NeuriteWidths(none, none)]) is None
    assert list_widths(None) is None


def test_voxels_are_square_or_not() -> None:
    assert has_square_voxels((5.0, 1.0, 1.2))
    assert not has_square_voxels((1.0, 0.3, 0.1))
