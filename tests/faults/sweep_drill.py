"""A sweep with kills: 40 small trials, 3 at a time, early stopping, a fifth of them killed, the driver killed twice.

    python tests/faults/sweep_drill.py OUT [--on local|slurm] [--real] [--trials 40]

Without --real the trials train nothing (tests/faults/stand_in_trial.py); the driver, jobs, journal and kills are real.
With it each trial is a `train` run of a tiny student on a synthetic store. Prints a table and, as its last line,
one JSON object; the exit code is 1 when a trial is unaccounted for or two processes were at work in one folder.
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
from dataclasses import dataclass, field
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
from launch.executors.cluster import SlurmExecutor
from launch.executors.local import LocalExecutor
from launch.job_files import ROOT
from launch.site import load_site
from launch.sweep.driver import SweepDriver

STEPS = 27
"""Steps of a stand-in trial."""
REAL_STEPS = 108
"""Steps of a real trial: some seconds, of which the driver sees the first tenth in time."""
STAND_IN = Path(__file__).resolve().with_name("stand_in_trial.py")
_SITE_KEYS = ["train.nodes=1"]


def main() -> int:
    """Run the drill, or with --drive be its driver."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--on", choices=("local", "slurm"), default="local")
    parser.add_argument("--cluster", default="dev")
    parser.add_argument("--real", action="store_true", help="train in each trial")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=4.0, help="what a stand-in trial takes when it is not stopped")
    parser.add_argument("--drive", action="store_true", help="be the driver; this is how the drill starts it")
    args = parser.parse_args()
    args.out = args.out.absolute()

    if args.drive:
        return drive(args)
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / "search.yaml"
    if not config.exists():
        config.write_text(yaml.safe_dump(make_search_config(args), sort_keys=False), encoding="utf-8")
    return run_drill(args, schema.load(SearchConfig, config))


def make_search_config(args: argparse.Namespace) -> dict[str, Any]:
    """The search config as plain values."""
    tree: dict[str, Any] = {
        "out": str(args.out / "study"),
        "space": {"lr": {"log": [1e-5, 1e-1]}},
        "sampler": {"kind": "tpe", "startup": 10},
        "trials": args.trials,
        "objective": {"key": "val.dice"},
        "asha": {"first": 3, "factor": 3},
        "concurrent": 3,
        "poll": 0.3,
    }
    if args.real:
        keys = [f"store={make_store(args.out)}", "transfer.rule=scratch", "distill=null", f"optim.steps={REAL_STEPS}"]
        keys += ["student.depth=1", "student.channels=[4,4,8]", "crop.size=[16,32,32]", "optim.batch=2"]
        keys += ["validate.every=27", "validate.crops=2", "checkpoint.every=12", "tracker.wandb=disabled"]
        tree["train"] = {"keys": [*keys, "tracker.every=3"]}
        tree["objective"] = {"key": "val.dice_best"}
        # The loss decides: so early, the Dice of most trials is 0.
        tree["asha"] = {"first": 12, "factor": 3, "key": "train.loss", "goal": "minimize"}
        tree["space"] = {"optim.lr": {"log": [1e-4, 3e-2]}, "optim.weight_decay": {"log": [1e-3, 0.3]}}
    return tree


def make_store(out: Path) -> Path:
    """The training store of small synthetic neurons."""
    from hpc_neuro import prepare
    from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset

    if not (out / "store").exists():
        write_dataset(out / "raw", SyntheticConfig(volumes=3, shape=(24, 64, 64)))
        keys = [f"images={out / 'raw'}", f"out={out / 'store'}", "split.test_fraction=0", "split.val_fraction=0.34"]
        prepare.run(schema.load(prepare.PrepareConfig, None, keys))
    return out / "store"


