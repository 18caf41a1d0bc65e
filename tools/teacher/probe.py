"""What a frozen encoder knows: masked reconstruction, and ridge regression from its tokens, against random weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_neuro.models import linear_probe
from tools.teacher import masked_autoencoder, photos
from tools.teacher.structure import difference

SIZE = 224
BINS = 8  # orientations of the gradient histograms
FIT = 120  # photographs (or synthetic slices) to fit the regressions on


@torch.no_grad()
def reconstruction(
    network: masked_autoencoder.MaskedAutoencoder,
    untrained: masked_autoencoder.MaskedAutoencoder,
    pictures: photos.Photos,
    keep: int,
    crop: int,
) -> dict[str, float]:
    """Loss on held-out photographs (gray, center crops, fixed masks); predicting each patch's mean scores 1."""
    device = next(network.parameters()).device
    image = F.interpolate(_gray(pictures, pictures.held), (crop, crop), mode="area").to(device)  # [B, 3, S, S]
    count, n = len(image), crop // network.patch
    order = torch.rand(count, n * n, generator=torch.Generator().manual_seed(1)).argsort(1).to(device)
    axis = torch.arange(n, dtype=torch.float32, device=device) + (SIZE // network.patch - n) / 2
    y, x = (c.flatten().expand(count, -1) for c in torch.meshgrid(axis, axis, indexing="ij"))
    batch = photos.Batch(image, image, order, y, x)
    return {
        "trained": float(network(batch, keep)),
        "random_weights": float(untrained(batch, keep)),
        "patch_mean": 1.0,
    }


def frozen_features(vits: dict[str, nn.Module], pictures: photos.Photos, patch: int) -> dict[str, Any]:
    """R^2 of ridge regressions from single frozen patch tokens, per task, encoder and depth.

    Photographs: fitted on training ones, scored on held-out ones. `pixels` regresses from the patch's own gray values.
    Tasks: `orientation`, the dominant direction of the token's own patch, a quadratic function of its pixels;
    `edges`, the gradient magnitude of its own patch, 4 x 4; `neighbors`, the gradient histograms of its four
    neighbors, which the token can know through attention only; `curves`, the share of curve in each 4 x 4 part of the
    patch on synthetic noisy slices of thin bright curves, which no encoder was trained on.
    """
    fit = _gray(pictures, pictures.train[:: max(1, len(pictures.train) // FIT)][:FIT])
    held = _gray(pictures, pictures.held)
    slices, truth = curves(len(fit) + len(held))
    share = F.unfold(F.avg_pool2d(truth, patch // 4), 4, stride=4).transpose(1, 2)  # [n, N, 16]
    own = {"orientation": orientation, "edges": edges, "neighbors": neighbors}
    sets = [
        (fit, {k: f(fit, patch) for k, f in own.items()}, held, {k: f(held, patch) for k, f in own.items()}),
        (slices[: len(fit)], {"curves": share[: len(fit)]}, slices[len(fit) :], {"curves": share[len(fit) :]}),
    ]

    def pixels(image: Tensor) -> dict[str, Tensor]:
        return {"0": masked_autoencoder.patchify(image[:, :1], patch)}

    readers: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {"pixels": pixels}
    readers |= {name: functools.partial(tokens, vit) for name, vit in vits.items()}
    table: dict[str, Any] = {task: {name: {} for name in readers} for task in (*own, "curves")}
    for name, read in readers.items():
        for images, wanted, others, right in sets:
            seen, unseen = read(images), read(others)
            for block in seen:
                for task, score in linear_probe.ridge(seen[block], wanted, unseen[block], right).items():
                    table[task][name][block] = round(score, 4)
    return {"score": "R^2 on held-out images, by encoder and block", **table}


@torch.no_grad()
def tokens(vit: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Gray image [B, 3, 224, 224] in -1..1 -> {block number: patch tokens [B, N, D]} at four depths, on the CPU."""
    device = next(vit.parameters()).device
    depth = len(vit.blocks)  # type: ignore[arg-type]
    chosen = sorted({math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})
    parts = []
    vit.eval()
    for some in image.split(20):  # type: ignore[no-untyped-call]
        parts.append(
            vit.forward_intermediates(  # type: ignore[operator]
                some.to(device), indices=chosen, norm=False, output_fmt="NLC", intermediates_only=True
            )
        )
    return {str(block + 1): torch.cat([p[i] for p in parts]).float().cpu() for i, block in enumerate(chosen)}


def _gray(pictures: photos.Photos, chosen: list[int]) -> Tensor:
    image = F.interpolate(pictures.square(chosen), (SIZE, SIZE), mode="area").mean(1, keepdim=True)
    return image.expand(-1, 3, -1, -1) * 2 - 1  # [n, 3, 224, 224]


def orientation(image: Tensor, patch: int) -> Tensor:
    """Coherence times (cos, sin) of twice the dominant angle of every patch, [B, N, 2]; structure tensor."""
    dy, dx = difference(image[:, :1])
    xx, yy, xy = (F.avg_pool2d(t, patch).flatten(1) for t in (dx * dx, dy * dy, dx * dy))  # [B, N]
    return torch.stack([(xx - yy), 2 * xy], -1) / (xx + yy + 1e-4)[..., None]


def edges(image: Tensor, patch: int) -> Tensor:
    """Gradient magnitude in 4 x 4 parts of every patch, [B, N, 16]."""
    dy, dx = difference(image[:, :1])
    return masked_autoencoder.patchify(F.avg_pool2d((dx * dx + dy * dy).sqrt(), patch // 4), 4)


def neighbors(image: Tensor, patch: int) -> Tensor:
    """Normalized orientation histograms of the patches above, below, left and right, [B, N, 4 * BINS]."""
    dy, dx = difference(image[:, :1])
    strength = (dx * dx + dy * dy).sqrt()
    bin_of = ((torch.atan2(dy, dx) % math.pi) / math.pi * BINS).long().clamp(0, BINS - 1)
    bins = torch.zeros(len(image), BINS, *image.shape[2:]).scatter_(1, bin_of, strength)
    hog = F.avg_pool2d(bins, patch)  # [B, BINS, g, g]
    hog = hog / (hog.square().sum(1, keepdim=True) + 1e-4).sqrt()
    around = F.pad(hog, (1, 1, 1, 1), mode="replicate")
    sides = [around[:, :, :-2, 1:-1], around[:, :, 2:, 1:-1], around[:, :, 1:-1, :-2], around[:, :, 1:-1, 2:]]
    return torch.cat(sides, 1).flatten(2).transpose(1, 2)


def curves(count: int, number: int = 8, points: int = 600) -> tuple[Tensor, Tensor]:
    """Noisy slices of thin bright curves: images [count, 3, 224, 224] in -1..1 and curve masks [count, 1, 224, 224]."""
    draws = torch.Generator().manual_seed(2)
    heading = torch.rand(count, number, 1, generator=draws) * 2 * math.pi
    angle = heading + (torch.randn(count, number, points, generator=draws) * 0.06).cumsum(-1)  # winding, not curling
    start = torch.rand(2, count, number, 1, generator=draws) * SIZE
    way = start + 0.5 * torch.stack([angle.sin(), angle.cos()]).cumsum(-1)  # [2, count, number, points], pixels
    y, x = way.long().clamp(0, SIZE - 1)
    inside = ((way >= 0) & (way < SIZE)).all(0)
    bright = (torch.rand(count, number, 1, generator=draws) * 0.7 + 0.3).expand(-1, -1, points) * inside
    line = torch.zeros(count, SIZE * SIZE)
    line.scatter_reduce_(1, (y * SIZE + x).flatten(1), bright.flatten(1), "amax")
    line = F.max_pool2d(line.view(count, 1, SIZE, SIZE), 3, 1, 1)
    haze = F.interpolate(torch.rand(count, 1, 8, 8, generator=draws), (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    image = 0.5 * F.avg_pool2d(line, 3, 1, 1) + 0.25 * haze + 0.15 * torch.randn(line.shape, generator=draws)
    return (image.clamp(0, 1) * 2 - 1).expand(-1, 3, -1, -1), (line > 0).float()
