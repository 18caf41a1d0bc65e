"""What the `structure` objective predicts: brightness, ridges, gradient histograms and directions, finer than a token.

Gradient histograms as targets of masked prediction: Wei et al. (MaskFeat), CVPR 2022. Ridges: the eigenvalues of the
Hessian at three scales, Frangi et al., MICCAI 1998. A neurite is a bright ridge two to six pixels wide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGE_SCALES = (1.0, 2.0, 4.0)
"""[pixel] Standard deviations of the Gaussians under the Hessians."""

RIDGE_FLOOR = 0.04
"""Ridge of images in [0, 1] that counts half: the target saturates, as the mask of a neurite does."""

HISTOGRAM_BINS = 8
"""Directions of a gradient histogram, over half a turn."""

DIRECTION_SCALE = 1.5
"""[pixel] Standard deviation of the Gaussian under the structure tensor's gradients."""


def describe_structure(image: Tensor, patch: int) -> list[Tensor]:
    """Gray images [B, 1, S, S] in [0, 1] -> groups of targets, each [B, N, T], for the N tokens of `patch` pixels.

    Groups: brightness in 4 x 4 parts of a token; ridges of each scale, in 4 x 4 parts, the coarsest in 2 x 2;
    histograms of gradients in 2 x 2 parts; direction and coherence in 2 x 2 parts.
    """
    fine, coarse = patch // 4, patch // 2
    ridges = [measure_ridges(image, scale) for scale in RIDGE_SCALES]
    return [
        _group_by_token(F.avg_pool2d(image, fine), 4),
        *(_group_by_token(F.avg_pool2d(ridge, fine), 4) for ridge in ridges[:-1]),
        _group_by_token(F.avg_pool2d(ridges[-1], coarse), 2),
        _group_by_token(_measure_histograms(image, coarse), 2),
        _group_by_token(_measure_directions(image, coarse), 2),
    ]


def measure_ridges(image: Tensor, scale: float) -> Tensor:
    """Strength of bright ridges of images [B, 1, S, S] in [0, 1] -> [B, 1, S, S] in 0..1.

    The most negative eigenvalue of the Hessian, normalized by scale, through r / (r + RIDGE_FLOOR).
    """
    smooth = blur(image, scale)
    dy, dx = _differentiate(smooth)
    yy, yx = _differentiate(dy)
    _, xx = _differentiate(dx)

    lowest = (yy + xx) / 2 - (((yy - xx) / 2).square() + yx.square()).sqrt()
    strength = (-(scale**2) * lowest).clamp_min(0)
    return strength / (strength + RIDGE_FLOOR)


def blur(image: Tensor, scale: float) -> Tensor:
    """Images [B, 1, S, S] under a Gaussian of standard deviation `scale` [pixel], reflected at their edges."""
    reach = math.ceil(3 * scale)
    taps = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
    weights = (-taps.square() / (2 * scale**2)).exp()
    weights = weights / weights.sum()

    padded = F.pad(image, (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _measure_histograms(image: Tensor, cell: int) -> Tensor:
    """Histograms of unsigned gradient directions per cell, each of length about 1 -> [B, BINS, S / cell, S / cell]."""
    dy, dx = _differentiate(image)
    strength = (dy.square() + dx.square()).sqrt()
    place = (torch.atan2(dy, dx) % math.pi) / math.pi * HISTOGRAM_BINS

    # A direction between two bins is shared by them.
    lower = place.floor()
    share = place - lower
    low = lower.long() % HISTOGRAM_BINS
    high = (low + 1) % HISTOGRAM_BINS
    bins = image.new_zeros(len(image), HISTOGRAM_BINS, *image.shape[2:])
    bins.scatter_add_(1, low, strength * (1 - share)).scatter_add_(1, high, strength * share)

    cells = F.avg_pool2d(bins, cell)
    return cells / (cells.square().sum(1, keepdim=True) + 1e-4).sqrt()


def _measure_directions(image: Tensor, cell: int) -> Tensor:
    """Coherence times (cos, sin) of twice the direction of each cell, from the structure tensor -> [B, 2, ...]."""
    dy, dx = _differentiate(blur(image, DIRECTION_SCALE))
    yy, xx, yx = (F.avg_pool2d(product, cell) for product in (dy * dy, dx * dx, dy * dx))
    return torch.cat([xx - yy, 2 * yx], 1) / (xx + yy + 1e-4)


def _differentiate(image: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes along y and x of [B, 1, S, S] per pixel."""
    dy, dx = difference(image)
    return dy / 2, dx / 2


def difference(image: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between both neighbors of each pixel, along y and x of [B, 1, H, W], edges repeated."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return dy, padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]


def _group_by_token(cells: Tensor, parts: int) -> Tensor:
    """Cells [B, C, n * parts, n * parts] -> [B, n * n, C * parts * parts]."""
    return F.unfold(cells, parts, stride=parts).transpose(1, 2)
