"""Voxel metrics against MONAI, against medpy's definition written out with scipy, and on cases known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hpc_neuro.core.geometry import Box, VoxelSize
from hpc_neuro.metrics import centerline, surface, voxel
from hpc_neuro.metrics.centerline import skeletonize_mask
from hpc_neuro.metrics.metric import measure_diagonal

SPACINGS = [(1.0, 1.0, 1.0), (1.0, 0.3296, 0.3296), (0.35, 2.0, 0.7)]


def blob(shape: tuple[int, int, int], seed: int, share: float, sigma: float = 2.0) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return field > np.quantile(field, 1 - share)


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    shape = (18, 40, 37)
    a = blob(shape, 0, 0.1)
    dot, far = np.zeros(shape, bool), np.zeros(shape, bool)
    dot[0, 0, 0] = far[-1, -1, -1] = True
    return [(a, blob(shape, 1, 0.1)), (a, np.roll(a, 2, axis=2)), (blob(shape, 2, 0.6), a), (dot, a), (dot, far)]


def medpy_distances(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """medpy's surface distances, by its published definition."""
    cross = ndimage.generate_binary_structure(3, 1)
    edge_a, edge_b = (m ^ ndimage.binary_erosion(m, cross) for m in (a, b))
    return ndimage.distance_transform_edt(~edge_b, sampling=spacing)[edge_a]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("case", range(5))
def test_surface_metrics_equal_medpys_definition(case: int, spacing: tuple[float, float, float]) -> None:
    a, b = pairs()[case]
    forward, backward = medpy_distances(a, b, spacing), medpy_distances(b, a, spacing)
    distances = voxel.compute_surface_distances(a, b, spacing)
    assert distances.hd95_pooled == pytest.approx(np.percentile(np.hstack([forward, backward]), 95), abs=1e-9)
    assert distances.assd == pytest.approx(np.hstack([forward, backward]).mean(), abs=1e-9)
    assert distances.hd95 == pytest.approx(max(np.percentile(forward, 95), np.percentile(backward, 95)), abs=1e-9)
    assert voxel.hd95(a, b, spacing) == pytest.approx(distances.hd95, abs=1e-12)
    assert voxel.hd95_pooled(a, b, spacing) == distances.hd95_pooled
    assert not distances.is_miss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_equal_to_monai() -> None:
    monai = pytest.importorskip("monai.metrics", reason="MONAI is the oracle here")
    import torch

    for a, b in pairs():
        for spacing in SPACINGS:
            ta, tb = torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None]
            hausdorff = monai.compute_hausdorff_distance(ta, tb, True, percentile=95, spacing=spacing)
            assert voxel.hd95(a, b, spacing) == pytest.approx(float(hausdorff), rel=1e-6)
            assert voxel.dice(a, b) == pytest.approx(float(monai.compute_dice(ta, tb, True)), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 2**32 - 1),
    st.floats(0.01, 0.9),
    st.sampled_from(SPACINGS),
)
def test_any_small_masks_equal_the_definition(
    shape: tuple[int, int, int], seed: int, share: float, spacing: VoxelSize
) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random(shape) < share, rng.random(shape) < share
    if a.any() and b.any():
        forward, backward = medpy_distances(a, b, spacing), medpy_distances(b, a, spacing)
        expected = max(np.percentile(forward, 95), np.percentile(backward, 95))
        assert voxel.hd95(a, b, spacing) == pytest.approx(expected, abs=1e-9)
        assert voxel.compute_surface_distances(a, b, spacing).hd95 == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.permutations([0, 1, 2]), st.sets(st.integers(0, 2)))
def test_invariant_under_axis_order_and_flips(seed: int, order: list[int], flipped: set[int]) -> None:
    shape, spacing = (8, 11, 13), (1.0, 0.5, 0.25)
    a, b = blob(shape, seed, 0.2), blob(shape, seed ^ 1, 0.2)

    def reorient_mask(m: np.ndarray) -> np.ndarray:
        return np.flip(m.transpose(order), axis=tuple(flipped))

    one = voxel.compute_surface_distances(a, b, spacing)
    two = voxel.compute_surface_distances(reorient_mask(a), reorient_mask(b), tuple(spacing[i] for i in order))  # type: ignore[arg-type]
    assert (two.hd95, two.hd95_pooled, two.assd) == pytest.approx((one.hd95, one.hd95_pooled, one.assd))
    assert voxel.count_voxels(reorient_mask(a), reorient_mask(b)) == voxel.count_voxels(a, b)
    assert voxel.hd95(b, a, spacing) == pytest.approx(voxel.hd95(a, b, spacing))


