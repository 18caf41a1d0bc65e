"""Means over neurons with bootstrap intervals, and whether a difference between two methods may be chance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_INDICES = 1 << 22
"""Random indices in memory at once."""
_MAX_EXACT = 16
"""Neurons up to which every pattern of signs is tried; beyond, a random sample of them."""
_RANDOM_FLIPS = 20_000
_QUANTILES = 1.96 + 0.84
"""Normal quantiles of a two-sided test at 5 % and of a power of 80 %."""


@dataclass(frozen=True)
class Interval:
    """A mean over `n` neurons and the interval that holds 95 % of the means of resampled neurons."""

    mean: float
    low: float | None
    """None below two neurons, for which there is no interval."""
    high: float | None
    n: int


def mean_interval(values: Sequence[float], draws: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean and percentile bootstrap interval: the neurons are drawn `draws` times with replacement.

    Neurons are drawn, not crops or voxels, because only neurons are independent. The same values and seed give the same
    interval. Raises ValueError when there are no values or a value is not finite. Source: Efron 1979.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data) or not np.isfinite(data).all():
        raise ValueError(f"a mean over {len(data)} neurons needs finite values, found {data.tolist()[:8]}")

    # Every draw from one neuron is that neuron, so its interval would have no width and mean nothing.
    if len(data) < 2:
        return Interval(float(data.mean()), None, None, len(data))

    # Draw in batches: all indices at once would need draws x neurons integers.
    rng = np.random.default_rng(seed)
    batch = max(1, _MAX_INDICES // len(data))
    means = []
    for start in range(0, draws, batch):
        indices = rng.integers(0, len(data), (min(batch, draws - start), len(data)))
        means.append(data[indices].mean(axis=1))

    return _build_interval(float(data.mean()), np.concatenate(means), level, len(data))


def paired_difference(
    first: Sequence[float], second: Sequence[float], draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of `first` minus `second`, neuron by neuron, with its interval; both have the neurons in the same order."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values cannot be paired with {len(second)}")

    # Neurons differ far more than methods do; the difference within each neuron removes what they share.
    return mean_interval([a - b for a, b in zip(first, second, strict=True)], draws, seed, level)


def crossed_interval(values: NDArray[np.float64], draws: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean of [seeds, neurons] and its interval when seeds and neurons are drawn independently.

    Every seed has scored every neuron, so the two factors are crossed: a draw takes rows and columns with replacement.
    With one seed this is `mean_interval` over neurons. There is no interval below two neurons. Raises ValueError when
    there are no values or a value is not finite. Source: Owen 2007, the pigeonhole bootstrap.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 2 or not data.size or not np.isfinite(data).all():
        raise ValueError(f"expected an array [seeds, neurons] of finite values, found shape {data.shape}")

    # One neuron has no interval, as in `mean_interval`, however many seeds have scored it.
    rows, columns = data.shape
    if columns < 2:
        return Interval(float(data.mean()), None, None, columns)

    # How often each row and column is drawn decides a mean; the order of the draws does not.
    rng = np.random.default_rng(seed)
    row_counts = rng.multinomial(rows, np.full(rows, 1 / rows), draws)  # [draws, seeds]
    column_counts = rng.multinomial(columns, np.full(columns, 1 / columns), draws)  # [draws, neurons]
    means = np.einsum("dr,rc,dc->d", row_counts, data, column_counts, optimize=True) / data.size

    return _build_interval(float(data.mean()), means, level, columns)


def _build_interval(mean: float, means: NDArray[np.float64], level: float, n: int) -> Interval:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), n)


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
