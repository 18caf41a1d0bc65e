"""A misaligned tree is recognized, and the change that aligns it is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data import swc
from hpc_neuro.data.alignment import Fit, compare_orientations, outside_fraction
from hpc_neuro.data.formats import open_volume
from hpc_neuro.data.intensity import compute_histogram
from hpc_neuro.data.rasterize import rasterize

SHAPE = (30, 60, 60)
SIZE = (1.0, 0.5, 0.5)


def scene(clean: bool = False) -> tuple[Tree, Array]:
    points = np.array([[3, 5, 8], [8, 12, 30], [12, 10, 50], [20, 25, 40], [9, 40, 20.0]])
    tree = morphology.build_tree(points, np.array([-1, 0, 1, 1, 1]), 1.5)
    body = rasterize(tree, Box.whole(SHAPE), SIZE).mask
    noise = np.zeros(SHAPE) if clean else np.random.default_rng(0).normal(10, 3, SHAPE)
    return tree, (noise + 90 * body).clip(0).astype(np.uint8)


def fit(tree: Tree, image: Array, unit: str = "voxel", size: VoxelSize = SIZE) -> Fit:
    def read(box: Box) -> Array:
        return image[box.slices]

    shape: Shape = (image.shape[0], image.shape[1], image.shape[2])
    return compare_orientations(tree, read, shape, compute_histogram(read, shape), size, unit)


@pytest.mark.parametrize("clean", [False, True])
def test_aligned_tree_fits_best(clean: bool) -> None:
    tree, image = scene(clean)
    result = fit(tree, image)
    assert result.score > 0.98
    assert not result.is_misaligned


MOVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "y flipped": lambda p: p * [1, -1, 1] + [0, 59, 0],
    "x flipped": lambda p: p * [1, 1, -1] + [0, 0, 59],
    "z and y flipped": lambda p: p * [-1, -1, 1] + [29, 59, 0],
    "axes y and x swapped": lambda p: p[:, [0, 2, 1]],
    "axes y and x swapped, then y flipped": lambda p: (p * [1, -1, 1] + [0, 59, 0])[:, [0, 2, 1]],
    "swc_unit=um": lambda p: p * SIZE,
}


@pytest.mark.parametrize("words", list(MOVES))
@pytest.mark.parametrize("clean", [False, True])
def test_best_change_undoes_the_misalignment(words: str, clean: bool) -> None:
    tree, image = scene(clean)
    result = fit(replace(tree, points=MOVES[words](tree.points)), image)
    assert result.is_misaligned
    assert result.best_score > 0.98
    assert result.best_change == words


def test_tree_in_the_other_unit_is_named() -> None:
    tree, image = scene()
    small = (slice(None), slice(0, 60), slice(0, 60))
    wrong = replace(tree, points=tree.points / SIZE * [1, 0.5, 0.5])  # 0.5 um voxels taken for 1 um
    result = fit(replace(wrong, points=tree.points / np.array(SIZE) * 0.5), image[small], "um", (2.0, 2.0, 2.0))
    assert result.score < result.best_score or not result.is_misaligned
    right = fit(replace(tree, points=tree.points / 2.0), image, "um", (2.0, 2.0, 2.0))
    assert right.is_misaligned
    assert right.best_change == "swc_unit=voxel"


def test_tree_on_noise_has_no_better_orientation() -> None:
    rng = np.random.default_rng(0)
    tree, _ = scene()
    assert not fit(tree, rng.integers(0, 50, SHAPE).astype(np.uint8)).is_misaligned


def test_outside_fraction() -> None:
    tree, _ = scene()
    assert outside_fraction(tree, SHAPE) == 0
    assert outside_fraction(replace(tree, points=tree.points + np.array([0, 0, 25])), SHAPE) == pytest.approx(2 / 5)
    assert outside_fraction(morphology.empty_tree(), SHAPE) == 0


@pytest.mark.parametrize("name", ["OP_1", "OP_7"])
def test_real_tree_and_its_flip(real_data: Path, name: str) -> None:
    image = open_volume(real_data / "diadem_op" / f"{name}.tif")
    tree = swc.read(real_data / "diadem_op" / f"{name}.swc")
    voxels = image[Box.whole(image.shape)]
    size = (0.9988, 0.32965, 0.32965)
    result = fit(tree, voxels, size=size)
    assert result.score > 0.95
    assert result.best_score < 0.75
    flipped = fit(replace(tree, points=tree.points * [1, -1, 1] + [0, 511, 0]), voxels, size=size)
    assert flipped.is_misaligned
    assert flipped.best_change == "y flipped"