def drive(args: argparse.Namespace) -> int:
    """Drive the stand-in trials to their end."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    cfg = schema.load(SearchConfig, args.out / "search.yaml")

    def write_trial(folder: Path, number: int, point: Point) -> None:
        text = yaml.safe_dump({"steps": STEPS, "every": 3, "seconds": args.seconds, **point})
        (folder / "train.yaml").write_text(text, encoding="utf-8")

    def make_command(folder: Path) -> list[str]:
        return [sys.executable, str(STAND_IN), str(folder)]

    site = load_site(args.cluster, _SITE_KEYS)
    executor: Executor = LocalExecutor() if args.on == "local" else SlurmExecutor(site, ROOT)
    with lock_study(cfg.out):
        SweepDriver(cfg, STEPS, write_trial, executor, make_command).run()
        return search.run(cfg)


@dataclass
class Casualties:
    """What the drill has killed."""

    trials: set[int] = field(default_factory=set)
    drivers: int = 0


def run_drill(args: argparse.Namespace, cfg: SearchConfig) -> int:
    """Start the driver, kill what is to be killed, start it again, and account for every trial."""
    targets = set(random.Random(0).sample(range(args.trials), args.trials // 5))
    # The driver is killed when so many trials have ended.
    driver_deaths = [args.trials // 5, args.trials // 2]
    killed, begin = Casualties(), time.monotonic()
    driver = start_driver(args)

    while driver.poll() is None or killed.drivers < len(driver_deaths):
        trials = load_trials(cfg.out)
        for t in trials:
            is_at_work = t.state == "running" and (t.folder / "train").exists()
            if t.number in targets - killed.trials and t.job and is_at_work:
                kill_job(args.on, t.job)
                killed.trials.add(t.number)

        ended = sum(t.state in ENDED_STATES for t in trials)
        if killed.drivers < len(driver_deaths) and ended >= driver_deaths[killed.drivers]:
            driver.kill()
            driver.wait()
            killed.drivers += 1
            count = len(killed.trials)
            print(f"driver {killed.drivers} killed after {ended} trials, {count} trials killed so far", flush=True)
            driver = start_driver(args)
        time.sleep(0.1)

    result = account_for_trials(cfg, args, killed)
    result |= {"wall_s": round(time.monotonic() - begin, 1), "last_driver_exit": driver.returncode}
    sys.stdout.write("".join(f"{key:>26}  {value}\n" for key, value in result.items()) + json.dumps(result) + "\n")
    return 0 if result["every_trial_accounted_for"] and not result["two_in_one_folder"] else 1


def account_for_trials(cfg: SearchConfig, args: argparse.Namespace, killed: Casualties) -> dict[str, Any]:
    """What became of every trial."""
    trials = load_trials(cfg.out)
    counts: dict[str, int] = {state: sum(t.state == state for t in trials) for state in ENDED_STATES}
    steps = REAL_STEPS if args.real else STEPS
    best = max((t for t in trials if t.value is not None), key=lambda t: float(t.value or 0))

    agrees = Study(cfg).read_states() == [t.state for t in trials]
    folders = {t.folder for t in trials}
    return {
        "trials": len(trials),
        **counts,
        "every_trial_accounted_for": agrees and sum(counts.values()) == args.trials == len(trials) == len(folders),
        "two_in_one_folder": sum(count_doubles(t) for t in trials),
        "trials_killed": len(killed.trials),
        "trials_sent_again": sum(len(t.attempts) > 1 for t in trials),
        "driver_killed": killed.drivers,
        "jobs": sum(len(t.attempts) for t in trials),
        "pruned_share": round(counts["pruned"] / len(trials), 3),
        "steps_share": round(sum(t.step for t in trials) / (len(trials) * steps), 3),
        "best_value": best.value,
        "best": best.values,
        "on": args.on,
        "real_training": args.real,
    }


def count_doubles(t: Trial) -> int:
    """How often two processes were at work in a trial's folder: by the lock they ask for, else by starts and jobs."""
    spans, record = t.folder / "spans.txt", t.folder / "train" / "run.json"
    if spans.exists():
        return spans.read_text(encoding="utf-8").count("DOUBLE")
    starts = len(json.loads(record.read_text(encoding="utf-8"))["starts"]) if record.exists() else 0
    return max(0, starts - len(t.attempts))


def start_driver(args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the driver as a process of its own, with OUT/driver.log as its log."""
    if args.real:
        words = ["-m", "launch", "sweep", str(args.out / "search.yaml"), "--on", args.on]
        if args.on == "slurm":
            words += ["--cluster", args.cluster, *(f"cluster.{key}" for key in _SITE_KEYS)]
    else:
        words = [__file__, str(args.out), "--drive", "--on", args.on, "--cluster", args.cluster]
        words += ["--trials", str(args.trials), "--seconds", str(args.seconds)]

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (args.out / "driver.log").open("ab") as log:
        return subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=env)


def load_trials(out: Path) -> list[Trial]:
    """The records as they are now."""
    return trial.load_trials(out) if (out / "trials").exists() else []


def kill_job(on: str, job: str) -> None:
    """Kill every process of a job."""
    if on == "slurm":
        slurm.run_command("scancel", "--signal=KILL", "--full", job)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(job.split(":")[1]), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