@pytest.mark.parametrize("gap", [1, 3, 20, 250, 300])
def test_far_surfaces_along_every_axis(gap: int) -> None:
    """Beyond the reach of the search close by, and beyond what one byte per column can hold."""
    for axis in range(3):
        shape = [9, 9, 9]
        shape[axis] = 330
        a, b = np.zeros(shape, bool), np.zeros(shape, bool)
        np.moveaxis(a, axis, 0)[4:7, 2:6, 2:6] = True
        np.moveaxis(b, axis, 0)[4 + gap : 7 + gap, 2:6, 2:6] = True
        forward = medpy_distances(a, b, (1, 2, 3))
        np.testing.assert_allclose(surface.SurfacePair(a, b, (1, 2, 3)).measure_distances()[0], forward)
        assert voxel.hd95(a, b, (1, 2, 3)) == pytest.approx(np.percentile(forward, 95))


def test_percentile_of_a_large_surface_with_a_far_part() -> None:
    a = np.zeros((40, 150, 150), bool)
    a[10:30, 10:80, 10:140] = True
    b = a.copy()
    b[:, 60:] = False
    b[15:20, 120:125, 20:120] = True
    full = surface.SurfacePair(a, b, (1.0, 0.5, 0.5)).measure_distances()
    for percent in (50.0, 90.0, 95.0, 99.0):
        expected = [np.percentile(d, percent) for d in full]
        assert surface.SurfacePair(a, b, (1.0, 0.5, 0.5)).measure_percentiles(percent) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_percentiles_are_exact_where_the_sample_is_beyond_the_nearby_search(
    seed: int, spacing: tuple[float, float, float]
) -> None:
    a, b = blob((40, 90, 80), seed, 0.1, 3.0), blob((40, 90, 80), seed + 100, (0.1, 0.01, 0.3)[seed % 3], 3.0)
    pair = surface.SurfacePair(a, b, spacing)
    for percent in (50.0, 90.0, 95.0, 99.0):
        expected = [np.percentile(d, percent) for d in pair.measure_distances()]
        assert pair.measure_percentiles(percent) == pytest.approx(expected, rel=1e-12)


def test_assd_is_the_mean_of_both_directions_pooled() -> None:
    """A line of 10 against its first 2 voxels: 8 of 12 distances are above 0. medpy pools them."""
    predicted, gold = np.zeros((3, 4, 12), bool), np.zeros((3, 4, 12), bool)
    predicted[1, 2, :10] = gold[1, 2, :2] = True
    assert voxel.compute_surface_distances(predicted, gold, (1, 1, 1)).assd == pytest.approx(sum(range(1, 9)) / 12)


def test_rules_for_empty_masks() -> None:
    empty, full = np.zeros((3, 4, 12), bool), np.ones((3, 4, 12), bool)
    assert measure_diagonal(empty.shape, (1, 1, 1)) == 13.0
    both = voxel.compute_surface_distances(empty, empty, (1, 1, 1))
    assert (both.hd95, both.hd95_pooled, both.assd, both.is_miss) == (0, 0, 0, False)
    for p, g in ((empty, full), (full, empty)):
        one = voxel.compute_surface_distances(p, g, (1, 1, 1))
        assert (one.hd95, one.hd95_pooled, one.assd, one.is_miss) == (13, 13, 13, True)
        assert voxel.hd95(p, g) == voxel.hd95_pooled(p, g) == 13
        assert (voxel.dice(p, g), centerline.cldice(p, g), voxel.precision(p, g), voxel.recall(p, g)) == (0, 0, 0, 0)
        assert voxel.count_voxels(p, g).is_miss
    assert (voxel.dice(empty, empty), centerline.cldice(empty, empty)) == (1, 1)
    assert (voxel.precision(empty, empty), voxel.recall(empty, empty)) == (1, 1)
    with pytest.raises(ValueError, match="empty mask"):
        surface.SurfacePair(empty, full, (1, 1, 1))


