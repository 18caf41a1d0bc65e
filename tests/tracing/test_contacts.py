"""One root gives one neuron: what touches or crosses it is cut off, and nothing of its own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree, length, tips
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.tracing import TraceConfig, list_trace_blocks, skeletonize_block, trace, trace_volume
from tests.helpers.shapes import Floats, paint_points, sample_line

ISO = (1.0, 1.0, 1.0)
SHAPE = (40, 90, 140)
ROOT = (20.0, 45.0, 8.0)
OWN = sample_line(ROOT, (20, 45, 130))
CROSSING = sample_line((20, 8, 40), (20, 82, 96))


def paint_stack(*neurites: tuple[Floats, float, float]) -> np.ndarray:
    """An image of neurites, each given by its course, radius and brightness."""
    image = np.zeros(SHAPE, np.float32)
    for course, radius, brightness in neurites:
        paint_points(image, course, radius, brightness)
    return gaussian_filter(image, 0.7)


def trace_root(image: np.ndarray, level: float = 0.12, **settings: object) -> Tree:
    (tree,) = trace(image > level, ISO, roots=[ROOT], cfg=TraceConfig(**{"contacts": True, **settings}), image=image)  # type: ignore[arg-type]
    return tree


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_dimmer_neuron_that_crosses_is_cut_off(ratio: float) -> None:
    image = paint_stack((OWN, 2.0, 1.0), (CROSSING, 2.0, ratio))
    tree, whole = trace_root(image), trace_root(image, contacts=False)
    assert length(tree) == pytest.approx(122, rel=0.05)
    assert len(tips(tree)) == 1
    assert length(whole) == pytest.approx(122 + 93, rel=0.05)


@pytest.mark.parametrize("place", ["end", "soma in the middle", "on a passing cable"])
def test_one_root_gives_one_neuron_wherever_it_lies(place: str) -> None:
    image = np.zeros(SHAPE, np.float32)
    own, other = sample_line((20, 45, 5), (20, 45, 130)), sample_line((20, 8, 70), (20, 82, 126))
    paint_points(image, own, 2.0)
    paint_points(image, sample_line((20, 45, 40), (20, 84, 60)), 1.5)
    if place == "soma in the middle":
        paint_points(image, np.array([[20.0, 45, 66]]), 8.0)
    alone = gaussian_filter(image, 0.7)
    paint_points(image, other, 2.0, 0.4)
    image = gaussian_filter(image, 0.7)

    root = {
        "end": (20.0, 45.0, 5.0),
        "soma in the middle": (20.0, 45.0, 66.0),
        "on a passing cable": (20.0, 45.0, 56.0),
    }
    cfg = TraceConfig(contacts=True, root_is_end=False)
    (tree,) = trace(image > 0.12, ISO, roots=[root[place]], cfg=cfg, image=image)
    (gold,) = trace(alone > 0.12, ISO, roots=[root[place]], cfg=cfg, image=alone)
    assert match_cable(tree, gold, 4.0).precision > 0.95
    assert match_cable(tree, gold, 4.0).recall > 0.95


def test_crossing_line_is_cut_off_without_image_or_difference() -> None:
    mask = paint_stack((OWN, 2.0, 1.0), (CROSSING, 2.0, 1.0)) > 0.4
    (tree,) = trace(mask, ISO, roots=[ROOT], cfg=TraceConfig(contacts=True))
    assert length(tree) == pytest.approx(122, rel=0.05)


def test_trunk_that_is_entered_from_the_side_is_cut_off() -> None:
    trunk = sample_line((20, 8, 70), (20, 82, 70))
    image = paint_stack((sample_line(ROOT, (20, 45, 66)), 1.5, 1.0), (trunk, 4.0, 1.0))
    assert length(trace_root(image)) < 70
    assert length(trace_root(image, contacts=False)) > 120


def test_a_swelling_at_the_end_of_a_branch_is_no_trunk() -> None:
    swelling = sample_line((20, 37, 70), (20, 53, 70))
    image = paint_stack((sample_line(ROOT, (20, 45, 66)), 1.5, 1.0), (swelling, 2.6, 1.0))
    tree, whole = trace_root(image), trace_root(image, contacts=False)
    np.testing.assert_array_equal(tree.points, whole.points)


def test_own_branches_stay() -> None:
    """Side branches are thinner and dimmer, leave opposite each other, and fade little by little."""
    side = sample_line((20, 45, 50), (20, 80, 70))
    opposite = sample_line((20, 45, 53), (20, 12, 80))
    image = paint_stack((OWN, 2.5, 1.0), (side, 1.2, 0.5), (opposite, 1.4, 0.6))

    fading = np.linspace(1, 0.25, 40)
    for share, brightness in zip(np.array_split(sample_line((20, 45, 100), (34, 80, 130)), 40), fading, strict=True):
        paint_points(image, share, 1.4, float(brightness))

    tree, whole = trace_root(image), trace_root(image, contacts=False)
    np.testing.assert_array_equal(tree.points, whole.points)
    np.testing.assert_array_equal(tree.parents, whole.parents)


def test_cuts_are_reported() -> None:
    image = paint_stack((OWN, 2.0, 1.0), (CROSSING, 2.0, 0.4))
    mask = image > 0.12
    voxel_size, cfg = (2.0, 0.5, 0.5), TraceConfig(contacts=True)

    def read(box: Box) -> np.ndarray:
        return np.asarray(mask[box.slices])

    blocks = [skeletonize_block(read, SHAPE, box, voxel_size, cfg) for box in list_trace_blocks(SHAPE, cfg)]
    skeletons = [block for block in blocks if block is not None]
    traced = trace_volume(
        skeletons, read, SHAPE, voxel_size, roots=[ROOT], cfg=cfg, image=lambda box: image[box.slices]
    )

    (contact,) = traced.contacts
    assert np.linalg.norm(np.array(contact.position) - (20, 45, 68)) < 6
    assert 0.5 < contact.certainty <= 1
    assert contact.cable_um == pytest.approx(93 * 0.5, rel=0.2)
    assert len(traced.trees) == 1


@pytest.mark.parametrize("axes", [(0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("flips", [(), (1,), (0, 2)])
def test_turned_and_mirrored_stacks_give_the_turned_neuron(axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
    image = paint_stack((OWN, 2.0, 1.0), (CROSSING, 2.0, 0.4))
    turned = np.flip(image, flips).transpose(axes)

    def turn(points: Floats) -> Floats:
        points = np.array(points, dtype=float)
        for axis in flips:
            points[..., axis] = SHAPE[axis] - 1 - points[..., axis]
        return points[..., list(axes)]

    z, y, x = turn(np.array(ROOT)).tolist()
    (tree,) = trace(turned > 0.12, ISO, roots=[(z, y, x)], cfg=TraceConfig(contacts=True), image=turned)
    assert length(tree) == pytest.approx(122, rel=0.05)
    along = turn(OWN)
    away = np.linalg.norm(tree.points[:, None] - along[None], axis=2).min(axis=1)
    assert away.max() < 4


def test_brightness_alone_cuts_no_branch() -> None:
    """A side branch may be dim from its first voxel: it is listed by its doubt, and not cut off."""
    side = sample_line((20, 45, 60), (20, 84, 90))
    image = paint_stack((OWN, 2.5, 1.0), (side, 1.5, 0.3))
    tree, whole = trace_root(image), trace_root(image, contacts=False)
    np.testing.assert_array_equal(tree.points, whole.points)


def test_own_cable_behind_a_cut_is_joined_over_the_gap() -> None:
    """The mask breaks where a thick and dim neighbor crosses, so the far side hangs on the neighbor alone."""
    neighbor = sample_line((20, 6, 60), (20, 84, 78))
    image = paint_stack((OWN, 2.0, 1.0), (neighbor, 2.5, 0.35))
    probability = image > 0.12
    probability[:, :, 58:63] &= np.abs(np.arange(SHAPE[1]) - 45)[:, None] > 4
    (tree,) = trace(probability, ISO, roots=[ROOT], cfg=TraceConfig(contacts=True), image=image)
    assert tree.points[:, 2].max() > 120


def test_several_roots_lose_their_neighbors_as_well() -> None:
    parallel = OWN + np.array([0.0, 30, 0])
    crossing = sample_line((20, 8, 40), (20, 88, 96))
    image = paint_stack((OWN, 2.0, 1.0), (parallel, 2.0, 1.0), (crossing, 2.0, 0.35))
    roots = [ROOT, (20.0, 75.0, 8.0)]
    trees = trace(image > 0.12, ISO, roots=roots, cfg=TraceConfig(contacts=True), image=image)
    assert [length(tree) for tree in trees] == [pytest.approx(122, rel=0.06)] * 2


def test_a_projection_is_left_as_it_is() -> None:
    image = paint_stack((OWN, 2.0, 1.0), (CROSSING, 2.0, 0.4)).max(axis=0, keepdims=True)
    root = (0.0, *ROOT[1:])
    trees = [
        trace(image > 0.12, ISO, roots=[root], cfg=TraceConfig(contacts=contacts), image=image)[0]
        for contacts in (False, True)
    ]
    np.testing.assert_array_equal(trees[0].points, trees[1].points)
