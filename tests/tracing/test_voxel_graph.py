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
from hpc_neuro.tracing import TraceConfig, voxel_graph
from hpc_neuro.tracing.block_skeleton import REACH
from hpc_neuro.tracing.centerlines import find_far_ends, find_paths_home
from hpc_neuro.tracing.probability import ProbabilitySampler
from hpc_neuro.tracing.voxel_graph import SurfaceIndex, find_neighbor_pairs
from tests.helpers.shapes import build_voxel_graph


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
    """What is connected in the volume is connected in the skeletons of its blocks, and nothing else is.

    Distances are measured in one of two ways, by the share of foreground in a block.
    """
    mask = np.random.default_rng(seed).random(shape) < share
    cfg = TraceConfig(block=(8, 9, 10), min_voxels=1, metric="um")
    graph = build_voxel_graph(mask, cfg, voxel_size)
    if not mask.any():
        assert graph is None
        return

    assert graph is not None
    labels = ndimage.label(mask, np.ones((3, 3, 3)))[0]
    label_of_voxel = labels[tuple(graph.voxels.T)]
    assert label_of_voxel.min() > 0
    assert graph.components == labels.max() == len({*label_of_voxel.tolist()})
    assert len({*zip(label_of_voxel.tolist(), graph.component.tolist(), strict=True)}) == labels.max()

    if not mask.all():
        expected = np.minimum(ndimage.distance_transform_edt(mask, sampling=cfg.spacing(voxel_size)), REACH)
        np.testing.assert_allclose(graph.distance, expected[tuple(graph.voxels.T)], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_a_box_holds_the_values_of_its_voxels(data: st.DataObject, seed: int) -> None:
    """Also boxes across the borders of the cells that stay in memory (32 x 64 x 64)."""
    values = np.random.default_rng(seed).random((40, 70, 133)).astype(np.float32)
    sampler = ProbabilitySampler(lambda box: values[box.slices], values.shape, 0.5)
    ends = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in values.shape]
    (z0, z1), (y0, y1), (x0, x1) = ends
    box = Box((z0, y0, x0), (z1, y1, x1))
    assert np.array_equal(sampler.read_foreground(box), values[box.slices] >= 0.5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.tuples(*[st.integers(1, 12)] * 3), share=st.floats(0.05, 0.9))
def test_neighbor_pairs_are_all_of_the_26(seed: int, shape: Shape, share: float) -> None:
    mask = np.random.default_rng(seed).random(shape) < share
    pairs, step = find_neighbor_pairs(np.argwhere(mask).astype(np.int32), shape, np.array([3.0, 1.0, 1.0]))
    around = ndimage.convolve(mask.astype(int), np.ones((3, 3, 3)), mode="constant")[mask] - 1
    assert len(pairs) * 2 == around.sum()
    voxels = np.argwhere(mask) * [3.0, 1.0, 1.0]
    np.testing.assert_allclose(np.linalg.norm(voxels[pairs[:, 0]] - voxels[pairs[:, 1]], axis=1), step)


def test_hysteresis_keeps_what_is_connected_to_a_strong_voxel_and_drops_specks() -> None:
    """Also where the strong voxel and the voxels that count lie in another block."""
    line = np.zeros((5, 5, 40), dtype=np.float32)
    line[2, 2, :30] = 0.35
    line[2, 2, 10] = 0.9
    # One that is weak throughout, and one that is strong, but has three voxels only.
    line[0, 0, 33:38] = 0.35
    line[4, 4, 0:3] = 0.9
    for block in ((8, 8, 40), (8, 8, 8), (8, 8, 11)):
        graph = build_voxel_graph(line, TraceConfig(threshold=0.5, low=0.3, min_voxels=4, block=block))
        assert graph is not None
        assert graph.components == 1
        np.testing.assert_array_equal(graph.voxels[:, 2], np.arange(30))


def test_single_voxels_are_read_cell_by_cell() -> None:
    shape = (70, 150, 90)
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    reads: list[Box] = []

    def read(box: Box) -> NDArray[np.uint8]:
        reads.append(box)
        return image[box.slices]

    sampler = ProbabilitySampler(read, shape, 0.3)
    positions = np.array([*itertools.product((-0.6, 0.4, 35, 69.4, 70), (3, 149.2, 150), (0, 89))])
    inside = np.all((np.rint(positions) >= 0) & (np.rint(positions) < shape), axis=1)
    expected = image[tuple(np.rint(positions[inside]).astype(int).T)] / 255

    for _ in range(2):
        np.testing.assert_allclose(sampler.sample_background(positions)[inside], expected, rtol=1e-6)
        np.testing.assert_allclose(sampler.sample(positions)[inside], np.where(expected >= 0.3, expected, 0), rtol=1e-6)
        assert not sampler.sample(positions)[~inside].any()
    assert len(reads) == 3 * 2 * 2
    assert max(box.size for box in reads) <= 32 * 64 * 64


