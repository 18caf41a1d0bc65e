"""Tracing against neurites whose course is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree, branch_points, length, tips
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.tracing import (
    TraceConfig,
    list_trace_blocks,
    skeletonize_block,
    trace,
    trace_block_skeletons,
    trace_reader,
)
from tests.helpers.shapes import grow_crooked_tree, paint_points, paint_tree, sample_line

ISO = (1.0, 1.0, 1.0)


def measure_f1(tree: Tree, gold: Tree, tolerance: float = 2.0) -> float:
    a, b = (morphology.resample_tree(t, 1.0).points for t in (tree, gold))
    precision = float((cKDTree(b).query(a)[0] <= tolerance).mean())
    recall = float((cKDTree(a).query(b)[0] <= tolerance).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def add_noise(mask: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """A blurred mask with smooth noise, as a model gives it."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=mask.shape), 1.0)
    blurred = 1.2 * ndimage.gaussian_filter(mask, 0.8)
    return np.clip(blurred + 0.05 * noise / noise.std(), 0, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("corners", "radius"),
    [
        ([(20, 20, 8), (20, 20, 90)], 2.0),
        ([(8, 8, 8), (32, 50, 92)], 2.0),
        ([(8, 8, 8), (32, 50, 92)], 4.5),
        ([(20, 8, 8), (20, 50, 50), (20, 8, 92)], 3.0),
    ],
)
def test_a_tube_becomes_its_centre_line(corners: list[tuple[float, float, float]], radius: float) -> None:
    course = sample_line(*corners)
    mask = np.zeros((40, 60, 100), dtype=np.float32)
    paint_points(mask, course, radius)
    (tree,) = trace(mask, ISO, roots=[corners[0]])
    off = cKDTree(course).query(morphology.resample_tree(tree, 1.0).points)[0]
    assert tuple(tree.points[0]) == corners[0]
    assert len(tips(tree)) == 1
    assert np.quantile(off, 0.9) < 0.8
    true = np.linalg.norm(np.diff(np.array(corners, dtype=float), axis=0), axis=1).sum()
    assert length(tree) == pytest.approx(true + radius, rel=0.03), "a staircase would be up to 1.7 times as long"
    assert np.median(tree.radii) == pytest.approx(radius, abs=0.6)


def test_a_helix_keeps_its_length() -> None:
    turn = np.linspace(0, 4 * np.pi, 600)
    course = np.stack([10 + 5 * turn, 32 + 16 * np.sin(turn), 32 + 16 * np.cos(turn)], axis=1)
    mask = np.zeros((84, 64, 64), dtype=np.float32)
    paint_points(mask, course, 2.2)
    (tree,) = trace(mask, ISO, roots=[tuple(course[0])])
    true = np.linalg.norm(np.diff(course, axis=0), axis=1).sum()
    assert length(tree) == pytest.approx(true, rel=0.04)
    assert len(tips(tree)) == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_branched_tree_comes_back_without_spurs(seed: int) -> None:
    gold = grow_crooked_tree(seed, (48, 96, 160), branches=6)
    mask = paint_tree(gold, (48, 96, 160))
    for probability in (mask, add_noise(mask, seed)):
        (tree,) = trace(probability, ISO, roots=[tuple(gold.points[0])])
        assert len(tips(tree)) == len(tips(gold)) == 7
        assert len(branch_points(tree)) == len(branch_points(gold))
        assert measure_f1(tree, gold) > 0.98
        assert length(tree) == pytest.approx(length(gold), rel=0.06)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), flips=st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_a_mirrored_volume_gives_the_mirrored_tree(seed: int, flips: tuple[bool, bool, bool]) -> None:
    gold = grow_crooked_tree(seed, (40, 64, 96), branches=2)
    mask = paint_tree(gold, (40, 64, 96))
    axes = [axis for axis, flip in enumerate(flips) if flip]
    mirror = np.array([n - 1 if flip else 0 for n, flip in zip(mask.shape, flips, strict=True)])
    sign = np.where(flips, -1, 1)
    (tree,) = trace(mask, ISO, roots=[tuple(gold.points[0])])
    (other,) = trace(np.flip(mask, axes), ISO, roots=[tuple(mirror + sign * gold.points[0])])
    back = Tree(mirror + sign * other.points, other.radii, other.parents, other.types)
    assert measure_f1(back, tree, tolerance=1.5) > 0.95
    assert length(back) == pytest.approx(length(tree), rel=0.03)
    assert len(tips(back)) == len(tips(tree))


