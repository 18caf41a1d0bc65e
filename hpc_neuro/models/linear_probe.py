"""The linear probe: ridge regression from the frozen features of tokens, scored on tokens it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge penalties that are tried, as shares of the features' variance, which is 1."""


def ridge(seen: Tensor, wanted: dict[str, Tensor], unseen: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    """R^2 by task of truth [m, N, T] from unseen [m, N, D], after a fit of wanted [n, N, T] from seen [n, N, D].

    The penalty is tuned on the last fifth of the images to fit on, so that no score has seen its own tuning.
    """
    cut = max(1, len(seen) * 4 // 5)
    fit_part = {task: values[:cut] for task, values in wanted.items()}
    tuning_part = {task: values[cut:] for task, values in wanted.items()}

    tuning = score_penalties(seen[:cut], fit_part, seen[cut:], tuning_part)
    final = score_penalties(seen, wanted, unseen, truth)
    return {task: final[task][tuning[task].index(max(tuning[task]))] for task in wanted}


def score_penalties(
    seen: Tensor,
    wanted: dict[str, Tensor],
    unseen: Tensor,
    truth: dict[str, Tensor],
    penalties: Sequence[float] = PENALTIES,
    weigh_by_variance: bool = False,
    bounds: tuple[float, float] | None = None,
) -> dict[str, list[float]]:
    """R^2 by task and penalty; arguments as of `ridge`.

    A task's R^2 is the mean over its T targets; with `weigh_by_variance` in proportion to their variance, so that a
    target that is almost constant in the truth does not decide. bounds: least and greatest value of the targets, where
    they have them; a guess beyond them is moved to them, so that a few bright tokens do not decide either.
    """
    fit, scored = seen.flatten(0, 1).double(), unseen.flatten(0, 1).double()
    mean, deviation = fit.mean(0), fit.std(0) + 1e-6
    fit, scored = (fit - mean) / deviation, (scored - mean) / deviation

    # One factorization serves all tasks and penalties.
    values, basis = torch.linalg.eigh(fit.T @ fit / len(fit))
    scored = scored @ basis

    scores: dict[str, list[float]] = {}
    for task in wanted:
        target, right = wanted[task].flatten(0, 1).double(), truth[task].flatten(0, 1).double()
        slopes = basis.T @ (fit.T @ (target - target.mean(0)) / len(fit))  # [D, T]
        variance = right.var(0) + 1e-12
        weight = variance / variance.sum() if weigh_by_variance else torch.full_like(variance, 1 / len(variance))

        guesses = (scored @ (slopes / (values + penalty)[:, None]) + target.mean(0) for penalty in penalties)
        if bounds is not None:
            guesses = (guess.clamp(*bounds) for guess in guesses)
        scores[task] = [float((weight * (1 - (g - right).square().mean(0) / variance)).sum()) for g in guesses]
    return scores
