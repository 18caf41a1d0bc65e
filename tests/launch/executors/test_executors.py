"""Jobs as processes: they outlive who started them, say how they ended, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_neuro.core.schema import InputError
from launch.executors import JobState, read_exit_code
from launch.executors.local import LocalExecutor


def wait(executor: LocalExecutor, job: str, base: Path, until: Callable[[JobState], bool] | None = None) -> JobState:
    for _ in range(400):
        state = executor.poll({job: base})[job]
        if (until or (lambda s: s.kind == "ended"))(state):
            return state
        time.sleep(0.025)
    raise AssertionError(f"still {state}")


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_arrives_also_at_a_later_driver(tmp_path, code):
    first = LocalExecutor()
    job = first.submit(["sh", "-c", f"echo hello; exit {code}"], tmp_path, "attempt_1")
    assert wait(first, job, tmp_path / "attempt_1") == JobState("ended", code)
    assert LocalExecutor().poll({job: tmp_path / "attempt_1"})[job] == JobState("ended", code)
    assert (tmp_path / "attempt_1.log").read_text() == "hello\n"


@pytest.mark.parametrize("content", [b"", b"x\n", b"\xff", b"-1\n", b"3.0\n"])
def test_what_is_no_exit_code_is_none(tmp_path, content):
    (tmp_path / "a.exit").write_bytes(content)
    assert read_exit_code(tmp_path / "a") is None
    (tmp_path / "a.exit").write_bytes(b"75\n")
    assert read_exit_code(tmp_path / "a") == 75


def test_a_job_outlives_its_submitter_and_is_found(tmp_path):
    script = (
        "import sys; from pathlib import Path; from launch.executors.local import LocalExecutor\n"
        "work = ['sh', '-c', 'until [ -e enough ]; do sleep 0.05; done']\n"
        "print(LocalExecutor().submit(work, Path(sys.argv[1]), 'attempt_1'))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    executor, job = LocalExecutor(), done.stdout.strip()
    assert executor.find(tmp_path, "attempt_1") == job
    assert executor.poll({job: tmp_path / "attempt_1"})[job].kind == "running"
    (tmp_path / "enough").touch()
    assert wait(executor, job, tmp_path / "attempt_1") == JobState("ended", 0)
    assert executor.find(tmp_path, "attempt_2") is None


def test_a_command_that_is_killed_ends_as_a_signal(tmp_path):
    executor = LocalExecutor()
    job = executor.submit(["sh", "-c", "kill -9 $$"], tmp_path, "a")
    assert wait(executor, job, tmp_path / "a") == JobState("ended", 128 + 9)


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_shell_takes_its_command_along(tmp_path, reaped):
    """Also while the shell is still in /proc, dead, because its parent has not taken note yet."""
    executor = LocalExecutor()
    job = executor.submit(["sh", "-c", f"echo $$ > {tmp_path}/child; exec sleep 60"], tmp_path, "a")
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        time.sleep(0.02)
    child, shell = int((tmp_path / "child").read_text()), int(job.split(":")[1])
    os.kill(shell, signal.SIGKILL)
    if reaped:
        os.waitpid(shell, 0)
    else:
        parent = executor._children.pop(job)  # held, so that nobody reaps the shell before the poll
    assert wait(executor, job, tmp_path / "a") == JobState("ended", None)
    if not reaped:
        assert has_ended(shell, "Z"), "the shell was not what this case is about"
        parent.wait()
    for _ in range(500):
        if has_ended(child, "Z"):
            return
        time.sleep(0.02)
    raise AssertionError("the command of a killed job still runs")


def has_ended(pid: int, state: str) -> bool:
    """No such process, or one in this state of /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == state
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_cancelling_asks_first_and_kills_after_the_grace(tmp_path):
    executor = LocalExecutor(grace=2.0)
    loop = f"touch {tmp_path}/$0; while :; do sleep 0.05; done"  # the file says that the trap is set
    polite = executor.submit(["sh", "-c", f"trap 'exit 75' TERM; {loop}", "set"], tmp_path, "polite")
    deaf = executor.submit(["sh", "-c", f"trap '' TERM; {loop}", "too"], tmp_path, "deaf")
    while not ((tmp_path / "set").exists() and (tmp_path / "too").exists()):
        time.sleep(0.02)
    executor.cancel([polite, deaf])
    assert wait(executor, polite, tmp_path / "polite") == JobState("ended", 75)
    assert wait(executor, deaf, tmp_path / "deaf").code in (None, 128 + 9)


def test_a_cancelled_job_sees_the_signal_also_when_its_command_has_not_begun(tmp_path, monkeypatch):
    """A slow `mv` holds the shell where it catches signals and has no command yet to pass them to."""
    slow = tmp_path / "bin" / "mv"
    slow.parent.mkdir()
    slow.write_text('#!/bin/sh\nsleep 0.5\nexec /bin/mv "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}{os.pathsep}{os.environ['PATH']}")
    executor = LocalExecutor(grace=60.0)
    job = executor.submit(["sleep", "60"], tmp_path, "a")
    executor.cancel([job])
    assert wait(executor, job, tmp_path / "a") == JobState("ended", 128 + signal.SIGTERM)


def test_a_job_is_no_rank_of_the_job_that_its_driver_runs_in(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_CONF", raising=False)  # it names the cluster, not a job, and is passed on
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SBATCH_X": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    executor = LocalExecutor()
    job = executor.submit(["env"], tmp_path, "a")
    assert wait(executor, job, tmp_path / "a") == JobState("ended", 0)
    names = {line.partition("=")[0] for line in (tmp_path / "a.log").read_text().splitlines()}
    assert not [name for name in names if name.startswith(("SLURM_", "SBATCH_")) or name == "WORLD_SIZE"]


def test_a_job_of_another_machine_is_refused(tmp_path):
    with pytest.raises(InputError, match="runs on elsewhere; go on with this sweep there"):
        LocalExecutor().poll({"elsewhere:1:1": tmp_path / "a"})


def test_a_recycled_process_id_is_not_taken_for_the_job(tmp_path):
    executor = LocalExecutor()
    host = os.uname().nodename
    stranger = f"{host}:{os.getpid()}:1"  # this very process, but with another start
    assert executor.poll({stranger: tmp_path / "a"})[stranger] == JobState("ended", None)
    executor.cancel([stranger])
