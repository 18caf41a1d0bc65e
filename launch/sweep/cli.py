"""`python -m launch sweep CONFIG.yaml [key=value ...] --on local|slurm [--cluster SITE] [--dry-run] [--cancel]`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hpc_neuro import search, train
from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.search import trial
from hpc_neuro.search.config import MAY_CHANGE, SearchConfig
from hpc_neuro.search.study import count_trials, lock_study
from hpc_neuro.search.trial import RECORD_FILE
from launch import preflight, slurm
from launch.executors import Executor
from launch.executors.cluster import QUEUES, SlurmExecutor
from launch.executors.local import LocalExecutor
from launch.job_files import snapshot_code
from launch.site import Site, load_site
from launch.sweep.driver import SweepDriver
from launch.sweep.recipe import TrialRecipe

log = logging.getLogger("hpc_neuro.sweep")
_EXECUTORS: dict[str, Callable[[Site, Path], Executor]] = {
    "slurm": SlurmExecutor,
    **QUEUES,
}
"""`--on` -> where trials run as jobs of a cluster."""
_SITE_PREFIX = "cluster."


def main(words: Sequence[str]) -> int:
    """Start or continue a sweep. 0: every trial done or pruned; 3: some failed; 75: stopped, trials run on."""
    parser = argparse.ArgumentParser(prog="python -m launch sweep", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--on", choices=("local", *_EXECUTORS), default="local")
    parser.add_argument("--cluster", metavar="SITE", help="a name in configs/cluster, or the path of a YAML file")
    parser.add_argument(
        "--dry-run", action="store_true", help="check every value and what a trial needs; start nothing"
    )
    parser.add_argument("--cancel", action="store_true", help="ask the running trials to end, and start none")

    args = parser.parse_intermixed_args([word for word in words if not word.startswith(_SITE_PREFIX)])
    args.site_keys = [word.removeprefix(_SITE_PREFIX) for word in words if word.startswith(_SITE_PREFIX)]
    _log_to_console()

    try:
        return run_sweep(args)
    except (ConfigError, InputError) as error:
        sys.stderr.write(f"launch sweep: {error}\n")
        return EXIT_BAD_INPUT


def run_sweep(args: argparse.Namespace) -> int:
    """Do what `main` does, with its arguments parsed."""
    cfg = schema.load(SearchConfig, args.config, args.keys)
    # Jobs start in other folders.
    cfg = dataclasses.replace(cfg, out=cfg.out.absolute())
    recipe = TrialRecipe(cfg)

    # A driver that lives is asked by a signal instead: the lock refuses this.
    if args.cancel:
        with lock_study(cfg.out):
            jobs = _make_driver(cfg, recipe, args).cancel_all()
            log.info("sweep: %s asked to end", files.format_count(jobs, "job"))
        return EXIT_DONE

    lines = [*search.forecast(cfg), *_check_trials(recipe, args)]
    if args.dry_run:
        sys.stdout.write("\n".join(lines) + "\n")
        return EXIT_DONE

    # A finished study only gets its report again.
    inputs, is_whole = {"base": recipe.digest}, _has_all_trials(cfg)
    with lock_study(cfg.out), run_folder.start("search", cfg, cfg.out, inputs, MAY_CHANGE, whole=is_whole) as run:
        if not run.complete:
            for line in lines:
                log.info("sweep: %s", line)
            return drive_to_end(cfg, _make_driver(cfg, recipe, args), run)

    return search.run(cfg)


def _has_all_trials(cfg: SearchConfig) -> bool:
    """Whether every trial of the study has its record; one that was removed is made again."""
    records = list((cfg.out / "trials").glob(f"*/{RECORD_FILE}"))
    return len(records) >= count_trials(cfg)


def drive_to_end(cfg: SearchConfig, driver: SweepDriver, run: run_folder.Run) -> int:
    """Drive trials until all have ended, then write the report; or until a signal."""
    with StopSignals() as signals:
        if not driver.run(stop=lambda: bool(signals.names)):
            running = sum(t.job is not None for t in driver.trials.values())
            log.warning(
                "sweep: stopped by %s; trials still running: %d; the same command continues with them",
                signals.names[0],
                running,
            )
            run.record["exit"] = EXIT_STOPPED
            return EXIT_STOPPED

        code = search.run(cfg)
        trials = trial.load_trials(cfg.out)
        counts: dict[str, Any] = {state: sum(t.state == state for t in trials) for state in trial.ENDED_STATES}
        run.finish(counts, [f"trial {t.number}: {t.note}" for t in trials if t.state == "failed"])
        return code


def _check_trials(recipe: TrialRecipe, args: argparse.Namespace) -> list[str]:
    """Assemble the training of every value once, and check it against the cluster; what the first one needs.

    Raises ConfigError or InputError.
    """
    # Every value is assembled once before the first trial starts.
    configs = recipe.load_train_configs()
    if args.on != "slurm":
        forecasts = [train.forecast(cfg) for cfg in configs]
    else:
        slurm.require_controller()
        forecasts = [preflight.check([("train", cfg)], _load_site(args), "slurm") for cfg in configs]

    return forecasts[0]


def _make_driver(cfg: SearchConfig, recipe: TrialRecipe, args: argparse.Namespace) -> SweepDriver:
    return SweepDriver(cfg, recipe.steps, recipe.write_trial, _make_executor(cfg, args))


def _make_executor(cfg: SearchConfig, args: argparse.Namespace) -> Executor:
    """All trials run one copy of the code, that of the sweep's first start: they are to be compared."""
    code = snapshot_code(cfg.out / "code", keep=True)
    if args.on == "local":
        return LocalExecutor(code=code)
    return _EXECUTORS[args.on](_load_site(args), code)


def _load_site(args: argparse.Namespace) -> Site:
    return load_site(args.cluster, args.site_keys)


class StopSignals:
    """Within its block, the signals that ask to stop are remembered by name and do nothing else."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._old_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old_handlers[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)


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