def test_the_same_tree_from_bool_uint8_float_and_from_boxes() -> None:
    gold = grow_crooked_tree(1, (40, 64, 300), branches=3)
    mask = paint_tree(gold, (40, 64, 300))
    root = tuple(gold.points[0])
    trees = [trace(m, ISO, roots=[root])[0] for m in (mask, mask.astype(bool), (mask * 255).astype(np.uint8))]
    trees += trace_reader(lambda box: mask[box.slices], mask.shape, ISO, roots=[root])
    for tree in trees[1:]:
        np.testing.assert_array_equal(tree.points, trees[0].points)
        np.testing.assert_array_equal(tree.parents, trees[0].parents)


def paint_broken_tube(gap: float, sideways: float = 0.0, size: float = 60.0) -> tuple[NDArray[np.float32], float]:
    """A tube of 40 voxels, a break, and its continuation shifted sideways; the x where the continuation ends."""
    mask = np.zeros((32, 96, 160), dtype=np.float32)
    paint_points(mask, sample_line((16, 40, 8), (16, 40, 48)), 2.0)
    begin = 48 + 4 + gap  # both ends are round
    paint_points(mask, sample_line((16, 40 + sideways, begin), (16, 40 + sideways, begin + size)), 2.0)
    return mask, begin + size


@pytest.mark.parametrize(
    ("gap", "sideways", "bridged"), [(5, 0, True), (16, 0, True), (6, 4, True), (24, 0, False), (4, 16, False)]
)
def test_breaks_are_bridged_straight_ahead_up_to_the_limit(gap: float, sideways: float, bridged: bool) -> None:
    mask, end = paint_broken_tube(gap, sideways)
    (tree,) = trace(mask, ISO, roots=[(16, 40, 8)])
    assert (tree.points[:, 2].max() > end - 3) == bridged
    assert len(tips(tree)) == 1
    (alone,) = trace(mask, ISO, roots=[(16, 40, 8)], cfg=TraceConfig(gap=0))
    assert alone.points[:, 2].max() < 52
    assert len(trace(mask, ISO)) == (1 if bridged else 2)


def test_a_string_of_beads_is_one_neurite() -> None:
    mask = np.zeros((32, 64, 160), dtype=np.float32)
    for x in range(8, 150, 9):
        paint_points(mask, sample_line((16, 32, x), (16, 32, x + 3)), 2.5)
    (tree,) = trace(mask, ISO, roots=[(16, 32, 8)])
    assert tree.points[:, 2].max() > 140
    assert len(tips(tree)) == 1


@pytest.mark.parametrize("joined", [False, True])
def test_a_thin_neurite_close_to_a_thick_one_is_not_swallowed(joined: bool) -> None:
    mask = np.zeros((40, 60, 130), dtype=np.float32)
    paint_points(mask, sample_line((20, 20, 10), (20, 20, 110)), 6.0)
    paint_points(mask, sample_line((20, 30, 8), (20, 30, 112)), 2.0)
    if joined:  # at one end
        paint_points(mask, sample_line((20, 20, 118), (20, 30, 118)), 2.0)
        paint_points(mask, sample_line((20, 20, 110), (20, 20, 118)), 2.0)
        paint_points(mask, sample_line((20, 30, 110), (20, 30, 118)), 2.0)
    trees = trace(mask, ISO, cfg=TraceConfig(gap=0))
    assert len(trees) == (1 if joined else 2)
    places = np.concatenate([morphology.resample_tree(tree, 1.0).points for tree in trees])
    for y in (20, 30):
        on = places[np.abs(places[:, 1] - y) < 1.5]
        assert len(np.unique(on[:, 2].round())) > 85


def test_bright_junk_beside_a_neurite_is_left_alone() -> None:
    mask, _ = paint_broken_tube(gap=-4)
    for place in ((16, 50, 20), (16, 30, 60), (26, 40, 80), (16, 60, 100), (5, 70, 30)):
        paint_points(mask, np.array([place], dtype=float), 4.0)
    (tree,) = trace(mask, ISO, roots=[(16, 40, 8)])
    assert np.abs(tree.points[:, 1] - 40).max() < 2
    assert len(tips(tree)) == 1


