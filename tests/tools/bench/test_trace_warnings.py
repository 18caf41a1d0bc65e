"""The benchmark of the warnings of `trace`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny_store import write_store
from tools.bench import trace_warnings


def test_the_area_counts_pairs_and_half_of_the_ties() -> None:
    positive = np.array([True, True, False, False])
    assert trace_warnings.measure_area(np.array([3, 2, 1, 0]), positive) == 1
    assert trace_warnings.measure_area(np.array([1, 1, 1, 1]), positive) == 0.5
    assert trace_warnings.measure_area(np.array([2, 0, 1, 0]), positive) == 0.625
    assert np.isnan(trace_warnings.measure_area(np.array([2, 0]), np.array([True, True])))


def test_every_copy_of_a_neuron_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store", {"a": "train"}, shape=(20, 160, 240))
    monkeypatch.setattr("sys.argv", ["trace_warnings", str(store)])
    assert trace_warnings.main() == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["copy"] for row in rows] == list(trace_warnings.COPIES)
    by_copy = {row["copy"]: row for row in rows}
    assert by_copy["as it is"]["f1"] > 0.8
    # The tree of an inverted copy is the same, and so is that of the gold, moved into a coarser copy.
    assert by_copy["inverted"]["f1"] == pytest.approx(by_copy["as it is"]["f1"], abs=0.1)
    assert by_copy["coarse"]["f1"] > 0.6
