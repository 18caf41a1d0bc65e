"""What every rank of a job runs: it prepares the environment, runs the verb as a child, relays signals, keeps watch.

The verb is a child process so that the snapshot of the code runs, that MPI starts in a fresh process, and that a
segmentation fault or a kill by the kernel is seen and named rather than shared.

    JOB.RESTARTS/            one folder per start of a job, in OUT/launch/starts
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
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hpc_neuro.core import files
from hpc_neuro.core.constants import EXIT_STOPPED
from launch import job_end, slurm
from launch.job_end import JobRecord

_RELAYED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_POLL_SECONDS = 0.5
"""[s] Between two looks at the child."""
_FENCE_SECONDS = 3.0
"""[s] What a start gives the ranks of an unfinished earlier one to see that they are superseded."""
_RESERVED_SECONDS = 10.0
"""[s] Part of signal_seconds that is kept for requeueing the job."""


@dataclass(frozen=True)
class RankPlace:
    """This process among those of its job."""

    rank: int
    size: int
    local_rank: int
    job: str
    """Slurm's id; `local-PID` without Slurm."""
    restarts: int
    host: str

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> RankPlace:
        """Read the variables of srun, or of submitit's local controller."""
        host = socket.gethostname()
        if "SLURM_PROCID" in env and env.get("SUBMITIT_EXECUTOR") != "local":
            rank, size, local_rank = (int(env[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID"))
            restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
            return cls(rank, size, local_rank, job_end.read_job_id(env), restarts, host)

        rank, size = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_NTASKS"])
        return cls(rank, size, rank, f"local-{env['SUBMITIT_LOCAL_JOB_ID']}", 0, "127.0.0.1")

    @property
    def is_on_slurm(self) -> bool:
        """Whether Slurm runs this process."""
        return not self.job.startswith("local-")

    @property
    def start(self) -> str:
        """Name of this start of the job."""
        return f"{self.job}.{self.restarts}"

    def agree_on_address(self, path: Path, patience: float = 120.0) -> dict[str, str]:
        """Return the variables that torch.distributed reads; rank 0 writes host and a free port to `path`.

        Raises TimeoutError when rank 0 has written nothing for `patience` seconds.
        """
        # One rank chooses: all must know the same address before any can connect.
        if self.rank == 0:
            nodes = os.environ.get("SLURM_JOB_NODELIST", self.host)
            files.write_json(path, {"host": self.host, "port": _find_free_port(), "nodes": nodes})

        # The file appears whole, by a rename.
        deadline = time.monotonic() + patience
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank 0 did not write {path} in {patience:.0f} s; is the run folder shared by all nodes?"
                )
            time.sleep(0.1)

        address = files.read_json(path, f"remove {path} and start the job again", dict[str, str])
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": address["host"],
            "MASTER_PORT": address["port"],
        }


def _find_free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


@dataclass(frozen=True)
class RankTask:
    """A verb as one rank runs it; submitit pickles it and calls it on every rank."""

    command: tuple[str, ...]
    """The child."""
    folder: Path
    """Where starts and ends are recorded: OUT/launch."""
    out: Path
    """The run folder."""
    cwd: Path
    """Relative paths in the config start here."""
    code: Path
    """Goes first on PYTHONPATH."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the child."""
    secrets_file: Path | None = None
    """JSON file with more variables, which others cannot read."""
    umask: int = 0o022
    """Of the child: the one of who submitted."""
    signal_seconds: int = 120
    """[s] What the child has to stop after the first signal."""
    max_requeue: int = 0
    """How often the job is requeued."""

    @property
    def record(self) -> JobRecord:
        """Where the ends of this job's starts are recorded."""
        return JobRecord(self.folder, self.out)

    def __call__(self) -> int:
        """Run the verb to its end. Returns 0, or exits with the child's code (128 + number for a signal)."""
        # Handlers come first: a signal may arrive before the child exists.
        relay = SignalRelay(self.signal_seconds)
        place = RankPlace.from_environment()
        start = self.record.start_folder(place.start)
        if place.rank == 0:
            self._take_folder(place)
        address = place.agree_on_address(start / "start.json")

        # Slurm requeues jobs by itself when a node fails, and does not count.
        if place.restarts > self.max_requeue:
            self._leave_before_start(place, [job_end.REQUEUE_LIMIT])

        # Asked to stop before there was anything to stop.
        if relay.events:
            self._leave_before_start(place, relay.events)

        # The exit code tells srun, and through it the batch script, how this rank ended.
        code = self._run_child(place, address, relay)
        if code:
            sys.exit(code if code > 0 else 128 - code)

        return 0

    def _take_folder(self, place: RankPlace) -> None:
        """Record why the last start ended if it could not, and become the owner of the folder."""
        # Close the record of earlier starts before this one begins its own.
        has_unfinished = job_end.close_earlier_starts(self.record, place.start)
        files.write_text(self.folder / "owner", place.start)
        if has_unfinished:
            # A node that lost touch with Slurm may still be computing here.
            time.sleep(_FENCE_SECONDS)

    def _leave_before_start(self, place: RankPlace, events: list[str]) -> None:
        """Exit without having started the child."""
        start = self.record.start_folder(place.start)
        job_end.write_rank_note(start, place.rank, EXIT_STOPPED, events, place.host)
        sys.exit(EXIT_STOPPED)

    def _run_child(self, place: RankPlace, address: Mapping[str, str], relay: SignalRelay) -> int:
        """Run the child, leave a note of its end and, where no batch script will do it, settle the start."""
        start = self.record.start_folder(place.start)
        environment = self._build_environment(address)
        inquiry = StopInquiry(place, self.signal_seconds)

        # close_fds: PMI2 hands its connection down as an open file.
        with subprocess.Popen(self.command, cwd=self.cwd, env=environment, close_fds=False, umask=self.umask) as child:
            relay.attach(child)
            code = self._wait_for_child(child, place, relay, inquiry)

        # A child that stopped at once left no time to ask.
        if relay.has_signals:
            inquiry.begin()
        events = [*relay.events, *(["killed, as it did not stop in time"] if relay.is_late else [])]
        job_end.write_rank_note(start, place.rank, code, events, place.host, inquiry.wait_for_reason())

        # A batch script that waits for a lost node would not settle the start in time.
        if place.rank == 0 and (
            relay.is_late or not place.is_on_slurm or (code and job_end.is_any_rank_lost(start, place.size))
        ):
            code = job_end.settle_start(self.record, place.start, place.size, 0, self.max_requeue, self.signal_seconds)

        return code

    def _build_environment(self, address: Mapping[str, str]) -> dict[str, str]:
        # Later entries win: the site overrides the login environment, and ranks override both.
        secrets = files.read_json(self.secrets_file, "submit again", dict[str, str]) if self.secrets_file else {}
        env = {**os.environ, **self.environment, **secrets, **address}
        env["PYTHONPATH"] = os.pathsep.join([str(self.code), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Compilers of torch and Triton write thousands of small files, which a shared file system serves slowly.
        caches = Path(env.get("TMPDIR") or "/tmp") / f"hpc_neuro_compilers_{os.getuid()}"
        env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "torchinductor"))
        env.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))

        # submitit's local controller hides all GPUs from jobs that ask for none.
        if env.get("CUDA_VISIBLE_DEVICES") == "":
            del env["CUDA_VISIBLE_DEVICES"]

        return env

    def _wait_for_child(
        self, child: subprocess.Popen[bytes], place: RankPlace, relay: SignalRelay, inquiry: StopInquiry
    ) -> int:
        """Wait for the child's exit code; kill it when a later start owns the folder, or when it stops too slowly."""
        owner = self.folder / "owner"
        alive = self.record.start_folder(place.start) / f"alive_{place.rank}"

        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=_POLL_SECONDS)

            # A sign of life, which tells a slow rank from a lost one.
            alive.touch()

            # After a node failure, an older start may still be running here.
            if owner.read_text(encoding="utf-8") != place.start and job_end.SUPERSEDED not in relay.events:
                relay.events.append(job_end.SUPERSEDED)
                child.kill()

            # A rank that does not stop in time would be killed by Slurm with no record of why.
            if relay.check_is_late():
                child.kill()

            if relay.has_signals:
                inquiry.begin()