def test_a_thick_flat_process_is_one_path_not_a_comb() -> None:
    mask = np.zeros((40, 40, 120), dtype=np.float32)
    for z in np.linspace(12, 28, 33):
        paint_points(mask, sample_line((z, 20, 10), (z, 20, 110)), 2.0)
    (tree,) = trace(mask, ISO, roots=[(20, 20, 10)])
    assert length(tree) < 125
    assert len(tips(tree)) <= 2
    (rough,) = trace(add_noise(mask, 3), ISO, roots=[(20, 20, 10)])
    assert length(rough) < 210
    assert len(tips(rough)) <= 4


def test_a_root_off_the_mask_snaps_and_one_too_far_is_refused() -> None:
    mask = np.zeros((32, 64, 100), dtype=np.float32)
    paint_points(mask, sample_line((16, 20, 8), (16, 20, 90)), 2.0)
    (tree,) = trace(mask, ISO, roots=[(16, 28, 10)])
    assert tuple(tree.points[0]) == (16, 28, 10)
    assert tree.points[1:, 1].max() < 28
    with pytest.raises(InputError, match=r"lies 23\.0 voxels off .* raise trace\.root_snap"):
        trace(mask, ISO, roots=[(16, 45, 10)])
    with pytest.raises(InputError, match="outside the volume"):
        trace(mask, ISO, roots=[(16, 20, 120)])
    with pytest.raises(InputError, match=r"reaches the probability 0\.5"):
        trace(mask * 0.4, ISO, roots=[(16, 20, 10)])


def test_a_speck_at_the_root_does_not_win_over_the_neurite_beside_it() -> None:
    mask = np.zeros((32, 64, 100), dtype=np.float32)
    paint_points(mask, sample_line((16, 20, 8), (16, 20, 90)), 2.0)
    paint_points(mask, np.array([[16.0, 27.0, 40.0]]), 2.0)
    (tree,) = trace(mask, ISO, roots=[(16, 25, 40)], cfg=TraceConfig(gap=0))
    assert length(tree) > 80


def test_a_root_at_a_string_of_beads_does_not_leap_to_a_longer_neurite_however_far_it_may() -> None:
    mask = np.zeros((32, 64, 160), dtype=np.float32)
    for x in range(8, 60, 12):  # beads of 8 voxels
        paint_points(mask, sample_line((16, 20, x), (16, 20, x + 4)), 2.0)
    paint_points(mask, sample_line((16, 50, 90), (16, 50, 150)), 2.0)
    (tree,) = trace(mask, ISO, roots=[(16, 20, 8)], cfg=TraceConfig(root_snap=1000.0))
    assert tree.points[:, 1].max() < 25
    assert tree.points[:, 2].max() > 55


def test_without_a_root_each_neuron_is_a_tree_from_its_soma_or_thick_end() -> None:
    mask = np.zeros((48, 96, 160), dtype=np.float32)
    paint_points(mask, sample_line((12, 20, 20), (12, 20, 150)), 2.0)
    paint_points(mask, np.array([[12.0, 20.0, 60.0]]), 9.0)  # a soma in the middle
    paint_points(mask, sample_line((36, 70, 10), (36, 70, 60)), 1.6)
    paint_points(mask, sample_line((36, 70, 60), (36, 70, 100)), 3.0)
    paint_points(mask, sample_line((36, 20, 10), (36, 20, 25)), 2.0)  # too short to be told
    trees = trace(mask, ISO)
    assert len(trees) == 2
    soma, thick = trees
    np.testing.assert_allclose(soma.points[0], (12, 20, 60), atol=2.5)
    assert soma.types.tolist() == [1] + [0] * (len(soma) - 1)
    assert soma.radii[0] == pytest.approx(9, abs=1)
    np.testing.assert_allclose(thick.points[0], (36, 70, 102), atol=2.5)
    assert trace(np.zeros((8, 8, 8), dtype=np.float32), ISO) == []


def paint_neuron_with_a_false_end(brightness: float) -> NDArray[np.float32]:
    """A neuron that tapers along x and branches, and at its thin end a thick cable of another brightness."""
    volume = np.zeros((32, 64, 160), dtype=np.float32)
    paint_points(volume, sample_line((16, 20, 100), (16, 20, 150)), 4.0, brightness)
    paint_points(volume, sample_line((16, 20, 8), (16, 20, 50)), 2.5)
    paint_points(volume, sample_line((16, 20, 50), (16, 20, 100)), 1.6)
    paint_points(volume, sample_line((16, 20, 40), (16, 55, 60)), 1.6)
    return volume


