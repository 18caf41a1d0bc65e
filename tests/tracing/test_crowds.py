"""A crowd is told from a lone neuron, and only in a crowd the strict rule cuts neighbors off."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from hpc_neuro.core.geometry import Box, Point
from hpc_neuro.core.morphology import Tree, length
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.synthetic import Microscope, grow_random_tree, render_stack
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.tracing import (
    TraceConfig,
    TracedVolume,
    list_trace_blocks,
    skeletonize_block,
    trace_volume,
)
from tests.helpers.shapes import Floats
from tools.bench.contacts import SHAPE, VOXEL, grow_crowd, render_crowd


@functools.cache
def draw_crowd(ratio: float) -> tuple[list[Tree], np.ndarray]:
    crowd = grow_crowd(21, 6)
    return crowd, render_crowd(crowd, ratio, 21)


def trace_root(image: np.ndarray, root: Point, **settings: object) -> TracedVolume:
    foreground = measure_foreground(lambda box: image[box.slices], SHAPE)
    probability = foreground.probability(Box.whole(SHAPE))
    cfg = TraceConfig(**settings)  # type: ignore[arg-type]

    def read(box: Box) -> np.ndarray:
        return np.asarray(probability[box.slices])

    blocks = [skeletonize_block(read, SHAPE, box, VOXEL, cfg) for box in list_trace_blocks(SHAPE, cfg)]
    skeletons = [block for block in blocks if block is not None]
    return trace_volume(skeletons, read, SHAPE, VOXEL, roots=[root], cfg=cfg, image=foreground.read_image)


@functools.cache
def trace_crowd(contacts: bool = True, crowd: bool | None = None) -> TracedVolume:
    """The volume of `draw_crowd` with neighbors of a fifth of the brightness."""
    trees, image = draw_crowd(0.2)
    return trace_root(image, get_root(trees[0]), contacts=contacts, crowd=crowd)


def get_root(tree: Tree) -> Point:
    z, y, x = tree.points[0].tolist()
    return z, y, x


def test_a_crowd_is_recognized_and_its_neighbors_are_cut_off() -> None:
    crowd, _ = draw_crowd(0.2)
    traced, whole = trace_crowd(), trace_crowd(contacts=False)
    assert traced.crowd is not None
    assert traced.crowd.is_crowd
    assert not traced.crowd.is_given
    assert traced.crowd.other_exits > 4

    match, before = (match_cable(volume.trees[0], crowd[0], 4.0) for volume in (traced, whole))
    assert before.precision < 0.5
    assert match.precision > 0.85
    assert match.recall > 0.8
    assert any(contact.is_cut for contact in traced.contacts)
    assert whole.crowd is None


def test_doubtful_cable_that_is_kept_is_listed() -> None:
    traced = trace_crowd()
    kept = [contact for contact in traced.contacts if not contact.is_cut]
    assert kept
    for contact in kept:
        assert 0 < contact.cable_um < length(traced.trees[0])
        assert 0.4 < contact.certainty < 0.9


@pytest.mark.parametrize("seed", [301, 302])
def test_a_lone_neuron_is_no_crowd_and_keeps_its_dim_branches(seed: int) -> None:
    tree = grow_random_tree(seed, SHAPE, VOXEL)
    image = render_stack(tree, SHAPE, VOXEL, Microscope(gap_every=1e9, fragments=0, unevenness=0.6), seed)
    traced, whole = (trace_root(image, get_root(tree), contacts=contacts) for contacts in (True, False))
    assert traced.crowd is not None
    assert not traced.crowd.is_crowd
    assert match_cable(traced.trees[0], whole.trees[0], 4.0).f1 > 0.997


def test_the_user_may_decide() -> None:
    as_lone, as_crowd = trace_crowd(crowd=False), trace_crowd(crowd=True)
    assert length(as_lone.trees[0]) > 1.5 * length(as_crowd.trees[0])
    assert as_crowd.crowd is not None
    assert as_crowd.crowd.is_given
    assert "trace.crowd=true was given" in as_crowd.crowd.describe()

    # The advice of the line is obeyed.
    decided = trace_crowd()
    assert decided.crowd is not None
    assert "(trace.crowd=false keeps more)" in decided.crowd.describe()


@pytest.mark.parametrize("axis", [2])
def test_a_mirrored_crowd_gives_the_mirrored_neuron(axis: int) -> None:
    crowd, image = draw_crowd(0.2)

    def mirror(points: Floats) -> Floats:
        points = np.array(points, dtype=np.float64)
        points[..., axis] = SHAPE[axis] - 1 - points[..., axis]
        return points

    z, y, x = mirror(np.array(get_root(crowd[0]))).tolist()
    traced = trace_crowd()
    mirrored = trace_root(np.ascontiguousarray(np.flip(image, axis)), (z, y, x))
    assert mirrored.crowd is not None
    assert mirrored.crowd.is_crowd
    (tree,) = mirrored.trees
    back = Tree(mirror(tree.points), tree.radii, tree.parents, tree.types)
    assert match_cable(back, traced.trees[0], 4.0).f1 > 0.9
