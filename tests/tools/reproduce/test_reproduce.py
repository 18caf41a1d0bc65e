"""The reproduction kit end to end on stand-in data, its commands on a cluster, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_neuro.core.schema import load
from hpc_neuro.pipeline import VERBS
from hpc_neuro.search.config import SearchConfig
from tools.reproduce import __main__ as kit
from tools.reproduce.stand_in import write_pairs


@pytest.mark.slow
def test_the_whole_kit_on_stand_in_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the settings are trained, traced and scored; the sweep assembles a training of each. Then all is done."""
    monkeypatch.setattr(kit, "QUICK_STUDY", (*kit.QUICK_STUDY, "trials=2"))
    arguments = ["dineuro", str(tmp_path / "data"), str(tmp_path / "out"), "--folds", "3", "--quick"]
    assert kit.main([*arguments, "--stand-in", "3", "--shape", "24", "64", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == [*kit.SCORES, "scores"]
    assert [line.split()[0] for line in lines[-3:-1]] == ["scratch", "untrained"]
    assert "+4.53 % mean Dice" in lines[-1]
    assert kit.main(arguments) == 0


def test_a_cluster_gets_one_step_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(kit, "_run_module", lambda words: commands.append(words) or 0)
    data, out = tmp_path / "data", tmp_path / "out"
    write_pairs(data, 3, (12, 32, 32))
    arguments = ["dineuro", str(data), str(out), "--part", "", "--folds", "3", "--cluster", "gpu"]
    arguments += ["--teacher", str(tmp_path / "dino")]

    assert kit.main(arguments) == 75
    assert commands[-1][:3] == ["launch", "prepare", f"out={out / 'store'}"]
    finish(out / "store", "prepare")
    assert kit.main(arguments) == 75
    assert commands[-1][:2] == ["launch", "precompute"]
    assert {"teacher.model=vit_small_patch16_224.dino", f"teacher.weights={tmp_path / 'dino'}"} <= set(commands[-1])
    finish(out / "cache", "precompute")
    monkeypatch.setattr(kit, "format_table", lambda path: [])
    assert kit.main(arguments) == 0
    assert commands[-1][:2] == ["launch", "sweep"]
    assert commands[-1][-4:] == ["--on", "slurm", "--cluster", "gpu"]


def finish(folder: Path, verb: str) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"verb": verb, "config": {}, "exit": 0}))


@pytest.mark.parametrize("paper", kit.PAPERS)
@pytest.mark.parametrize("quick", [True, False])
def test_the_keys_of_a_study_are_usable(
    paper: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep's own check of keys accepts what the kit gives it, and so does the training's config."""
    commands: list[list[str]] = []
    monkeypatch.setattr(kit, "_run_module", lambda words: commands.append(words) or 0)
    monkeypatch.setattr(kit, "format_table", lambda path: [])
    write_pairs(tmp_path / "data", 3, (12, 32, 32))
    extra = ["--quick"] if quick else []
    assert kit.main([paper, str(tmp_path / "data"), str(tmp_path / "out"), "--part", "", "--folds", "3", *extra]) == 0

    words = commands[-1]
    cfg = load(SearchConfig, Path(words[2]), words[3:])
    training = load(VERBS["train"].load_config_class(), cfg.train.config, [*cfg.train.keys, f"out={tmp_path}"])
    assert training.store == tmp_path / "out" / "store"
    assert (training.cache is not None) == kit.PAPERS[paper].distils
    assert training.optim.steps == (4 if quick else 20000)
    assert [command[1] for command in commands] == ["prepare", *(["precompute"] * (paper == "dineuro")), "sweep"]


def test_missing_data_end_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kit.main(["dineuro", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "docs/reproduce.md says where to download the data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        kit.main(["dineuro", str(tmp_path), str(tmp_path / "out"), "--folds", "2"])
    assert "want at least 3 folds" in capsys.readouterr().err
