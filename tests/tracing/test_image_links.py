"""Breaks bridged along signal that shows in the image."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import branch_points, tips
from hpc_neuro.core.schema import InputError
from hpc_neuro.tracing import TraceConfig, trace, trace_reader
from hpc_neuro.tracing.centerlines import find_centerlines, find_far_ends
from hpc_neuro.tracing.graph import CenterlineIndex
from hpc_neuro.tracing.image_links import ImagePathFinder
from hpc_neuro.tracing.voxel_graph import VoxelGraph
from tests.helpers.shapes import build_voxel_graph, paint_points, sample_line

ISO = (1.0, 1.0, 1.0)
ROOT = (16.0, 32.0, 8.0)
STALK = [(16, 34, 60), (18, 42, 66), (20, 54, 62)]  # bends, and leaves the trunk sideways


def build_finder(mask: NDArray[np.float32], image: NDArray[np.float32]) -> tuple[ImagePathFinder, VoxelGraph]:
    """A search of the image for links between all components of a mask, and the graph of the mask."""
    cfg = TraceConfig()
    graph = build_voxel_graph(mask, cfg)
    assert graph is not None
    index = CenterlineIndex(graph, find_centerlines(graph, find_far_ends(graph)[0], cfg))
    is_large = np.ones(graph.components, dtype=bool)
    return ImagePathFinder(graph, index, lambda box: image[box.slices], cfg, is_large), graph


def paint_scene(stalk: float, noise: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(probability, image): a trunk, a bouton at the end of a thin stalk of this brightness that the mask misses."""
    mask = np.zeros((36, 80, 110), dtype=np.float32)
    paint_points(mask, sample_line(ROOT, (16, 32, 100)), 2.0)
    paint_points(mask, np.array([[20.0, 58.0, 62.0]]), 4.0)
    bright = mask.copy()
    paint_points(bright, sample_line(*STALK), 1.0, stalk)
    image = ndimage.gaussian_filter(100 * bright, 0.7) + 20
    return mask, (image + np.random.default_rng(0).normal(size=image.shape) * noise).astype(np.float32)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_a_stalk_that_shows_in_the_image_joins_its_bouton(noise: float) -> None:
    mask, image = paint_scene(stalk=0.6, noise=noise)
    (blind,) = trace(mask, ISO, roots=[ROOT])
    assert blind.points[:, 1].max() < 36
    (tree,) = trace(mask, ISO, roots=[ROOT], image=image)
    assert tree.points[:, 1].max() > 56
    assert len(tips(tree)) == 2
    assert len(branch_points(tree)) == 1
    bend = np.linalg.norm(tree.points - np.array(STALK[1]), axis=1).min()
    assert bend < 3, "the link follows the stalk, not the straight line"


@pytest.mark.parametrize("noise", [0.0, 3.0, 12.0])
def test_a_bouton_without_a_stalk_is_left_alone(noise: float) -> None:
    mask, image = paint_scene(stalk=0.0, noise=noise)
    (tree,) = trace(mask, ISO, roots=[ROOT], image=image)
    assert tree.points[:, 1].max() < 36
    assert len(tips(tree)) == 1


def test_the_limit_holds_and_the_scale_of_the_image_does_not_matter() -> None:
    mask, image = paint_scene(stalk=0.6)
    (short,) = trace(mask, ISO, roots=[ROOT], image=image, cfg=TraceConfig(signal_gap=12))
    assert short.points[:, 1].max() < 36
    (off,) = trace(mask, ISO, roots=[ROOT], image=image, cfg=TraceConfig(signal_gap=0))
    assert off.points[:, 1].max() < 36
    trees = [trace(mask, ISO, roots=[ROOT], image=scale)[0] for scale in (image, image * 40 + 1000)]
    np.testing.assert_allclose(trees[0].points, trees[1].points, atol=1e-6)


def test_pieces_linked_in_a_chain_are_one_tree_without_a_cycle() -> None:
    mask = np.zeros((32, 64, 160), dtype=np.float32)
    image = np.zeros_like(mask)
    course = sample_line((16, 32, 8), (16, 32, 150))
    paint_points(image, course, 1.5, 0.5)
    for x in range(8, 150, 24):
        paint_points(mask, sample_line((16, 32, x), (16, 32, x + 3)), 2.5)
    paint_points(image, course[mask[tuple(np.rint(course).astype(int).T)] > 0], 2.0)
    (tree,) = trace(mask, ISO, roots=[(16, 32, 8)], image=image)
    assert tree.points[:, 2].max() > 125
    assert len(tips(tree)) == 1
    assert len(trace(mask, ISO, image=image)) == 1
    assert np.abs(tree.points[:, 1] - 32).max() < 1.5


