"""The benchmark of resampling for a student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.tiny_store import write_store
from tests.trace_stacks.test_predictor import save_brightness_student
from tools.bench import voxel_size


def test_every_copy_is_traced_in_three_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store", {"a": "train"}, shape=(20, 80, 120))
    student = save_brightness_student(tmp_path / "weights")
    words = [str(store), "--model", str(student), "--factors", "1,0.5,0.5", "1,1.5,1.5"]
    monkeypatch.setattr("sys.argv", ["voxel_size", *words])
    assert voxel_size.main() == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["a"]
    assert list(rows) == ["itself", "1,0.5,0.5", "1,1.5,1.5"]
    assert rows["itself"]["f1"] > 0.8
    for name in ("1,0.5,0.5", "1,1.5,1.5"):
        assert list(rows[name]) == ["as_it_is", "resampled", "grid_of_the_copy"]
        assert rows[name]["resampled"] > 0.7
