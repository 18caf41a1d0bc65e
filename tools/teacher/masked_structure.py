"""The `structure` objective: a ViT of the DINOv3 kind predicts the structure of hidden and visible patches.

Positions are rotary, hence relative: the features of a patch do not say where in the image it lies. timm scales the
coordinates to the image, so that training draws the spacing that images of one to eight times the crop's side have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tools.teacher.masked_autoencoder import import_timm, pick
from tools.teacher.photos import Batch
from tools.teacher.structure import describe_structure

ARCH = "vit_tiny_patch16_dinov3_qkvb"

LAYER_SCALE = 0.5
"""Start of the layer scale. DINOv3's own start, 1e-5, takes more steps to leave than a short training has."""


def make_encoder(patch: int, **overrides: int) -> nn.Module:
    """timm's DINOv3 ViT-Tiny without a head; `overrides`: depth."""
    import_timm()
    import timm

    vit: nn.Module = timm.create_model(ARCH, patch_size=patch, img_size=224, num_classes=0, **overrides)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("gamma_1", "gamma_2")):
                parameter.fill_(LAYER_SCALE)
    return vit


class MaskedStructure(nn.Module):
    """A timm ViT, the token of hidden patches, and the linear head that is thrown away after training."""

    target_mean: Tensor
    target_deviation: Tensor

    def __init__(self, vit: nn.Module, patch: int, visible_weight: float, sample: Tensor) -> None:
        """sample: images [n, 3, S, S] in -1..1, whose targets say what the mean and deviation of each is."""
        super().__init__()
        self.vit, self.patch, self.visible_weight = vit, patch, visible_weight
        dim = int(vit.embed_dim)  # type: ignore[arg-type]
        self.hidden = nn.Parameter(torch.zeros(dim))

        groups = describe_structure(to_gray(sample), patch)
        self.sizes = [group.shape[-1] for group in groups]
        targets = torch.cat(groups, -1).flatten(0, 1)
        self.register_buffer("target_mean", targets.mean(0))
        self.register_buffer("target_deviation", targets.std(0) + 1e-3)

        # The first guess is the mean of every target, loss 1.
        self.head = nn.Linear(dim, sum(self.sizes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode(self, batch: Batch, keep: int) -> Tensor:
        """Patch tokens after the final norm, [B, N, D]; all but the first `keep` of each order are hidden."""
        vit = self.vit
        proj: nn.Conv2d = vit.patch_embed.proj  # type: ignore[union-attr,assignment]
        tokens = proj(batch.image).flatten(2).mT  # [B, N, D]

        is_hidden = torch.zeros_like(batch.order, dtype=torch.bool).scatter(1, batch.order[:, keep:], True)
        tokens = torch.where(is_hidden[..., None], self.hidden.to(tokens.dtype), tokens)

        prefix: list[Tensor] = [vit.cls_token, vit.reg_token]  # type: ignore[list-item]
        tokens = torch.cat([*(token.expand(len(tokens), -1, -1) for token in prefix), tokens], 1)
        rotation = rotate_by(batch.y, batch.x, vit.rope.periods)  # type: ignore[union-attr,arg-type]
        for block in vit.blocks:  # type: ignore[union-attr]
            tokens = block(tokens, rope=rotation)
        encoded: Tensor = vit.norm(tokens)  # type: ignore[operator]
        return encoded[:, -batch.order.shape[1] :]

    def forward(self, batch: Batch, keep: int) -> Tensor:
        """Squared error as a share of the targets' variance, mean over the groups of targets; a scalar.

        The error of a visible token counts `visible_weight` times that of a hidden one.
        """
        groups = describe_structure(to_gray(batch.target), self.patch)
        wanted = (torch.cat(groups, -1) - self.target_mean) / self.target_deviation
        guess = self.head(self.encode(batch, keep)).float()

        errors = (guess - wanted).square().split(self.sizes, -1)
        error = torch.stack([group.mean(-1) for group in errors]).mean(0)  # [B, N]
        hidden, visible = pick_error(error, batch.order[:, keep:]), pick_error(error, batch.order[:, :keep])
        return (hidden + self.visible_weight * visible) / (1 + self.visible_weight)


def pick_error(error: Tensor, index: Tensor) -> Tensor:
    """Mean of error [B, N] at index [B, K]; a scalar."""
    return pick(error[..., None], index).mean()


def to_gray(image: Tensor) -> Tensor:
    """[B, 3, S, S] in -1..1 -> [B, 1, S, S] in 0..1."""
    return (image.mean(1, keepdim=True) + 1) / 2


def rotate_by(y: Tensor, x: Tensor, periods: Tensor) -> Tensor:
    """timm's rotary embedding of token coordinates y, x [B, N], in half sides of an image -> [B, 1, N, 2 * head]."""
    angles = 2 * math.pi * torch.stack([y, x], -1)[..., None] / periods  # [B, N, 2, head / 4]
    angles = angles.flatten(2).repeat(1, 1, 2)  # [B, N, head]
    return torch.cat([angles.sin(), angles.cos()], -1)[:, None]
