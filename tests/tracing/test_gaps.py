"""Rounds of bridges: what did not change is not measured again, and the bridges are the same."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.tracing import TraceConfig, gaps
from hpc_neuro.tracing.centerlines import find_centerlines, find_far_ends
from hpc_neuro.tracing.gaps import join_gaps
from hpc_neuro.tracing.graph import Bridges, CenterlineGraph, LineEnds
from hpc_neuro.tracing.voxel_graph import VoxelGraph
from tests.helpers.shapes import build_voxel_graph, paint_points, sample_line


def build_beads() -> VoxelGraph:
    """Strings of short dashes that bend, so that their directions come round by round, and dashes that stay alone."""
    mask = np.zeros((40, 140, 200), dtype=np.float32)
    rng = np.random.default_rng(8)
    for y in range(15, 130, 28):
        for x in range(10, 180, 13):
            bend = 5 * np.sin(x / 25)
            paint_points(mask, sample_line((20 + bend, y, x), (20 + bend, y, x + rng.integers(2, 8))), 1.3)
    graph = build_voxel_graph(mask, TraceConfig())
    assert graph is not None
    return graph


def test_rounds_measure_only_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, cfg = build_beads(), TraceConfig()
    centerlines = find_centerlines(graph, find_far_ends(graph)[0], cfg)
    measured, measure_ends = list[int](), gaps.measure_ends

    def count(lines: CenterlineGraph) -> LineEnds:
        measured.append(len(lines))
        return measure_ends(lines)

    monkeypatch.setattr(gaps, "measure_ends", count)
    bridges = join_gaps(graph, centerlines, cfg)
    assert len(measured) > 2
    assert measured[-1] < measured[0]

    update_ends, find_candidates = gaps._update_ends, gaps._find_candidates
    monkeypatch.setattr(
        gaps,
        "_update_ends",
        lambda graph, lines, pieces, is_changed, ends: update_ends(
            graph, lines, pieces, np.ones_like(is_changed), ends
        ),
    )
    monkeypatch.setattr(
        gaps,
        "_find_candidates",
        lambda graph, ends, pieces, is_changed, cfg: find_candidates(
            graph, ends, pieces, np.ones_like(is_changed), cfg
        ),
    )
    assert_equal(join_gaps(graph, centerlines, cfg), bridges)


def assert_equal(one: Bridges, other: Bridges) -> None:
    assert len(one) == len(other)
    np.testing.assert_array_equal(one.ends, other.ends)
    np.testing.assert_array_equal(one.targets, other.targets)
    np.testing.assert_array_equal(one.points, other.points)
