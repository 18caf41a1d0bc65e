"""How the patch embedding of a new teacher starts, from the patches of a sample of its images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PATCH_RMS = 0.7
"""Root mean square of the tokens that a new patch embedding gives: that of the positions that some ViTs add."""
PIXEL_NOISE = 0.01
"""Variance of the noise put on training images, in -1..1: the floor of what a patch embedding amplifies."""


def scale_embedding(vit: nn.Module, patches: Tensor) -> None:
    """Scale the patch embedding so that tokens of `patches` [n, P], in -1..1, have mean 0 and the size PATCH_RMS.

    Its directions stay random. Pixels keep their weight, so that a token tells how bright its parts are.
    """
    proj = get_projection(vit)
    mean = patches.mean(0)  # [P]
    with torch.no_grad():
        weight = proj.weight.flatten(1)  # [D, P]
        weight = weight * PATCH_RMS / ((patches - mean) @ weight.T).square().mean().sqrt()
        _set_projection(proj, weight, mean)


def whiten_embedding(vit: nn.Module, patches: Tensor) -> None:
    """Start the patch embedding as the whitened principal components of `patches` [n, P], in -1..1.

    A short training has no steps to spare on finding what a second of linear algebra knows. Fine detail gets the weight
    of coarse brightness, so that the tokens are a poor start for a linear probe of brightness.
    """
    patches = patches.double()
    mean = patches.mean(0)  # [P]
    variance, basis = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))  # ascending
    weight = PATCH_RMS * basis / (variance.clamp_min(0) + PIXEL_NOISE).sqrt()  # [P, P], components are columns
    proj = get_projection(vit)
    with torch.no_grad():
        _set_projection(proj, weight.flip(1)[:, : proj.out_channels].T, mean)  # [D, P], strongest first


def get_projection(vit: nn.Module) -> nn.Conv2d:
    """The convolution that makes a token of each patch; timm's modules have no types of their parts."""
    proj: nn.Conv2d = vit.patch_embed.proj  # type: ignore[union-attr,assignment]
    return proj


def _set_projection(proj: nn.Conv2d, weight: Tensor, mean: Tensor) -> None:
    """Weights [D, P], and the bias that makes the token of the mean patch zero."""
    proj.weight.copy_(weight.reshape(proj.weight.shape))
    if proj.bias is not None:
        proj.bias.copy_(-(weight @ mean))
