"""The study: Optuna by ask and tell, in a journal file with one writer. The only importer of optuna."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core import yaml_text
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import (
    IntegerDimension,
    LogDimension,
    Point,
    RangeDimension,
    format_value,
    is_applicable,
    list_grid_points,
    list_values,
)
from hpc_neuro.search.trial import State

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError as error:
    raise ConfigError(
        f"a search needs optuna, which is not installed ({error}); install it with `pip install 'hpc_neuro[search]'`"
    ) from None

JOURNAL_FILE = "journal.log"
"""Optuna's journal, in the study folder."""
LOCK_FILE = "driver.lock"
"""Lock of the one driver of a study."""
_STUDY_NAME = "study"
_POINT_ATTRIBUTE = "values"
"""User attribute that holds a trial's point; a trial without it has not been asked for completely."""
_MIN_TRIALS_FOR_IMPORTANCE = 8
_OPTUNA_STATES: dict[State, TrialState] = {
    "done": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@contextlib.contextmanager
def lock_study(out: Path) -> Iterator[None]:
    """Be the one driver of a study; the lock goes with the process, however that ends.

    Raises ConfigError while another driver lives.
    """
    out.mkdir(parents=True, exist_ok=True)

    with (out / LOCK_FILE).open("a+", encoding="utf-8") as handle:
        # The lock of a killed process is released by the kernel.
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise ConfigError(
                f"{out} is already driven by {owner}; a study has one driver: wait for it or end it"
            ) from None

        # Who holds the lock, for the message to the next one.
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {platform.node()}\n")
        handle.flush()
        yield


class Study:
    """Proposes points and is told what they were worth. The journal is up to date as soon as a method returns."""

    def __init__(self, cfg: SearchConfig) -> None:
        """Open or begin the study in cfg.out."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.cfg = cfg
        cfg.out.mkdir(parents=True, exist_ok=True)
        # Optuna stops at a torn line.
        _repair_journal(cfg.out / JOURNAL_FILE)
        self._study = optuna.create_study(
            study_name=_STUDY_NAME,
            storage=_open_storage(cfg.out),
            direction=cfg.objective.goal,
            load_if_exists=True,
        )
        self._grid = list_grid_points(cfg.space) if cfg.sampler.kind == "grid" else None

    @property
    def trial_count(self) -> int:
        """How many trials there will be."""
        return count_trials(self.cfg, self._grid)

    def read_points(self) -> dict[int, Point]:
        """Read the points that have been asked for, by trial number."""
        points = {t.number: t.user_attrs.get(_POINT_ATTRIBUTE) for t in self._read_trials()}
        return {number: yaml_text.parse(text) for number, text in points.items() if text is not None}

    def read_states(self) -> list[State | None]:
        """Read how each trial that was asked for ended; None: the study has not been told yet."""
        states = {after: before for before, after in _OPTUNA_STATES.items()}
        return [states.get(t.state) for t in self._read_trials()]

    def ask(self) -> tuple[int, Point] | None:
        """Propose the next trial, (number, point); None when all have been asked for.

        A trial whose proposal was interrupted by a kill is completed first.
        """
        # A kill between the first and the last value of a point leaves a trial without the attribute.
        trials = self._read_trials()
        unfinished = [t for t in trials if t.state == TrialState.RUNNING and _POINT_ATTRIBUTE not in t.user_attrs]
        waiting = [t for t in trials if t.state == TrialState.WAITING]
        number = unfinished[0].number if unfinished else len(trials) - len(waiting)
        # All trials have been asked for.
        if number >= self.trial_count:
            return None

        # A new sampler for each trial: what it draws depends on the trial's number, not on restarts.
        self._study.sampler = _make_sampler(self.cfg, number)
        if unfinished:
            trial = optuna.trial.Trial(self._study, unfinished[0]._trial_id)
        else:
            if self._grid is not None and not waiting:
                self._study.enqueue_trial(_to_optuna(self.cfg, self._grid[number]))
            trial = self._study.ask()

        # The values in order: whether a dimension applies depends on those before it.
        point: Point = {}

        for name, dimension in self.cfg.space.items():
            if is_applicable(dimension, point):
                point[name] = _suggest_value(trial, name, dimension)

        trial.set_user_attr(_POINT_ATTRIBUTE, format_value(point))
        return trial.number, point

    def tell(self, number: int, state: State, value: float | None, rungs: Mapping[int, float]) -> None:
        """Record how a trial ended: done with a value, pruned, or failed. Telling again changes nothing."""
        # A driver that was killed after telling tells again.
        frozen: FrozenTrial = self._read_trials()[number]
        if frozen.state.is_finished():
            return

        trial = optuna.trial.Trial(self._study, frozen._trial_id)

        # The values at the rungs let the sampler learn from trials that were stopped.
        for step, reached in rungs.items():
            if step not in frozen.intermediate_values:
                trial.report(reached, step)

        self._study.tell(number, value if state == "done" else None, state=_OPTUNA_STATES[state])

    def _read_trials(self) -> list[FrozenTrial]:
        return list(self._study.get_trials(deepcopy=False))


def count_trials(cfg: SearchConfig, grid: Sequence[Point] | None = None) -> int:
    """How many trials a study has; `grid`: its points where they are known already."""
    # A grid ends by itself; `trials` may end it earlier.
    if cfg.sampler.kind == "grid" and grid is None:
        grid = list_grid_points(cfg.space)
    return min(count for count in (cfg.trials, None if grid is None else len(grid)) if count is not None)


def compute_importances(study_folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Share of each dimension in telling good trials from bad ones, by PED-ANOVA (Watanabe et al. 2023).

    Each is measured over the finished trials that have it; {} with fewer than 8 of them, or where all are equal.
    """
    # Read without the lock: the sweep may be running.
    study = optuna.load_study(study_name=_STUDY_NAME, storage=_open_storage(study_folder))
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    weights = {}

    for name in names:
        trials = [t for t in completed if name in t.params]
        has_variety = len({t.value for t in trials}) > 1 and len({str(t.params[name]) for t in trials}) > 1
        if len(trials) >= _MIN_TRIALS_FOR_IMPORTANCE and has_variety:
            weights[name] = _measure_importance(study.direction, trials, name)

    # Shares add up to 1.
    total = sum(weights.values())
    if total <= 0:
        return {}

    by_weight = sorted(weights.items(), key=lambda item: -item[1])
    return {name: weight / total for name, weight in by_weight}


def _measure_importance(direction: Any, trials: Sequence[FrozenTrial], name: str) -> float:
    """Importance of one dimension, in a study of its own without the others."""
    study = optuna.create_study(direction=direction)
    # Other dimensions would share the credit.
    study.add_trials([_keep_parameter(t, name) for t in trials])

    with warnings.catch_warnings():
        # Optuna marks the estimator as experimental.
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        importances = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)

    return float(importances[name])


