"""The neurite before the root is found where there is one, and only there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data.proximal_axon import VoxelRegion, find_proximal_axon
from hpc_neuro.data.rasterize import rasterize

SHAPE = (24, 80, 160)
SIZE = (1.0, 0.5, 0.5)


def grow_tree() -> Tree:
    x = np.arange(0, 150, 2.0)
    points = np.stack([12 + 2 * np.sin(x / 30), 40 + 8 * np.sin(x / 40), x], axis=1)
    return morphology.build_tree(points, np.arange(-1, len(x) - 1), 2.0)


def cut_tree(at: float) -> Tree:
    """The tree from x = `at` on, as an annotator leaves it who starts at the arbour."""
    tree = grow_tree()
    return morphology.select_nodes(tree, tree.points[:, 2] >= at)


def draw_image(tree: Tree, noise: float = 3.0) -> Array:
    body = ndimage.gaussian_filter(rasterize(tree, Box.whole(SHAPE), SIZE).mask.astype(float), 0.7)
    return (10 + 150 * body + noise * np.random.default_rng(0).normal(size=SHAPE)).clip(0).astype(np.uint8)


def find(tree: Tree, image: Array) -> VoxelRegion | None:
    return find_proximal_axon(tree, 1.0, lambda box: image[box.slices], SHAPE, SIZE)


def test_a_stub_is_found_whole_and_the_tree_is_left_alone() -> None:
    region = find(cut_tree(60), draw_image(grow_tree()))
    assert region is not None

    mask = region.mask_in(Box.whole(SHAPE))
    stub = rasterize(grow_tree(), Box.whole(SHAPE), SIZE).mask.astype(bool)
    stub[:, :, 52:] = False

    assert mask[stub].mean() > 0.95
    assert not mask[:, :, 70:].any()
    assert mask.sum() < 9 * stub.sum()


def test_a_tree_that_starts_where_the_neurite_does_has_none() -> None:
    assert find(cut_tree(60), draw_image(cut_tree(60))) is None
    assert find(grow_tree(), draw_image(grow_tree())) is None


def test_a_soma_several_roots_and_a_lone_node_have_none() -> None:
    tree, image = cut_tree(60), draw_image(grow_tree())
    soma = tree.types.copy()
    soma[0] = 1

    assert find(replace(tree, types=soma), image) is None
    parents = tree.parents.copy()
    parents[10] = -1

    assert find(replace(tree, parents=parents), image) is None
    assert find(Tree(tree.points[:1], tree.radii[:1], tree.parents[:1], tree.types[:1]), image) is None


def test_bright_tissue_is_no_neurite(caplog: pytest.LogCaptureFixture) -> None:
    image = draw_image(grow_tree())
    image[:, :, :58] = 150
    assert find(cut_tree(60), image) is None
    assert "stays background" in caplog.text


def test_any_box_is_the_same_part() -> None:
    region = find(cut_tree(60), draw_image(grow_tree()))
    assert region is not None
    whole = region.mask_in(Box.whole(SHAPE))
    for box in (Box((3, 20, 10), (20, 60, 90)), Box((0, 0, 130), (5, 5, 160))):
        np.testing.assert_array_equal(region.mask_in(box), whole[box.slices])
