"""Jobs as processes of this machine. They outlive the driver; a later one finds them by process id and start time."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from launch.executors import KILLED, JobState, beside, exit_code

# The shell stays to the end of the command and passes over the signals that the whole group is sent.
_SHELL = (
    'trap : TERM INT USR1 USR2; echo $$ > "$0.job.part" && mv "$0.job.part" "$0.job"; '
    '"$@" >> "$0.log" 2>&1; code=$?; echo $code > "$0.exit.part" && mv "$0.exit.part" "$0.exit"'
)


class Local:
    """Each job in a session of its own."""

    def __init__(self, grace: float = 30.0, code: Path | None = None) -> None:
        """grace: [s] what a cancelled job has to end before it is killed; code: goes first on PYTHONPATH."""
        self.grace, self.code = grace, code
        self._ours: dict[str, subprocess.Popen[bytes]] = {}
        self._deadlines: dict[str, float] = {}

    def submit(self, command: Sequence[str], folder: Path, name: str) -> str:
        """Start a job now."""
        paths = [*([str(self.code)] if self.code else []), *filter(None, [os.environ.get("PYTHONPATH")])]
        child = subprocess.Popen(
            ["/bin/sh", "-c", _SHELL, str(folder / name), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)} if paths else None,
        )
        # The shell notes its id too, for when this process ends here; without this line a later driver could look
        # before the shell had its turn, find nothing, and start the same job again.
        files.write_text(beside(folder / name, "job"), f"{child.pid}\n")
        job = _id(child.pid) or f"{platform.node()}:{child.pid}:0"
        self._ours[job] = child
        return job

    def find(self, folder: Path, name: str) -> str | None:
        """By the process id that the shell noted; one that is gone is found, too, if it left its exit code."""
        path = beside(folder / name, "job")
        if not path.exists():
            return None
        pid = int(path.read_text(encoding="utf-8"))
        return _id(pid) or f"{platform.node()}:{pid}:0"

    def poll(self, jobs: Mapping[str, Path]) -> dict[str, JobState]:
        """By /proc. What a killed shell left behind is killed, so that a folder never has two at work."""
        return {job: self._state(job, base) for job, base in jobs.items()}

    def cancel(self, jobs: Sequence[str]) -> None:
        """SIGTERM to the group, SIGKILL after `grace` seconds (at a later `poll`)."""
        for job in jobs:
            if self._alive(job):
                _kill(_pid(job), signal.SIGTERM)
                self._deadlines.setdefault(job, time.monotonic() + self.grace)

    def _state(self, job: str, base: Path) -> JobState:
        if self._alive(job):
            if time.monotonic() > self._deadlines.get(job, float("inf")):
                _kill(_pid(job), signal.SIGKILL)
            return JobState("running")
        code = exit_code(base)  # looked for after the shell was seen to be gone, hence final
        if code is None:
            _end_session(job)
        return JobState("ended", KILLED if code is None else code)

    def _alive(self, job: str) -> bool:
        if job in self._ours:
            self._ours[job].poll()  # lets go of it once it has ended
        host = job.partition(":")[0]
        if host != platform.node():
            raise InputError(f"job {job} runs on {host}; go on with this sweep there")
        return _id(_pid(job)) == job


def _pid(job: str) -> int:
    return int(job.split(":")[1])


def _id(pid: int) -> str | None:
    """HOST:PID:START of a living process; the start tells it from a later one of the same number."""
    fields = _stat(pid)
    return f"{platform.node()}:{pid}:{fields[19]}" if fields and fields[0] != "Z" else None


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; [] when there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return []


def _kill(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _end_session(job: str) -> None:
    """Kill what is left of a session whose leader is gone; its number cannot have been given away while any is left.

    A killed leader stays in /proc until its parent takes note: only a living process of that number is a stranger.
    """
    leader = _pid(job)
    if _id(leader):
        return
    for path in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(path.name))
        if fields and int(fields[3]) == leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)
