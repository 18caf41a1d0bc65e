"""Means over neurons with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_INDICES = 1 << 22
"""Random indices in memory at once."""


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
