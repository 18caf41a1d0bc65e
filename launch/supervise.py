"""What every rank of a job runs: it prepares the environment, runs the verb as a child, passes signals on, keeps watch.

The verb is a child process so that it is the snapshotted code that runs, that MPI starts in a fresh process, and that a
segmentation fault or a kill by the kernel is seen and named rather than shared.

    JOB.RESTART/            one folder per start of a job, in OUT/launch/starts
        start.json          rank 0: nodes, and the address and port where ranks meet
        rank_N.json         rank N: how its child ended
        alive_N             touched by rank N while its child runs
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hpc_neuro.core import files
from launch import job_end

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_POLL = 0.5  # [s]
_FENCE = 3.0  # [s] what a start waits for the ranks of an unfinished earlier one to see that they are superseded
_LAST_SECONDS = 10.0  # [s] of signal_seconds kept for putting the job back


@dataclass(frozen=True)
class Place:
    """This process among those of its job."""

    rank: int
    size: int
    local_rank: int
    job: str  # Slurm's id, `local-PID` without Slurm
    restarts: int
    host: str

    @property
    def key(self) -> str:
        """Name of this start of the job."""
        return f"{self.job}.{self.restarts}"

    def meet(self, path: Path, patience: float = 120.0) -> dict[str, str]:
        """What torch.distributed asks for in the environment; rank 0 takes a port that is free and says so in `path`.

        Raises TimeoutError when rank 0 says nothing for `patience` seconds.
        """
        if self.rank == 0:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = str(probe.getsockname()[1])
            nodes = os.environ.get("SLURM_JOB_NODELIST", self.host)
            files.write_json(path, {"host": self.host, "port": port, "nodes": nodes})
        until = time.monotonic() + patience
        while not path.exists():
            if time.monotonic() > until:
                raise TimeoutError(
                    f"rank 0 did not write {path} in {patience:.0f} s; is the run folder shared by all nodes?"
                )
            time.sleep(0.1)
        found = files.read_json(path, "rank 0 writes it")
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": found["host"],
            "MASTER_PORT": found["port"],
        }

    @classmethod
    def here(cls, env: Mapping[str, str] = os.environ) -> Place:
        """From the variables of srun, or of submitit's local controller."""
        host = socket.gethostname()
        if "SLURM_PROCID" in env and env.get("SUBMITIT_EXECUTOR") != "local":
            rank, size, local = (int(env[f"SLURM_{k}"]) for k in ("PROCID", "NTASKS", "LOCALID"))
            return cls(rank, size, local, job_end.job_id(env), int(env.get("SLURM_RESTART_COUNT", "0")), host)
        rank, size = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_NTASKS"])
        return cls(rank, size, rank, f"local-{env['SUBMITIT_LOCAL_JOB_ID']}", 0, "127.0.0.1")


@dataclass(frozen=True)
class Task:
    """A verb as one rank runs it. Pickled by submitit; `plain` scripts call it through `python -m launch.supervise`."""

    command: tuple[str, ...]  # the child
    folder: Path  # where starts and ends are recorded: OUT/launch
    out: Path  # the run folder
    cwd: Path  # relative paths in the config start here
    code: Path  # goes first on PYTHONPATH
    environment: dict[str, str] = field(default_factory=dict)
    interface: str | None = None
    signal_seconds: int = 120
    max_requeue: int = 0

    def __call__(self) -> int:
        """Run to the end. Returns 0 or leaves with the child's exit code (128 + number for a signal)."""
        place = Place.here()
        start = self.folder / "starts" / place.key
        watch = _Watch(self.signal_seconds)
        if place.rank == 0:
            self._begin(place)
        meeting = place.meet(start / "start.json")
        if place.restarts > self.max_requeue:  # Slurm puts jobs back by itself when a node fails, and does not count
            job_end.note_rank(start, place, job_end.RESUMABLE, ["requeue limit"])
            sys.exit(job_end.RESUMABLE)
        if watch.seen:  # asked to stop before there was anything to stop
            job_end.note_rank(start, place, job_end.RESUMABLE, watch.seen)
            sys.exit(job_end.RESUMABLE)
        with subprocess.Popen(
            self.command, cwd=self.cwd, env=self._environment(place, meeting), close_fds=False
        ) as child:  # PMI2 hands its connection down as an open file
            watch.child = child
            code = self._wait(child, place, watch)
        words = [*watch.seen, *(["killed, as it did not stop in time"] if watch.late else [])]
        job_end.note_rank(start, place, code, words)
        # Without Slurm there is no batch script to do this; and one that waits for a lost node would not in time.
        alone = watch.late or place.job.startswith("local-")
        if place.rank == 0 and (alone or (code and job_end.lost(start, place.size))):
            code = job_end.settle(
                self.folder, self.out, place.key, place.size, 0, self.max_requeue, self.signal_seconds
            )
        if code:
            sys.exit(code if code > 0 else 128 - code)
        return 0

    def _begin(self, place: Place) -> None:
        """Rank 0: say why the last start ended if it could not, and take the folder over."""
        unfinished = job_end.close_earlier(self.folder, self.out, place.key)
        files.write_text(self.folder / "owner", place.key)
        if unfinished:
            time.sleep(_FENCE)  # a node that lost touch with Slurm may still be computing here

    def _environment(self, place: Place, meeting: Mapping[str, str]) -> dict[str, str]:
        env = {**os.environ, **self.environment, **meeting}
        env["PYTHONPATH"] = os.pathsep.join([str(self.code), *filter(None, [os.environ.get("PYTHONPATH")])])
        if self.interface:
            env |= {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}
        if env.get("CUDA_VISIBLE_DEVICES") == "":
            del env["CUDA_VISIBLE_DEVICES"]  # submitit's local controller hides all GPUs from jobs that ask for none
        return env

    def _wait(self, child: subprocess.Popen[bytes], place: Place, watch: _Watch) -> int:
        """The child's exit code. It is killed when a later start owns the folder, or when it will not stop in time."""
        owner, alive = self.folder / "owner", self.folder / "starts" / place.key / f"alive_{place.rank}"
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=_POLL)
            alive.touch()
            if owner.read_text(encoding="utf-8") != place.key and "superseded by a later start" not in watch.seen:
                watch.seen.append("superseded by a later start")
                child.kill()
            if watch.overdue():
                child.kill()


class _Watch:
    """Signals that came, passed on to the child; from the first on, the child has `signal_seconds` to stop."""

    def __init__(self, signal_seconds: int) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.seen: list[str] = []
        self.late = False
        self._patience = max(signal_seconds - _LAST_SECONDS, signal_seconds / 2)
        self._since: float | None = None
        for number in _PASSED_ON:  # in the place of submitit's own, which would put the job back by itself
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.seen.append(signal.Signals(number).name)
        self._since = time.monotonic() if self._since is None else self._since
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def overdue(self) -> bool:
        self.late = self.late or (self._since is not None and time.monotonic() - self._since > self._patience)
        return self.late
