"""The benchmark of super-blocks compares a volume with itself, and measures every step."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from hpc_neuro.core.morphology import build_tree
from tools.bench import super_blocks


def test_f1_counts_cable_that_is_missing() -> None:
    line = build_tree(np.arange(40)[:, None] * np.array([0.0, 0.0, 1.0]), np.arange(40) - 1)
    half = build_tree(line.points[:20], np.arange(20) - 1)
    assert super_blocks.measure_f1([line], [line], 1.0) == 1.0
    assert super_blocks.measure_f1([half], [line], 1.0) == pytest.approx(2 * 0.525 / 1.525, abs=0.01)
    assert super_blocks.measure_f1([], [line], 1.0) == 0.0


@pytest.mark.slow
def test_every_part_has_a_figure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--size", "24", "64", "128", "--neurons", "2", "--block", "32", "--super-block", "2", "--grow", "1"]
    monkeypatch.setattr(sys, "argv", ["super_blocks", *arguments])
    super_blocks.main()
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["alike"]["crowd"]["super_blocks"] == 2
    assert facts["alike"]["crowd"]["f1"][1] > 0.9
    assert set(facts["memory"]["1"]) == {"skeletons", "lines", "links", "groups", "trees", "one process"}
