"""The linear probe."""

from __future__ import annotations

import torch

from hpc_neuro.models import linear_probe


def test_ridge_finds_a_linear_law_and_nothing_in_noise() -> None:
    draws = torch.Generator().manual_seed(0)
    seen = torch.randn(20, 50, 6, generator=draws)
    law = torch.randn(6, 2, generator=draws)
    noise = torch.randn(20, 50, 2, generator=draws)
    targets = {"law": seen @ law, "noise": noise}
    scores = linear_probe.ridge(
        seen[:10], {k: v[:10] for k, v in targets.items()}, seen[10:], {k: v[10:] for k, v in targets.items()}
    )
    assert scores["law"] > 0.999
    assert abs(scores["noise"]) < 0.05


def test_a_target_that_is_almost_constant_decides_only_where_all_weigh_the_same() -> None:
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(20, 50, 3, generator=draws)
    law = torch.stack([features[..., 0], 0.1 * features[..., 1]], -1)
    truth = law.clone()
    truth[10:, :, 1] = 0
    parts = features[:10], {"law": law[:10]}, features[10:], {"law": truth[10:]}

    assert max(linear_probe.score_penalties(*parts)["law"]) < -1e6
    assert max(linear_probe.score_penalties(*parts, weigh_by_variance=True)["law"]) > 0.98


def test_guesses_are_kept_within_the_bounds_of_the_targets() -> None:
    draws = torch.Generator().manual_seed(0)
    features = torch.rand(20, 50, 1, generator=draws)
    share = (3 * features).clamp(max=1)

    # One token ten times as bright as the others: its guess is far above a share of 1.
    unseen, truth = features[10:].clone(), share[10:].clone()
    unseen[0, 0], truth[0, 0] = 30, 1
    parts = features[:10], {"share": share[:10]}, unseen, {"share": truth}
    assert max(linear_probe.score_penalties(*parts)["share"]) < 0
    assert max(linear_probe.score_penalties(*parts, bounds=(0, 1))["share"]) > 0.6
