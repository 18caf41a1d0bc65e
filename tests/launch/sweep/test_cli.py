"""`python -m launch sweep` from the command line to the report, with a real training in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_neuro.core import schema
from hpc_neuro.search import trial
from hpc_neuro.search.study import lock_study
from hpc_neuro.train import TrainConfig
from launch.sweep import cli
from tests.conftest import REPO
from tests.helpers.small_search import write_search


@pytest.fixture
def search_file(tmp_path: Path) -> Path:
    """A search of one trial on a tiny store, as a file."""
    return write_search(tmp_path)


@pytest.mark.slow
def test_a_sweep_trains_reports_and_is_complete(search_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    assert cli.main([str(search_file), "--on", "local"]) == 0
    study = tmp_path / "study"
    (only,) = trial.load_trials(study)
    assert (only.state, [a.reason for a in only.attempts]) == ("done", ["finished"])
    record = json.loads((only.folder / "train" / "run.json").read_text())
    assert record["exit"] == 0
    assert record["config"]["optim"]["lr"] == only.values["optim.lr"]
    assert record["code"] == (study / "code" / "CODE_VERSION").read_text().strip(), "it ran the copy of the code"
    assert only.value == record["summary"]["best_val_dice"]
    assert schema.load(TrainConfig, study / "best.yaml").optim.lr == only.values["optim.lr"]
    assert "1 trial: 1 done" in (study / "report.html").read_text()
    (study / "report.html").unlink()
    assert cli.main([str(search_file)]) == 0, "a finished sweep writes its report again"
    assert (study / "report.html").exists()
    assert cli.main([str(search_file), "optim.lr=1"]) == 2
    assert cli.main([str(search_file), "objective.key=val.dice"]) == 2, "another search in the same folder"
    assert "was made with another config" in capsys.readouterr().err


def test_a_dry_run_checks_everything_and_writes_nothing(search_file, tmp_path, capsys):
    assert cli.main([str(search_file), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "1 trial of train by random" in output
    assert "6 steps of 2 crops" in output
    assert not (tmp_path / "study").exists()


def test_a_store_that_is_not_there_is_named_before_anything_starts(search_file, tmp_path, capsys):
    assert cli.main([str(search_file), "train.keys=[store=nowhere, distill=null]"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_second_driver_is_refused(search_file, tmp_path, capsys):
    # within one process a POSIX lock is no obstacle: the other driver is played by another process
    import subprocess
    import sys

    hold = (
        "import sys,time; from pathlib import Path; from hpc_neuro.search.study import lock_study\n"
        "with lock_study(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "study")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            assert cli.main([str(search_file)]) == 2
        finally:
            other.kill()
    assert "a study has one driver" in capsys.readouterr().err
    with lock_study(tmp_path / "study"):
        pass
