"""Fine-tuning is compared with random weights and with the student as it is, and goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hpc_neuro.data.store import Store
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import build_student, save_student
from hpc_neuro.train.start_weights import open_initial_student
from tests.helpers.tiny_store import write_store
from tools.bench import fine_tune
from tools.bench.held_out import Windows, predict

SMALL = ("--crop", "16", "32", "32", "--seconds", "0.2", "--seeds", "0", "--neurons", "1", "2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = dict.fromkeys(("a", "b", "c", "d"), "train")
    return write_store(tmp_path_factory.mktemp("fine_tune") / "store", names)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fine_tune") / "student"
    torch.manual_seed(0)
    cfg = StudentConfig(transformer=False, patch=(4, 8, 8))
    save_student(folder, cfg, build_student(cfg).state_dict(), {})
    return folder


def run(store: Path, init: Path, out: Path, *keys: str) -> int:
    return fine_tune.main(["--store", str(store), "--init", str(init), "--out", str(out), *SMALL, *keys])


@pytest.mark.slow
def test_every_start_is_scored_and_nothing_is_done_twice(
    store: Path, init: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(store, init, tmp_path, "--own", "a", "b") == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(facts["mean"]) == {"as_is", "init, 1", "scratch, 1", "init, 2", "scratch, 2"}
    assert set(facts["difference"]) >= {"init, 1 - scratch, 1", "init, 2 - as_is"}
    assert set(facts["scores"]["as_is"]["dice"]) == {"a", "b"}

    monkeypatch.setattr(fine_tune, "train", None)
    assert run(store, init, tmp_path, "--own", "a", "b") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["scores"] == facts["scores"]
    assert run(store, init, tmp_path, "--own", "a", "b", "--batch", "3") == 2
    assert "other settings" in capsys.readouterr().err


def test_neurons_of_the_same_microscope_come_first() -> None:
    folds = fine_tune.choose_folds(["a", "b", "c", "d", "e"], ["b", "c", "d"], [], [1, 3], [0, 1])
    assert len(folds) == 3 * (1 + 2 * 2 * 2)
    for fold in folds:
        assert fold.validated != fold.held_out
        assert not {fold.held_out, fold.validated} & set(fold.trained)
        assert not fold.trained or fold.trained[0] in {"b", "c", "d"}
    assert {fold.held_out for fold in fine_tune.choose_folds(["a", "b", "c"], [], ["b"], [1], [0])} == {"b"}
    # More neurons are those of fewer, and others.
    assert {one.trained[0] for one in folds if one.seed == 0 and one.held_out == "b" and one.trained} == {"d"}


def test_the_student_as_it_is_predicts_what_it_predicted(store: Path, init: Path) -> None:
    windows = Windows(crop=(16, 32, 32))
    start = open_initial_student(init)
    kept = fine_tune.build_recipe(start, fine_tune.AS_IS).network
    for name, value in kept.student.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(value, start.values[name])
    random = fine_tune.build_recipe(start, fine_tune.SCRATCH).network
    first, other = (predict(network, Store(store), "a", windows)[0] for network in (kept, random))
    assert abs(first - other).max() > 1e-3


def test_faults_are_one_sentence(store: Path, init: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(store, init, tmp_path, "--own", "nobody") == 2
    assert "has no nobody" in capsys.readouterr().err
    assert run(store, init, tmp_path, "--own", "a", "b", "--only", "c") == 2
    assert "not one of --own" in capsys.readouterr().err
    assert run(store, init, tmp_path, "--neurons", "3") == 2
    assert "at most 2" in capsys.readouterr().err
    assert run(store, tmp_path / "none", tmp_path) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
