"""Jobs as processes of this machine. They outlive the driver; a later one finds them by process id and start time."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from launch import slurm
from launch.executors import KILLED, JobState, job_file, make_exit_line, read_exit_code

_JOB_PART = b".job.part"
"""Part of the name of the file that the shell renames before it begins the command."""

# The shell stays to the end of the command, and ignores the signals that are sent to the whole group.
_SHELL = (
    'trap : TERM INT USR1 USR2; echo $$ > "$0.job.part" && mv "$0.job.part" "$0.job"; '
    '"$@" >> "$0.log" 2>&1; ' + make_exit_line('"$0"')
)
_BEGIN_SECONDS = 10.0
"""[s] How long cancelling waits for a shell to begin its command."""


class LocalExecutor:
    """Runs each job in a session of its own."""

    def __init__(self, grace: float = 30.0, code: Path | None = None) -> None:
        """grace: [s] what a cancelled job has to end before it is killed; code: goes first on PYTHONPATH."""
        self.grace, self.code = grace, code
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._deadlines: dict[str, float] = {}

    def submit(self, command: Sequence[str], folder: Path, name: str) -> str:
        """Start a job now."""
        # A session of its own: signals to the driver, such as Ctrl-C, must not reach the job.
        child = subprocess.Popen(
            ["/bin/sh", "-c", _SHELL, str(folder / name), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder,
            env=self._make_environment(),
        )
        # The shell writes its id too, in case this process ends here. Without this line a later driver could look
        # before the shell had its turn, find nothing, and start the same job again.
        files.write_text(job_file(folder / name, "job"), f"{child.pid}\n")

        job = _find_job_id(child.pid) or _make_ended_id(child.pid)
        self._children[job] = child
        return job

    def find(self, folder: Path, name: str) -> str | None:
        """Find a job by the process id that the shell wrote, also one that has ended."""
        path = job_file(folder / name, "job")
        if not path.exists():
            return None
        # A job that is gone is found, too: it may have left its exit code.
        pid = int(path.read_text(encoding="utf-8"))
        return _find_job_id(pid) or _make_ended_id(pid)

    def poll(self, jobs: Mapping[str, Path]) -> dict[str, JobState]:
        """Look into /proc. What a killed shell left behind is killed, so that a folder never has two at work."""
        return {job: self._read_state(job, base) for job, base in jobs.items()}

    def cancel(self, jobs: Sequence[str]) -> None:
        """Send SIGTERM to the group of each job, and SIGKILL after `grace` seconds (at a later `poll`)."""
        for job in jobs:
            if not self._is_alive(job):
                continue
            # A shell that has not begun its command yet would catch the signal, and the command never see it.
            _await_command(_parse_pid(job))
            _signal_group(_parse_pid(job), signal.SIGTERM)
            self._deadlines.setdefault(job, time.monotonic() + self.grace)

    def _make_environment(self) -> dict[str, str]:
        """The environment of a job: without the variables of the job that the driver itself may be running in."""
        own_job = slurm.list_job_variables(os.environ)
        env = {name: value for name, value in os.environ.items() if name not in own_job}
        # The snapshot of the code comes before what the driver itself runs.
        paths = [*([str(self.code)] if self.code else []), *filter(None, [os.environ.get("PYTHONPATH")])]
        if paths:
            env["PYTHONPATH"] = os.pathsep.join(paths)

        return env

    def _read_state(self, job: str, base: Path) -> JobState:
        if self._is_alive(job):
            if time.monotonic() > self._deadlines.get(job, float("inf")):
                _signal_group(_parse_pid(job), signal.SIGKILL)
            return JobState("running")

        # Final, as it is read after the shell was seen to be gone.
        code = read_exit_code(base)
        # The shell was killed before it could write: its command may still run.
        if code is None:
            _kill_session(job)

        return JobState("ended", KILLED if code is None else code)

    def _is_alive(self, job: str) -> bool:
        if job in self._children:
            # Reap the child once it has ended.
            self._children[job].poll()

        # Processes of another machine cannot be seen from here, so they would look dead.
        host = job.partition(":")[0]
        if host != platform.node():
            raise InputError(f"job {job} runs on {host}; go on with this sweep there")

        return _find_job_id(_parse_pid(job)) == job


def _parse_pid(job: str) -> int:
    return int(job.split(":")[1])


def _find_job_id(pid: int) -> str | None:
    """HOST:PID:START of a living process; the start time tells it from a later process of the same number."""
    fields = _read_stat(pid)
    return f"{platform.node()}:{pid}:{fields[19]}" if fields and fields[0] != "Z" else None


def _make_ended_id(pid: int) -> str:
    """The id of a job whose process is gone."""
    return f"{platform.node()}:{pid}:0"


def _read_stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; [] when there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return []


def _read_command(pid: int) -> bytes:
    """The command line of a process; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _find_processes(*, parent: int | None = None, session: int | None = None) -> Iterator[int]:
    """The processes of this machine with this parent, or of this session."""
    for path in Path("/proc").glob("[0-9]*"):
        fields = _read_stat(int(path.name))
        if fields and (int(fields[1]) == parent or int(fields[3]) == session):
            yield int(path.name)


def _await_command(shell: int) -> None:
    """Wait until a shell has begun its command, or is gone."""
    deadline = time.monotonic() + _BEGIN_SECONDS

    while time.monotonic() < deadline:
        shell_command = _read_command(shell)
        child_commands = [_read_command(pid) for pid in _find_processes(parent=shell)]
        if not shell_command or any(_is_begun(command, shell_command) for command in child_commands):
            return
        time.sleep(0.02)


def _is_begun(command: bytes, shell_command: bytes) -> bool:
    """Whether a child of a shell is its command: no fork that has yet to become it, not the `mv` before it."""
    return command not in (b"", shell_command) and _JOB_PART not in command


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _kill_session(job: str) -> None:
    """Kill what is left of a session whose leader is gone; its number cannot be reused while any of it is left.

    A killed leader stays in /proc until its parent reaps it: only a living process of that number is another one.
    """
    # A later process may have the number of the leader, but not its session.
    leader = _parse_pid(job)
    if _find_job_id(leader):
        return

    for pid in _find_processes(session=leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
