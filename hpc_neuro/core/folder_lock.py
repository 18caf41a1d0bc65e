"""One process writes into a run folder: a lock file with its owner and a heartbeat, on any file system.

OUT/run.lock holds who works there (host, process, Slurm job) and is touched every few seconds. A lock whose owner is
gone is taken over, and the log says so. An owner is gone when

- it ran in this very system (same boot, same process namespace) and its process has ended: known at once;
- it was an earlier start of this Slurm job, which Slurm ended before it started the job again: known at once;
- it gave no sign of life for STALE_SECONDS, by the clock of the file system: a process elsewhere.

The kernel's own locks (flock, fcntl) are not used: NFS and Lustre may refuse them, or keep them in one node only.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError

log = logging.getLogger(__name__)
LOCK = "run.lock"
"""Name of the lock in a run folder."""
BEAT_SECONDS = 10.0
"""[s] Between two signs of life."""
STALE_SECONDS = 60.0
"""[s] Of silence after which the lock of a process elsewhere is taken over."""
EXIT_LOST = 1
"""Exit code of a process whose lock was taken over."""
_depths: dict[Path, int] = {}
"""How often this process holds each folder."""


def _read_system_id() -> str:
    """What tells this system and its process ids from others; "" where the kernel does not say."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _read_start_time(pid: int) -> str:
    """When a process began, in ticks since boot; "" when there is none of this id, or it is a zombie."""
    with contextlib.suppress(OSError, IndexError):
        state, *values = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state == "Z" else values[18]
    return ""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    system: str = field(default_factory=_read_system_id)
    """Boot and process namespace."""
    started: str = field(default_factory=lambda: _read_start_time(os.getpid()))
    """Start of the process: ids are used again."""
    job: str = field(default_factory=lambda: os.getenv("SLURM_JOB_ID", ""))
    restart: str = field(default_factory=lambda: os.getenv("SLURM_RESTART_COUNT", "0"))
    since: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def describe(self) -> str:
        """For people: `process 412 on node7, since 2026-11-30T06:00:00+00:00`."""
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def is_gone(self) -> bool | None:
        """Whether the owner has ended; None when only its silence can tell."""
        if self.system and self.system == _read_system_id():
            return self.started != _read_start_time(self.pid)
        # Slurm starts a job again only after it has ended all processes of its last start.
        is_same_job = bool(self.job) and self.job == os.getenv("SLURM_JOB_ID")
        return True if is_same_job and self.restart != os.getenv("SLURM_RESTART_COUNT", "0") else None


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Be the one process that writes into `folder`, which is made if it is missing; may be entered again.

    Raises InputError while another process works there, and where no folder can be made. May wait STALE_SECONDS to see
    whether a process elsewhere lives.
    """
    key = folder.resolve()
    if _depths.get(key):
        _depths[key] += 1
        try:
            yield
        finally:
            _depths[key] -= 1
        return

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        # File systems without folders of one's own, such as /proc, say so of a parent that is there.
        raise InputError(f"no folder can be made at {folder}; give another `out`") from None
    owner = Owner()
    _acquire(folder, owner)
    _depths[key] = 1
    is_left = threading.Event()
    threading.Thread(target=_beat, args=(folder / LOCK, owner, is_left), name="folder lock", daemon=True).start()
    try:
        yield
    finally:
        is_left.set()
        del _depths[key]
        # Another process may have taken over from one that was suspended.
        if _read_owner(folder / LOCK) == owner:
            (folder / LOCK).unlink(missing_ok=True)


def require_idle(folder: Path) -> None:
    """Raise InputError while another process works in `folder`."""
    path = folder / LOCK
    if path.exists() and not _depths.get(folder.resolve()) and not _is_stale(path):
        raise InputError(_describe_conflict(folder, _read_owner(path)))


def describe_holder(folder: Path) -> str | None:
    """Who works in `folder`, for people; None when nobody does.

    Writes nothing and does not wait: a process elsewhere counts as gone when its lock is older than STALE_SECONDS by
    the clock of this machine.
    """
    beat = _read_beat(folder / LOCK)
    if beat is None:
        return None

    owner = _read_owner(folder / LOCK)
    is_gone = owner.is_gone() if owner else None
    if is_gone is None:
        is_gone = time.time() - beat / 1e9 > STALE_SECONDS
    if is_gone:
        return None
    return owner.describe() if owner else "a process that left no name"


def _acquire(folder: Path, owner: Owner) -> None:
    path = folder / LOCK
    while not files.create_once(path, json.dumps(asdict(owner))):
        previous = _read_owner(path)
        if not _is_stale(path):
            raise InputError(_describe_conflict(folder, previous))

        if _take_away(path, previous):
            name = previous.describe() if previous else "a process that left no name"
            log.warning("%s: taken over from %s, which is gone", folder, name)


def _read_owner(path: Path) -> Owner | None:
    """The owner in a lock; None when there is no lock, or it cannot be read."""
    with contextlib.suppress(InputError):
        return files.read_json(path, "", Owner)
    return None


def _is_stale(path: Path) -> bool:
    """Whether the owner of a lock is gone. Waits for a sign of life of an owner elsewhere."""
    owner = _read_owner(path)
    is_gone = owner.is_gone() if owner else None
    if is_gone is not None:
        return is_gone

    # A lock that cannot be read may be just being written; its time tells.
    first_beat = _read_beat(path)
    while first_beat is not None:
        if _measure_silence(path) > STALE_SECONDS:
            return True
        time.sleep(min(1.0, BEAT_SECONDS / 10))
        if _read_beat(path) != first_beat:
            break
    # A lock that went meanwhile is free, and is tried again.
    return not path.exists()


def _read_beat(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return None


def _measure_silence(path: Path) -> float:
    """[s] Since the last sign of life, by the clock of the file system: those of two hosts may differ."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _take_away(path: Path, previous: Owner | None) -> bool:
    """Remove a stale lock; False when another process was first."""
    # Renamed first: of several processes that find it stale one gets it, and sees whether it is still the same.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False

    is_same = _read_owner(aside) == previous
    if not is_same:
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    return is_same


def _describe_conflict(folder: Path, owner: Owner | None) -> str:
    name = owner.describe() if owner else "another process"
    return (
        f"{name} works in {folder}, and two at once would damage it; wait until it ends, or choose another `out`. A "
        "process that has died is noticed by itself"
    )


def _beat(path: Path, owner: Owner, is_left: threading.Event) -> None:
    """Touch the lock until it is left; end this process when another one has taken it over."""
    while not is_left.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            if _read_owner(path) in (owner, None):
                os.utime(path)
                continue
            if not is_left.is_set():
                log.error("%s was taken over by another process, as this one gave no sign of life", path.parent)
                logging.shutdown()
                os._exit(EXIT_LOST)
