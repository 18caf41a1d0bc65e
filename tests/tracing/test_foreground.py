"""The sparse graph against dense libraries."""

from __future__ import annotations

import cc3d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hpc_neuro.tracing.foreground import foreground
from hpc_neuro.tracing.paths import far_ends, ways


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    share=st.floats(0.05, 0.9),
    spacing=st.tuples(*[st.sampled_from([1.0, 1.5, 3.0])] * 3),
)
def test_components_and_distances_are_those_of_dense_libraries(
    seed: int, shape: tuple[int, int, int], share: float, spacing: tuple[float, float, float]
) -> None:
    mask = np.random.default_rng(seed).random(shape) < share
    found = foreground(lambda box: mask[box.slices], shape, 0.5, 0.5, np.array(spacing), min_voxels=1)
    if not mask.any():
        assert found is None
        return
    assert found is not None
    np.testing.assert_array_equal(found.voxels, np.argwhere(mask))
    labels = cc3d.connected_components(mask, connectivity=26)[mask]
    assert found.components == labels.max()
    assert len({*zip(labels.tolist(), found.component.tolist(), strict=True)}) == labels.max()
    if not mask.all():
        wanted = ndimage.distance_transform_edt(mask, sampling=spacing)
        np.testing.assert_allclose(found.distance, wanted[mask], rtol=1e-9)
    around = ndimage.convolve(mask.astype(int), np.ones((3, 3, 3)), mode="constant")[mask] - 1
    assert len(found.pairs) * 2 == around.sum()


def test_hysteresis_keeps_what_hangs_on_a_strong_voxel_and_drops_specks() -> None:
    line = np.zeros((5, 5, 40), dtype=np.float32)
    line[2, 2, :30] = 0.35
    line[2, 2, 10] = 0.9
    line[0, 0, 33:38] = 0.35  # weak alone
    line[4, 4, 0:3] = 0.9  # strong, but only three voxels
    found = foreground(lambda box: line[box.slices], line.shape, 0.3, 0.5, np.ones(3), min_voxels=4)
    assert found is not None
    assert found.components == 1
    np.testing.assert_array_equal(found.voxels[:, 2], np.arange(30))
    np.testing.assert_array_equal(
        found.at(np.array([[2.2, 1.9, 10.3], [0, 0, 35], [2, 2, 41]])), np.float32([0.9, 0, 0])
    )


def test_ways_lead_home_by_the_shortest_road() -> None:
    ring = np.zeros((3, 21, 21), dtype=bool)
    ring[1, 2, 2:19] = ring[1, 18, 2:19] = ring[1, 2:19, 2] = ring[1, 2:19, 18] = True
    found = foreground(lambda box: ring[box.slices], ring.shape, 0.5, 0.5, np.ones(3), min_voxels=1)
    assert found is not None
    way, length = ways(found, np.array([0]), np.ones(len(found.voxels)))
    assert way[0] == 0
    assert length.max() == pytest.approx(32 - 2 * (2 - np.sqrt(2)), abs=1.5)  # the far corner, over cut corners
    ends, extent = far_ends(found)
    np.testing.assert_array_equal(found.voxels[ends[0]], [1, 18, 18])
    assert extent[0] == pytest.approx(length.max())
