"""The objective `structure`: a ViT with rotary positions predicts the structure of hidden and visible patches.

Rotary positions are relative: the features of a patch do not say where in the image it lies. timm scales the
coordinates to the image, so that training draws the spacing that images of one to eight times the crop's side have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hpc_neuro.models.teacher import Teacher, create_vit
from hpc_neuro.teacher.augment import darken_field
from hpc_neuro.teacher.config import TRAINED_SIZE, TaskConfig
from hpc_neuro.teacher.objective import Batch, Network, Objective, pick, uniform
from hpc_neuro.teacher.patch_embedding import get_projection, scale_embedding
from hpc_neuro.teacher.structure_targets import describe_structure

LAYER_SCALE = 0.5
"""Start of the layer scale. DINOv3's own start, 1e-5, takes more steps to leave than a short training has."""

WIDEST = 8
"""Side of the widest image whose spacing of tokens is trained, in crops."""


class StructureObjective(Objective):
    """Ridges, gradients, directions and brightness of hidden and visible patches."""

    name = "structure"
    arch = "vit_tiny_patch16_dinov3_qkvb"
    method = (
        "masked prediction of structure (after MaskFeat, Wei et al., CVPR 2022): brightness, bright ridges at three "
        "scales, histograms of gradients and directions in parts of each patch, at hidden patches and, with a smaller "
        "weight, at visible ones; rotary positions whose spacing is that of images one to eight times as wide; patch "
        "embedding started from random directions; gray crops of 1/4 to 1 of the tile's side, quarter "
        "turns, mirroring, inversion, gamma, contrast, a dark field in half of them, noise on the input and not on the "
        "targets; losses are shares of the targets' variance"
    )

    def make_encoder(self, patch: int, depth: int) -> nn.Module:
        """timm's DINOv3 ViT-Tiny without a head."""
        vit: nn.Module = create_vit(self.arch, patch_size=patch, img_size=TRAINED_SIZE, depth=depth)
        with torch.no_grad():
            for name, parameter in vit.named_parameters():
                if name.endswith(("gamma_1", "gamma_2")):
                    parameter.fill_(LAYER_SCALE)
        return vit

    def start_patches(self, vit: nn.Module, patches: Tensor) -> None:
        """Random directions."""
        scale_embedding(vit, patches)

    def find_obstacle(self, teacher: Teacher) -> str | None:
        """Its positions have to be those of DINOv3."""
        if getattr(getattr(teacher.backbone, "rope", None), "periods", None) is None:
            return "`structure` needs the rotary positions of DINOv3"
        return None

    def make_network(self, vit: nn.Module, patch: int, task: TaskConfig, sample: Tensor) -> Network:
        """The ViT with a linear head, whose first guess is the mean of every target in the sample."""
        return MaskedStructure(vit, patch, task.visible_weight, sample)

    def tone_photographs(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Gray, and half of them bright structures on black."""
        return darken_field(images, draws)

    def limit_noise(self, images: Tensor) -> Tensor:
        """Slices of a store end at their black and white levels."""
        return images.clamp(-1, 1)

    def draw_coordinates(self, draws: torch.Generator, count: int, n: int, patch: int) -> tuple[Tensor, Tensor]:
        """Coordinates in half sides of an image that is one to eight crops wide."""
        tokens = n * uniform(draws, count, 0.0, math.log(WIDEST)).exp()  # along the side of that image
        axis = 2 * (torch.arange(n) + 0.5 - n / 2) / tokens[:, None]  # [count, n]
        y = axis[:, :, None].expand(-1, -1, n).flatten(1)
        return y, axis[:, None, :].expand(-1, n, -1).flatten(1)


class MaskedStructure(Network):
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
        proj = get_projection(vit)
        tokens = proj(batch.image).flatten(2).mT  # [B, N, D]

        is_hidden = torch.zeros_like(batch.order, dtype=torch.bool).scatter(1, batch.order[:, keep:], True)
        tokens = torch.where(is_hidden[..., None], self.hidden.to(tokens.dtype), tokens)

        # DINOv3 has a class token and registers; a ViT may lack either.
        prefix: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]  # type: ignore[misc]
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
