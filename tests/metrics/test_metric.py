"""The table of metrics: keys, directions, and what may be imported with it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import empty_tree
from hpc_neuro.metrics import list_metrics
from hpc_neuro.metrics.metric import Comparison, Metric, Tolerance, tolerance_key


def test_keys_follow_the_tolerance() -> None:
    assert tolerance_key("f1", 4.0) == "f1_4vox"
    assert [Tolerance(value, unit).text for value, unit in ((4, "vox"), (1, "vox"), (2.5, "um"))] == [  # type: ignore[arg-type]
        "4 voxels",
        "1 voxel",
        "2.5 µm",
    ]
    keys = [m.key for m in list_metrics(2.0, 1.5)]
    assert {"f1_2vox", "precision_2vox", "recall_2vox", "f1_2vox_no_stub", "f1_1.5um"} <= set(keys)
    assert len(set(keys)) == len(keys)
    assert not [key for key in keys if "4vox" in key]


def test_the_best_value_follows_the_direction() -> None:
    metrics = {m.key: m for m in list_metrics()}
    assert metrics["dice"].find_best([0.1, 0.9]) == 0.9
    assert metrics["esa"].find_best([0.1, 0.9]) == 0.1
    assert metrics["tips"].find_best([1, 2]) is None
    assert metrics["dice"].find_best([0.5, 0.5]) is None


def test_values_that_are_printed_alike_are_equally_good() -> None:
    dice = {metric.key: metric for metric in list_metrics()}["dice"]
    assert dice.mark_best([0.9861, 0.9859, 0.5]) == [True, True, False]
    assert dice.mark_best([0.9861, 0.9859]) == [False, False]
    assert dice.mark_best([0.9861, 0.9]) == [True, False]


def test_a_shared_step_runs_once() -> None:
    calls = []

    def step(comparison: Comparison) -> int:
        calls.append(comparison)
        return len(calls)

    def nothing(box: Box) -> NDArray[np.bool_]:
        return np.zeros(box.shape, bool)

    comparison = Comparison(nothing, nothing, empty_tree(), empty_tree(), (2, 2, 2), (1.0, 1.0, 1.0))
    metric = Metric("k", "K", "", "higher", 0, "A number.", compute=lambda c: c.once(step))
    assert [metric.compute(comparison), metric.compute(comparison)] == [1, 1]


@pytest.mark.slow
def test_metrics_do_not_import_torch() -> None:
    code = "import sys; from hpc_neuro.metrics import list_metrics; list_metrics(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