def test_overlap_by_hand_and_unlabelled_voxels() -> None:
    gold = np.array([[[1, 1, 1, 0, 0, 255, 255]]], dtype=np.uint8)
    predicted = np.array([[[1, 1, 0, 1, 0, 1, 0]]], dtype=np.uint8)
    counts = voxel.count_voxels(predicted, gold)
    assert counts == voxel.Counts(both=2, predicted_only=1, gold_only=1)
    assert (counts.dice, counts.precision, counts.recall) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    elsewhere = predicted.copy()
    elsewhere[..., 5:] = [[0, 1]]
    assert voxel.count_voxels(elsewhere, gold) == counts
    assert voxel.compute_surface_distances(elsewhere, gold, (1, 1, 1)) == voxel.compute_surface_distances(
        predicted, gold, (1, 1, 1)
    )
    with pytest.raises(ValueError, match="shape"):
        voxel.count_voxels(predicted, gold[..., 1:])


def test_cldice_of_lines() -> None:
    gold, half, thick = (np.zeros((20, 30, 40), bool) for _ in range(3))
    gold[10, 15, 5:35] = half[10, 15, 5:20] = True
    thick[9:12, 14:17, 5:35] = True
    assert centerline.cldice(gold, gold) == 1.0
    assert centerline.cldice(half, gold) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert centerline.cldice(thick, gold) == 1.0  # thickness does not matter, the centerline does
    assert voxel.dice(thick, gold) < 0.25


PARTS = {(2, 2, 20): 19, (20, 2, 2): 19, (4, 4, 20): 17, (3, 8, 8): 1, (2, 2, 2): 1, (6, 6, 6): 1, (1, 2, 2): 1}


@pytest.mark.parametrize("part", PARTS)
def test_no_part_is_thinned_away(part: tuple[int, int, int]) -> None:
    """Plain thinning removes each of these whole: a perfect prediction then had clDice 0, a false one counted not."""
    mask = np.zeros((30, 30, 30), dtype=bool)
    mask[tuple(slice(5, 5 + n) for n in part)] = True
    thin = skeletonize_mask(mask)
    assert PARTS[part] <= thin.sum() <= max(part)
    assert not (thin & ~mask).any()
    assert centerline.cldice(mask, mask) == 1.0
    other = mask.copy()
    other[5:8, 20, 2:12] = other[28, 28, 27:] = True  # a cable that survives thinning, and a speck
    assert centerline.cldice(mask, other) < 1.0


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("line", ["11", "101", "10110101", "1000000001"])
def test_a_mask_of_single_voxels_in_a_row_has_a_centerline(line: str, axis: int) -> None:
    """cc3d fails on such a row by itself."""
    mask = np.zeros((12, 13, 14), dtype=bool)
    row = np.array([c == "1" for c in line])
    np.moveaxis(mask, axis, 2)[3, 4, 1 : 1 + len(row)] = row
    thin = skeletonize_mask(mask)
    assert not (thin & ~mask).any()
    labels, parts = ndimage.label(mask, np.ones((3, 3, 3)))
    assert {*np.unique(labels[thin])} == set(range(1, parts + 1))


def test_streamed_equals_whole() -> None:
    a, b = blob((30, 45, 50), 3, 0.1), blob((30, 45, 50), 4, 0.1).astype(np.uint8)
    b[:5, :20] = 255
    block = (16, 16, 16)
    read_a, read_b = (lambda box: a[box.slices]), (lambda box: b[box.slices])
    assert voxel.count_voxels_blockwise(read_a, read_b, a.shape, block) == voxel.count_voxels(a, b)
    assert centerline.cldice_blockwise(read_a, read_b, a.shape, block, halo=(30, 30, 30)) == pytest.approx(
        centerline.cldice(a, b)
    )
    assert centerline.cldice_blockwise(lambda box: a[box.slices] & False, read_b, a.shape, block) == 0.0
    whole = voxel.compute_surface_distances(a, b, (1.0, 0.4, 0.4))
    parts = voxel.compute_surface_distances_blockwise(read_a, read_b, a.shape, (1.0, 0.4, 0.4), block)
    assert (parts.hd95, parts.hd95_pooled, parts.assd) == pytest.approx((whole.hd95, whole.hd95_pooled, whole.assd))
    nothing = voxel.compute_surface_distances_blockwise(
        lambda box: a[box.slices] & False, read_b, a.shape, (1, 1, 1), block
    )
    assert nothing.is_miss
    assert nothing.hd95 == pytest.approx(math.sqrt(30**2 + 45**2 + 50**2))


def test_extent() -> None:
    mask = np.zeros((5, 6, 7), bool)
    assert surface.find_extent(mask).size == 0
    mask[1:3, 2, 4:6] = True
    assert surface.find_extent(mask) == Box((1, 2, 4), (3, 3, 6))
