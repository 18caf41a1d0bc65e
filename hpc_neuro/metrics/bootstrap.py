"""Means over neurons with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 1 << 22  # drawn indices held at a time


@dataclass(frozen=True)
class Interval:
    """A mean over `n` neurons, and the interval that holds 95 % of the means of resampled neurons."""

    mean: float
    low: float | None  # None below two neurons, of which no interval can be given
    high: float | None
    n: int


def mean_interval(values: Sequence[float], draws: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean and percentile bootstrap interval: `draws` times as many neurons are drawn with replacement.

    Neurons, not crops or voxels, are what is drawn: they are what is independent. The same values and seed give the
    same interval. Raises ValueError without values, and for values that are not finite. Source: Efron 1979.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data) or not np.isfinite(data).all():
        raise ValueError(f"a mean over {len(data)} neurons needs finite values, found {data.tolist()[:8]}")
    if len(data) < 2:
        return Interval(float(data.mean()), None, None, len(data))
    rng = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // len(data))
    means = [
        data[rng.integers(0, len(data), (min(step, draws - at), len(data)))].mean(axis=1)
        for at in range(0, draws, step)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(data.mean()), float(low), float(high), len(data))


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of ours minus theirs neuron by neuron, with its interval; both in the same order of neurons."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)], draws, seed, level)


def crossed_interval(values: NDArray[np.float64], draws: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean of [seeds, neurons] and its interval when seeds and neurons are each drawn anew, independently.

    Every seed has scored every neuron, so the two are crossed: a draw takes rows and columns with replacement. With
    one seed this is `mean_interval` over neurons. No interval is given below two neurons. Source: Owen 2007, the
    pigeonhole bootstrap. Raises ValueError without values, and for values that are not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 2 or not data.size or not np.isfinite(data).all():
        raise ValueError(f"an array [seeds, neurons] of finite values is wanted, found {data.shape}")
    rows, columns = data.shape
    if columns < 2:
        return Interval(float(data.mean()), None, None, columns)
    rng = np.random.default_rng(seed)
    row_counts = rng.multinomial(rows, np.full(rows, 1 / rows), draws)  # [draws, seeds]
    column_counts = rng.multinomial(columns, np.full(columns, 1 / columns), draws)  # [draws, neurons]
    means = np.einsum("dr,rc,dc->d", row_counts, data, column_counts, optimize=True) / data.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(data.mean()), float(low), float(high), columns)
