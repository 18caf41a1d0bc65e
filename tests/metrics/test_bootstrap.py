"""Bootstrap intervals over neurons."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.metrics.bootstrap import Interval, mean_interval, paired_difference


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
