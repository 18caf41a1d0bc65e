"""Verbs as jobs of PBS and LSF, against fake programs (tests/helpers/fake_queue.py), and dry runs without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from hpc_neuro.core.schema import ConfigError
from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset
from launch import forecast, status
from launch.__main__ import main
from launch.executors.cluster import QUEUES
from launch.site import load_site
from tests.helpers import fake_queue

SECRET = "cluster.environment={WANDB_API_KEY: hush}"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "raw"
    write_dataset(folder, SyntheticConfig(volumes=1, shape=(16, 32, 32)))
    return folder


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    fake_queue.install(folder)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def wait(out: Path) -> status.JobStatus:
    """The state of the last job, when it has ended."""
    job = status.read_jobs(out)[-1]
    for _ in range(1200):
        state = status.poll_jobs([job], status.slurm.Poller(0.1, 0.1))[job.id]
        if state in status.ENDED:
            return state
        time.sleep(0.1)
    raise AssertionError(f"still {state}")


@pytest.mark.parametrize("on", QUEUES)
def test_a_verb_runs_as_a_job_and_its_folder_says_how_it_ended(
    on: str, raw: Path, programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store"
    words = ["prepare", f"images={raw}", f"out={out}", "--on", on, "cluster.partition=long", SECRET]
    (programs / "hold").touch()
    assert main(words) == 0
    assert f"{on} is not asked beforehand" in capsys.readouterr().out

    # Two jobs never write into one folder.
    assert main(["status", str(out)]) == 0
    assert "queued" in capsys.readouterr().out
    assert main(words) == 2
    assert "already has a job" in capsys.readouterr().err

    (programs / "hold").unlink()
    assert wait(out) == "done"
    assert (out / "dataset.json").exists()
    assert main(["status", str(out)]) == 0
    assert "done; finished" in capsys.readouterr().out
    assert main(["logs", str(out)]) == 0
    assert "[prepare 0]" in capsys.readouterr().out
    (call,) = [line for line in (programs / "calls").read_text().splitlines() if line.startswith(("qsub", "bsub"))]
    assert " -q long " in call
    assert [path.name for path in out.rglob("*") if path.is_file() and b"hush" in path.read_bytes()] == ["job_1.sh"]


@pytest.mark.parametrize("on", QUEUES)
def test_a_job_that_fails_and_one_that_is_cancelled_are_told_apart(
    on: str, raw: Path, programs: Path, tmp_path: Path
) -> None:
    failing = ["cluster.setup=[exit 3]", f"images={raw}", "--on", on]
    assert main(["prepare", f"out={tmp_path / 'a'}", *failing, "--watch"]) == 1

    (programs / "hold").touch()
    assert main(["prepare", f"out={tmp_path / 'b'}", *failing]) == 0
    assert main(["cancel", str(tmp_path / "b")]) == 0
    assert wait(tmp_path / "b") == "cancelled"


@pytest.mark.parametrize("on", QUEUES)
def test_a_job_that_stopped_before_its_limit_goes_on_with_the_same_command(
    on: str, raw: Path, programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", f"images={raw}", f"out={tmp_path / 'a'}", "--on", on]
    assert main([*words, 'cluster.setup=["timeout() { return 75; }"]']) == 0
    assert wait(tmp_path / "a") == "failed"
    assert main(["status", str(tmp_path / "a")]) == 0
    assert "the same command goes on" in capsys.readouterr().out

    assert main([*words, "--watch"]) == 0
    assert (tmp_path / "a/dataset.json").exists()
    assert [job.files for job in status.read_jobs(tmp_path / "a")] == ["job_1", "job_2"]


@pytest.mark.parametrize("on", QUEUES)
def test_shares_are_jobs_and_only_those_that_failed_are_submitted_again(
    on: str, programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "store"
    write_dataset(raw, SyntheticConfig(volumes=3, shape=(16, 32, 32)))
    words = ["prepare", f"images={raw}", f"out={out}", "--on", on, "--array", "3"]

    # The second share fails, so the job that gathers is removed.
    failing = (
        'cluster.setup=["timeout() { case \\"$*\\" in *share=?1,3*) return 3;; *) command timeout \\"$@\\";; esac; }"]'
    )
    assert main([*words, failing, "--watch"]) == 1
    assert "prepare: 3 shares as jobs 100" in capsys.readouterr().out
    assert not (out / "dataset.json").exists()
    jobs = status.read_jobs(out)
    assert [job.share for job in jobs] == ["0000_of_0003", "0001_of_0003", "0002_of_0003", ""]

    # The same command submits one share and the job that gathers.
    assert main([*words, "--watch"]) == 0
    assert [job.share for job in status.read_jobs(out)[4:]] == ["0001_of_0003", ""]
    assert len(json.loads((out / "dataset.json").read_text())["volumes"]) == 3
    assert main(["status", str(out)]) == 0
    assert "[prepare 0001_of_0003]" in capsys.readouterr().out

    # All shares may run at once, so the site's limit holds for their number.
    assert main([*words[:-1], "9", "cluster.at_once=4"]) == 2
    assert "give --array 4, or raise at_once" in capsys.readouterr().err


@pytest.mark.parametrize("on", QUEUES)
def test_what_a_verb_asks_for(on: str, tmp_path: Path) -> None:
    keys = ["infer.tasks_per_node=4", "infer.cpus_per_task=2", "infer.mpi=pmi2"]
    queue = QUEUES[on](load_site(None, keys), tmp_path / "code", "infer", tmp_path, ["12", "13"])
    words = queue.list_submit_words("name", tmp_path / "a.sh", queue.resources)
    depends = {"pbs": "depend=afterok:12:13", "lsf": "done(12) && done(13)"}[on]
    assert depends in words
    assert {"pbs": "1:ncpus=8" in " ".join(words), "lsf": "8" in words}[on]

    script = queue.make_script(["python", "-m", "hpc_neuro", "infer"], tmp_path / "logs" / "job_1")
    assert "mpiexec -n 4 python -m hpc_neuro infer" in script
    assert f"cd {tmp_path}\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    with pytest.raises(ConfigError, match=r"a job runs on one node; set infer\.nodes=1"):
        QUEUES[on](load_site(None, ["infer.nodes=2"]), tmp_path, "infer")


@pytest.mark.parametrize(
    ("on", "script"),
    [
        ("slurm", ["#SBATCH --partition=long", "#SBATCH --time=90", "srun ", "launch.job_end"]),
        ("pbs", ["# qsub ", "walltime=01:30:00", "-q long", "hpc_neuro prepare"]),
        ("lsf", ["# bsub ", "-W 01:30", "-q long", "hpc_neuro prepare"]),
    ],
)
def test_a_dry_run_needs_no_cluster(
    on: str,
    script: list[str],
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(forecast, "PATIENCE", 60.0)
    keys = ["cluster.partition=long", "cluster.prepare.minutes=90", "cluster.interface=ib7", SECRET]
    words = ["prepare", f"images={raw}", f"out={tmp_path / 'o'}", "--on", on, *keys]
    assert main([*words, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert output.count("does not answer on this machine, so these are not checked") == 1
    assert "prepare: 1 volume" in output, "the forecast"
    assert all(part in output for part in script), output
    assert "hush" not in output
    assert not (tmp_path / "o").exists()

    # Without --dry-run the advice is to add it.
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "is not on this machine" in error
    assert "--dry-run" in error or on == "slurm"
