"""The patch embedding that a new teacher starts from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hpc_neuro.models.teacher import create_vit
from hpc_neuro.teacher.objective import patchify
from hpc_neuro.teacher.patch_embedding import PATCH_RMS, scale_embedding, whiten_embedding


@pytest.fixture(scope="module")
def patches() -> Tensor:
    """Smooth images, as photographs are: coarse brightness varies most."""
    noise = torch.randn(64, 1, 34, 34, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.avg_pool2d(noise, 3, stride=1).expand(-1, 3, -1, -1) + 0.3
    return patchify(smooth, 8).flatten(0, 1)


def embed(vit: nn.Module, patches: Tensor) -> Tensor:
    proj: nn.Conv2d = vit.patch_embed.proj  # type: ignore[union-attr,assignment]
    return proj(patches.view(-1, 3, 8, 8))[..., 0, 0]


@pytest.mark.parametrize("start", [scale_embedding, whiten_embedding])
def test_tokens_have_mean_zero(start: Callable[[nn.Module, Tensor], None], patches: Tensor) -> None:
    vit = create_vit("vit_tiny_patch16_224", patch_size=8, depth=1)
    start(vit, patches)
    assert embed(vit, patches).mean(0).abs().max() < 1e-4


def test_random_directions_are_scaled_and_not_turned(patches: Tensor) -> None:
    vit = create_vit("vit_tiny_patch16_224", patch_size=8, depth=1)
    before = vit.patch_embed.proj.weight.detach().clone()
    scale_embedding(vit, patches)
    ratio = vit.patch_embed.proj.weight.detach() / before
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-3, atol=0)
    assert embed(vit, patches).square().mean().sqrt().item() == pytest.approx(PATCH_RMS, rel=1e-3)


def test_whitened_tokens_are_not_correlated(patches: Tensor) -> None:
    vit = create_vit("vit_tiny_patch16_224", patch_size=8, depth=1)
    whiten_embedding(vit, patches)
    tokens = embed(vit, patches).double()[:, :32]
    covariance = tokens.T @ tokens / len(tokens)
    off_diagonal = covariance - covariance.diag().diag()
    assert off_diagonal.abs().max() < 1e-3 * covariance.diag().max()
