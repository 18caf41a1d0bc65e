"""Whether a difference between two methods may be chance: sign flips, correction for many comparisons, and power."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MAX_EXACT = 16
"""Neurons up to which every pattern of signs is tried; beyond, a random sample of them."""
_RANDOM_FLIPS = 20_000
_QUANTILES = 1.96 + 0.84
"""Normal quantiles of a two-sided test at 5 % and of a power of 80 %."""


def sign_flip_test(differences: NDArray[np.float64], seed: int = 0) -> float:
    """Two-sided p of the mean of paired differences [seeds, neurons], were each neuron's sign a coin toss.

    Seeds are averaged first, because only neurons are independent. With n neurons p is at least 2 / 2^n: below six
    neurons no difference reaches 0.05. Source: Fisher 1935.
    """
    means = np.asarray(differences, dtype=np.float64).mean(0)  # [neurons]
    count = len(means)
    if count <= _MAX_EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    else:
        # The pattern that was observed counts as one of the sample, so that p is never 0.
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (_RANDOM_FLIPS, count))
        signs[0] = 1

    flipped = np.abs(signs @ means)
    # Sums that differ by rounding alone are equal.
    return float((flipped >= flipped[0] * (1 - 1e-12)).mean())


def correct_for_many(p_values: Sequence[float]) -> list[float]:
    """Each p after Holm's correction for the whole family, in the order given. Source: Holm 1979."""
    order = np.argsort(p_values, kind="stable")
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def count_neurons_needed(differences: NDArray[np.float64], effect: float) -> int | None:
    """Neurons that a mean difference of `effect` needs to be found with a power of 80 % at 5 %, as many seeds each.

    differences: [seeds, neurons] as observed, whose spread over neurons is taken for that of others. None for fewer
    than two neurons.
    """
    means = np.asarray(differences, dtype=np.float64).mean(0)
    if len(means) < 2:
        return None
    return max(2, math.ceil((_QUANTILES * float(means.std(ddof=1)) / effect) ** 2))