def test_a_mask_and_image_of_nothing_but_noise_cost_next_to_nothing() -> None:
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(64, 96, 96)).astype(np.float32), 1.2)
    mask = image > 2.5 * image.std()
    looks = []

    def look(box: Box) -> NDArray[np.float32]:
        looks.append(box)
        return image[box.slices]

    trees = trace_reader(lambda box: mask[box.slices], (64, 96, 96), ISO, image=look, cfg=TraceConfig(min_cable=20.0))
    pieces = int((np.bincount(ndimage.label(mask, np.ones((3, 3, 3)))[0].ravel())[1:] >= 12).sum())
    assert pieces > 50
    assert len(looks) <= pieces
    blind = trace(mask, ISO, cfg=TraceConfig(min_cable=20.0))
    assert [len(tree) for tree in trees] == [len(tree) for tree in blind]


def test_an_image_of_another_shape_is_refused() -> None:
    mask, image = paint_scene(stalk=0.6)
    with pytest.raises(InputError, match="must be equal"):
        trace(mask, ISO, roots=[ROOT], image=image[1:])


def test_what_lies_between_is_not_passed_through() -> None:
    """A bright stalk from neurite to neurite to bouton: no link of the outer two runs through the middle one."""
    mask = np.zeros((32, 64, 110), dtype=np.float32)
    for y in (10, 22):
        paint_points(mask, sample_line((16, y, 8), (16, y, 100)), 2.0)
    paint_points(mask, sample_line((16, 34, 50), (16, 34, 60)), 2.0)
    image = mask.copy()
    paint_points(image, sample_line((16, 10, 55), (16, 34, 55)), 1.0, 0.6)
    finder, graph = build_finder(mask, image)
    row = {c: round(float(graph.points[graph.component == c, 1].mean())) for c in range(graph.components)}
    nearby = finder.find_nearby(np.flatnonzero(graph.points[:, 1] > 30))
    linked = {(row[a], row[b]): finder.find_link((a, b)) is not None for a, b in nearby}
    assert linked == {(34, 22): True, (34, 10): False}


def test_a_speck_in_a_break_is_no_wall() -> None:
    mask = np.zeros((32, 64, 120), dtype=np.float32)
    for begin, end in ((8, 40), (70, 110)):
        paint_points(mask, sample_line((16, 32, begin), (16, 32, end)), 2.0)
    image = mask.copy()
    paint_points(image, sample_line((16, 32, 40), (16, 32, 70)), 1.0, 0.5)
    mask[15:18, 31:34, 54:56] = 1.0  # as large as min_voxels
    (tree,) = trace(mask, ISO, roots=[(16, 32, 8)], image=image, cfg=TraceConfig(gap=0))
    assert tree.points[:, 2].max() > 105


def test_a_small_piece_is_not_worth_a_long_link() -> None:
    """A bead four voxels long, at the end of a stalk of 24 that shows."""
    image = paint_scene(stalk=0.6)[1]
    mask = np.zeros(image.shape, dtype=np.float32)
    paint_points(mask, sample_line(ROOT, (16, 32, 100)), 2.0)
    for large, reaches in ((0.0, False), (8.0, True)):
        with_bead = mask.copy()
        paint_points(with_bead, sample_line((20, 57, 62), (20, 59 + large, 62)), 1.2)
        (tree,) = trace(with_bead, ISO, roots=[ROOT], image=image)
        assert (tree.points[:, 1].max() > 56) == reaches


def test_two_specks_join_only_at_a_root() -> None:
    mask = np.zeros((24, 24, 80), dtype=np.float32)
    image = np.zeros_like(mask)
    paint_points(image, sample_line((12, 12, 6), (12, 12, 60)), 1.5, 0.5)
    for x in (8, 22, 36, 50):
        paint_points(mask, sample_line((12, 12, x), (12, 12, x + 3)), 1.5)
        paint_points(image, sample_line((12, 12, x), (12, 12, x + 3)), 1.5)
    cfg = TraceConfig(gap=0, min_cable=40.0)
    (tree,) = trace(mask, ISO, roots=[(12, 12, 8)], image=image, cfg=cfg)
    assert tree.points[:, 2].max() > 50
    assert trace(mask, ISO, image=image, cfg=cfg) == []


