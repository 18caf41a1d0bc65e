"""`python -m launch sweep CONFIG.yaml [key=value ...] --on local|slurm [--cluster SITE] [--dry-run] [--cancel]`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hpc_neuro import search, train
from hpc_neuro.core import run_folder, schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.search import trial
from hpc_neuro.search.config import MAY_CHANGE, SearchConfig
from hpc_neuro.search.study import only_driver
from launch import preflight, slurm
from launch.executors import Executor
from launch.executors.local import Local
from launch.executors.slurm import Slurm
from launch.site import Site, load_site
from launch.snapshot import snapshot
from launch.sweep.driver import RESUMABLE, Driver
from launch.sweep.recipe import Recipe

log = logging.getLogger("hpc_neuro.sweep")


def main(words: Sequence[str]) -> int:
    """Run, or go on with, a sweep. 0: every trial done or pruned; 3: some failed; 75: stopped, trials run on."""
    parser = argparse.ArgumentParser(prog="python -m launch sweep", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--on", choices=("local", "slurm"), default="local")
    parser.add_argument("--cluster", metavar="SITE", help="a name in configs/cluster, or the path of a YAML file")
    parser.add_argument(
        "--dry-run", action="store_true", help="check every value and what a trial needs; start nothing"
    )
    parser.add_argument("--cancel", action="store_true", help="ask the running trials to end, and start none")
    asked = parser.parse_intermixed_args([w for w in words if not w.startswith("cluster.")])
    asked.site = [w for w in words if w.startswith("cluster.")]
    _log_to_console()
    try:
        return sweep(asked)
    except (ConfigError, InputError) as error:
        sys.stderr.write(f"launch sweep: {error}\n")
        return 2


def sweep(asked: argparse.Namespace) -> int:
    """What `main` does, with its arguments parsed."""
    cfg = schema.load(SearchConfig, asked.config, asked.keys)
    cfg = dataclasses.replace(cfg, out=cfg.out.absolute())
    recipe = Recipe(cfg)
    if asked.cancel:
        with only_driver(cfg.out):
            driver = Driver(cfg, recipe.steps, recipe.write, _executor(asked, cfg))
            log.info("sweep: %d jobs asked to end", driver.cancel_all())
        return 0
    lines = [*search.forecast(cfg), *_check(recipe, asked)]
    if asked.dry_run:
        sys.stdout.write("\n".join(lines) + "\n")
        return 0
    with only_driver(cfg.out), run_folder.start("search", cfg, cfg.out, {"base": recipe.digest}, MAY_CHANGE) as this:
        if not this.complete:
            for line in lines:
                log.info("sweep: %s", line)
            return drive(cfg, Driver(cfg, recipe.steps, recipe.write, _executor(asked, cfg)), this)
    return search.run(cfg)


def drive(cfg: SearchConfig, driver: Driver, this: run_folder.Run) -> int:
    """Until the end or a signal, then the report."""
    with _signals() as seen:
        if not driver.run(stop=lambda: bool(seen)):
            running = sum(t.job is not None for t in driver.trials.values())
            log.warning(
                "sweep: stopped by %s; %d trials run on, and the same command goes on with them", seen[0], running
            )
            this.record["exit"] = RESUMABLE
            return RESUMABLE
    code = search.run(cfg)
    ended = trial.load_all(cfg.out)
    summary: dict[str, Any] = {s: sum(t.state == s for t in ended) for s in trial.FINAL}
    this.finish(summary, [f"trial {t.number}: {t.note}" for t in ended if t.state == "failed"])
    return code


def _check(recipe: Recipe, asked: argparse.Namespace) -> list[str]:
    """Assemble the training of every value once, and hold it against the cluster; what the first one needs.

    Raises ConfigError or InputError.
    """
    if asked.on == "slurm":
        slurm.reach()
    if asked.on == "local":
        first, *_ = [train.forecast(cfg) for cfg in recipe.trainings()]
    else:
        first, *_ = [preflight.check([("train", cfg)], _site(asked), "slurm") for cfg in recipe.trainings()]
    return first


def _site(asked: argparse.Namespace) -> Site:
    return load_site(asked.cluster, [w.removeprefix("cluster.") for w in asked.site])


def _executor(asked: argparse.Namespace, cfg: SearchConfig) -> Executor:
    """All trials run one copy of the code, that of the sweep's first start: they are to be compared."""
    code = snapshot(cfg.out / "code", keep=True)
    if asked.on == "local":
        return Local(code=code)
    return Slurm(_site(asked), code)


@contextlib.contextmanager
def _signals() -> Any:
    """The names of the signals that asked to stop, as they come."""
    seen: list[str] = []

    def remember(number: int, frame: FrameType | None) -> None:
        seen.append(signal.Signals(number).name)

    old = {n: signal.signal(n, remember) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _log_to_console() -> None:
    root = logging.getLogger("hpc_neuro")
    root.setLevel(logging.INFO)
    root.propagate = False
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
