"""The benchmark of trees measures every part, and its dashes are joined row by row."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from hpc_neuro.tracing import TraceConfig
from hpc_neuro.tracing.centerlines import Centerlines, find_far_ends, find_paths_home
from hpc_neuro.tracing.gaps import join_gaps
from tools.bench import trees


def test_the_dashes_of_a_row_are_joined() -> None:
    graph = trees.build_dashes(250)
    assert graph.components == 250
    following, _ = find_paths_home(graph, find_far_ends(graph)[0], np.ones(len(graph.voxels)))
    bridges = join_gaps(graph, Centerlines(following, np.ones(len(following), dtype=bool)), TraceConfig())
    assert len(bridges) == 99 + 99 + 49
    np.testing.assert_array_equal(graph.points[bridges.ends, :2], graph.points[bridges.targets, :2])


def test_every_part_has_a_figure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--size", "24", "96", "96", "--neurons", "2", "--pieces", "100", "200", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["trees", *arguments])
    trees.main()
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["skeleton_voxels"] > 100
    for name in ("skeletons", "trees", "trees_with_image"):
        assert facts[f"{name}_us_per_voxel"] > 0
    assert set(facts["bridging"]) == {"100", "200"}
