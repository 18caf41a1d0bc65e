"""Drills of building feature caches that take too long for a test run.

    python -m tests.faults.cache_drill kills [count=50] [ranks=2] [seed=0]
        A build on several MPI ranks is killed `count` times at work, with SIGKILL, all processes or one rank. The kill
        comes after a random share of the time that an undisturbed build takes for the rest; one start of ten is killed
        while it starts, which does not count. Whenever a build ends, the cache must pass `cache verify` and equal an
        undisturbed one, byte for byte.
    python -m tests.faults.cache_drill silent [ranks=2] [silence=5]
        One rank is suspended at work, which no launcher notices. The others must name it and end.
    python -m tests.faults.cache_drill memory [factor=2]
        The peak memory of a build on a small volume, and on one `factor` times as large along each axis.

The last line is one JSON object; exit code 1 when the drill fails.
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

KEYS = ["teacher.model=random", "stride_v=2", "slab=4", "batch=1"]
"""Keys of a build whose shards are open during several forwards."""

STUCK = 180.0
"""[s] A start that built no shard by then makes no progress."""

Result = tuple[bool, dict[str, object]]
"""Whether the drill passed, and its figures."""


def main(argv: Sequence[str]) -> int:
    """Run one drill."""
    drills: dict[str, Callable[..., Result]] = {
        "kills": drill_kills,
        "silent": drill_silent_rank,
        "memory": drill_memory,
    }
    if not argv or argv[0] not in drills:
        sys.stdout.write(__doc__ or "")
        return 2

    options = {key: int(value) for key, _, value in (argument.partition("=") for argument in argv[1:])}
    with tempfile.TemporaryDirectory() as folder:
        passed, figures = drills[argv[0]](Path(folder), **options)
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0 if passed else 1


@dataclass
class KillTally:
    """What the kills struck, and what followed."""

    kills: int = 0
    in_mid_build: int = 0  # after this start had built or begun a shard, before the manifest
    that_left_half_a_shard: int = 0
    of_one_rank: int = 0
    launcher_seconds: list[float] = field(default_factory=list)  # from the death of one rank to the end of all
    launcher_stuck: int = 0
    finished: int = 0

    def count(self, out: Path, shards_before: set[str]) -> None:
        """Count one kill by what it left."""
        halves = [path for path in out.glob(".*.part") if ".h5." in path.name]
        shards = list_shards(out)
        is_mid_build = bool(halves or shards - shards_before) and not (out / MANIFEST).exists()

        self.kills += 1
        self.that_left_half_a_shard += bool(halves)
        self.in_mid_build += is_mid_build
        place = "in mid-build" if is_mid_build else "not in mid-build"
        sys.stderr.write(f"kill {self.kills}: {place}, {len(shards)} shards, {len(halves)} half written\n")

    def summarize(self) -> dict[str, Any]:
        """The figures of the last line."""
        figures = {name: value for name, value in vars(self).items() if name != "launcher_seconds"}
        slowest = max(self.launcher_seconds, default=0.0)
        return figures | {"slowest_end_after_one_rank_died_s": round(slowest, 2)}


def drill_kills(folder: Path, count: int = 50, ranks: int = 2, seed: int = 0) -> Result:
    """Kill a build `count` times at work; see the module."""
    begin = time.monotonic()
    store = write_store(folder / "store", ["a", "b"], (48, 160, 160))
    start_seconds, build_seconds = time_build(start_build(store, folder / "whole", ranks), folder / "whole")
    expected = read_shards(folder / "whole")

    out, rng, tally = folder / "killed", random.Random(seed), KillTally()
    equal = True
    while equal and tally.in_mid_build < count:
        before = list_shards(out)
        process = start_build(store, out, ranks)
        rest_seconds = build_seconds * (1 - len(before) / len(expected))
        if not wait_random_time(process, out, before, rng, start_seconds, rest_seconds):
            kill_build(process, rng, tally)
            tally.count(out, before)
            continue

        equal = has_succeeded(process) and is_sound(out, expected)
        tally.finished += 1
        shutil.rmtree(out)

    # The last start is left alone, so that at least one build ends after kills.
    if equal:
        equal = has_succeeded(start_build(store, out, ranks)) and is_sound(out, expected)
        tally.finished += 1

    figures = {
        **tally.summarize(),
        "equal_to_an_undisturbed_build": equal,
        "ranks": ranks,
        "shards": len(expected),
        "build_s": round(build_seconds, 1),
        "start_s": round(start_seconds, 1),
        "seconds": round(time.monotonic() - begin),
    }
    return equal and not tally.launcher_stuck, figures


def wait_random_time(
    process: subprocess.Popen[bytes],
    out: Path,
    before: set[str],
    rng: random.Random,
    start_seconds: float,
    rest_seconds: float,
) -> bool:
    """Wait for a random share of the start, or in nine of ten cases of the build; -> whether the build has ended."""
    patience = rng.uniform(0, start_seconds)
    begin = time.monotonic()
    if rng.random() < 0.9:
        wait_for_shard(process, out, before)
        patience = rng.uniform(0, rest_seconds)
        begin = time.monotonic()

    try:
        process.wait(max(0.0, patience - (time.monotonic() - begin)))
    except subprocess.TimeoutExpired:
        return False
    return True


def drill_silent_rank(folder: Path, ranks: int = 2, silence: int = 5) -> Result:
    """Suspend one rank; see the module."""
    store, out = write_store(folder / "store", ["a", "b"], (48, 160, 160)), folder / "out"
    with (folder / "log").open("w+", encoding="utf-8") as log:
        process = start_build(store, out, ranks, f"silence={silence}", log=log)
        wait_for_shard(process, out, set())
        victim = find_ranks(find_descendants(process.pid))[-1]
        os.kill(victim, signal.SIGSTOP)

        begin = time.monotonic()
        code = process.wait(STUCK)
        seconds = time.monotonic() - begin
        log.seek(0)
        verdicts = [line.strip() for line in log if f"process {victim}) has been silent" in line]

    resumed = has_succeeded(start_build(store, out, ranks))
    passed = code != 0 and len(verdicts) == 1 and resumed
    figures = {"silence_s": silence, "ended_after_s": round(seconds, 1), "said": verdicts, "went_on": resumed}
    return passed, figures


def drill_memory(folder: Path, factor: int = 2) -> Result:
    """Peak memory of two builds, each in a process of its own; both volumes have a tile with context on every side."""
    # Not getrusage, which starts from the peak of the process that started this one.
    script = (
        "import sys; from hpc_neuro.cli import main; code = main(sys.argv[1:]); "
        "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line]); sys.exit(code)"
    )

    peaks = {}
    for name, side in (("small", 384), ("large", 384 * factor)):
        store = write_store(folder / f"{name}_store", ["a"], (side, side, side))
        keys = [*build_command(store, folder / name)[3:], "stride_v=192", "batch=2", "tile=128", "halo=64"]
        ended = subprocess.run(
            [sys.executable, "-c", script, *keys],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=build_environment(),
        )
        peaks[name] = int(ended.stdout.split()[-1]) / 1000

    ratio = peaks["large"] / peaks["small"]
    return ratio <= 1.1, {"times_as_large": factor**3, "peak_mb": peaks, "ratio": round(ratio, 3)}


def build_command(store: Path, out: Path, *keys: str) -> list[str]:
    """The command of a build on one process."""
    return [sys.executable, "-m", "hpc_neuro", "precompute", f"store={store}", f"out={out}", *KEYS, *keys]


def build_environment() -> dict[str, str]:
    """One thread per rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start_build(
    store: Path, out: Path, ranks: int, *keys: str, log: Any = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a build on several MPI ranks."""
    mpiexec = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)]
    command = [*mpiexec, *build_command(store, out, *keys)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=build_environment())


def time_build(process: subprocess.Popen[bytes], out: Path) -> tuple[float, float]:
    """Seconds until the first shard of an undisturbed build, and from there to its end."""
    begin = time.monotonic()
    wait_for_shard(process, out, set())
    first = time.monotonic()
    if not has_succeeded(process):
        raise SystemExit(f"the build ended with {process.returncode} and was not killed")
    return first - begin, time.monotonic() - first


def wait_for_shard(process: subprocess.Popen[bytes], out: Path, before: set[str]) -> None:
    """Wait until a start has built its first shard, or ended."""
    latest = time.monotonic() + STUCK
    while process.poll() is None and list_shards(out) == before:
        if time.monotonic() > latest:
            for pid in find_descendants(process.pid):
                kill_process(pid)
            raise SystemExit(f"no new shard in {STUCK:.0f} s: the build is stuck")
        time.sleep(0.01)


def kill_build(process: subprocess.Popen[bytes], rng: random.Random, tally: KillTally) -> None:
    """Kill all processes, as a node that goes down does, or one rank, after which the launcher ends the others."""
    # The launcher gives every rank a session of its own, so there is no process group to kill.
    group = find_descendants(process.pid)
    ranks, wants_one = find_ranks(group), rng.random() < 0.5
    kills_one = bool(ranks) and wants_one

    begin = time.monotonic()
    for pid in [rng.choice(ranks)] if kills_one else group:
        kill_process(pid)
    try:
        process.wait(20)
        if kills_one:
            tally.of_one_rank += 1
            tally.launcher_seconds.append(time.monotonic() - begin)
    except subprocess.TimeoutExpired:
        tally.launcher_stuck += 1
        kill_process(process.pid)
        process.wait()

    # No process of this start may write into the next one.
    for pid in group:
        kill_process(pid)
    while any(Path(f"/proc/{pid}").exists() and read_state(pid) not in "ZX" for pid in group):
        time.sleep(0.05)


def kill_process(pid: int) -> None:
    """Send SIGKILL; a process that has ended is left alone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def find_ranks(group: Sequence[int]) -> list[int]:
    """The processes of a start that compute."""
    ranks = []
    for pid in group:
        command = read_command(pid)
        if b"precompute" in command and b"mpiexec" not in command.split(b"\0")[0]:
            ranks.append(pid)
    return ranks


def find_descendants(root: int) -> list[int]:
    """A process and all that it started, the root first."""
    parents = {int(path.name): read_parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    family = [root]
    # The list grows while it is walked.
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def read_parent(entry: Path) -> int:
    """The parent of a process in /proc; -1 when it has ended."""
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return -1


def read_state(pid: int) -> str:
    """The state letter of a process; X when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def read_command(pid: int) -> bytes:
    """The command line of a process, words ending in a zero byte."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def has_succeeded(process: subprocess.Popen[bytes]) -> bool:
    """Whether a build ends with exit code 0."""
    return process.wait(10 * STUCK) == 0


def is_sound(out: Path, expected: dict[str, bytes]) -> bool:
    """Whether the cache passes `verify`, has the expected bytes, and holds no part file."""
    verify = [sys.executable, "-m", "hpc_neuro", "cache", "verify", str(out), "rebuild=false", "slices=8"]
    ended = subprocess.run(verify, check=False, stderr=subprocess.DEVNULL, env=build_environment())
    return ended.returncode == 0 and read_shards(out) == expected and not list(out.glob(".*"))


def list_shards(folder: Path) -> set[str]:
    """Names of the finished shards."""
    return {path.name for path in folder.glob("*.h5")}


def read_shards(folder: Path) -> dict[str, bytes]:
    """Bytes of the finished shards by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.h5")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
