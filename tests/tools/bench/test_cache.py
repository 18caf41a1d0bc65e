"""The benchmark of the feature cache compares equals, and prints what it measured."""

from __future__ import annotations

import json

import pytest

from tools.bench import cache


@pytest.mark.slow
def test_the_last_line_is_json_and_the_live_teacher_gives_what_the_cache_holds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["--shape", "16", "48", "64", "--step-shape", "16", "48", "64", "--crop", "8", "32", "32"]
    assert cache.main([*sizes, "--teachers", "bundled", "--steps", "1"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    step = report["steps bundled"]
    assert step["cosine_of_same"] > 0.9999 > step["cosine_of_crop"]
    assert step["ratio"] == pytest.approx(step["cache_s"] / step["same_s"], rel=0.05)
    assert 0 <= step["wait"] < 1
    assert report["build"]["ratio"] == pytest.approx(report["build"]["bare_s"] / report["build"]["build_s"], rel=0.05)
    assert set(report["reads_mb_per_s"]) == {"crops", "sequential", "raw_windows", "gzip1_windows", "zarr_windows"}