@pytest.mark.parametrize("brightness", [0.52, 0.65])
def test_a_tree_does_not_begin_at_the_thick_end_of_a_dim_cable(brightness: float) -> None:
    (tree,) = trace(paint_neuron_with_a_false_end(brightness), ISO)
    np.testing.assert_allclose(tree.points[0], (16, 20, 7), atol=3)
    assert length(tree) > 170


def test_a_tree_does_not_begin_at_a_dim_blob() -> None:
    volume = paint_neuron_with_a_false_end(0.52)
    paint_points(volume, np.array([[16.0, 20.0, 140.0]]), 9.0, 0.52)
    (tree,) = trace(volume, ISO)
    np.testing.assert_allclose(tree.points[0], (16, 20, 7), atol=3)
    assert not tree.types.any()


def test_a_false_cable_with_the_thickest_end_is_left_out_and_the_neuron_is_kept() -> None:
    """What only a network sees is no root, so it is an end like others, and is dropped."""
    probability, shown = paint_neuron_with_a_false_end(1.0), paint_neuron_with_a_false_end(0.1)
    shape, cfg = (32, 64, 160), TraceConfig()

    def read(box: Box) -> NDArray[np.float32]:
        return probability[box.slices]

    blocks = [skeletonize_block(read, shape, box, ISO, cfg) for box in list_trace_blocks(shape, cfg)]
    skeletons = [block for block in blocks if block is not None]
    (tree,) = trace_block_skeletons(skeletons, read, shape, ISO, cfg=cfg, shown=lambda box: shown[box.slices])
    np.testing.assert_allclose(tree.points[0], (16, 20, 7), atol=3)
    assert tree.points[:, 2].max() < 110
    assert length(tree) > 120


def test_a_root_can_be_where_the_neuron_begins() -> None:
    mask = np.zeros((32, 64, 160), dtype=np.float32)
    paint_points(mask, sample_line((16, 32, 5), (16, 32, 150)), 2.0)
    paint_points(mask, sample_line((16, 32, 100), (16, 55, 120)), 2.0)
    (both,) = trace(mask, ISO, roots=[(16, 32, 50)], cfg=TraceConfig(root_is_end=False))
    (ahead,) = trace(mask, ISO, roots=[(16, 32, 50)], cfg=TraceConfig(root_is_end=True))
    assert both.points[:, 2].min() < 6
    assert ahead.points[:, 2].min() > 49
    assert len(tips(ahead)) == len(tips(both)) - 1 == 2


def paint_neuron(start: float) -> NDArray[np.float32]:
    """An axon along x from `start`, with a branch from x = 100."""
    mask = np.zeros((32, 64, 160), dtype=np.float32)
    paint_points(mask, sample_line((16, 32, start), (16, 32, 150)), 2.0)
    paint_points(mask, sample_line((16, 32, 100), (16, 55, 120)), 2.0)
    return mask


def test_an_unbranched_cable_from_the_border_to_the_root_is_left_out() -> None:
    (tree,) = trace(paint_neuron(0), ISO, roots=[(16, 32, 50)])
    assert tree.points[:, 2].min() > 49
    assert len(tips(tree)) == 2


def test_stubs_and_doubles_of_the_cable_behind_a_root_are_no_branches() -> None:
    mask = np.zeros((32, 96, 220), dtype=np.float32)
    paint_points(mask, sample_line((16, 48, 0), (16, 48, 215)), 2.0)
    paint_points(mask, sample_line((16, 48, 160), (16, 80, 180)), 2.0)

    # A short stub, and a stretch that leaves the cable and runs beside it.
    paint_points(mask, sample_line((16, 48, 60), (16, 55, 60)), 1.0)
    paint_points(mask, sample_line((16, 48, 50), (23, 48, 40)), 1.0)
    paint_points(mask, sample_line((23, 48, 40), (23, 48, 15)), 1.0)
    (ahead,) = trace(mask, ISO, roots=[(16, 48, 80)])
    assert ahead.points[:, 2].min() > 79

    # A branch that leads away is one.
    paint_points(mask, sample_line((16, 48, 55), (16, 66, 40)), 1.0)
    (both,) = trace(mask, ISO, roots=[(16, 48, 80)])
    assert both.points[:, 2].min() < 4


