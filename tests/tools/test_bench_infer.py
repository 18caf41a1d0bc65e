"""The benchmark of inference runs, and its figures are right where they can be known."""

from __future__ import annotations

import json
import sys

import pytest

from tools import bench_infer


def figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["bench_infer", *args])
    bench_infer.main()
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_monai_gives_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures(capsys, monkeypatch, "monai", "--shape", "16", "96", "128")
    assert found["largest_difference"] < 0.02  # type: ignore[operator]
    assert found["throughput_to_monai"] > 0  # type: ignore[operator]


def test_a_sparse_brain_is_skipped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_infer, "_BRAIN", (256, 1024, 1024))
    found = figures(capsys, monkeypatch, "sparse", "--occupied", "0.25")
    assert (found["blocks"], found["skipped_share"]) == (8, 0.75)
    assert found["foreground"] == 2 * 8 * 29 * 256  # two blocks, every ninth line of 64 x 256 x 256 voxels
