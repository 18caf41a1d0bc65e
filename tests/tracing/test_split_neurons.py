"""Neurons that touch, cross, or are wrongly bridged, told apart by their roots."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree, length, tips
from hpc_neuro.core.schema import InputError
from hpc_neuro.tracing import TraceConfig, trace
from tests.helpers.shapes import Floats, paint_points, sample_line

ISO = (1.0, 1.0, 1.0)
SHAPE = (40, 90, 140)


def on(tree: Tree, course: Floats) -> float:
    """Share of a tree within 3.5 voxels of a course."""
    distances = cKDTree(course).query(morphology.resample_tree(tree, 1.0).points)[0]
    return float(np.mean(np.asarray(distances) <= 3.5))


def check(mask: np.ndarray, courses: list[Floats], ends: list[int], cfg: TraceConfig | None = None) -> None:
    """One tree per course, on its own course throughout, of its whole length, with so many tips."""
    assert len(trace(mask, ISO, cfg=cfg)) == 1, "they should hang together"
    roots = [tuple(c[0]) for c in courses]
    for order in (slice(None), slice(None, None, -1)):
        trees = trace(mask, ISO, roots=roots[order], cfg=cfg)
        assert [tuple(t.points[0]) for t in trees] == roots[order]
        for tree, course, count in zip(trees, courses[order], ends[order], strict=True):
            assert on(tree, course) > 0.97
            assert (
                on(
                    morphology.build_tree(course, np.arange(-1, len(course) - 1)),
                    morphology.resample_tree(tree, 0.5).points,
                )
                > 0.95
            )
            assert len(tips(tree)) == count
            assert len(tree.roots) == 1


@pytest.mark.parametrize("apart", [0.0, 3.0])
def test_two_neurons_that_cross(apart: float) -> None:
    """Each goes on straight over the crossing, whether they pass through each other or only touch."""
    a, b = sample_line((20, 15, 10), (20, 75, 130)), sample_line((20 + apart, 75, 10), (20 + apart, 15, 130))
    mask = np.zeros(SHAPE, np.float32)
    paint_points(mask, a, 2.0)
    paint_points(mask, b, 2.0)
    check(mask, [a, b], [1, 1])


def test_two_branched_neurons_of_which_one_touches_the_other_with_a_tip() -> None:
    a = np.concatenate([sample_line((20, 25, 10), (20, 25, 130)), sample_line((20, 25, 40), (20, 10, 60))])
    b = np.concatenate([sample_line((20, 75, 10), (20, 75, 130)), sample_line((20, 75, 60), (20, 31, 84))])
    mask = np.zeros(SHAPE, np.float32)
    paint_points(mask, a, 2.0)
    paint_points(mask, b, 2.0)
    paint_points(
        mask, sample_line((20, 31, 84), (20, 27, 86)), 1.4, 0.4
    )  # what a model leaves between them: below the threshold
    roots = [(20, 25, 10), (20, 75, 10)]
    assert len(trace(mask, ISO)) == 1
    first, second = trace(mask, ISO, roots=roots)
    assert on(first, a) > 0.97
    assert on(second, b) > 0.97
    assert len(tips(first)) == len(tips(second)) == 2
    assert length(first) == pytest.approx(120 + 25, rel=0.08)
    assert length(second) == pytest.approx(120 + 50, rel=0.08)


def test_a_bridge_between_two_neurons_is_cut_and_one_within_a_neuron_stays() -> None:
    a = sample_line((20, 30, 10), (20, 30, 130))
    b = sample_line((20, 75, 70), (20, 40, 70))
    mask = np.zeros(SHAPE, np.float32)
    paint_points(mask, a, 2.0)
    paint_points(mask, b, 2.0)
    mask[:, :, 94:104] = 0  # a break in the first one
    check(mask, [a, b], [1, 1])


def test_two_somas_on_one_neurite_share_it_at_its_weakest_place() -> None:
    mask = np.zeros(SHAPE, np.float32)
    paint_points(mask, sample_line((20, 45, 15), (20, 45, 125)), 2.0)
    mask[18:23, 42:49, 89:92] *= 0.6
    paint_points(mask, np.array([[20.0, 45.0, 15.0], [20.0, 45.0, 125.0]]), 7.0)
    first, second = trace(mask, ISO, roots=[(20, 45, 15), (20, 45, 125)])
    assert first.points[:, 2].max() == pytest.approx(89, abs=4)
    assert second.points[:, 2].min() == pytest.approx(91, abs=4)


def test_two_roots_at_one_place_are_refused() -> None:
    mask = np.zeros(SHAPE, np.float32)
    paint_points(mask, sample_line((20, 45, 15), (20, 45, 125)), 2.0)
    with pytest.raises(InputError, match="lie at one place of one neurite"):
        trace(mask, ISO, roots=[(20, 45, 60), (20, 44, 60)])