def test_a_link_is_as_long_as_its_way_and_not_as_the_gap() -> None:
    """A faint horseshoe of 40 voxels between two ends that are 24 apart."""
    mask = np.zeros((24, 64, 120), dtype=np.float32)
    for begin, end in ((8, 40), (68, 110)):
        paint_points(mask, sample_line((12, 20, begin), (12, 20, end)), 2.0)
    image = mask.copy()
    angle = np.linspace(np.pi, 0, 100)
    paint_points(
        image, np.stack([0 * angle + 12, 20 + 11 * np.sin(angle), 54 - 14 * np.cos(np.pi - angle)], axis=1), 1.0, 0.6
    )
    points_at = {}
    for most in (30.0, 70.0):
        cfg = TraceConfig(gap=0, signal_gap=most)
        points_at[most] = trace(mask, ISO, roots=[(12, 20, 8)], image=image, cfg=cfg)[0].points
    assert points_at[30.0][:, 2].max() < 45
    assert points_at[70.0][:, 2].max() > 105
    assert points_at[70.0][:, 1].max() > 28


def test_the_way_is_measured_in_the_metric() -> None:
    """Two ways: round in the plane, or three slices below it, where a slice is five voxels thick."""
    mask = np.zeros((16, 48, 90), dtype=np.float32)
    for begin, end in ((8, 34), (50, 82)):
        paint_points(mask, sample_line((4, 20, begin), (4, 20, end)), 1.5)
    image = mask.copy()
    paint_points(image, sample_line((4, 20, 34), (4, 28, 42), (4, 20, 50)), 1.2, 0.75)
    paint_points(image, sample_line((4, 20, 34), (7, 20, 37), (7, 20, 47), (4, 20, 50)), 1.2, 0.6)
    cfg = TraceConfig(gap=0, metric="um", signal_gap=60.0)
    (tree,) = trace(mask, (5.0, 1.0, 1.0), roots=[(4, 20, 8)], image=image, cfg=cfg)
    assert tree.points[:, 2].max() > 78
    assert tree.points[:, 0].max() < 6
    assert tree.points[:, 1].max() > 25


def test_an_end_is_compared_with_the_nearest_pieces_only() -> None:
    mask = np.zeros((24, 80, 80), dtype=np.float32)
    for y in range(8, 80, 12):
        for x in range(8, 80, 12):
            paint_points(mask, np.array([[12.0, y, x]]), 2.5)
    finder, graph = build_finder(mask, mask)
    end = int(np.linalg.norm(graph.points - (12, 44, 44), axis=1).argmin())
    assert graph.components == 36
    assert len(finder.find_nearby(np.array([end]))) == 8
    assert {round(gap) for gap in finder.find_nearby(np.array([end])).values()} <= set(range(6, 14))


def test_only_the_surroundings_of_breaks_are_read() -> None:
    mask, image = paint_scene(stalk=0.6)
    mask, image = (np.pad(a, ((0, 0), (0, 0), (0, 300))) for a in (mask, image))
    boxes: list[Box] = []

    def look(box: Box) -> NDArray[np.float32]:
        boxes.append(box)
        return image[box.slices]

    z, y, x = mask.shape
    (tree,) = trace_reader(lambda box: mask[box.slices], (z, y, x), ISO, roots=[ROOT], image=look)
    assert tree.points[:, 1].max() > 56
    assert boxes
    assert max(box.stop[2] for box in boxes) <= 128
    boxes.clear()
    mask[:, 40:] = 0
    trace_reader(lambda box: mask[box.slices], (z, y, x), ISO, image=look)
    assert not boxes, "one piece, and no break"


def test_a_mask_that_is_mostly_specks_is_not_searched_for_links_pair_by_pair() -> None:
    """Noise has thousands of specks within reach of one another; only the neurite and its piece are looked at."""
    mask, image = paint_scene(stalk=0.6, noise=3.0)
    noisy = mask.copy()
    rng = np.random.default_rng(1)
    for z, y, x in rng.uniform((2, 2, 2), (34, 78, 108), (150, 3)):
        if mask[int(z) - 2 : int(z) + 4, int(y) - 2 : int(y) + 4, int(x) - 2 : int(x) + 4].max() == 0:
            noisy[int(z) : int(z) + 2, int(y) : int(y) + 2, int(x) : int(x) + 3] = 0.8
    looks = []

    def look(box: Box) -> NDArray[np.float32]:
        looks.append(box)
        return image[box.slices]

    z, y, x = mask.shape
    trees = trace_reader(lambda box: noisy[box.slices], (z, y, x), ISO, roots=[ROOT], image=look)
    assert trees[0].points[:, 1].max() > 56
    assert len(looks) < 50, "there are some thousand pairs within reach"
