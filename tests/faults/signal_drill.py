"""Random warnings (TERM, USR1, USR2) to prepare, precompute, infer and evaluate; are the results those of quiet runs?

    python -m tests.faults.signal_drill [--warnings 100] [--verbs infer ...] [--seed 0] [--folder FOLDER]

Each verb runs once in quiet. Then it is warned at random moments, again and again, until its share of the warnings has
struck, and is left alone to its end. A start that is warned must end with exit code 75, or 0 if it was about to end; it
must leave no count of a death, no half-written file, and the next start must go on with what it did. `infer` runs with
`deaths=1`, so that a warning that counted as a death would leave a piece out. A run that ends before it is warned is
compared and begun anew. Last line: JSON; exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_neuro.core.constants import EXIT_DONE, EXIT_STOPPED
from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset
from tests.faults.kill_infer import snapshot_code, write_bright_student
from tests.helpers.journal import list_all_begun

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_RESULTS = {
    "prepare": ("*.h5", "dataset.json", "pictures/*"),
    "precompute": ("*.h5", "manifest.json"),
    "infer": ("*.ome.zarr/**/*", "swc/**/*", "proofread/*", "predictions.json"),
    "evaluate": ("scores/**/*.json", "metrics.*", "pictures/*"),
}
"""Files of a run folder whose bytes do not depend on when it was made, by verb in the order of the pipeline."""
_STOP_SECONDS = 120.0
"""[s] What a site gives a job between warning and kill."""


@dataclass
class Tally:
    """What the warnings struck, and what followed."""

    warnings: Counter[str] = field(default_factory=Counter)
    """By verb."""
    codes: Counter[int] = field(default_factory=Counter)
    """Exit codes of the starts that were warned."""
    deaths: int = 0
    """Starts that ended otherwise, and counts of deaths that they left."""
    parts: int = 0
    """Half-written files that they left."""
    slowest_s: float = 0.0
    """[s] From a warning to the end of the process."""
    differs: set[str] = field(default_factory=set)
    """Results that differ from those of the quiet run."""


def main() -> int:
    """Run the drill; exit code 1 when anything differs or a death was counted."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--warnings", type=int, default=100)
    ask.add_argument("--verbs", nargs="+", default=list(_RESULTS), choices=list(_RESULTS), help="which are warned")
    ask.add_argument("--seed", type=int, default=0, help="of what is sent, and when")
    ask.add_argument("--folder", type=Path, help="for all runs; none: a temporary one, removed when all is well")
    args = ask.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="signal_drill_"))
    facts = drill(folder, args.warnings, args.verbs, args.seed)
    print(json.dumps(facts))
    if not facts["passed"]:
        print(f"all runs are kept in {folder}", file=sys.stderr)
        return 1
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


def drill(folder: Path, warnings: int, verbs: Sequence[str] = tuple(_RESULTS), seed: int = 0) -> dict[str, Any]:
    """Warn each of `verbs` its share of `warnings` times; compare with one quiet run of each."""
    folder, begin = folder.resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    code = snapshot_code(folder / "code")
    write_bright_student(folder / "model")
    write_dataset(folder / "raw", SyntheticConfig(volumes=4, shape=(16, 64, 64)))

    draw, tally = random.Random(seed), Tally()
    for verb in _RESULTS:
        share = -(-warnings // len(verbs)) if verb in verbs else 0
        _drill_verb(verb, folder, code, share, draw, tally)

    return {
        "warnings": tally.warnings,
        "codes": tally.codes,
        "deaths": tally.deaths,
        "parts": tally.parts,
        "slowest_stop_s": round(tally.slowest_s, 1),
        "differs": sorted(tally.differs)[:20],
        "passed": not (tally.deaths or tally.parts or tally.differs),
        "seconds": round(time.monotonic() - begin),
    }


def _drill_verb(verb: str, folder: Path, code: Path, warnings: int, draw: random.Random, tally: Tally) -> None:
    quiet, warned = folder / verb / "quiet", folder / verb / "warned"
    begin = time.monotonic()
    process = _start(verb, folder, quiet, code)
    _wait_for_handlers(process)
    start_seconds = time.monotonic() - begin
    if process.wait() != EXIT_DONE:
        raise RuntimeError(f"{verb} ended with exit code {process.returncode} in quiet; see {quiet}.log")
    work_seconds = time.monotonic() - begin - start_seconds

    while tally.warnings[verb] < warnings:
        process = _start(verb, folder, warned, code)
        _wait_for_handlers(process)

        # Early moments too: a start that is warned before it has done anything must leave nothing.
        time.sleep(draw.random() * work_seconds)
        if process.poll() is None:
            _warn(process, verb, draw, tally)
            _inspect(process.returncode, warned, tally)
        if process.returncode == EXIT_DONE:
            tally.differs |= _compare(verb, quiet, warned)
            shutil.rmtree(warned)

    if _start(verb, folder, warned, code).wait() != EXIT_DONE:
        tally.deaths += 1
    tally.differs |= _compare(verb, quiet, warned)


def _warn(process: subprocess.Popen[bytes], verb: str, draw: random.Random, tally: Tally) -> None:
    """Send one signal or two, and wait for the end."""
    begin = time.monotonic()
    for _ in range(draw.choice((1, 1, 2))):
        process.send_signal(draw.choice(SIGNALS))
        tally.warnings[verb] += 1
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    tally.slowest_s = max(tally.slowest_s, time.monotonic() - begin)
    tally.codes[process.returncode] += 1


def _inspect(code: int, out: Path, tally: Tally) -> None:
    """Count what a warned start must not leave."""
    tally.deaths += code not in (EXIT_DONE, EXIT_STOPPED)
    tally.deaths += len(list_all_begun(out))
    tally.parts += sum(1 for _ in out.rglob(".*.part"))


def _compare(verb: str, quiet: Path, warned: Path) -> set[str]:
    """Names of the results whose bytes differ."""
    expected, actual = _read_results(verb, quiet), _read_results(verb, warned)
    return {f"{verb}/{name}" for name in expected | actual if expected.get(name) != actual.get(name)}


def _read_results(verb: str, out: Path) -> dict[str, bytes]:
    paths = [path for pattern in _RESULTS[verb] for path in out.glob(pattern) if path.is_file()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def _start(verb: str, folder: Path, out: Path, code: Path) -> subprocess.Popen[bytes]:
    store = f"store={folder / 'prepare' / 'quiet'}"
    keys = {
        "prepare": [f"images={folder / 'raw'}", "split.test=[syn_1,syn_2]"],
        "precompute": [store, "teacher.model=random", "stride_v=4", "slab=2", "batch=1"],
        "infer": [
            *(store, f"model={folder / 'model'}", "split=test", "block=[8,32,32]", "chunk=[8,32,32]"),
            *("trace.block=[8,32,32]", "flips=[flip_x]", "deaths=1", "trace.threshold=0.01", "trace.root_snap=1000"),
        ],
        "evaluate": [store, f"predictions={folder / 'infer' / 'quiet'}", "draws=100", "pictures=2"],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{out}.log").open("ab") as log:
        command = [sys.executable, "-m", "hpc_neuro", verb, f"out={out}", *keys[verb]]
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=code)


def _wait_for_handlers(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process catches SIGUSR2: before that the supervisor of a rank answers for it."""
    bit = 1 << (signal.SIGUSR2 - 1)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        caught = next((line for line in status.splitlines() if line.startswith("SigCgt")), "SigCgt: 0")
        if int(caught.split()[1], 16) & bit:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