def _keep_parameter(trial: FrozenTrial, name: str) -> FrozenTrial:
    """A trial with one of its parameters."""
    return optuna.trial.create_trial(
        value=trial.value, params={name: trial.params[name]}, distributions={name: trial.distributions[name]}
    )


def _open_storage(study_folder: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(study_folder / JOURNAL_FILE)))


def _make_sampler(cfg: SearchConfig, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial."""
    if cfg.sampler.kind == "grid":
        # Every value is fixed beforehand.
        return optuna.samplers.RandomSampler(seed=0)

    # Independent streams from one seed, one for each trial.
    seed = int(np.random.SeedSequence([cfg.sampler.seed, number]).generate_state(1)[0])
    if cfg.sampler.kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)

    with warnings.catch_warnings():
        # Optuna marks `multivariate` and its companions as experimental.
        warnings.simplefilter("ignore")
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=cfg.sampler.startup,
            multivariate=True,
            # For conditional dimensions.
            group=True,
            # Several trials run at the same time.
            constant_liar=True,
        )


def _suggest_value(trial: optuna.trial.Trial, name: str, dimension: Any) -> Any:
    if isinstance(dimension, RangeDimension):
        return trial.suggest_float(name, *dimension.range)
    if isinstance(dimension, LogDimension):
        return trial.suggest_float(name, *dimension.log, log=True)
    if isinstance(dimension, IntegerDimension):
        return trial.suggest_int(name, *dimension.integer, step=dimension.step)

    # Optuna's categories hold no lists, and mix up 1 and True.
    values = list_values(dimension) or []
    texts = [format_value(value) for value in values]
    return values[texts.index(trial.suggest_categorical(name, texts))]


def _to_optuna(cfg: SearchConfig, point: Point) -> dict[str, Any]:
    """A point as Optuna holds it."""
    return {
        name: value if isinstance(cfg.space[name], IntegerDimension) else format_value(value)
        for name, value in point.items()
    }


def _repair_journal(journal: Path) -> None:
    """Undo what a killed driver left, a torn last line and Optuna's own lock. Safe while `lock_study` is held."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return

    # Every entry of the journal is one line.
    data = journal.read_bytes()
    end_of_last_line = data.rfind(b"\n") + 1
    if end_of_last_line < len(data):
        os.truncate(journal, end_of_last_line)
