"""Another grid over the same image: exact means, linear between centers, the same in boxes of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hpc_neuro.core.geometry import Box, Point, Shape, fine_voxel
from hpc_neuro.core.morphology import build_tree
from hpc_neuro.data import resample as module
from hpc_neuro.data.resample import Resampling

FACTORS = st.tuples(*[st.sampled_from([1 / 8, 0.3, 0.5, 1.0, 1.7, 2.0, 3.1, 8.0]) for _ in range(3)])
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 14), st.integers(1, 16))


def make_grid(shape: Shape, factor: Point) -> Resampling:
    return Resampling(shape, (1.0, 0.5, 0.25), factor)


def read_whole(grid: Resampling, image: np.ndarray) -> np.ndarray:
    return grid.read_new(lambda box: image[box.slices])(Box.whole(grid.new_shape))


def test_coarser_voxels_are_means_and_finer_ones_linear() -> None:
    image = np.random.default_rng(0).random((8, 12, 16)).astype(np.float32)
    coarse = read_whole(make_grid(image.shape, (2, 3, 4)), image)
    np.testing.assert_allclose(coarse, image.reshape(4, 2, 4, 3, 4, 4).mean(axis=(1, 3, 5)), rtol=1e-6)

    # scipy's grid of the same corners, whose borders stay as well.
    fine = read_whole(make_grid(image.shape, (0.5, 0.5, 0.5)), image)
    oracle = ndimage.zoom(image, 2, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(fine, oracle, atol=1e-6)


def test_a_coarser_voxel_counts_the_share_of_each_voxel() -> None:
    image = np.arange(5, dtype=np.float32).reshape(1, 1, 5)
    coarse = read_whole(make_grid((1, 1, 5), (1, 1, 1.5)), image)
    # The last voxel reaches over the end, and is the mean of what lies inside.
    np.testing.assert_allclose(coarse[0, 0], [1 / 3, (0.5 + 2) / 1.5, (3 + 2) / 1.5, 4.0], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(SHAPES, FACTORS, st.randoms(use_true_random=False))
def test_boxes_hold_what_the_whole_does(shape: Shape, factor: Point, random: object) -> None:
    rng = np.random.default_rng(random.randrange(1 << 30))  # type: ignore[attr-defined]
    image = rng.random(shape).astype(np.float32)
    grid = make_grid(shape, factor)
    whole = read_whole(grid, image)
    assert whole.shape == grid.new_shape
    assert image.min() - 1e-6 <= whole.min()
    assert whole.max() <= image.max() + 1e-6

    back = grid.read_back(lambda box: whole[box.slices])
    for size, read, values in (
        (grid.new_shape, grid.read_new(lambda box: image[box.slices]), whole),
        (shape, back, back(Box.whole(shape))),
    ):
        start = [int(rng.integers(n)) for n in size]
        stop = [int(rng.integers(a + 1, n + 1)) for a, n in zip(start, size, strict=True)]
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        np.testing.assert_array_equal(read(box), values[box.slices])


def test_memory_is_bounded_by_reading_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).random((32, 48, 40)).astype(np.float32)
    grid = make_grid(image.shape, (8, 4, 2))
    whole = read_whole(grid, image)
    sizes = []

    def read(box: Box) -> np.ndarray:
        sizes.append(box.size)
        return image[box.slices]

    monkeypatch.setattr(module, "_MOST_VOXELS", 4096)
    np.testing.assert_array_equal(grid.read_new(read)(Box.whole(grid.new_shape)), whole)
    assert max(sizes) <= 4096 < image.size
    assert len(sizes) > 4


@settings(max_examples=40, deadline=None)
@given(FACTORS)
def test_places_and_radii_come_back(factor: Point) -> None:
    grid = make_grid((20, 20, 20), factor)
    points = np.random.default_rng(0).uniform(0, 19, (6, 3))
    tree = build_tree(points, np.arange(6) - 1, np.linspace(1, 3, 6))
    moved = grid.move_tree_to_new(tree)
    again = grid.move_tree_back(moved)
    np.testing.assert_allclose(again.points, points, atol=1e-9)
    np.testing.assert_allclose(again.radii, tree.radii, rtol=1e-9)

    # The same places and widths in micrometers, from the corner of the first voxel.
    old, new = np.asarray(grid.voxel_size), np.asarray(grid.new_voxel_size)
    np.testing.assert_allclose((moved.points + 0.5) * new, (points + 0.5) * old, atol=1e-9)
    np.testing.assert_allclose(moved.radii * fine_voxel(grid.new_voxel_size), tree.radii * fine_voxel(grid.voxel_size))


def test_a_ramp_is_where_it_was() -> None:
    """The brightness at a place in micrometers is the same on both grids."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.float32), (4, 8, 64))
    # Voxels are constant inside, so that shares of them move a mean by less than a tenth of a voxel.
    for factor, tolerance in ((2.0, 1e-4), (0.5, 1e-4), (1.6, 0.1)):
        grid = make_grid((4, 8, 64), (1, 1, factor))
        new = read_whole(grid, ramp)[0, 0]
        places = grid.move_back(np.stack([np.zeros(len(new)), np.zeros(len(new)), np.arange(len(new))], axis=1))[:, 2]
        inside = (places >= factor / 2) & (places <= 63 - factor / 2)
        np.testing.assert_allclose(new[inside], places[inside], atol=tolerance)
