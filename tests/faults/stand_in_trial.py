"""A trial that trains nothing, for drills and tests of sweeps: seconds of a real trial's life in a tenth of one.

    python tests/faults/stand_in_trial.py FOLDER

Reads FOLDER/train.yaml, minimizes (log10(lr) + 3)^2 by steps, writes FOLDER/train/metrics.jsonl as training does, saves
its step so that a killed trial resumes, and notes in FOLDER/spans.txt that it began, so that a drill sees two at work.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import sys
import time
from pathlib import Path

import yaml

BEST = 1e-3
"""The learning rate at which `val.dice` ends highest."""


def dice(lr: float, step: int, steps: int) -> float:
    """What a trial of this learning rate reaches after `step` steps: a saturating curve, lower off `BEST`."""
    limit = 0.9 * math.exp(-((math.log10(lr / BEST)) ** 2))
    return limit * (1 - math.exp(-4 * step / steps))


def main(folder: Path) -> int:
    """Run or resume one trial; its exit code is the key `exit` of train.yaml."""
    cfg = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))
    lock = (folder / "lock").open("a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        event = "begins"
    except OSError:
        event = "DOUBLE"
    with (folder / "spans.txt").open("a", encoding="utf-8") as spans:
        spans.write(f"{event} {os.getpid()} {time.time()}\n")
    if event == "DOUBLE":
        return 1

    out = folder / "train"
    out.mkdir(exist_ok=True)
    checkpoint = out / "step"
    step = int(checkpoint.read_text(encoding="utf-8")) if checkpoint.exists() else 0
    while step < cfg["steps"]:
        time.sleep(cfg["seconds"] / cfg["steps"])
        step += 1
        if step % cfg["every"] == 0:
            row = {"step": step, "kind": "val", "dice": dice(cfg["lr"], step, cfg["steps"])}
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
                metrics.write(json.dumps(row) + "\n")
            part = out / "step.part"
            part.write_text(str(step), encoding="utf-8")
            part.replace(checkpoint)
    return int(cfg.get("exit", 0))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
