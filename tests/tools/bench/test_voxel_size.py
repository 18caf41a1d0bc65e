"""The benchmark of resampling for a student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.tiny_store import write_store
from tests.trace_stacks.test_predictor import save_brightness_student
from tools.bench import voxel_size


def test_every_copy_is_traced_in_four_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store", {"a": "train"}, shape=(20, 80, 120))
    student = save_brightness_student(tmp_path / "weights", neurite_widths=[[2, 3.5], [3, 4], [4, 9]])
    words = [str(store), "--model", str(student), "--factors", "1,1,1", "1,0.5,0.5", "1,1.5,1.5"]
    monkeypatch.setattr("sys.argv", ["voxel_size", *words])
    assert voxel_size.main() == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["a"]
    assert list(rows) == ["1,1,1", "1,0.5,0.5", "1,1.5,1.5"]
    assert rows["1,1,1"]["as_it_is"] > 0.8
    for row in rows.values():
        assert row["by_width"] > 0.7
    for name in ("1,0.5,0.5", "1,1.5,1.5"):
        assert list(rows[name]) == ["as_it_is", "by_width", "widths", "zoom", "by_size", "grid_of_the_copy"]
        assert rows[name]["by_size"] > 0.7

    # A copy that fits is not traced twice.
    fitting = [row for row in rows.values() if row["zoom"] == "1,1,1"]
    assert fitting
    assert all(row["by_width"] == row["as_it_is"] for row in fitting)
    monkeypatch.setattr("sys.argv", ["voxel_size", str(store), "--factors", "1,1,1", "--ways", "as_it_is"])
    assert voxel_size.main() == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["a"]["1,1,1"]) == ["as_it_is"]
