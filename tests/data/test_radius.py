"""Radii measured in images whose truth is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import ndimage

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data.radius import (
    ConstantRadius,
    ImageRadius,
    RadiusConfig,
    SwcRadius,
    cut_into_paths,
    fit_radii,
    measure_radii,
)
from hpc_neuro.data.rasterize import rasterize

SHAPE = (40, 120, 160)
ISO = (0.5, 0.5, 0.5)


def make_reader(image: Array) -> Callable[[Box], Array]:
    return lambda box: image[box.slices]


def make_bent_tree(radii: float | np.ndarray = 3.0, n: int = 30) -> Tree:
    x = np.linspace(15, 145, n)
    points = np.stack([20 + 4 * np.sin(x / 30), 60 + 15 * np.sin(x / 25), x], axis=1)
    return morphology.build_tree(points, np.arange(-1, n - 1), radii)


def render_picture(
    tree: Tree, size: tuple[float, float, float], blur: tuple[float, float, float], noise: float = 0.0
) -> Array:
    rng = np.random.default_rng(0)
    body = rasterize(tree, Box.whole(SHAPE), size).mask.astype(float)
    return 20 + 150 * ndimage.gaussian_filter(body, blur) + noise * rng.normal(size=SHAPE)


@pytest.mark.parametrize("radius", [1.5, 2.5, 4.0, 6.0])
def test_the_radius_of_a_tube_is_found(radius: float) -> None:
    tree = make_bent_tree(radius)
    fitted = measure_radii(
        tree, ImageRadius(), make_reader(render_picture(tree, ISO, (0.7,) * 3, noise=3.0)), SHAPE, ISO
    ).tree
    assert np.median(fitted.radii) == pytest.approx(radius, abs=0.5)
    assert np.percentile(fitted.radii, 90) - np.percentile(fitted.radii, 10) < 0.8


def test_a_taper_is_followed() -> None:
    tree = make_bent_tree(np.linspace(6, 2, 30))
    fitted = measure_radii(
        tree, ImageRadius(), make_reader(render_picture(tree, ISO, (0.7,) * 3, noise=3.0)), SHAPE, ISO
    ).tree
    expected = np.interp(fitted.points[:, 2], tree.points[:, 2], tree.radii)
    assert np.abs(fitted.radii - expected)[10:-10].mean() < 0.5


def test_the_radius_ignores_the_blur_along_coarse_z_and_the_stretch_measures_it() -> None:
    size = (1.5, 0.5, 0.5)
    tree = make_bent_tree(2.5)
    image = render_picture(tree, size, (2.0, 0.6, 0.6), noise=2.0)
    fitted = measure_radii(tree, ImageRadius(), make_reader(image), SHAPE, size)

    assert np.median(fitted.tree.radii) == pytest.approx(2.5, abs=0.6)
    assert 2.0 < fitted.stretch < 4.5
    assert (
        measure_radii(tree, ImageRadius(), make_reader(render_picture(tree, ISO, (0.6,) * 3)), SHAPE, ISO).stretch < 1.2
    )


@pytest.mark.parametrize("offset", [(0.0, 1.5, 0.0), (0.8, -1.0, 0.0)])
def test_an_offset_centerline_is_moved_onto_the_ridge_and_no_farther_than_allowed(offset: tuple[float, ...]) -> None:
    tree = make_bent_tree(2.0)
    image = render_picture(tree, ISO, (0.7,) * 3, noise=3.0)
    moved = Tree(tree.points + offset, tree.radii, tree.parents, tree.types)
    dense = morphology.resample_tree(tree, 0.1).points

    def off(points: np.ndarray) -> float:
        return float(np.median(np.linalg.norm(points[:, None] - dense[None], axis=2).min(axis=1)[5:-5]))

    still = measure_radii(moved, ImageRadius(recentre=0), make_reader(image), SHAPE, ISO).tree
    there = measure_radii(moved, ImageRadius(recentre=2), make_reader(image), SHAPE, ISO).tree

    assert off(still.points) > 0.9
    assert off(there.points) < 0.4
    assert np.linalg.norm(there.points - still.points, axis=1).max() <= 2 + 1e-6
    np.testing.assert_allclose(morphology.resample_tree(moved, 1.0).points, still.points, atol=1e-9)


def test_a_gap_takes_its_radius_from_the_neighbors() -> None:
    tree = make_bent_tree(3.0)
    image = render_picture(tree, ISO, (0.7,) * 3, noise=2.0)
    image[:, :, 75:85] = 20
    fitted = measure_radii(tree, ImageRadius(recentre=0), make_reader(image), SHAPE, ISO).tree
    gap = (fitted.points[:, 2] > 76) & (fitted.points[:, 2] < 84)
    assert np.abs(fitted.radii[gap] - 3.0).max() < 1.2


def test_radii_stay_within_the_bounds_even_without_any_signal() -> None:
    flat = np.random.default_rng(0).normal(50, 3, SHAPE)
    fitted = measure_radii(make_bent_tree(), ImageRadius(smallest=1.5, largest=2.5), make_reader(flat), SHAPE, ISO).tree
    assert fitted.radii.min() >= 1.5
    assert fitted.radii.max() <= 2.5


def test_a_branch_point_is_not_swollen_by_its_branches() -> None:
    stem = np.stack([np.full(40, 20.0), np.full(40, 60.0), np.linspace(20, 140, 40)], axis=1)
    twig = np.stack([np.full(15, 20.0), 60 + np.linspace(3, 45, 15), np.full(15, stem[20, 2])], axis=1)
    parents = np.concatenate([np.arange(-1, 39), [20], np.arange(40, 54)])
    tree = morphology.build_tree(np.concatenate([stem, twig]), parents, 2.0)
    fitted = measure_radii(tree, ImageRadius(), make_reader(render_picture(tree, ISO, (0.7,) * 3)), SHAPE, ISO).tree
    assert fitted.radii.max() < 3.2


def test_memory_is_read_block_by_block_near_the_tree_alone() -> None:
    image = render_picture(make_bent_tree(), ISO, (0.7,) * 3)
    read: list[Box] = []

    def noting(box: Box) -> Array:
        read.append(box)
        return image[box.slices]

    measure_radii(make_bent_tree(), ImageRadius(), noting, SHAPE, ISO)
    assert max(b.size for b in read) < 100 * 180 * 180


def test_swc_and_constant_radii() -> None:
    tree = make_bent_tree(np.linspace(0.1, 3, 30))
    none = make_reader(np.zeros((1, 1, 1)))

    assert fit_radii(tree, SwcRadius(scale=2.0), none, SHAPE, ISO).tree.radii[[0, -1]] == pytest.approx([0.5, 6])
    constant = fit_radii(tree, ConstantRadius(radius=2.5), none, SHAPE, ISO)

    assert np.all(constant.tree.radii == 2.5)
    assert constant.stretch == 1.0
    np.testing.assert_array_equal(constant.tree.points, tree.points)


def test_paths_cover_every_node_once_and_side_paths_begin_at_their_branch_point() -> None:
    rng = np.random.default_rng(2)
    parents = np.array([-1, *(int(rng.integers(0, i)) for i in range(1, 60))])
    tree = morphology.build_tree(rng.normal(size=(60, 3)), parents)
    lines = cut_into_paths(tree)
    owned = np.concatenate([line.nodes[line.own] for line in lines])

    assert sorted(owned) == list(range(60))
    for line in lines:
        assert np.all(tree.parents[line.nodes[1:]] == line.nodes[:-1])


def test_the_union_reads_by_kind() -> None:
    assert TypeAdapter(RadiusConfig).validate_python({"kind": "constant", "radius": 2}) == ConstantRadius(radius=2.0)
    with pytest.raises(ValueError, match="largest 1.0 is below smallest 2.0"):
        ImageRadius(smallest=2, largest=1)
