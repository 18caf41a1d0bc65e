"""Asynchronous successive halving: a trial continues past a rung only if it is among the best that reached it."""

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
    """Of the trials that reach a rung, the best 1 / factor are promoted, at least one."""
    startup: int = Field(default=0, ge=0)
    """Number of trials that pass a rung before the first is stopped there."""


def list_rungs(cfg: AshaConfig, steps: int) -> list[int]:
    """The steps at which trials of `steps` steps are judged; at the last step nothing is left to save."""
    rungs, step = [], cfg.first
    while step < steps:
        rungs.append(step)
        step *= cfg.factor
    return rungs


def is_promoted(value: float, others: Sequence[float], cfg: AshaConfig, goal: Goal) -> bool:
    """Whether a trial continues past a rung, given its value there and those of the trials that came before it.

    It must be among the best max(1, n // factor) of all n values at the rung, its own included.
    """
    # A few values say little about a rung.
    if len(others) < cfg.startup:
        return True

    # Equal values do not stop one another.
    sign = 1 if goal == "maximize" else -1
    better = sum(sign * other > sign * value for other in others)
    return better < max(1, (len(others) + 1) // cfg.factor)
