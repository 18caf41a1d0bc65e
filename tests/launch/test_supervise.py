"""What each rank of a job does: where it stands, how ranks meet, and what becomes of a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_neuro.core import files
from launch import slurm
from launch.job_files import ROOT
from launch.supervise import RankPlace, RankTask, SignalRelay, StopInquiry

PREEMPTED = {"JobState": "RUNNING", "PreemptTime": "2026-01-01T00:00:00", "EndTime": "2999-01-01T00:00:00"}


def test_places_of_srun_and_of_the_local_controller():
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    place = RankPlace.from_environment(srun)
    assert (place.rank, place.start, place.is_on_slurm) == (3, "7.0", True)
    array = srun | {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"}
    assert RankPlace.from_environment(array).start == "6_2.1"
    local = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"}
    place = RankPlace.from_environment(srun | local | {"SUBMITIT_LOCAL_JOB_ID": "99"})
    assert (place.start, place.is_on_slurm) == ("local-99.0", False)


def test_ranks_of_a_trial_meet_and_only_train_together(tmp_path: Path):
    """Two processes as srun starts them, then the one that does the rest; stand-ins of the verbs print their place."""
    for verb in ("train", "infer"):
        (tmp_path / f"{verb}.yaml").touch()
    script = (
        "import os, sys\nfrom hpc_neuro import cli\nfrom launch.sweep import trial\n"
        "def main(words):\n    print(words[0], *(os.environ.get(k) for k in ('RANK', 'WORLD_SIZE', 'MASTER_PORT')))\n"
        "cli.main = main\nsys.exit(trial.main(sys.argv[1:]))"
    )

    def start(rank: int, size: int) -> subprocess.Popen[str]:
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": size, "SLURM_JOB_ID": 7}
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SUBMITIT_EXECUTOR")}
        env |= {k: str(v) for k, v in place.items()} | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", script, str(tmp_path)]
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)

    second, first = start(1, 2), start(0, 2)
    outputs = [child.communicate(timeout=60)[0].split() for child in (first, second)]
    port = outputs[0][-1]
    assert outputs == [["train", "0", "2", port], ["train", "1", "2", port]]
    assert start(0, 1).communicate(timeout=60)[0].split() == ["train", *["None"] * 3, "infer", *["None"] * 3]


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def relay() -> Iterator[SignalRelay]:
    """A relay whose signal handlers are taken back after the test."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield SignalRelay(20)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("seconds", [0.0, 1.2])
def test_why_a_job_was_signalled_is_asked_while_it_still_runs(tmp_path: Path, monkeypatch, relay, seconds: float):
    """The child ends at the signal, or goes on for a while: the question is asked once in either case."""
    jobs: list[str] = []
    monkeypatch.setattr(slurm, "read_job", lambda job: jobs.append(job) or PREEMPTED)
    place = RankPlace(0, 1, 0, "77", 0, "here")
    files.write_text(tmp_path / "owner", place.start)
    start = tmp_path / "starts" / place.start
    start.mkdir(parents=True)

    script = f"trap 'sleep {seconds}; exit 75' USR2; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    task = RankTask(("sh", "-c", script), tmp_path, tmp_path / "out", tmp_path, tmp_path)
    threading.Thread(target=send_warning, args=(tmp_path / "ready",)).start()
    assert task._run_child(place, {}, relay) == 75

    note = files.read_json(start / "rank_0.json", "")
    assert (note["words"], note["stop_reason"], jobs) == (["SIGUSR2"], "preemption", ["77"])


def send_warning(ready: Path) -> None:
    """Send this process the signal that Slurm sends before the end, once a file exists."""
    while not ready.exists():
        threading.Event().wait(0.02)
    os.kill(os.getpid(), signal.SIGUSR2)


@pytest.mark.parametrize(("rank", "job"), [(1, "77"), (0, "local-77")])
def test_only_the_first_rank_of_a_slurm_job_asks(monkeypatch, rank: int, job: str):
    monkeypatch.setattr(slurm, "read_job", lambda job: pytest.fail("one rank asks"))
    inquiry = StopInquiry(RankPlace(rank, 2, 0, job, 0, "here"), 20)
    inquiry.begin()
    assert inquiry.wait_for_reason() is None


def test_a_controller_that_does_not_answer_leaves_the_reason_open(monkeypatch):
    monkeypatch.setattr(slurm, "read_job", lambda job: {})
    inquiry = StopInquiry(RankPlace(0, 1, 0, "77", 0, "here"), 20)
    inquiry.begin()
    assert inquiry.wait_for_reason() is None
