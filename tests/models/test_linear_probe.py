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
