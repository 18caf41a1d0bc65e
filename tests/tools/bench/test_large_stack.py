"""The benchmark of large stacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tools.bench import large_stack


def test_a_small_stack_is_written_once_and_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["large_stack", "--folder", str(tmp_path), "--edges", "64", "130"])
    assert large_stack.main() == 0
    small, large = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (small["voxels"], large["voxels"]) == (64**3, 130**3)
    assert large["trees"] >= 1
    assert large["cpu_seconds"] > 0
    assert 0.005 < large["mask_share"] < 0.06
    path = tmp_path / "stack_130_0.01_0.tif"
    image = tifffile.imread(path)
    assert image.shape == (130, 130, 130)
    assert 0.003 < np.mean(image > 80) < 0.03

    # The stack is kept, and traced again.
    written_at = path.stat().st_mtime_ns
    assert large_stack.main() == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])[1]["trees"] == large["trees"]
    assert path.stat().st_mtime_ns == written_at
