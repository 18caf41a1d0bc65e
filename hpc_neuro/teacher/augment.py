"""Crops of photographs and of slices, turned and toned as a function of random draws alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_neuro.teacher.objective import uniform

PHOTOGRAPH_EXTENT = (0.25, 1.0)
"""Side of a crop of a photograph, as a share of its tile: any magnification."""

SLICE_EXTENT = (0.35, 1.0)
"""Side of a crop of a slice, as a share of its window: magnifications near that of the volume."""


def vary_photographs(tiles: Tensor, crop: int, draws: torch.Generator) -> Tensor:
    """Crop, turn, gray, invert and re-tone tiles [B, 3, side, side] in 0..1 -> [B, 3, crop, crop] in -1..1.

    The teacher will look at gray microscopy slices: bright on dark or dark on bright, at any magnification.
    """
    count, device = len(tiles), tiles.device
    image = cut_crops(tiles, crop, PHOTOGRAPH_EXTENT, draws)

    def draw(low: float, high: float) -> Tensor:
        return uniform(draws, count, low, high).view(-1, 1, 1, 1).to(device)

    weights = torch.rand(count, 3, 1, 1, generator=draws).add(0.1).to(device)  # random channel mix: more grays
    gray = (image * (weights / weights.sum(1, keepdim=True))).sum(1, keepdim=True)
    image = torch.where(draw(0, 1) < 0.8, gray, image)
    image = torch.where(draw(0, 1) < 0.5, 1 - image, image)
    image = image.clamp(1e-3, 1) ** draw(math.log(0.5), math.log(2.5)).exp()  # dark fields are common in microscopy
    image = (image - 0.5) * draw(0.4, 1.4) + 0.5 + draw(-0.15, 0.15)
    return image.clamp(0, 1) * 2 - 1


def vary_slices(windows: Tensor, crop: int, draws: torch.Generator) -> Tensor:
    """Crop, turn and slightly re-tone windows [B, 1, side, side] in 0..1 -> [B, 3, crop, crop] in -1..1.

    Brightness stays near that of the volume: the student sees no other.
    """
    image = cut_crops(windows, crop, SLICE_EXTENT, draws)
    gamma = uniform(draws, len(windows), math.log(0.7), math.log(1.4)).exp().view(-1, 1, 1, 1).to(windows.device)
    return (image.clamp(0, 1) ** gamma * 2 - 1).expand(-1, 3, -1, -1)


def cut_crops(images: Tensor, crop: int, extent: tuple[float, float], draws: torch.Generator) -> Tensor:
    """Parts of images [B, C, side, side], turned by quarters and mirrored at random -> [B, C, crop, crop].

    extent: least and greatest side of a part, as a share of the image's.
    """
    count, channels = images.shape[:2]
    share = uniform(draws, count, math.log(extent[0]), math.log(extent[1])).exp()
    shift = [uniform(draws, count, -1, 1) * (1 - share) for _ in range(2)]

    # Four quarter turns, mirrored or not.
    turns = torch.randint(8, (count,), generator=draws)
    cos, sin = (turns % 4 * (math.pi / 2)).cos(), (turns % 4 * (math.pi / 2)).sin()
    mirror = torch.where(turns < 4, 1.0, -1.0)
    rows = [cos * mirror * share, -sin * share, shift[0], sin * mirror * share, cos * share, shift[1]]
    affine = torch.stack(rows, -1).view(count, 2, 3).to(images.device)
    grid = F.affine_grid(affine, [count, channels, crop, crop], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def darken_field(images: Tensor, draws: torch.Generator) -> Tensor:
    """Make images [B, 3, S, S] in -1..1 gray, and half of them bright structures on black, as fluorescence is.

    The black level is a quantile of the image, up to nine tenths; the white level lies among its brightest pixels.
    """
    count, device = len(images), images.device
    gray = (images.mean(1, keepdim=True) + 1) / 2
    is_dark = (uniform(draws, count, 0, 1) < 0.5).view(-1, 1, 1, 1).to(device)
    low, high = uniform(draws, count, 0.3, 0.9), uniform(draws, count, 0.97, 1.0)

    levels = gray.flatten(1).sort(1).values
    last = levels.shape[1] - 1
    black, white = (
        levels.gather(1, (share * last).long()[:, None].to(device)).view(-1, 1, 1, 1) for share in (low, high)
    )
    # The floor keeps the grain of a flat crop from becoming structure.
    dark = ((gray - black) / (white - black).clamp_min(0.1)).clamp(0, 1)
    return (torch.where(is_dark, dark, gray) * 2 - 1).expand(-1, 3, -1, -1)
