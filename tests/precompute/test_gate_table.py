"""Which volumes the gate judges, what `precompute` and `doctor` make of a verdict."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from hpc_neuro import cli, precompute
from hpc_neuro.core.schema import InputError, load
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute import gate_table
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.gate import Figures, Judgment
from tests.helpers.tiny_store import write_store
from tests.helpers.tiny_teachers import write_trained


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four volumes, too small for the gate to judge."""
    folder = tmp_path_factory.mktemp("gate") / "store"
    return write_store(folder, {"a": "train", "b": "train", "c": "train", "d": "test"}, (12, 40, 56))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Keys of a teacher with weights, which are not worth anything."""
    folder = write_trained(tmp_path_factory.mktemp("teacher") / "teacher")
    return ["teacher.model=trained", f"teacher.weights={folder}"]


def set_gain(monkeypatch: pytest.MonkeyPatch, gain: float, small: str = "") -> list[str]:
    """The gate finds `gain` on every volume but `small`, which it calls too small; returns the volumes it is asked."""
    asked = []

    def judge(teacher: Teacher, volume: StoredVolume, layer: int, seed: int, samples: int, copies: int) -> Judgment:
        asked.append(volume.id)
        if volume.id == small:
            raise InputError(f"volume {volume.id} is small; name larger volumes")
        figures = Figures(0.4 + gain, 0.9, 0.1)
        return Judgment(volume.id, (figures,), ((Figures(0.4, 0.9, 0.1),),), (0.2,))

    monkeypatch.setattr(gate_table, "judge_teacher", judge)
    return asked


def configure(store: Path, out: Path, *keys: str) -> PrecomputeConfig:
    return load(PrecomputeConfig, None, [f"store={store}", f"out={out}", "stride_v=8", "tile=64", "halo=0", *keys])


def test_a_failing_teacher_is_refused_and_nothing_is_written(
    store: Path, teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gain(monkeypatch, 0.01)
    with pytest.raises(InputError, match=r"fails the gate on a: gain \+0.010 \(least 0.03\).*set gate=report"):
        precompute.run(configure(store, tmp_path / "cache", *teacher))
    assert not (tmp_path / "cache").exists()


def test_a_failing_teacher_is_used_by_choice(
    store: Path,
    teacher: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = set_gain(monkeypatch, 0.01)
    with caplog.at_level(logging.INFO, logger="hpc_neuro"):
        assert precompute.run(configure(store, tmp_path / "cache", *teacher, "gate=report")) == 0
    assert asked == ["a", "c"]
    assert "is used all the same (gate=report)" in caplog.text
    gate = json.loads((tmp_path / "cache" / "manifest.json").read_text())["gate"]
    assert (gate["passes"], gate["volumes"]["c"]["gain"]) == (False, pytest.approx(0.01))

    # A cache that is whole is not judged again, and the choice belongs to no shard.
    assert precompute.run(configure(store, tmp_path / "cache", *teacher)) == 0
    assert asked == ["a", "c"]


@pytest.mark.parametrize("keys", [["gate=skip"], ["teacher.model=random"]])
def test_what_is_not_measured(
    store: Path, teacher: list[str], keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set_gain(monkeypatch, 0.01)
    own = teacher if keys == ["gate=skip"] else []
    assert precompute.run(configure(store, tmp_path / "cache", *own, *keys)) == 0
    assert not asked
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["gate"] is None


def test_volumes_that_cannot_be_judged_are_passed_over(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set_gain(monkeypatch, 0.05, small="d")
    cfg = load(gate_table.GateConfig, None, [f"store={store}", "teacher.model=random"])
    verdict = gate_table.run_gate(cfg, lambda text: None)
    assert asked == ["a", "d", "b"]
    assert verdict.passes
    assert verdict.unjudged == ("volume d is small",)


def test_a_teacher_that_cannot_be_judged_neither_passes_nor_fails(
    store: Path, teacher: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Half of a slice of 40 x 56 has no room for 4 tokens of 8 pixels.
    with caplog.at_level(logging.INFO, logger="hpc_neuro"):
        assert precompute.run(configure(store, tmp_path / "cache", *teacher)) == 0
    assert "not judged: volume a is (12, 40, 56) voxels" in caplog.text


@pytest.mark.parametrize(("gain", "code", "verdict"), [(0.05, 0, "random passes"), (0.02, 3, "random fails the gate")])
def test_the_doctor_judges_a_teacher(
    store: Path,
    gain: float,
    code: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_gain(monkeypatch, gain)
    assert cli.main(["doctor", "teacher=random", f"store={store}", "volumes=[b]"]) == code
    out = capsys.readouterr().out
    assert [line.split()[1:3] for line in out.splitlines()[1:4]] == [
        ["b", "trained"],
        ["b", "untrained"],
        ["b", "pixels"],
    ]
    assert verdict in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teacher=random"], "is not understood; usage"),
        (["store=STORE", "volumes=[e]"], "has no volume e; name some of a, b, c, d"),
        (["store=STORE", "teacher=nonsense"], "timm"),
        (["store=STORE", "teacher=random", "layers=3"], "layers"),
    ],
)
def test_bad_arguments_of_the_doctor(
    store: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *(text.replace("STORE", str(store)) for text in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_store_without_room_for_the_gate_is_an_error_of_the_doctor(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "teacher=random", f"store={store}"]) == 2
    assert "random cannot be judged: volume a is (12, 40, 56) voxels" in capsys.readouterr().err


def test_volumes_at_both_ends_come_first(store: Path) -> None:
    assert gate_table._list_candidates(Store(store).ids) == ["a", "d", "b", "c"]
    assert len(gate_table._list_candidates([str(n) for n in range(100)])) == gate_table.MAX_TRIES + 1
