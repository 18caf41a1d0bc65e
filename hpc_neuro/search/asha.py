"""Asynchronous successive halving: a trial goes on past a rung only when it is among the best that reached it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from hpc_neuro.core.schema import config

Goal = Literal["maximize", "minimize"]


@config
class AshaConfig:
    """Early stopping over steps (Li et al. 2018, the stopping variant). Rungs lie at first, first * factor, ..."""

    first: int = Field(ge=1)
    """[step] The first rung; a trial is judged by its first validation at or after it."""
    factor: int = Field(default=3, ge=2)
    """Of the trials that reach a rung the best 1 / factor go on, at least one."""
    startup: int = Field(default=0, ge=0)
    """So many trials pass a rung before the first is stopped there."""
    key: str | None = None
    """What is judged, a key of metrics.jsonl such as `val.dice_best`; none: the objective."""
    goal: Goal | None = None
    """Which way is better; none: as of the objective."""


def rungs(cfg: AshaConfig, steps: int) -> list[int]:
    """The steps at which trials of `steps` steps are judged; at the last step nothing is left to save."""
    found, step = [], cfg.first
    while step < steps:
        found.append(step)
        step *= cfg.factor
    return found


def goes_on(value: float, others: Sequence[float], cfg: AshaConfig, goal: Goal) -> bool:
    """Whether a trial goes on past a rung, given its value there and those of the trials that came before it.

    It must be among the best max(1, n // factor) of all n values at the rung, its own included.
    """
    if len(others) < cfg.startup:
        return True
    sign = 1 if goal == "maximize" else -1
    better = sum(sign * o > sign * value for o in others)
    return better < max(1, (len(others) + 1) // cfg.factor)
