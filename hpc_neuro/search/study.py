"""The study: Optuna by ask and tell, in a journal file with one writer. The only importer of optuna."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpc_neuro.core.schema import ConfigError
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import Integer, Log, Point, Range, applies, grid, options, text
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

JOURNAL = "journal.log"
LOCK = "driver.lock"
_VALUES = "values"  # the user attribute that says a trial has been asked for wholly
_STATES: dict[State, TrialState] = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@contextlib.contextmanager
def only_driver(out: Path) -> Iterator[None]:
    """Be the one driver of a study; the lock goes with the process, however that ends.

    Raises ConfigError while another one lives.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+", encoding="utf-8") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise ConfigError(
                f"{out} is already driven by {handle.read().strip() or 'another process'}; a study has one driver: "
                "wait for it or end it"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {platform.node()}\n")
        handle.flush()
        yield


class Study:
    """Asks for points and is told what they were worth. Everything is in the journal as soon as a method returns."""

    def __init__(self, cfg: SearchConfig) -> None:
        """Open or begin the study in cfg.out."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.cfg = cfg
        cfg.out.mkdir(parents=True, exist_ok=True)
        path = str(cfg.out / JOURNAL)
        _mend(cfg.out / JOURNAL)
        storage = JournalStorage(JournalFileBackend(path))
        self._study = optuna.create_study(
            study_name="study", storage=storage, direction=cfg.objective.goal, load_if_exists=True
        )
        self._grid = grid(cfg.space) if cfg.sampler.kind == "grid" else None

    @property
    def planned(self) -> int:
        """How many trials there will be."""
        whole = len(self._grid) if self._grid is not None else None
        return min(n for n in (self.cfg.trials, whole) if n is not None)

    def asked(self) -> dict[int, Point]:
        """The points that have been asked for, by trial number."""
        found = self._study.get_trials(deepcopy=False)
        return {t.number: yaml.safe_load(t.user_attrs[_VALUES]) for t in found if _VALUES in t.user_attrs}

    def told(self) -> list[State | None]:
        """How each trial that was asked for ended, as the journal has it; None: not told yet."""
        names = {after: before for before, after in _STATES.items()}
        return [names.get(t.state) for t in self._study.get_trials(deepcopy=False)]

    def ask(self) -> tuple[int, Point] | None:
        """The next trial, None when all have been asked for. What a kill interrupted is asked to its end first."""
        held = self._study.get_trials(deepcopy=False)
        half = [t for t in held if t.state == TrialState.RUNNING and _VALUES not in t.user_attrs]
        number = half[0].number if half else len([t for t in held if t.state != TrialState.WAITING])
        if number >= self.planned:
            return None
        # a sampler made anew for each trial: what it draws depends on the trial's number, not on restarts
        self._study.sampler = _sampler(self.cfg, number)
        if half:
            trial = optuna.trial.Trial(self._study, half[0]._trial_id)
        else:
            if self._grid is not None and not any(t.state == TrialState.WAITING for t in held):
                self._study.enqueue_trial(_fixed(self.cfg, self._grid[number]))
            trial = self._study.ask()
        point: Point = {}
        for name, dimension in self.cfg.space.items():
            if applies(dimension, point):
                point[name] = _suggest(trial, name, dimension)
        trial.set_user_attr(_VALUES, text(point))
        return trial.number, point

    def tell(self, number: int, state: State, value: float | None, rungs: Mapping[int, float]) -> None:
        """How a trial ended: done with a value, pruned, or failed. Telling again changes nothing."""
        found: FrozenTrial = self._study.get_trials(deepcopy=False)[number]
        if found.state.is_finished():
            return
        trial = optuna.trial.Trial(self._study, found._trial_id)
        for step, reached in rungs.items():
            if step not in found.intermediate_values:
                trial.report(reached, step)
        self._study.tell(number, value if state == "done" else None, state=_STATES[state])


def importances(study_folder: Path, names: list[str]) -> dict[str, float]:
    """Share of each dimension in telling good trials from bad ones, by PED-ANOVA (Watanabe et al. 2023).

    Each is measured over the finished trials that have it; {} with fewer than 8 of them, or where all are equal.
    """
    storage = JournalStorage(JournalFileBackend(str(study_folder / JOURNAL)))
    study = optuna.load_study(study_name="study", storage=storage)
    found = {}
    for name in names:
        having = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if name in t.params]
        if len(having) < 8 or len({t.value for t in having}) < 2 or len({str(t.params[name]) for t in having}) < 2:
            continue
        part = optuna.create_study(direction=study.direction)
        part.add_trials([_alone(t, name) for t in having])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the estimator is marked experimental
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found[name] = optuna.importance.get_param_importances(part, evaluator=evaluator, normalize=False)[name]
    total = sum(found.values())
    return {k: v / total for k, v in sorted(found.items(), key=lambda kv: -kv[1])} if total > 0 else {}


def _alone(trial: FrozenTrial, name: str) -> FrozenTrial:
    return optuna.trial.create_trial(
        value=trial.value, params={name: trial.params[name]}, distributions={name: trial.distributions[name]}
    )


def _sampler(cfg: SearchConfig, number: int) -> optuna.samplers.BaseSampler:
    if cfg.sampler.kind == "grid":
        return optuna.samplers.RandomSampler(seed=0)  # every value is fixed beforehand
    seed = int(np.random.SeedSequence([cfg.sampler.seed, number]).generate_state(1)[0])
    if cfg.sampler.kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `multivariate` and its companions are marked experimental
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=cfg.sampler.startup,
            multivariate=True,
            group=True,  # conditional dimensions
            constant_liar=True,  # several trials are at work at once
        )


def _suggest(trial: optuna.trial.Trial, name: str, dimension: Any) -> Any:
    if isinstance(dimension, Range):
        return trial.suggest_float(name, *dimension.range)
    if isinstance(dimension, Log):
        return trial.suggest_float(name, *dimension.log, log=True)
    if isinstance(dimension, Integer):
        return trial.suggest_int(name, *dimension.integer, step=dimension.step)
    values = options(dimension) or []
    names = [text(v) for v in values]  # Optuna's categories hold no lists, and mix up 1 and True
    return values[names.index(trial.suggest_categorical(name, names))]


def _fixed(cfg: SearchConfig, point: Point) -> dict[str, Any]:
    """A point as Optuna holds it."""
    return {n: v if isinstance(cfg.space[n], Integer) else text(v) for n, v in point.items()}


def _mend(journal: Path) -> None:
    """Undo what a killed driver left: a torn last line, and Optuna's own lock. Safe while `only_driver` is held."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        held = journal.read_bytes()
        if (whole := held.rfind(b"\n") + 1) < len(held):
            os.truncate(journal, whole)
