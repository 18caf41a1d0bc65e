"""The benchmark of `trace` on known neurons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.tiny_store import write_store
from tests.trace_stacks.test_predictor import save_brightness_student
from tools.bench import trace_stacks


def test_every_method_is_scored_on_every_neuron(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store", {"a": "train", "b": "test"})
    weights = save_brightness_student(tmp_path / "weights")
    monkeypatch.setattr("sys.argv", ["trace_stacks", str(store), "--models", "none", str(weights)])
    assert trace_stacks.main() == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(table["neurons"]) == {"otsu", "none", str(weights)}
    for rows in table["neurons"].values():
        assert set(rows) == {"a", "b"}
        assert all(0 <= row["f1_4vox"] <= 1 for row in rows.values())
    mean = sum(table["neurons"]["otsu"][name]["dice"] for name in "ab") / 2
    assert table["mean"]["otsu"]["dice"] == pytest.approx(mean)
