"""Bootstrap intervals over neurons; sign flips, Holm's correction and power, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.metrics.statistics import (
    Interval,
    correct_for_many,
    count_neurons_needed,
    mean_interval,
    paired_difference,
    sign_flip_test,
)


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 200)
    interval = mean_interval(values.tolist())
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - half_width, values.mean() + half_width), abs=0.05
    )
    assert interval == mean_interval(values.tolist())
    assert interval != mean_interval(values.tolist(), seed=1)


def test_few_neurons() -> None:
    assert mean_interval([0.5]) == Interval(0.5, None, None, 1)
    assert mean_interval([0.5, 0.5]) == Interval(0.5, 0.5, 0.5, 2)
    for bad in ([], [float("nan"), 1.0], [float("inf")]):
        with pytest.raises(ValueError, match="finite"):
            mean_interval(bad)


def test_pairing_removes_what_neurons_share() -> None:
    rng = np.random.default_rng(1)
    neuron = rng.normal(0, 10, 30)
    first, second = neuron + 1 + rng.normal(0, 0.1, 30), neuron + rng.normal(0, 0.1, 30)
    interval = paired_difference(first.tolist(), second.tolist())
    assert interval.low is not None
    assert 0.9 < interval.low < interval.mean < 1.1
    with pytest.raises(ValueError, match="paired"):
        paired_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("means", "p"),
    [([1.0, 2.0], 0.5), ([0.1] * 6, 2 / 64), ([1.0, -1.0], 1.0), ([3.0, 1.0, -1.0], 0.75), ([0.0, 0.0], 1.0)],
)
def test_every_pattern_of_signs_counts(means: list[float], p: float) -> None:
    assert sign_flip_test(np.array([means])) == pytest.approx(p)
    # Seeds are averaged: they are no neurons.
    spread = np.array([[0.5] * len(means), [-0.5] * len(means)])
    assert sign_flip_test(np.array([means, means]) + spread) == pytest.approx(p)


def test_many_neurons_are_sampled_and_p_is_never_zero() -> None:
    draws = np.random.default_rng(0)
    assert 0 < sign_flip_test(np.full((1, 30), 0.2)) < 1e-3
    by_chance = [sign_flip_test(draws.normal(size=(2, 20))) for _ in range(40)]
    assert 0.3 < np.mean(by_chance) < 0.7


def test_holm_by_hand() -> None:
    # 4 x 0.01, 3 x 0.02, then 2 x 0.02 and 1 x 0.9, none below those before it.
    assert correct_for_many([0.02, 0.9, 0.01, 0.02]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert correct_for_many([0.6, 0.7]) == [1.0, 1.0]
    assert correct_for_many([]) == []


def test_the_number_of_neurons_follows_the_spread_and_the_effect() -> None:
    differences = np.array([[0.0, 0.02, 0.04], [0.02, 0.0, 0.02]])
    deviation = np.std([0.01, 0.01, 0.03], ddof=1)
    assert count_neurons_needed(differences, 0.01) == int(np.ceil((2.8 * deviation / 0.01) ** 2))
    assert count_neurons_needed(differences, 0.001) > 80 * count_neurons_needed(differences, 0.01)
    assert count_neurons_needed(differences[:, :1], 0.01) is None
