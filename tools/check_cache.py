"""Proofs about building feature caches that take too long for a test run.

    python -m tools.check_cache kills [count=50] [ranks=2] [seed=0]
        a build on several MPI ranks is killed at random moments, with SIGKILL, all ranks or one; whenever it comes to
        its end, the cache must pass `cache verify` and equal an undisturbed one, byte for byte
    python -m tools.check_cache memory [factor=8]
        the peak memory of a build on one small volume, and on one `factor` times as large

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
from collections.abc import Sequence
from pathlib import Path

from hpc_neuro.data.feature_cache import MANIFEST
from tests.tiny_store import write_store

KEYS = ["teacher.model=random", "stride_v=2", "slab=1", "batch=2", "layers=[-1]"]
_STUCK = 180.0  # [s] a start that made no shard by then has stopped making progress


def main(argv: Sequence[str]) -> int:
    """Run one proof."""
    if not argv or argv[0] not in ("kills", "memory"):
        sys.stdout.write(__doc__ or "")
        return 2
    given = {k: int(v) for k, _, v in (a.partition("=") for a in argv[1:])}
    with tempfile.TemporaryDirectory() as folder:
        passed, result = kills(Path(folder), **given) if argv[0] == "kills" else memory(Path(folder), **given)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if passed else 1


def kills(folder: Path, count: int = 50, ranks: int = 2, seed: int = 0) -> tuple[bool, dict[str, object]]:
    """Kill a build `count` times; see the module."""
    store = write_store(folder / "store", {"a": "train", "b": "train"}, (40, 72, 88))
    _run(_verb(store, folder / "whole"))
    wanted, out = _shards(folder / "whole"), folder / "killed"
    draw, killed, finished, begun, partial = random.Random(seed), 0, 0, time.monotonic(), 0
    mean = 8.0  # [s] about how long a start takes to reach its end; corrected as starts come to it
    while killed < count:
        start = time.monotonic()
        command = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks), *_verb(store, out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment())
        if draw.random() < 0.8:  # in the midst of the work, of which starting takes most of the time otherwise
            held = len(_names(out))
            while process.poll() is None and len(_names(out)) == held:
                if time.monotonic() - start > _STUCK:
                    _kill(process, draw)
                    raise SystemExit(f"no new shard in {_STUCK:.0f} s: the build is stuck")
                time.sleep(0.01)
            patience = draw.uniform(0, 1.5)
        else:
            patience = draw.uniform(0, 1.1) * mean
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            _kill(process, draw)
            killed += 1
            partial += bool(_names(out)) and not (out / MANIFEST).exists()
            continue
        if process.returncode != 0:
            raise SystemExit(f"the build ended with {process.returncode} and was not killed")
        mean = 0.5 * (mean + time.monotonic() - start)
        finished += 1
        if not _sound(out, wanted):
            return False, {"kills": killed, "finished": finished, "equal": False}
        shutil.rmtree(out)
    _run(_verb(store, out))
    equal = _sound(out, wanted)
    seconds = round(time.monotonic() - begun)
    return equal, {
        "kills": killed, "kills_in_mid_build": partial, "builds_that_came_to_their_end": finished + 1, "ranks": ranks,
        "shards": len(wanted), "equal_to_an_undisturbed_build": equal, "seconds": seconds,
    }  # fmt: skip


def memory(folder: Path, factor: int = 8) -> tuple[bool, dict[str, object]]:
    """Peak memory of two builds, each in a process of its own."""
    peaks = {}
    for name, scale in (("small", 1), ("large", factor)):
        shape = (64 * scale, 256, 256)
        store = write_store(folder / f"{name}_store", {"a": "train"}, shape)
        keys = [*_verb(store, folder / name)[3:], "stride_v=8", "slab=16", "batch=4", "views=[z,y]"]
        script = (
            "import sys; from hpc_neuro.__main__ import main; code = main(sys.argv[1:]); "
            # not getrusage, which starts from the peak of the process that started this one
            "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line]); sys.exit(code)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script, *keys], check=True, stdout=subprocess.PIPE, text=True, env=_environment()
        )
        peaks[name] = int(ended.stdout.split()[-1]) / 1000
    ratio = peaks["large"] / peaks["small"]
    return ratio <= 1.1, {"factor": factor, "peak_mb": peaks, "ratio": round(ratio, 3)}


def _verb(store: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "hpc_neuro", "precompute", f"store={store}", f"out={out}", *KEYS]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=_environment())


def _kill(process: subprocess.Popen[bytes], draw: random.Random) -> None:
    """All at once, as a node that goes down, or one rank, after which the launcher ends the others."""
    group = _descendants(process.pid)  # the launcher gives every rank a session of its own
    ranks = [pid for pid in group if b"precompute" in _words(pid) and b"mpiexec" not in _words(pid)]
    victims = [draw.choice(ranks)] if ranks and draw.random() < 0.5 else group
    for pid in victims:
        _signal(pid)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
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


def _sound(out: Path, wanted: dict[str, bytes]) -> bool:
    """Whether the cache passes `verify` and has the wanted bytes, and nothing half-written lies about."""
    verify = [sys.executable, "-m", "hpc_neuro", "cache", "verify", str(out), "rebuild=false", "slices=8"]
    passed = subprocess.run(verify, check=False, stderr=subprocess.DEVNULL, env=_environment()).returncode == 0
    return passed and _shards(out) == wanted and not list(out.glob(".*"))


def _names(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("*.h5")]


def _shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.h5")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
