"""The voxel graph against dense libraries."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.tracing import TraceConfig
from hpc_neuro.tracing.block_skeleton import REACH
from hpc_neuro.tracing.centerlines import far_ends, ways
from hpc_neuro.tracing.voxel_graph import Look, find_neighbor_pairs
from tests.helpers.shapes import foreground_of


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    share=st.one_of(st.floats(0.001, 0.05), st.floats(0.05, 0.9)),
    voxel_size=st.tuples(*[st.sampled_from([1.0, 1.5, 3.0])] * 3),
)
def test_components_and_distances_are_those_of_dense_libraries(
    seed: int, shape: Shape, share: float, voxel_size: tuple[float, float, float]
) -> None:
    """What hangs together in the volume does so in the strands of its blocks, and nothing else does.

    Distances are taken in two ways, by what share of a block is foreground.
    """
    mask = np.random.default_rng(seed).random(shape) < share
    cfg = TraceConfig(block=(8, 9, 10), min_voxels=1, metric="um")
    found = foreground_of(mask, cfg, voxel_size)
    if not mask.any():
        assert found is None
        return
    assert found is not None
    labels = ndimage.label(mask, np.ones((3, 3, 3)))[0]
    mine = labels[tuple(found.voxels.T)]
    assert mine.min() > 0
    assert found.components == labels.max() == len({*mine.tolist()})
    assert len({*zip(mine.tolist(), found.component.tolist(), strict=True)}) == labels.max()
    if not mask.all():
        wanted = np.minimum(ndimage.distance_transform_edt(mask, sampling=cfg.spacing(voxel_size)), REACH)
        np.testing.assert_allclose(found.distance, wanted[tuple(found.voxels.T)], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_a_box_looked_at_is_what_single_voxels_tell(data: st.DataObject, seed: int) -> None:
    """Boxes over the borders of the cells that are kept (32 x 64 x 64)."""
    values = np.random.default_rng(seed).random((40, 70, 133)).astype(np.float32)
    look = Look(lambda box: values[box.slices], values.shape, 0.5)
    ends = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in values.shape]
    (z0, z1), (y0, y1), (x0, x1) = ends
    box = Box((z0, y0, x0), (z1, y1, x1))
    assert np.array_equal(look.inside(box), values[box.slices] >= 0.5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.tuples(*[st.integers(1, 12)] * 3), share=st.floats(0.05, 0.9))
def test_neighbours_are_all_of_the_26(seed: int, shape: Shape, share: float) -> None:
    mask = np.random.default_rng(seed).random(shape) < share
    pairs, step = find_neighbor_pairs(np.argwhere(mask).astype(np.int32), shape, np.array([3.0, 1.0, 1.0]))
    around = ndimage.convolve(mask.astype(int), np.ones((3, 3, 3)), mode="constant")[mask] - 1
    assert len(pairs) * 2 == around.sum()
    voxels = np.argwhere(mask) * [3.0, 1.0, 1.0]
    np.testing.assert_allclose(np.linalg.norm(voxels[pairs[:, 0]] - voxels[pairs[:, 1]], axis=1), step)


def test_hysteresis_keeps_what_hangs_on_a_strong_voxel_and_drops_specks() -> None:
    """Also where the strong voxel and the voxels that count lie in another block."""
    line = np.zeros((5, 5, 40), dtype=np.float32)
    line[2, 2, :30] = 0.35
    line[2, 2, 10] = 0.9
    line[0, 0, 33:38] = 0.35  # weak alone
    line[4, 4, 0:3] = 0.9  # strong, but only three voxels
    for block in ((8, 8, 40), (8, 8, 8), (8, 8, 11)):
        found = foreground_of(line, TraceConfig(threshold=0.5, low=0.3, min_voxels=4, block=block))
        assert found is not None
        assert found.components == 1
        np.testing.assert_array_equal(found.voxels[:, 2], np.arange(30))


def test_single_voxels_are_read_cell_by_cell() -> None:
    shape = (70, 150, 90)
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    reads: list[Box] = []

    def read(box: Box) -> NDArray[np.uint8]:
        reads.append(box)
        return image[box.slices]

    look = Look(read, shape, 0.3)
    places = np.array([*itertools.product((-0.6, 0.4, 35, 69.4, 70), (3, 149.2, 150), (0, 89))])
    inside = np.all((np.rint(places) >= 0) & (np.rint(places) < shape), axis=1)
    wanted = image[tuple(np.rint(places[inside]).astype(int).T)] / 255
    for _ in range(2):
        np.testing.assert_allclose(look.plain(places)[inside], wanted, rtol=1e-6)
        np.testing.assert_allclose(look(places)[inside], np.where(wanted >= 0.3, wanted, 0), rtol=1e-6)
        assert not look(places)[~inside].any()
    assert len(reads) == 3 * 2 * 2
    assert max(box.size for box in reads) <= 32 * 64 * 64


def test_ways_lead_home_by_the_shortest_road() -> None:
    ring = np.zeros((3, 21, 21), dtype=bool)
    ring[1, 2, 2:19] = ring[1, 18, 2:19] = ring[1, 2:19, 2] = ring[1, 2:19, 18] = True
    found = foreground_of(ring, TraceConfig(min_voxels=1))
    assert found is not None
    way, length = ways(found, np.array([0]), np.ones(len(found.voxels)))
    assert way[0] == 0
    assert length.max() == pytest.approx(32 - 2 * (2 - np.sqrt(2)), abs=1.5)  # the far corner, over cut corners
    _, extent = far_ends(found)
    assert extent[0] == pytest.approx(32, abs=3)
