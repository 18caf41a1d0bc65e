"""The accepted paths of a component are searched alike however they are looked up."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.tracing import TraceConfig, branch_test
from hpc_neuro.tracing.branch_test import AcceptedPaths
from tests.helpers.shapes import build_voxel_graph


@pytest.mark.parametrize("cell", [3.0, 1000.0])
def test_the_nearest_accepted_voxel_does_not_depend_on_the_cells(cell: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short paths in one component, so that few cells of the smaller edge hold all that may be nearest."""
    monkeypatch.setattr(branch_test, "_PATH_CELL", cell)
    graph = build_voxel_graph(np.ones((10, 24, 60), dtype=bool), TraceConfig())
    assert graph is not None
    assert graph.components == 1
    rng = np.random.default_rng(7)
    paths = AcceptedPaths(graph)
    accepted = [rng.integers(len(graph.voxels) - 3) + np.arange(3) for _ in range(300)]
    for path in accepted:
        paths.add(path)

    taken = np.concatenate(accepted)
    for joint in rng.choice(taken, 10):
        path = np.append(joint + np.arange(4), joint) % len(graph.voxels)
        distance, nearest = paths.find_nearest(path)
        exact = np.linalg.norm(graph.points[path][:, None] - graph.points[taken], axis=2).min(axis=1)
        np.testing.assert_allclose(distance, exact)
        np.testing.assert_allclose(np.linalg.norm(graph.points[path] - graph.points[nearest], axis=1), exact)
        assert np.isin(nearest, taken).all()


def test_a_component_without_a_path_is_infinitely_far() -> None:
    graph = build_voxel_graph(np.ones((4, 4, 20), dtype=bool), TraceConfig())
    assert graph is not None
    assert np.isinf(AcceptedPaths(graph).find_nearest(np.array([0, 1]))[0]).all()
