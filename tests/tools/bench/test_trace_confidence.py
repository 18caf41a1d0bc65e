"""The benchmark of the confidence of `trace`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.trace_stacks.calibration import calibrate
from tests.helpers.tiny_store import write_store
from tools.bench import trace_confidence
from tools.bench.trace_confidence import JudgedStack


def make_stack(neuron: str, intercept: float, slope: float) -> JudgedStack:
    confidence = (np.arange(50) + 0.5) / 50
    share = np.full(50, 1 / 50)
    return JudgedStack(neuron, "as it is", confidence, share, share * calibrate(confidence, intercept, slope))


def test_the_scale_that_made_the_cable_is_found_and_calibrates_other_domains() -> None:
    stacks = [make_stack(name, 1.2, 0.6) for name in ("a_1", "a_2", "b", "c")]
    assert trace_confidence.fit_scale(stacks) == pytest.approx((1.2, 0.6), abs=0.01)
    errors = trace_confidence.compare_scales(stacks)
    assert errors["calibrated"] < 0.005
    assert errors["plain"] > 0.1
    assert stacks[0].domain == stacks[1].domain == "a"

    # A domain of another kind is judged by the scale of the others.
    odd = [*stacks, make_stack("d", -1.0, 0.6)]
    assert trace_confidence.compare_scales(odd)["calibrated"] > errors["calibrated"]
    with pytest.raises(SystemExit, match="several domains"):
        trace_confidence.compare_scales(stacks[:2])


def test_copies_of_neurons_are_traced_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store", {"a": "train", "b": "train"}, shape=(20, 80, 120))
    monkeypatch.setattr("sys.argv", ["trace_confidence", str(store), "--copies", "as it is"])
    assert trace_confidence.main() == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert set(result["errors"]) == {"plain", "calibrated", "constant"}
    assert sum("right" in line for line in lines) > 2
