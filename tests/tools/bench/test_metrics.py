"""The benchmark runs, and its last line is the JSON that programs read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_small_sizes_run_and_end_in_json() -> None:
    sizes = ["--side", "40", "--nodes", "200", "--volume", "48", "--seconds", "0.5"]
    run = subprocess.run(
        [sys.executable, "-m", "tools.bench.metrics", *sizes], cwd=REPO, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert set(report) == {"hd95_blobs", "hd95_neuron", "hd95_spheres", "esa", "rasterize"}
    for row in report.values():
        assert {"ratio", "cpu_ratio", "ours_peak_bytes", "plain_peak_bytes"} <= set(row)
        assert row["ratio"] > 0
