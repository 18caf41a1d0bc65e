"""What a frozen teacher knows: ridge regressions from its tokens, beside those from the tokens of other networks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_neuro.core import stop_signals
from hpc_neuro.models import linear_probe
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.teacher.objective import patchify
from hpc_neuro.teacher.structure_targets import difference
from hpc_neuro.teacher.tiles import Tiles
from hpc_neuro.teacher.trainer import normalize_input

SIZE = 224
"""[pixel] Side of the images."""
BINS = 8
"""Directions of the gradient histograms."""
FIT = 120
"""Images that the regressions are fitted on."""
HELD = 100
"""Held-out images that they are scored on, at most."""


def probe_features(teachers: Mapping[str, Teacher], tiles: Tiles) -> dict[str, Any]:
    """R^2 of ridge regressions from single frozen patch tokens, per task, teacher and block.

    Fitted on images that were trained on, scored on held-out ones. `pixels` regresses from the patch's own gray values.
    Tasks: `orientation`, the dominant direction of the token's own patch, a quadratic function of its pixels;
    `edges`, the gradient magnitude of its own patch, 4 x 4; `neighbors`, the gradient histograms of its four
    neighbors, which the token can know through attention only; `curves`, the share of curve in each 4 x 4 part of the
    patch on synthetic noisy slices of thin bright curves, which no teacher was trained on.
    """
    patch = next(iter(teachers.values())).patch
    fit = tiles.show(_take_evenly(tiles.train, FIT), SIZE)
    held_out = tiles.show(_take_evenly(tiles.held, HELD), SIZE)
    slices, truth = curves(len(fit) + len(held_out))
    share = F.unfold(F.avg_pool2d(truth, patch // 4), 4, stride=4).transpose(1, 2)  # [n, N, 16]
    own = {"orientation": orientation, "edges": edges, "neighbors": neighbors}
    sets = [
        (fit, {k: f(fit, patch) for k, f in own.items()}, held_out, {k: f(held_out, patch) for k, f in own.items()}),
        (slices[: len(fit)], {"curves": share[: len(fit)]}, slices[len(fit) :], {"curves": share[len(fit) :]}),
    ]

    def pixels(image: Tensor) -> dict[str, Tensor]:
        return {"0": patchify(image[:, :1], patch)}

    readers: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {"pixels": pixels}
    readers |= {name: functools.partial(read_tokens, teacher) for name, teacher in teachers.items()}
    table: dict[str, Any] = {task: {name: {} for name in readers} for task in (*own, "curves")}
    for name, read in readers.items():
        stop_signals.check()
        for images, wanted, others, right in sets:
            seen, unseen = read(images), read(others)
            for block in seen:
                for task, score in linear_probe.ridge(seen[block], wanted, unseen[block], right).items():
                    table[task][name][block] = round(score, 4)
    return {"score": "R^2 on held-out images, by encoder and block", **table}


def _take_evenly(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spread."""
    return items[:: max(1, len(items) // count)][:count]


@torch.no_grad()
def read_tokens(teacher: Teacher, images: Tensor) -> dict[str, Tensor]:
    """Gray images [B, 3, S, S] in -1..1 -> {block number: patch tokens [B, N, D]} at four depths, on the CPU."""
    vit = teacher.backbone
    device = next(vit.parameters()).device
    chosen = sorted({math.ceil(teacher.depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})
    parts = [
        vit.forward_intermediates(
            normalize_input(part.to(device), teacher.mean, teacher.std),
            indices=chosen,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        for part in torch.split(images, 20)
    ]
    return {
        str(block + 1): torch.cat([part[place] for part in parts]).float().cpu() for place, block in enumerate(chosen)
    }


def orientation(image: Tensor, patch: int) -> Tensor:
    """Coherence times (cos, sin) of twice the dominant angle of every patch, [B, N, 2]; structure tensor."""
    dy, dx = difference(image[:, :1])
    xx, yy, xy = (F.avg_pool2d(t, patch).flatten(1) for t in (dx * dx, dy * dy, dx * dy))  # [B, N]
    return torch.stack([(xx - yy), 2 * xy], -1) / (xx + yy + 1e-4)[..., None]


def edges(image: Tensor, patch: int) -> Tensor:
    """Gradient magnitude in 4 x 4 parts of every patch, [B, N, 16]."""
    dy, dx = difference(image[:, :1])
    return patchify(F.avg_pool2d((dx * dx + dy * dy).sqrt(), patch // 4), 4)


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
    path = start + 0.5 * torch.stack([angle.sin(), angle.cos()]).cumsum(-1)  # [2, count, number, points], pixels
    y, x = path.long().clamp(0, SIZE - 1)
    inside = ((path >= 0) & (path < SIZE)).all(0)
    bright = (torch.rand(count, number, 1, generator=draws) * 0.7 + 0.3).expand(-1, -1, points) * inside
    line = torch.zeros(count, SIZE * SIZE)
    line.scatter_reduce_(1, (y * SIZE + x).flatten(1), bright.flatten(1), "amax")
    line = F.max_pool2d(line.view(count, 1, SIZE, SIZE), 3, 1, 1)
    haze = F.interpolate(torch.rand(count, 1, 8, 8, generator=draws), (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    image = 0.5 * F.avg_pool2d(line, 3, 1, 1) + 0.25 * haze + 0.15 * torch.randn(line.shape, generator=draws)
    return (image.clamp(0, 1) * 2 - 1).expand(-1, 3, -1, -1), (line > 0).float()
