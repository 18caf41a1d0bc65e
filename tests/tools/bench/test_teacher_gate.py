"""The table of teachers, its verdict as exit code, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_neuro.data.store import StoredVolume
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute import gate_table
from hpc_neuro.precompute.gate import Figures, Judgment
from tests.helpers.tiny_store import write_store
from tools.bench import teacher_gate


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("gate") / "store", {"a": "train", "b": "test"}, (12, 64, 160))


def test_an_untrained_teacher_fails(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert teacher_gate.main(["--store", str(store), "--volumes", "a", "--teacher", "random", "--samples", "2"]) == 3

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:4]] == ["trained", "untrained", "pixels"]
    result = json.loads(lines[-1])["teachers"]["random"]
    assert not result["passes"]
    assert len(result["volumes"]["a"]["gains"]) == 4
    assert abs(result["volumes"]["a"]["gain"]) < 0.1


def judge_by_name(teacher: Teacher, volume: StoredVolume, layer: int, seed: int, samples: int, copies: int) -> Judgment:
    """Gains of 0.1, but for the random teacher on volume b."""
    probe = 0.2 if teacher.random and volume.id == "b" else 0.3
    return Judgment(volume.id, (Figures(probe, 0.9, 0.1),), ((Figures(0.2, 0.9, 0.1),),), (0.2,))


@pytest.mark.parametrize(
    ("teachers", "volumes", "code"),
    [(["random"], ["a"], 0), (["random"], ["a", "b"], 3), (["random", "bundled"], ["a", "b"], 0)],
)
def test_a_teacher_has_to_pass_on_every_volume(
    store: Path, monkeypatch: pytest.MonkeyPatch, teachers: list[str], volumes: list[str], code: int
) -> None:
    monkeypatch.setattr(gate_table, "judge_teacher", judge_by_name)
    assert teacher_gate.main(["--store", str(store), "--volumes", *volumes, "--teacher", *teachers]) == code


def test_an_unknown_volume_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert teacher_gate.main(["--store", str(store), "--volumes", "a", "c"]) == 2
    assert "has no volume c; name some of a, b" in capsys.readouterr().err


def test_weights_follow_the_name(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.safetensors"
    text = f"vit_tiny_patch16_224={missing}"
    assert teacher_gate.main(["--store", str(store), "--teacher", text]) == 2
    assert str(missing) in capsys.readouterr().err