def test_ends_that_the_image_does_not_show_are_left_out() -> None:
    cfg, shape = TraceConfig(), (32, 64, 160)
    mask, image = paint_neuron(20), paint_neuron(20)
    # The image shows neither a gap in the axon nor the branch.
    image[:, :, 60:75] = 0
    image[:, 34:, :] = 0
    skeletons = [
        skeleton
        for box in list_trace_blocks(shape, cfg)
        if (skeleton := skeletonize_block(lambda b: mask[b.slices], shape, box, ISO, cfg)) is not None
    ]

    def run(shown: NDArray[np.float32] | None) -> Tree:
        (tree,) = trace_block_skeletons(
            skeletons,
            lambda b: mask[b.slices],
            shape,
            ISO,
            roots=[(16.0, 32.0, 20.0)],
            cfg=cfg,
            shown=None if shown is None else lambda b: shown[b.slices],
        )
        return tree

    assert len(tips(run(None))) == 2
    tree = run(image)
    assert len(tips(tree)) == 1
    assert tree.points[:, 2].max() > 146
    assert tree.points[:, 1].max() < 34


def test_a_root_at_an_end_keeps_the_whole_neuron() -> None:
    (tree,) = trace(paint_neuron(0), ISO, roots=[(16, 32, 0)])
    assert tree.points[:, 2].max() > 148
    assert length(tree) > 170


def test_a_root_on_a_passing_cable_grows_both_ways() -> None:
    # The far side ends inside the volume, so it is no axon that enters the view.
    (tree,) = trace(paint_neuron(20), ISO, roots=[(16, 32, 50)])
    assert tree.points[:, 2].min() < 24

    # Without a branch on either side nothing tells where the neuron begins.
    cable = np.zeros((32, 64, 160), dtype=np.float32)
    paint_points(cable, sample_line((16, 32, 0), (16, 32, 159)), 2.0)
    (tree,) = trace(cable, ISO, roots=[(16, 32, 50)])
    assert np.ptp(tree.points[:, 2]) > 150


def test_a_soma_in_the_middle_is_no_end() -> None:
    mask = paint_neuron(0)
    paint_points(mask, np.array([[16.0, 32.0, 50.0]]), 8.0)
    (tree,) = trace(mask, ISO, roots=[(16, 32, 50)])
    assert tree.points[:, 2].min() < 4
    assert tree.points[:, 2].max() > 146


def test_pieces_without_a_root_are_kept_on_request() -> None:
    mask = paint_neuron(0)
    paint_points(mask, sample_line((5, 5, 20), (5, 5, 90)), 2.0)
    cfg, shape = TraceConfig(), (32, 64, 160)
    skeletons = [
        skeletonize_block(lambda b: mask[b.slices], shape, box, ISO, cfg) for box in list_trace_blocks(shape, cfg)
    ]
    present = [skeleton for skeleton in skeletons if skeleton is not None]
    roots = [(16.0, 32.0, 0.0), (16.0, 32.0, 149.0)]
    for starts in (roots[:1], roots):
        trees = trace_block_skeletons(
            present, lambda b: mask[b.slices], shape, ISO, roots=starts, cfg=cfg, keep_rest=True
        )
        assert len(trees) == len(starts) + 1
        assert np.allclose(trees[-1].points[:, 1], 5, atol=1)


def test_physical_lengths_undo_a_coarse_z_step() -> None:
    mask = np.zeros((24, 80, 160), dtype=bool)
    z, y, x = np.indices(mask.shape)
    mask |= (3.0 * (z - 12)) ** 2 + (y - 40) ** 2 <= 36  # 13 voxels wide, 5 high
    mask &= (x > 10) & (x < 150)
    (tree,) = trace(mask, (3.0, 1.0, 1.0), roots=[(12, 40, 14)], cfg=TraceConfig(metric="um"))
    assert np.median(tree.radii) == pytest.approx(6, abs=0.8)
    assert len(tips(tree)) <= 2
    assert length(tree) < 150


@pytest.mark.parametrize(
    ("probability", "message"),
    [
        (np.zeros((8, 8), dtype=np.float32), "three axes"),
        (np.full((8, 8, 8), 2.0, dtype=np.float32), "ranges from 2"),
        (np.full((8, 8, 8), np.nan, dtype=np.float32), "ranges from nan"),
        (np.zeros((8, 8, 8), dtype=np.int16), "int16"),
    ],
)
def test_what_is_no_probability_is_refused(probability: NDArray[np.generic], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(probability, ISO)


@pytest.mark.parametrize("bad", ["threshold=0", "low=0.9", "gap=-1", "smooth=-1"])
def test_senseless_settings_are_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=bad.split("=")[0]):
        load(TraceConfig, None, [bad])
