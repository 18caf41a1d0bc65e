"""A sweep under fire: 40 small trials, 3 at a time, early stopping, a fifth of them killed, the driver killed twice.

    python tests/faults/sweep_drill.py OUT [--on local|slurm] [--real] [--trials 40]

Without --real the trials train nothing (tests/faults/stand_in_trial.py); the driver, jobs, journal and kills are real.
With it each trial is a `train` run of a tiny student on a synthetic store. Prints a table and, as its last line,
one JSON object; the exit code is 1 when a trial is unaccounted for or two were at work in one folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from hpc_neuro import search
from hpc_neuro.core import schema
from hpc_neuro.search import trial
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import Point
from hpc_neuro.search.study import Study, lock_study
from hpc_neuro.search.trial import ENDED_STATES, Trial
from launch import slurm
from launch.executors import Executor
from launch.executors.local import LocalExecutor
from launch.executors.slurm import SlurmExecutor
from launch.job_files import ROOT
from launch.site import load_site
from launch.sweep.driver import SweepDriver

STEPS = 27
REAL_STEPS = 108  # some seconds, of which the driver sees the first tenth in time
STAND_IN = Path(__file__).resolve().with_name("stand_in_trial.py")
_SITE = ["train.nodes=1"]


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--on", choices=("local", "slurm"), default="local")
    parser.add_argument("--cluster", default="dev")
    parser.add_argument("--real", action="store_true", help="train in each trial")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=4.0, help="what a stand-in trial takes when it is not stopped")
    parser.add_argument("--drive", action="store_true", help="be the driver; this is how the drill starts it")
    asked = parser.parse_args()
    asked.out = asked.out.absolute()
    if asked.drive:
        return drive(asked)
    asked.out.mkdir(parents=True, exist_ok=True)
    config = asked.out / "search.yaml"
    if not config.exists():
        config.write_text(yaml.safe_dump(plan(asked), sort_keys=False), encoding="utf-8")
    return fire(asked, schema.load(SearchConfig, config))


def plan(asked: argparse.Namespace) -> dict[str, Any]:
    """The search config as plain values."""
    tree: dict[str, Any] = {
        "out": str(asked.out / "study"),
        "space": {"lr": {"log": [1e-5, 1e-1]}},
        "sampler": {"kind": "tpe", "startup": 10},
        "trials": asked.trials,
        "objective": {"key": "val.dice"},
        "asha": {"first": 3, "factor": 3},
        "concurrent": 3,
        "poll": 0.3,
    }
    if asked.real:
        keys = [f"store={_store(asked.out)}", "transfer.rule=scratch", "distill=null", f"optim.steps={REAL_STEPS}"]
        keys += ["student.depth=1", "student.stem_channels=[4,4,8]", "crop.size=[16,32,32]", "optim.batch=2"]
        keys += ["validate.every=27", "validate.crops=2", "checkpoint.every=12", "tracker.wandb=disabled"]
        tree["train"] = {"keys": [*keys, "tracker.every=3"]}
        tree["objective"] = {"key": "val.dice_best"}
        # validation says nothing yet so early: Dice is 0 for most
        tree["asha"] = {"first": 12, "factor": 3, "key": "train.loss", "goal": "minimize"}
        tree["space"] = {"optim.lr": {"log": [1e-4, 3e-2]}, "optim.weight_decay": {"log": [1e-3, 0.3]}}
    return tree


def _store(out: Path) -> Path:
    """A training store of small synthetic neurons."""
    from hpc_neuro import prepare
    from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset

    if not (out / "store").exists():
        write_dataset(out / "raw", SyntheticConfig(volumes=3, shape=(24, 64, 64)))
        keys = [f"images={out / 'raw'}", f"out={out / 'store'}", "split.test_fraction=0", "split.val_fraction=0.34"]
        prepare.run(schema.load(prepare.PrepareConfig, None, keys))
    return out / "store"


def drive(asked: argparse.Namespace) -> int:
    """Drive the stand-in trials to their end."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    cfg = schema.load(SearchConfig, asked.out / "search.yaml")

    def write(folder: Path, number: int, point: Point) -> None:
        text = yaml.safe_dump({"steps": STEPS, "every": 3, "seconds": asked.seconds, **point})
        (folder / "train.yaml").write_text(text, encoding="utf-8")

    executor: Executor = (
        LocalExecutor() if asked.on == "local" else SlurmExecutor(load_site(asked.cluster, _SITE), ROOT)
    )
    with lock_study(cfg.out):
        SweepDriver(cfg, STEPS, write, executor, lambda folder: [sys.executable, str(STAND_IN), str(folder)]).run()
        return search.run(cfg)