class StopInquiry:
    """Asks Slurm, once, why it sends this job a signal, while the job still runs.

    When a preempted job is back in the queue, Slurm has forgotten that it was preempted, so the batch script that asks
    after all ranks have stopped may be too late. The question runs in a thread: the controller may be slow to answer,
    and the rank must go on giving signs of life.
    """

    def __init__(self, place: RankPlace, signal_seconds: int) -> None:
        self._place, self._signal_seconds = place, signal_seconds
        self._thread: threading.Thread | None = None
        self._reason: str | None = None

    def begin(self) -> None:
        """Ask, unless that was done. One rank asks: hundreds would be a burden to the controller."""
        # Only Slurm knows why, and it forgets.
        if self._thread is not None or self._place.rank != 0 or not self._place.is_on_slurm:
            return
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def wait_for_reason(self, seconds: float = 10.0) -> str | None:
        """Return the answer, None when there is none within `seconds` or nothing was asked."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._reason

    def _ask(self) -> None:
        facts = slurm.read_job(self._place.job)
        if facts:
            self._reason = job_end.explain_signal(facts | {"signal_seconds": str(self._signal_seconds)})


class SignalRelay:
    """Passes signals on to the child; from the first one on, the child has `signal_seconds` to stop."""

    def __init__(self, signal_seconds: int) -> None:
        self.events: list[str] = []
        """Names of the signals in order, and what else happened."""
        self._child: subprocess.Popen[bytes] | None = None
        self.is_late = False
        self._patience = max(signal_seconds - _RESERVED_SECONDS, signal_seconds / 2)
        self._since: float | None = None

        # These handlers replace submitit's own, which would requeue the job by themselves.
        for number in _RELAYED_SIGNALS:
            signal.signal(number, self._relay)

    def attach(self, child: subprocess.Popen[bytes]) -> None:
        """Relay signals to this child, also those that came while it was being started."""
        self._child = child
        for name in list(self.events):
            child.send_signal(signal.Signals[name])

    def _relay(self, number: int, frame: FrameType | None) -> None:
        self.events.append(signal.Signals(number).name)
        self._since = time.monotonic() if self._since is None else self._since

        # The child decides what a signal means: train saves and stops.
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    @property
    def has_signals(self) -> bool:
        """Whether a signal came."""
        return self._since is not None

    def check_is_late(self) -> bool:
        """Note whether the child should have stopped by now."""
        if self._since is not None and time.monotonic() - self._since > self._patience:
            self.is_late = True
        return self.is_late
