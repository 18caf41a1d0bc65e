"""The intensity range: exact order statistics, streamed; refusals; the normalization."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data import intensity
from hpc_neuro.data.intensity import compute_histogram, compute_intensity_range, iter_slabs, normalize


def reader(image: Array) -> Callable[[Box], Array]:
    return lambda box: image[box.slices]


def compute_range_by_sorting(image: Array) -> tuple[float, float]:
    """The definition, by sorting."""
    values = np.sort(image.ravel().astype(np.float64))
    top = min(int((values > values[0]).sum()), max(1, round(0.005 * len(values))))
    return float(values[math.floor(0.01 * (len(values) - 1))]), float(values[::-1][math.floor(0.05 * (top - 1) + 1e-9)])


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "i4", "u4", "f4"])
def test_range_equals_its_definition(dtype: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.gamma(2.0, 20.0, (12, 40, 50))
    image[5, 10:30, 20:22] = 230
    if dtype in ("i2", "i4", "f4"):
        image -= 30  # negative values order too
    image = image.astype(dtype)
    assert compute_intensity_range(reader(image), image.shape) == pytest.approx(compute_range_by_sorting(image))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(["u1", "i2", "f4"]), st.floats(0, 0.999))
def test_range_equals_its_definition_at_any_sparsity(seed: int, dtype: str, empty: float) -> None:
    rng = np.random.default_rng(seed)
    image = np.where(rng.random((8, 20, 20)) < empty, 0, rng.integers(1, 120, (8, 20, 20))).astype(dtype)
    low, high = compute_range_by_sorting(image)
    if high > low:
        assert compute_intensity_range(reader(image), image.shape) == pytest.approx((low, high))
    else:
        with pytest.raises(InputError):
            compute_intensity_range(reader(image), image.shape)


def test_neurites_of_a_sparse_stack_are_near_one() -> None:
    image = np.zeros((20, 100, 100), dtype=np.uint8)
    image[10, 50, 10:90] = np.linspace(100, 200, 80)
    low, high = compute_intensity_range(reader(image), image.shape)
    assert low == 0
    assert 190 < high <= 200


def test_range_does_not_depend_on_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(1).normal(100, 20, (30, 70, 130)).astype(np.float32)
    whole = compute_intensity_range(reader(image), image.shape)
    monkeypatch.setattr(intensity, "_PASS_BYTES", 20_000)
    boxes = list(iter_slabs(image.shape, 4))
    assert len(boxes) > 30
    assert sum(b.size for b in boxes) == image.size
    assert compute_intensity_range(reader(image), image.shape) == whole


def test_slabs_begin_at_multiples_of_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intensity, "_PASS_BYTES", 100_000)
    assert {box.start[0] % 32 for box in iter_slabs((100, 300, 300), 2, depth=32)} == {0}
    assert {box.start[1] % 64 for box in iter_slabs((100, 300, 300), 2, depth=32)} == {0}


@pytest.mark.parametrize("value", [0, 7])
def test_constant_image_is_refused(value: int) -> None:
    image = np.full((4, 8, 8), value, dtype=np.uint8)
    with pytest.raises(InputError, match=f"every voxel is {value}, an image with contrast is wanted"):
        compute_intensity_range(reader(image), image.shape)
    with pytest.raises(InputError, match="every voxel is"):
        compute_intensity_range(reader(image.astype(np.float32)), image.shape)


def test_dark_neuron_on_white_is_refused() -> None:
    image = np.full((10, 50, 50), 255, dtype=np.uint8)
    image[5, 25, 10:40] = 0
    with pytest.raises(InputError, match="bright neuron on a dark background is wanted"):
        compute_intensity_range(reader(image), image.shape)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_named_by_voxel(bad: float) -> None:
    image = np.random.default_rng(0).random((4, 8, 9)).astype(np.float32)
    image[2, 3, 5] = bad
    with pytest.raises(InputError, match="voxel z=2 y=3 x=5 is NaN or infinite"):
        compute_intensity_range(reader(image), image.shape)


def test_normalize_maps_the_range_to_0_and_1() -> None:
    out = normalize(np.array([0, 10, 60, 110, 500], dtype=np.uint16), 10, 110)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, [0, 0, 0.5, 1, 1])


def test_percentile_ranks_are_mid_ranks() -> None:
    image = np.array([0, 0, 0, 0, 5, 5, 9, 9], dtype=np.uint8).reshape(2, 2, 2)
    ranks = compute_histogram(reader(image), image.shape).percentile_rank(np.array([0, 5, 9], dtype=np.uint8))
    np.testing.assert_allclose(ranks, [0.25, 0.625, 0.875])


@pytest.mark.parametrize("bounds", [(0.0, 1e300), (0.0, 1e-60), (5.0, 5.0), (1e39, 2e39)])
def test_range_beyond_float32_is_refused(bounds: tuple[float, float]) -> None:
    """Normalized by such a range, every voxel would become NaN, 0 or 1."""
    with pytest.raises(InputError, match="is empty or beyond float32"):
        normalize(np.array([0.0, 1.0]), *bounds)
