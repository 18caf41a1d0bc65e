"""The benchmark of inference runs, and its figures are right where they can be known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hpc_neuro.infer.tiling import Tiling
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import build_student, save_student
from tests.helpers.tiny_store import write_store
from tools.bench import infer


def figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["bench_infer", *args])
    infer.main()
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_monai_gives_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report = figures(capsys, monkeypatch, "monai", "--shape", "16", "96", "144", "--overlap", "0.5")
    assert report["mean_difference"] < 5e-3  # type: ignore[operator]
    assert report["throughput_to_monai"] > 0  # type: ignore[operator]


def test_a_sparse_brain_is_skipped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer, "_BRAIN", (256, 1024, 1024))
    report = figures(capsys, monkeypatch, "sparse", "--occupied", "0.25", "--stand-in")
    assert (report["blocks"], report["skipped_share"]) == (8, 0.75)
    assert report["foreground"] == 2 * 8 * 29 * 256  # two blocks, every ninth line of 64 x 256 x 256 voxels


def test_a_student_sees_what_is_not_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer, "_BRAIN", (16, 64, 1152))
    report = figures(capsys, monkeypatch, "sparse", "--occupied", "0.5")
    plan = Tiling((16, 64, 64), 0.25, (4, 16, 16), (128, 512, 512), (32, 64, 64))
    blocks = plan.list_blocks((16, 64, 1152))
    assert (report["blocks"], report["skipped_share"]) == (len(blocks), 0.5) == (2, 0.5)
    assert report["windows"] == plan.count_windows(blocks[0])


def test_overlaps_and_windows_are_compared_on_a_labelled_volume(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = StudentConfig(depth=1, patch=(4, 16, 16), channels=(2, 4, 4))
    extra = {"window": [8, 32, 32], "threshold": 0.5}
    save_student(tmp_path / "model", cfg, build_student(cfg).state_dict(), extra)
    store = write_store(tmp_path / "store", {"a": "test"})
    args = ["--model", str(tmp_path / "model"), "--store", str(store), "--volume", "a", "--shape", "16", "48", "48"]
    report = figures(capsys, monkeypatch, "overlap", *args)
    rows = report["rows"]
    assert isinstance(rows, list)
    assert {r["overlap"] for r in rows} == {0.0, 0.25, 0.375, 0.5}
    assert all(0 <= r["dice"] <= 1 for r in rows)