def test_paths_lead_home_by_the_shortest_way() -> None:
    ring = np.zeros((3, 21, 21), dtype=bool)
    ring[1, 2, 2:19] = ring[1, 18, 2:19] = ring[1, 2:19, 2] = ring[1, 2:19, 18] = True
    graph = build_voxel_graph(ring, TraceConfig(min_voxels=1))
    assert graph is not None
    following, length = find_paths_home(graph, np.array([0]), np.ones(len(graph.voxels)))
    assert following[0] == 0
    # To the far corner, over cut corners.
    assert length.max() == pytest.approx(32 - 2 * (2 - np.sqrt(2)), abs=1.5)
    _, extent = find_far_ends(graph)
    assert extent[0] == pytest.approx(32, abs=3)


@pytest.mark.parametrize("most", [1, 30, 60])
def test_paths_do_not_depend_on_how_many_voxels_are_searched_at_once(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large graphs are searched in groups of components."""
    mask = np.random.default_rng(3).random((8, 20, 30)) < 0.06
    graph = build_voxel_graph(mask, TraceConfig(min_voxels=1))
    assert graph is not None
    assert graph.components > 20
    sources, cost = find_far_ends(graph)[0], np.random.default_rng(4).random(len(graph.voxels)) + 0.1
    following, length = find_paths_home(graph, sources, cost)
    monkeypatch.setattr(voxel_graph, "_DIJKSTRA_VOXELS", most)
    grouped, grouped_length = find_paths_home(graph, sources, cost)
    np.testing.assert_array_equal(grouped, following)
    np.testing.assert_allclose(grouped_length, length)


def test_voxels_are_looked_up_by_box_and_by_component() -> None:
    mask = np.random.default_rng(5).random((40, 70, 90)) < 0.02
    graph = build_voxel_graph(mask, TraceConfig(min_voxels=1))
    assert graph is not None
    for box in (Box((0, 0, 0), (40, 70, 90)), Box((31, 5, 60), (33, 66, 70)), Box((3, 3, 3), (4, 4, 4))):
        inside = np.all((graph.voxels >= box.start) & (graph.voxels < box.stop), axis=1)
        assert sorted(graph.voxels_in_box(box).tolist()) == np.flatnonzero(inside).tolist()
    for component in (0, 7, graph.components - 1):
        expected = np.flatnonzero(graph.component == component)
        np.testing.assert_array_equal(graph.voxels_of_component(component), expected)


def test_surfaces_are_searched_by_their_distance() -> None:
    """A soma beside thin neurites: pairs are found by the distance to the surface, whatever the thickness."""
    mask = np.zeros((40, 60, 120), dtype=bool)
    z, y, x = np.indices(mask.shape)
    mask |= (z - 20) ** 2 + (y - 30) ** 2 + (x - 20) ** 2 <= 14**2
    mask[20, 5:55:10, 40:110] = True
    graph = build_voxel_graph(mask, TraceConfig())
    assert graph is not None
    assert graph.thickness.max() > 8 * graph.thickness.min()

    rng = np.random.default_rng(6)
    positions = rng.uniform(0, mask.shape, (50, 3))
    reach = rng.uniform(1, 12, 50)
    away = np.linalg.norm(positions[:, None] - graph.points, axis=2) - graph.thickness
    is_near = away <= reach[:, None]
    assert 0 < is_near.any(axis=1).sum() < 50

    for voxels in (np.arange(len(graph.voxels)), np.flatnonzero(rng.random(len(graph.voxels)) < 0.3)):
        surfaces = SurfaceIndex(graph, voxels)
        pairs = set(zip(*(part.tolist() for part in surfaces.find_within(positions, reach)), strict=True))
        expected = {(place, voxel) for place, voxel in np.argwhere(is_near).tolist() if voxel in set(voxels.tolist())}
        assert expected <= pairs
        # The soma does not widen the search among the thin neurites.
        assert all(away[pair] <= reach[pair[0]] + graph.thickness[pair[1]] + 2 for pair in pairs)
        is_marked = surfaces.mark_near(positions, 12.0)
        assert is_marked[[place for place, _ in expected]].all()
        assert not surfaces.mark_near(positions + 500, 12.0).any()


def test_nothing_is_near_no_voxels() -> None:
    graph = build_voxel_graph(np.ones((4, 4, 20), dtype=bool), TraceConfig())
    assert graph is not None
    surfaces = SurfaceIndex(graph, np.zeros(0, dtype=np.int64))
    positions = np.zeros((3, 3))
    assert not surfaces.mark_near(positions, 5.0).any()
    assert [len(part) for part in surfaces.find_within(positions, np.full(3, 5.0))] == [0, 0]
