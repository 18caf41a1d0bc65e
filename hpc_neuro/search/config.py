"""The root config of `search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hpc_neuro.core.schema import config
from hpc_neuro.pipeline import stages_from
from hpc_neuro.search import space as spaces
from hpc_neuro.search.asha import AshaConfig, Goal
from hpc_neuro.search.space import Space

RECIPE = stages_from("train")
"""The verbs of a trial that ends with scored neurons."""
MAY_CHANGE = ("concurrent", "requeue", "poll", "draws", "trials")
"""Keys that may differ between starts of a sweep, and between the sweep and its report."""


@config
class GridSampler:
    """Every point of the space once, in order."""

    kind: Literal["grid"] = "grid"


@config
class RandomSampler:
    """Points drawn independently."""

    kind: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0)
    """Of the draws; trial n draws the same whatever happened before."""


@config
class TpeSampler:
    """Tree-structured Parzen estimator (Bergstra et al. 2011) of all dimensions together, aware of running trials."""

    kind: Literal["tpe"] = "tpe"
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    startup: int = Field(default=10, ge=1)
    """Trials drawn at random before the estimator decides."""


Sampler = Annotated[GridSampler | RandomSampler | TpeSampler, Field(discriminator="kind")]


@config
class StageConfig:
    """The config of one verb of a trial, without what the search fills in."""

    config: Path | None = None
    """A YAML file of this verb; none: its defaults."""
    keys: tuple[str, ...] = ()
    """More `key=value`. What links the stages (out, store, model, predictions) is filled in."""


@config
class Objective:
    """The number that a trial is judged by."""

    key: str = "val.dice_best"
    """`val.KEY` or `train.KEY` of the train run's metrics.jsonl (the best row counts), or `evaluate.KEY`: the mean in
    evaluate's metrics.json."""
    goal: Goal = "maximize"
    """Which direction is better."""

    def __post_init__(self) -> None:
        source, dot, name = self.key.partition(".")
        if source not in ("train", "val", "evaluate") or not dot or not name:
            raise ValueError(f"key {self.key!r} must begin with `val.`, `train.` or `evaluate.`")


@config
class SearchConfig:
    """A study: many trainings, each with values of its own. `python -m launch sweep` runs it."""

    out: Path
    """Study folder: journal.log, trials/NNNN, report.html, trials.csv, best.yaml."""
    space: Space = Field(min_length=1)
    """Dotted key of the train config (or the name of a bundle) -> values. The key `seed` repeats settings."""
    recipe: tuple[str, ...] = ("train",)
    """The verbs of a trial, in order: [train] or [train, infer, evaluate]."""
    train: StageConfig = StageConfig()
    """Config that the values are put into."""
    infer: StageConfig = StageConfig()
    """Config of infer, for a recipe that has it."""
    evaluate: StageConfig = StageConfig()
    """Config of evaluate, for a recipe that has it."""
    sampler: Sampler = TpeSampler()
    """How values are chosen."""
    trials: int | None = Field(default=None, ge=1)
    """Number of trials; none: the whole grid."""
    objective: Objective = Objective()
    """The number that a trial is judged by."""
    asha: AshaConfig | None = None
    """Early stopping; null: every trial runs to its end."""
    concurrent: int = Field(default=4, ge=1)
    """Number of trials that are queued or running at any time."""
    requeue: int = Field(default=3, ge=0)
    """How often a trial that was killed, preempted or timed out is submitted again; it resumes from its checkpoint."""
    poll: float = Field(default=10.0, gt=0)
    """[s] Between two looks at jobs and metrics; up to 6 times as long while nothing happens."""
    draws: int = Field(default=10_000, ge=100)
    """Draws of the bootstrap behind the comparison."""

    def __post_init__(self) -> None:
        # Faults of keys that depend on one another; each key alone is checked by its type.
        faults = spaces.find_structure_faults(self.space)

        if self.recipe not in (("train",), RECIPE):
            faults.append(f"recipe {list(self.recipe)} must be [train] or [{', '.join(RECIPE)}]")

        if self.objective.key.startswith("evaluate.") and "evaluate" not in self.recipe:
            faults.append(f"objective.key {self.objective.key} needs recipe [{', '.join(RECIPE)}]")

        if self.trials is None and self.sampler.kind != "grid":
            faults.append(f"trials: the sampler {self.sampler.kind} never ends; say how many")

        if self.asha and self.objective.key.startswith("evaluate."):
            faults.append("asha: early stopping judges training; give an objective.key such as val.dice_best")

        if faults:
            raise ValueError("; ".join(faults))
