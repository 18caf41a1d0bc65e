"""Verbs killed at random moments, with a second process started in the same folder; is the output that of quiet runs?

    python -m tests.faults.kill_verbs [--kills 200] [--seed 0] [--folder FOLDER]

Two pipelines of three synthetic neurons run, one quietly and one in which every verb is killed (SIGKILL) after a random
part of its quiet time, again and again. Beside each start a second process of the same command begins at a random
moment: it is refused, finds the run complete, or goes on with what the killed one left. Last line: JSON with the number
of kills, of refusals and of locks that were taken over, and `differs`, the files that are not equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE
from hpc_neuro.core.schema import load
from hpc_neuro.data.run_journal import JOURNAL, RunJournal
from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset
from hpc_neuro.pipeline import STAGES

_KEYS = {
    "prepare": ["split.test=[syn_3]"],
    "precompute": ["teacher.model=random", "tile=112"],
    "train": [
        *("teacher.model=random", "student.depth=1", "crop.size=[8,32,32]", "optim.batch=1", "optim.steps=12"),
        *("optim.warmup=0.01", "ema.window=0", "validate.crops=2", "validate.every=4", "checkpoint.every=2"),
        *("checkpoint.background=false", "tracker.wandb=disabled", "tracker.every=1"),
    ],
    "infer": ["trace.threshold=0.15", "trace.root_snap=100", "block=[16,32,32]", "window=[16,32,32]"],
    "evaluate": ["draws=100"],
}
_TIMES = re.compile(
    r"(^|/)(log\.txt|run\.json|report\.html|status\.html|config\.yaml|deepspeed\.json|uses|begun|failed)"
)
"""Files that hold times, paths or the history of the starts."""
_MEASURED = ("crops_per_s", "tokens_per_s", "mfu", "data_wait_share", "memory_bytes", "memory_bytes_by_rank", "eta_s")
"""Keys of a row of metrics.jsonl that depend on the machine."""


@dataclass
class Facts:
    """What happened."""

    kills: int = 0
    refusals: int = 0
    takeovers: int = 0
    starts: int = 0
    differs: list[str] = field(default_factory=list)


def main() -> int:
    """Run the drill; exit code 1 when anything differs."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--kills", type=int, default=200)
    ask.add_argument("--seed", type=int, default=0, help="of the moments")
    ask.add_argument("--folder", type=Path, help="for both pipelines; none: a temporary one, removed when all is well")
    args = ask.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill_verbs_"))
    facts = drill(folder, args.kills, args.seed)
    print(json.dumps(vars(facts)))
    if facts.differs:
        return 1
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


def drill(folder: Path, kills: int, seed: int = 0) -> Facts:
    """Run both pipelines in `folder`, with `kills` kills shared out among the verbs of one."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    write_dataset(raw, load(SyntheticConfig, None, ["volumes=3", "shape=[16,64,64]"]))

    # Both run at the same place, since results hold the paths of what they were made from.
    seconds = dict[str, float]()
    for name in STAGES:
        begin = time.monotonic()
        process = _start(folder, name)
        text = process.communicate()[1]
        assert process.returncode == EXIT_DONE, f"{name} failed without a kill:\n{text[-3000:]}"
        seconds[name] = time.monotonic() - begin
    (folder / "run").rename(folder / "quiet")

    facts, draw = Facts(), random.Random(seed)
    for number, name in enumerate(STAGES):
        # The first verbs get one kill more where the number does not divide.
        share = kills // len(STAGES) + (number < kills % len(STAGES))
        _run_killed(folder, name, share, seconds[name], draw, facts)
    (folder / "run").rename(folder / "killed")

    facts.differs = compare(folder / "quiet", folder / "killed")
    return facts


def _run_killed(folder: Path, name: str, kills: int, seconds: float, draw: random.Random, facts: Facts) -> None:
    """Start a verb until it has been killed `kills` times and is complete, each time with a second process."""
    while True:
        is_last = kills == 0
        pair = [_start(folder, name)]
        time.sleep(draw.uniform(0, 0.3 * seconds))
        pair.append(_start(folder, name))
        facts.starts += 2

        if not is_last:
            time.sleep(draw.uniform(0, seconds))
            victim = pair[draw.randrange(2)]
            if victim.poll() is None:
                victim.send_signal(signal.SIGKILL)
                facts.kills += 1
                kills -= 1
            elif victim.returncode == EXIT_DONE:
                # Complete before its kill: what is left of the kills strikes a run that is made anew.
                kills -= 1

        codes = []
        for process in pair:
            text = process.communicate()[1]
            codes.append(process.returncode)
            is_refusal = process.returncode == EXIT_BAD_INPUT and "two at once" in text
            facts.refusals += is_refusal
            facts.takeovers += "taken over from" in text
            is_known = process.returncode in (EXIT_DONE, -signal.SIGKILL) or is_refusal
            assert is_known, f"{name} ended with {process.returncode}:\n{text[-3000:]}"

        if is_last and EXIT_DONE in codes:
            return


def _start(folder: Path, name: str) -> subprocess.Popen[str]:
    folders = {"images": folder / "raw"} if name == "prepare" else {}
    folders |= STAGES[name].folders_under(folder / "run", present=STAGES)
    keys = [f"{key}={path}" for key, path in folders.items()]
    words = [sys.executable, "-m", "hpc_neuro", name, *keys, *_KEYS[name]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def compare(quiet: Path, killed: Path) -> list[str]:
    """Files that are in one folder only, or differ in more than times."""
    names = {
        path.relative_to(root).as_posix() for root in (quiet, killed) for path in root.rglob("*") if path.is_file()
    }
    # The logs of a journal have names of their own; what they say together is compared.
    journals = sorted({Path(name).parent.as_posix() for name in names if f"/{JOURNAL}/" in name})
    names = {name for name in names if f"/{JOURNAL}/" not in name}
    differs = [name for name in sorted(names) if not _TIMES.search(name) and _read(quiet, name) != _read(killed, name)]
    return differs + [name for name in journals if _read_journal(quiet / name) != _read_journal(killed / name)]


def _read_journal(folder: Path) -> dict[str, object]:
    """What is done of each volume, and what failed or was begun and not ended."""
    journal = RunJournal(folder.parent)
    volumes: dict[str, object] = {}
    for name in journal.list_volumes():
        records = journal.find(name)
        blocks = {block: {**json.loads(record.body), "seconds": 0} for block, record in records.blocks.items()}
        shards = {path: json.loads(record.body) for path, record in records.shards.items()}
        volumes[name] = (blocks, shards, sorted(records.failures), sorted(records.begun))
    return volumes


def _read(root: Path, name: str) -> object:
    """The content of a file without times; None where there is none."""
    path = root / name
    if not path.exists():
        return None
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: value for key, value in row.items() if key not in _MEASURED} for row in rows]
    if path.suffix == ".json":
        return _drop_times(json.loads(path.read_text(encoding="utf-8")))
    return path.read_bytes()


def _drop_times(value: object) -> object:
    """JSON data without times, and without the digests of files that hold some."""
    if isinstance(value, dict):
        skipped = ("seconds", "files")
        return {key: _drop_times(item) for key, item in value.items() if key not in skipped}
    return [_drop_times(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
