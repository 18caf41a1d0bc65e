"""PBS and LSF executors against fake programs (tests/helpers/fake_queue.py): no real scheduler has run them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_neuro.core.schema import ConfigError, InputError
from launch.executors import JobState
from launch.executors.cluster import LsfExecutor, PbsExecutor, QueueExecutor, name_job
from launch.site import load_site
from tests.helpers import fake_queue

KEYS = ["train.nodes=1", "train.minutes=90", "train.memory_gb=8", "train.gpus_per_task=1", "train.cpus_per_task=4"]
Make = Callable[..., QueueExecutor]


@pytest.fixture(params=[PbsExecutor, LsfExecutor])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes an executor whose programs are fakes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fake_queue.install(folder)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda *keys: request.param(load_site(None, [*KEYS, *keys]), tmp_path / "code")


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    folder = tmp_path / "study" / "trials" / "0003"
    folder.mkdir(parents=True)
    return folder


def wait(executor: QueueExecutor, job: str, base: Path) -> JobState:
    for _ in range(400):
        state = executor.poll({job: base})[job]
        if state.kind == "ended":
            return state
        time.sleep(0.05)
    raise AssertionError(f"still {state}")


def read_calls(tmp_path: Path) -> str:
    return (tmp_path / "bin" / "calls").read_text()


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_arrives_also_at_a_later_driver(make: Make, trial: Path, code: int) -> None:
    job = make().submit(["sh", "-c", f"echo hello; exit {code}"], trial, "attempt_1")
    assert wait(make(), job, trial / "attempt_1") == JobState("ended", code)
    assert (trial / "attempt_1.log").read_text() == "hello\n"
    assert (trial / "attempt_1.sh").stat().st_mode & 0o077 == 0, "the script may hold secrets"


def test_a_waiting_job_is_found_by_its_name_and_a_running_one_by_its_file(
    make: Make, trial: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin" / "hold").touch()
    executor = make()
    job = executor.submit(["sh", "-c", "until [ -e enough ]; do sleep 0.05; done"], trial, "attempt_1")
    assert executor.find(trial, "attempt_1") == job
    assert executor.find(trial, "attempt_2") is None
    assert executor.poll({job: trial / "attempt_1"})[job].kind == "queued"

    (tmp_path / "bin" / "hold").unlink()
    while not (trial / "attempt_1.job").exists() or not (trial / "attempt_1.job").read_text():
        time.sleep(0.02)
    assert make().find(trial, "attempt_1") == job
    assert executor.poll({job: trial / "attempt_1"})[job].kind == "running"
    (trial / "enough").touch()
    assert wait(executor, job, trial / "attempt_1") == JobState("ended", 0)


def test_a_cancelled_trial_saves_and_says_how_it_ended(make: Make, trial: Path) -> None:
    executor = make()
    loop = "trap 'touch saved; exit 75' TERM; touch set; while :; do sleep 0.05; done"
    job = executor.submit(["sh", "-c", loop], trial, "a")
    while not (trial / "set").exists():
        time.sleep(0.02)
    executor.cancel([job])
    assert wait(executor, job, trial / "a") == JobState("ended", 75)
    assert (trial / "saved").exists()
    executor.cancel([job])


def test_a_trial_is_asked_to_stop_before_the_time_limit(make: Make, trial: Path) -> None:
    executor = make("train.minutes=1", "signal_seconds=59")
    loop = "trap 'exit 75' TERM; while :; do sleep 0.05; done"
    job = executor.submit(["sh", "-c", loop], trial, "a")
    assert wait(executor, job, trial / "a") == JobState("ended", 75)


def test_the_scheduler_is_asked_for_what_the_site_says(make: Make, trial: Path, tmp_path: Path) -> None:
    executor = make("partition=gpu", "account=lab")
    wait(executor, executor.submit(["true"], trial, "a"), trial / "a")
    (line,) = [call for call in read_calls(tmp_path).splitlines() if call.startswith(("qsub", "bsub"))]
    for option in (f" {name_job(trial / 'a')} ", " -q gpu ", " lab ", "01:30", "8192"):
        assert option in line
    assert ("ncpus=4" in line and "ngpus=1" in line) or ("-n 4" in line and "num=1" in line)
    assert len(name_job(trial / "a")) == 15


def test_ranks_are_started_by_torchrun_in_the_container(make: Make, trial: Path) -> None:
    executor = make("train.tasks_per_node=2", "container=apptainer exec --nv i.sif")
    script = executor.make_script(["python", "-m", "hpc_neuro"], trial / "a")
    assert (
        "apptainer exec --nv i.sif torchrun --standalone --nproc-per-node=2 --no-python python -m hpc_neuro" in script
    )
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_what_is_refused_is_said(make: Make, trial: Path) -> None:
    with pytest.raises(InputError, match="Unknown queue nowhere"):
        make("partition=nowhere").submit(["true"], trial, "a")
    with pytest.raises(ConfigError, match="qos: .* has no such option; remove it"):
        make("qos=high")
    with pytest.raises(ConfigError, match=r"set train\.nodes=1"):
        make("train.nodes=2")
