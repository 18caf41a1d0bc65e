"""Asynchronous successive halving against Optuna's pruner, and its corner cases."""

from __future__ import annotations

import optuna
from hypothesis import given
from hypothesis import strategies as st

from hpc_neuro.search.asha import AshaConfig, is_promoted, list_rungs


def test_rungs_grow_by_the_factor_and_end_before_the_last_step():
    assert list_rungs(AshaConfig(first=100, factor=3), 2000) == [100, 300, 900]
    assert list_rungs(AshaConfig(first=100, factor=2), 400) == [100, 200]
    assert list_rungs(AshaConfig(first=100), 100) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40, unique=True), st.integers(2, 4), st.booleans())
def test_it_decides_as_optunas_pruner_at_the_first_rung(values, factor, high):
    cfg, goal = AshaConfig(first=1, factor=factor), "maximize" if high else "minimize"
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction=goal, pruner=pruner)
    seen: list[float] = []
    for value in values:
        trial = study.ask()
        trial.report(value, 1)
        assert is_promoted(value, seen, cfg, goal) == (not trial.should_prune())
        seen.append(value)


def test_startup_lets_the_first_pass():
    cfg = AshaConfig(first=1, startup=3)
    assert is_promoted(0.0, [1.0, 1.0], cfg, "maximize")
    assert not is_promoted(0.0, [1.0, 1.0, 1.0], cfg, "maximize")


def test_equals_are_not_stopped_for_one_another():
    assert is_promoted(0.5, [0.5, 0.5, 0.5], AshaConfig(first=1), "maximize")
