"""Jobs that were submitted into run folders: their states, logs and steps, and cancelling them.

OUT/launch/jobs.json lists the jobs of a run folder, the oldest first.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files, metric_rows
from hpc_neuro.core.constants import EXIT_STOPPED
from hpc_neuro.core.schema import InputError
from launch import slurm
from launch.executors import KILLED, JobState, job_file, read_exit_code
from launch.executors.cluster import QUEUES, QueueExecutor
from launch.job_end import JobRecord
from launch.site import Site

Place = Literal["slurm", "pbs", "lsf", "local"]
"""Where jobs run: `--on`."""
JobStatus = Literal["queued", "running", "done", "failed", "cancelled", "lost"]
ENDED: tuple[JobStatus, ...] = ("done", "failed", "cancelled", "lost")
"""States of jobs that are over."""
JOBS_FILE = "jobs.json"
"""Record of the jobs of a run folder, in OUT/launch."""


@dataclass(frozen=True)
class LaunchedJob:
    """One submitted verb."""

    id: str
    """That of the scheduler; the process id without one."""
    on: Place
    verb: str
    out: Path
    """Run folder."""
    share: str = ""
    """Which share of an array, `0003_of_0010`."""
    files: str = ""
    """On PBS and LSF: the name of its script, log and exit code in OUT/launch/logs, without their endings."""

    @property
    def folder(self) -> Path:
        """Where its starts and ends are recorded."""
        return self.out / "launch" / self.share if self.share else self.out / "launch"

    @property
    def title(self) -> str:
        """The verb and, in an array, the share."""
        return f"{self.verb} {self.share}" if self.share else self.verb

    @property
    def base(self) -> Path:
        """The files of a job on PBS or LSF, without their endings."""
        return self.out / "launch" / "logs" / self.files

    def read_end(self) -> dict[str, Any] | None:
        """Read the last recorded end (reason, exit, put_back, at); None before there is one."""
        if self.on in QUEUES:
            return self._read_exit()

        # A start is named JOB.RESTARTS, and JOB is `local-PID` without Slurm.
        ends = [
            end
            for end in JobRecord(self.folder, self.out).read_ends()
            if end["start"].rpartition(".")[0] in (self.id, f"local-{self.id}")
        ]
        return ends[-1] if ends else None

    def _read_exit(self) -> dict[str, Any] | None:
        """The end of a job on PBS or LSF, from the exit code that its script left."""
        code = read_exit_code(self.base)
        if code is None:
            return None
        at = dt.datetime.fromtimestamp(job_file(self.base, "exit").stat().st_mtime, dt.UTC)
        stopped = "stopped before its time limit or on a signal; the same command goes on"
        reason = {0: "finished", EXIT_STOPPED: stopped}.get(code, f"exit code {code}")
        return {"reason": reason, "exit": code, "put_back": False, "at": at.isoformat(timespec="seconds")}


_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@\[\]-]{0,99}")
"""Ids of Slurm (7_3), PBS (7[].host), LSF (7) and of processes."""


@with_config(ConfigDict(extra="allow"))
class _JobRow(TypedDict):
    """What jobs.json holds of one job at least."""

    id: str
    on: Place
    verb: str
    share: str
    files: NotRequired[str]


def read_jobs(out: Path) -> list[LaunchedJob]:
    """Read the jobs that were submitted into a run folder, the oldest first. Raises InputError when there are none."""
    path = out / "launch" / JOBS_FILE
    hint = f"nothing was launched into {out}; give the run folder of a launched verb"
    again = f"remove {files.quote_path(path)} to launch again"
    rows = files.read_json(path, hint if not path.exists() else again, list[_JobRow])
    for row in rows:
        # Both reach commands and paths.
        if not _JOB_ID.fullmatch(row["id"]):
            raise InputError(f"{path} names the job {row['id'][:40]!a}, which is no id of a job; {again}")
        if name := row.get("files"):
            files.require_plain_names({name: None}, path, again)
    folder = out.resolve()
    return [LaunchedJob(row["id"], row["on"], row["verb"], folder, row["share"], row.get("files", "")) for row in rows]


def require_idle(out: Path) -> None:
    """Raise InputError when a job of this run folder is queued or running: two must never write into one folder."""
    if not (out / "launch" / JOBS_FILE).exists():
        return

    # A folder whose jobs have all ended may be submitted into again.
    states = poll_jobs(read_jobs(out), slurm.Poller())
    busy = [job for job, state in states.items() if state in ("queued", "running")]
    if busy:
        raise InputError(
            f"{out} already has a job, {', '.join(busy[:5])}; wait for it, or "
            f"`python -m launch cancel {files.quote_path(out)}` first"
        )


def poll_jobs(jobs: Sequence[LaunchedJob], poller: slurm.Poller) -> dict[str, JobStatus]:
    """State of every job by id, with one call to Slurm for all; waits as the poller says."""
    # Without jobs on Slurm, Slurm need not be there.
    on_slurm = [job.id for job in jobs if job.on == "slurm"]
    slurm_states = poller.poll(on_slurm) if on_slurm else {}
    queue_states = {job: state for name in QUEUES for job, state in _poll_queue(name, jobs).items()}

    # Only Slurm's poller has a pause of its own.
    if queue_states and not on_slurm and poller.pause:
        poller.sleep(poller.pause)
    poller.pause = max(poller.pause, poller.first) if queue_states else poller.pause
    return {job.id: queue_states.get(job.id) or _judge_state(job, slurm_states.get(job.id)) for job in jobs}


def _poll_queue(name: str, jobs: Sequence[LaunchedJob]) -> dict[str, JobStatus]:
    """State of the jobs on PBS, or on LSF, by id, with one call."""
    bases = {job.id: job.base for job in jobs if job.on == name}
    states = _open_queue(name).poll(bases) if bases else {}
    return {job: _judge_exit(state, bases[job]) for job, state in states.items()}


@functools.cache
def _open_queue(name: str) -> QueueExecutor:
    """Asks for jobs, whatever site they were submitted with."""
    queue = QUEUES[name](Site(), Path())
    # What a job that was killed left is on the disk by the time a person asks.
    queue.settle_seconds = 0.0
    return queue


def _judge_exit(state: JobState, base: Path) -> JobStatus:
    if state.kind != "ended":
        return state.kind
    if state.code is KILLED:
        # A job that has begun has written its id.
        return "lost" if job_file(base, "job").exists() else "cancelled"
    return "done" if state.code == 0 else "failed"


def _judge_state(job: LaunchedJob, slurm_state: str | None) -> JobStatus:
    """Combine what Slurm says and, where that is not enough, what the folder says."""
    if slurm_state is not None and slurm.is_active(slurm_state):
        return "running" if slurm_state in ("RUNNING", "COMPLETING") else "queued"

    # Slurm forgets a job after a while, and calls one that ended with a plain exit code of its script completed.
    end = job.read_end()
    if slurm_state in ("COMPLETED", None) and end is not None and not end["put_back"]:
        if end["exit"] == 0:
            return "done"
        return "cancelled" if end["reason"] == "cancelled" else "failed"

    # No end was recorded: the state is all there is.
    if slurm_state is not None:
        by_slurm: dict[str, JobStatus] = {"CANCELLED": "cancelled", "COMPLETED": "done"}
        return by_slurm.get(slurm_state, "failed")

    # Neither Slurm nor the folder knows it.
    return "running" if job.on == "local" and Path(f"/proc/{job.id}").exists() else "lost"


def cancel_jobs(jobs: Sequence[LaunchedJob]) -> None:
    """Cancel jobs, queued or running; those that have ended are passed over."""
    on_slurm = [job.id for job in jobs if job.on == "slurm"]
    if on_slurm:
        slurm.run_command("scancel", "--quiet", *on_slurm)

    for name in QUEUES:
        if on_queue := [job.id for job in jobs if job.on == name]:
            _open_queue(name).cancel(on_queue)

    for job in jobs:
        if job.on == "local":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.id), signal.SIGTERM)


def follow_jobs(
    jobs: Sequence[LaunchedJob], poller: slurm.Poller, write: Callable[[str], object] = sys.stdout.write
) -> int:
    """Write new lines of all ranks' logs and each change of state until all jobs are over. 0 when all are done."""
    logs = [LogReader(job) for job in jobs]
    # Log lines also appear while the next question to Slurm is far off.
    poller.sleep = lambda seconds: _write_lines(logs, seconds, write)
    last: dict[str, JobStatus] = {}

    while True:
        states = poll_jobs(jobs, poller)
        _write_lines(logs, 0, write)
        # Only changes are written.
        for job in jobs:
            if last.get(job.id) != states[job.id]:
                write(f"[{job.title}] {describe_job(job, states[job.id])}\n")
        last = states

        if all(state in ENDED for state in states.values()):
            return 0 if all(state == "done" for state in states.values()) else 1


