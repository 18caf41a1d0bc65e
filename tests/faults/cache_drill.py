"""Proofs about building feature caches that take too long for a test run.

    python -m tests.faults.cache_drill kills [count=50] [ranks=2] [seed=0]
        a build on several MPI ranks is killed `count` times in its midst, at a random share of the time that an
        undisturbed one takes for what is still to make (one start of ten: while it starts, which does not count), with
        SIGKILL, all processes or one rank; whenever one comes to its end, the cache must pass `cache verify` and equal
        an undisturbed one, byte for byte
    python -m tests.faults.cache_drill silent [ranks=2] [silence=5]
        one rank is suspended in the midst of a build, which no launcher notices: the others must name it and end
    python -m tests.faults.cache_drill memory [factor=2]
        the peak memory of a build on a small volume, and on one `factor` times as large along each axis

The last line is one JSON object; exit code 1 when the proof fails.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_neuro.data.feature_cache import MANIFEST
from tools.bench.random_store import write_store

KEYS = ["teacher.model=random", "stride_v=2", "slab=4", "batch=1"]  # a file is open during several forwards
_STUCK = 180.0  # [s] a start that made no shard by then has stopped making progress


def main(argv: Sequence[str]) -> int:
    """Run one proof."""
    proofs: dict[str, Callable[..., tuple[bool, dict[str, object]]]] = {
        "kills": kills,
        "silent": silent,
        "memory": memory,
    }
    if not argv or argv[0] not in proofs:
        sys.stdout.write(__doc__ or "")
        return 2
    given = {k: int(v) for k, _, v in (a.partition("=") for a in argv[1:])}
    with tempfile.TemporaryDirectory() as folder:
        passed, result = proofs[argv[0]](Path(folder), **given)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if passed else 1


@dataclass
class Tally:
    """What the kills struck, and what came of it."""

    kills: int = 0
    in_mid_build: int = 0  # after this start had made a shard or begun one, before the manifest
    that_left_half_a_shard: int = 0
    of_one_rank: int = 0
    launcher_seconds: list[float] = field(default_factory=list)  # from the death of one rank to the end of all
    launcher_stuck: int = 0
    finished: int = 0

    def count(self, out: Path, started_with: set[str]) -> None:
        """Look at what a kill left."""
        self.kills += 1
        halves = [p for p in out.glob(".*.part") if ".h5." in p.name]
        self.that_left_half_a_shard += bool(halves)
        struck = bool(halves or _names(out) - started_with) and not (out / MANIFEST).exists()
        self.in_mid_build += struck
        where = "in mid-build" if struck else "not in mid-build"
        sys.stderr.write(f"kill {self.kills}: {where}, {len(_names(out))} shards, {len(halves)} half written\n")

    def told(self) -> dict[str, Any]:
        """For the last line."""
        seconds = self.launcher_seconds
        rest = {k: v for k, v in vars(self).items() if k != "launcher_seconds"}
        return rest | {"slowest_end_after_one_rank_died_s": round(max(seconds, default=0.0), 2)}


def kills(folder: Path, count: int = 50, ranks: int = 2, seed: int = 0) -> tuple[bool, dict[str, object]]:
    """Kill a build `count` times in its midst; see the module."""
    store = write_store(folder / "store", ["a", "b"], (48, 160, 160))
    begun, out, draw, tally = time.monotonic(), folder / "killed", random.Random(seed), Tally()
    start_seconds, seconds = _timed(_start(store, folder / "whole", ranks), folder / "whole")
    wanted = _shards(folder / "whole")
    equal = True
    while equal and tally.in_mid_build < count:
        before, start = _names(out), time.monotonic()
        process = _start(store, out, ranks)
        patience = draw.uniform(0, start_seconds)
        if draw.random() < 0.9:
            _first_shard(process, out, before)
            patience = draw.uniform(0, seconds) * (1 - len(before) / len(wanted))
            start = time.monotonic()
        try:
            process.wait(max(0.0, patience - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            _kill(process, draw, tally)
            tally.count(out, before)
            continue
        equal = _ended_well(process) and _sound(out, wanted)
        tally.finished += 1
        shutil.rmtree(out)
    if equal:
        equal = _ended_well(_start(store, out, ranks)) and _sound(out, wanted)
        tally.finished += 1
    figures = {"ranks": ranks, "shards": len(wanted), "build_s": round(seconds, 1), "start_s": round(start_seconds, 1)}
    passed = equal and not tally.launcher_stuck
    took = {"seconds": round(time.monotonic() - begun)}
    return passed, {**tally.told(), "equal_to_an_undisturbed_build": equal, **figures, **took}


def silent(folder: Path, ranks: int = 2, silence: int = 5) -> tuple[bool, dict[str, object]]:
    """Suspend one rank; see the module."""
    store, out = write_store(folder / "store", ["a", "b"], (48, 160, 160)), folder / "out"
    with (folder / "said").open("w+", encoding="utf-8") as said:
        process = _start(store, out, ranks, f"silence={silence}", said=said)
        _first_shard(process, out, set())
        victim = _ranks(_descendants(process.pid))[-1]
        os.kill(victim, signal.SIGSTOP)
        begun = time.monotonic()
        code = process.wait(_STUCK)
        seconds = time.monotonic() - begun
        said.seek(0)
        verdict = [line.strip() for line in said if f"process {victim}) has been silent" in line]
    again = _ended_well(_start(store, out, ranks))
    passed = code != 0 and len(verdict) == 1 and again
    return passed, {"silence_s": silence, "ended_after_s": round(seconds, 1), "said": verdict, "went_on": again}


def memory(folder: Path, factor: int = 2) -> tuple[bool, dict[str, object]]:
    """Peak memory of two builds, each in a process of its own; both volumes have a tile with context on every side."""
    peaks = {}
    for name, side in (("small", 384), ("large", 384 * factor)):
        store = write_store(folder / f"{name}_store", ["a"], (side, side, side))
        keys = [*_verb(store, folder / name)[3:], "stride_v=192", "batch=2", "tile=128", "halo=64"]
        script = (
            "import sys; from hpc_neuro.cli import main; code = main(sys.argv[1:]); "
            # not getrusage, which starts from the peak of the process that started this one
            "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line]); sys.exit(code)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script, *keys], check=True, stdout=subprocess.PIPE, text=True, env=_environment()
        )
        peaks[name] = int(ended.stdout.split()[-1]) / 1000
    ratio = peaks["large"] / peaks["small"]
    return ratio <= 1.1, {"times_as_large": factor**3, "peak_mb": peaks, "ratio": round(ratio, 3)}


def _verb(store: Path, out: Path, *keys: str) -> list[str]:
    return [sys.executable, "-m", "hpc_neuro", "precompute", f"store={store}", f"out={out}", *KEYS, *keys]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _start(store: Path, out: Path, ranks: int, *keys: str, said: Any = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks), *_verb(store, out, *keys)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=_environment())


def _timed(process: subprocess.Popen[bytes], out: Path) -> tuple[float, float]:
    """Seconds until the first shard of an undisturbed build, and from there to its end."""
    begun = time.monotonic()
    _first_shard(process, out, set())
    first = time.monotonic()
    if not _ended_well(process):
        raise SystemExit(f"the build ended with {process.returncode} and was not killed")
    return first - begun, time.monotonic() - first


def _first_shard(process: subprocess.Popen[bytes], out: Path, before: set[str]) -> None:
    """Wait until a start has made its first shard, or ended."""
    latest = time.monotonic() + _STUCK
    while process.poll() is None and _names(out) == before:
        if time.monotonic() > latest:
            for pid in _descendants(process.pid):
                _signal(pid)
            raise SystemExit(f"no new shard in {_STUCK:.0f} s: the build is stuck")
        time.sleep(0.01)


def _kill(process: subprocess.Popen[bytes], draw: random.Random, tally: Tally) -> None:
    """All at once, as a node that goes down, or one rank, after which the launcher ends the others."""
    group = _descendants(process.pid)  # the launcher gives every rank a session of its own
    ranks, one = _ranks(group), draw.random() < 0.5
    begun, single = time.monotonic(), bool(ranks) and one
    for pid in [draw.choice(ranks)] if single else group:
        _signal(pid)
    try:
        process.wait(20)
        if single:
            tally.of_one_rank += 1
            tally.launcher_seconds.append(time.monotonic() - begun)
    except subprocess.TimeoutExpired:
        tally.launcher_stuck += 1
        _signal(process.pid)
        process.wait()
    for pid in group:  # nothing of this start may write into the next
        _signal(pid)
    while any(Path(f"/proc/{pid}").exists() and _state(pid) not in "ZX" for pid in group):
        time.sleep(0.05)


def _signal(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _ranks(group: Sequence[int]) -> list[int]:
    """The processes of a start that compute."""
    return [pid for pid in group if b"precompute" in _words(pid) and b"mpiexec" not in _words(pid).split(b"\0")[0]]


def _descendants(root: int) -> list[int]:
    """A process and all that it started, the root first."""
    parents = {int(p.name): _parent(p) for p in Path("/proc").iterdir() if p.name.isdigit()}
    found = [root]
    for pid in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return -1


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _ended_well(process: subprocess.Popen[bytes]) -> bool:
    return process.wait(10 * _STUCK) == 0


def _sound(out: Path, wanted: dict[str, bytes]) -> bool:
    """Whether the cache passes `verify` and has the wanted bytes, and nothing half-written lies about."""
    verify = [sys.executable, "-m", "hpc_neuro", "cache", "verify", str(out), "rebuild=false", "slices=8"]
    passed = subprocess.run(verify, check=False, stderr=subprocess.DEVNULL, env=_environment()).returncode == 0
    return passed and _shards(out) == wanted and not list(out.glob(".*"))


def _names(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("*.h5")}


def _shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.h5")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