def fire(asked: argparse.Namespace, cfg: SearchConfig) -> int:
    """Start the driver, kill what is to be killed, start it again, and count."""
    draw = random.Random(0)
    doomed = set(draw.sample(range(asked.trials), asked.trials // 5))
    deaths = [asked.trials // 5, asked.trials // 2]  # of the driver, when so many trials have ended
    begun, killed, drivers = time.monotonic(), set[int](), 1
    driver = _start(asked)
    while driver.poll() is None or drivers <= len(deaths):
        trials = _read(cfg.out)
        for t in trials:
            if t.number in doomed - killed and t.job and t.state == "running" and (t.folder / "train").exists():
                _kill(asked.on, t.job)
                killed.add(t.number)
        ended = sum(t.state in ENDED_STATES for t in trials)
        if drivers <= len(deaths) and ended >= deaths[drivers - 1]:
            driver.kill()
            driver.wait()
            sys.stdout.write(f"driver {drivers} killed after {ended} trials, {len(killed)} trials killed so far\n")
            sys.stdout.flush()
            drivers += 1
            driver = _start(asked)
        time.sleep(0.1)
    return account(cfg, asked, killed, drivers - 1, time.monotonic() - begun, driver.returncode)


def account(cfg: SearchConfig, asked: argparse.Namespace, killed: set[int], deaths: int, wall: float, code: int) -> int:
    """Print where every trial is; the exit code of the drill."""
    trials = _read(cfg.out)
    agree = Study(cfg).read_states() == [t.state for t in trials]
    counts: dict[str, int] = {s: sum(t.state == s for t in trials) for s in ENDED_STATES}
    steps = sum(t.step for t in trials)
    doubles = sum(_doubles(t) for t in trials)
    winner = max((t for t in trials if t.value is not None), key=lambda t: float(t.value or 0))
    accounted = agree and sum(counts.values()) == asked.trials == len(trials) == len({t.folder for t in trials})
    result = {
        "trials": len(trials),
        **counts,
        "every_trial_accounted_for": accounted,
        "two_in_one_folder": doubles,
        "trials_killed": len(killed),
        "trials_sent_again": sum(len(t.attempts) > 1 for t in trials),
        "driver_killed": deaths,
        "jobs": sum(len(t.attempts) for t in trials),
        "pruned_share": round(counts["pruned"] / len(trials), 3),
        "steps_share": round(steps / (len(trials) * (REAL_STEPS if asked.real else STEPS)), 3),
        "best_value": winner.value,
        "best": winner.values,
        "wall_s": round(wall, 1),
        "on": asked.on,
        "real_training": asked.real,
        "last_driver_exit": code,
    }
    sys.stdout.write("".join(f"{k:>26}  {v}\n" for k, v in result.items()) + json.dumps(result) + "\n")
    return 0 if accounted and not doubles else 1


def _doubles(t: Trial) -> int:
    """How often two processes were at work in a trial's folder: by the lock they ask for, else by starts and jobs."""
    spans, record = t.folder / "spans.txt", t.folder / "train" / "run.json"
    if spans.exists():
        return spans.read_text(encoding="utf-8").count("DOUBLE")
    starts = len(json.loads(record.read_text(encoding="utf-8"))["starts"]) if record.exists() else 0
    return max(0, starts - len(t.attempts))


def _start(asked: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The driver as a process of its own; what it says goes to OUT/driver.log."""
    if asked.real:
        words = ["-m", "launch", "sweep", str(asked.out / "search.yaml"), "--on", asked.on]
        words += ["--cluster", asked.cluster, *(f"cluster.{k}" for k in _SITE)] if asked.on == "slurm" else []
    else:
        words = [__file__, str(asked.out), "--drive", "--on", asked.on, "--cluster", asked.cluster]
        words += ["--trials", str(asked.trials), "--seconds", str(asked.seconds)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (asked.out / "driver.log").open("ab") as said:
        return subprocess.Popen([sys.executable, *words], stdout=said, stderr=said, env=env)


def _read(out: Path) -> list[Trial]:
    """The records as they are now."""
    return trial.load_trials(out) if (out / "trials").exists() else []


def _kill(on: str, job: str) -> None:
    if on == "slurm":
        slurm.run_command("scancel", "--signal=KILL", "--full", job)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(job.split(":")[1]), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