def _write_lines(logs: Sequence[LogReader], seconds: float, write: Callable[[str], object]) -> None:
    """Write the lines that appear in logs within `seconds`, those that are there at once."""
    deadline = time.monotonic() + seconds

    while True:
        for log in logs:
            for line in log.read_new_lines():
                write(line + "\n")
        # Look once a second, so that lines appear soon without reading all the time.
        left = deadline - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(1.0, left))


def describe_job(job: LaunchedJob, state: JobStatus) -> str:
    """One line about a job: id, state, step, and why its last start ended."""
    # State first, then what is known beyond it.
    parts = [f"job {job.id}: {state}"]
    if step := describe_last_step(job.out):
        parts.append(step)

    if end := job.read_end():
        parts.append(f"{end['reason']}{', put back' if end['put_back'] else ''} ({end['at']})")

    return "; ".join(parts)


def describe_last_step(out: Path) -> str:
    """`step 40, loss 0.93` of a training; empty for a verb without steps."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return ""

    # The last row of training says where the run is; the last line may still be written.
    for line in reversed(metric_rows.read_lines(path)):
        row = metric_rows.parse_row(line)
        if row is not None and row.get("kind") == "train":
            loss = row.get("loss")
            return f"step {row['step']}, loss {loss:.4f}" if isinstance(loss, float) else f"step {row['step']}"

    return ""


class LogReader:
    """New lines of the logs of one job's ranks, without submitit's own remarks."""

    def __init__(self, job: LaunchedJob) -> None:
        self.job = job
        self._offsets: dict[Path, int] = {}

    def list_logs(self) -> list[Path]:
        """The logs of all ranks, by rank."""
        if self.job.on in QUEUES:
            return [path for path in [job_file(self.job.base, "log")] if path.exists()]

        # submitit names logs JOB_RANK_log.out, and JOB_RANK_log.err without Slurm.
        folder = self.job.out / "launch" / "logs"
        paths = [path for kind in ("out", "err") for path in folder.glob(f"{self.job.id}_*_log.{kind}")]
        return sorted(paths, key=lambda path: (_rank_of(path), path.name))

    def read_new_lines(self) -> list[str]:
        """Read the whole lines that were written since the last call, each with verb and rank before it."""
        return [line for path in self.list_logs() for line in self._read_log(path)]

    def _read_log(self, path: Path) -> list[str]:
        offset = self._offsets.get(path, 0)

        with path.open("rb") as log:
            log.seek(offset)
            data = log.read()

        # A line that is still being written comes with the next call.
        whole_lines = data[: data.rfind(b"\n") + 1]
        self._offsets[path] = offset + len(whole_lines)

        # Of a progress bar, which returns to the start of its line, the last state is shown.
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in whole_lines.decode("utf-8", "replace").split("\n")]
        shown = [line for line in lines if line.strip() and not line.startswith("submitit ")]
        return [f"[{self.job.title} {_rank_of(path)}] {line}" for line in shown]


def _rank_of(log: Path) -> int:
    """The rank in the name of a log, JOB_RANK_log.out; 0 for the one log of a job on PBS or LSF."""
    return 0 if log.suffix == ".log" else int(log.name.split("_")[-2])
