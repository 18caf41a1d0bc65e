"""What a teacher learns from: the interface of an objective, and what a training step sees.

To add an objective, write a subclass of `Objective` in a file of its own, and name it in `objectives.OBJECTIVES` and in
`TeacherTrainConfig`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hpc_neuro.models.teacher import Teacher
from hpc_neuro.teacher.config import TaskConfig


@dataclass(frozen=True)
class Batch:
    """What one training step sees."""

    image: Tensor
    """[B, 3, S, S] in -1..1, noise added."""
    target: Tensor
    """[B, 3, S, S] the same without noise: the teacher learns to see through it."""
    order: Tensor
    """[B, N] tokens in random order, the visible ones first."""
    y: Tensor
    """[B, N] token coordinates, in the unit of the objective's positions."""
    x: Tensor

    def split(self, size: int) -> list[Batch]:
        """Parts of `size` images, the last may be smaller."""
        columns = (torch.split(t, size) for t in (self.image, self.target, self.order, self.y, self.x))
        return [Batch(*part) for part in zip(*columns, strict=True)]


class Network(nn.Module, ABC):
    """A timm ViT, `vit`, and what predicts from it, which is dropped after training."""

    vit: nn.Module

    @abstractmethod
    def forward(self, batch: Batch, keep: int) -> Tensor:
        """The loss of a batch, a scalar: 1 for the first guess. The first `keep` tokens of each order are visible."""


class Objective(ABC):
    """What differs between the ways in which a teacher learns."""

    name: ClassVar[str]
    arch: ClassVar[str]
    """timm's architecture of a new teacher."""
    method: ClassVar[str]
    """What is done, for the card."""

    @abstractmethod
    def make_encoder(self, patch: int, depth: int) -> nn.Module:
        """A new ViT as it starts."""

    @abstractmethod
    def start_patches(self, vit: nn.Module, patches: Tensor) -> None:
        """Set the patch embedding of a new ViT, from patches [n, P] of its images in -1..1."""

    @abstractmethod
    def find_obstacle(self, teacher: Teacher) -> str | None:
        """Why a teacher cannot go on learning by this objective; None where it can."""

    @abstractmethod
    def make_network(self, vit: nn.Module, patch: int, task: TaskConfig, sample: Tensor) -> Network:
        """The ViT with what predicts from it. sample: images [n, 3, S, S] in -1..1 as training shows them."""

    def tone_photographs(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Change the brightness of photographs [B, 3, S, S] in -1..1 to that of what the teacher will look at."""
        return images

    def limit_noise(self, images: Tensor) -> Tensor:
        """Noisy images [B, 3, S, S] as the teacher sees them."""
        return images

    @abstractmethod
    def draw_coordinates(self, draws: torch.Generator, count: int, n: int, patch: int) -> tuple[Tensor, Tensor]:
        """Coordinates y, x [count, n * n] of n x n tokens at a place and a spacing that the teacher may meet."""

    def measure_extra(
        self, network: Network, untrained: Network, images: Tensor, task: TaskConfig
    ) -> dict[str, dict[str, float]]:
        """More figures for the card, by name, from held-out images [B, 3, S, S] in -1..1; {} without any."""
        return {}


def uniform(draws: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """`count` numbers in low..high."""
    return torch.rand(count, generator=draws) * (high - low) + low


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D], index [B, K] -> [B, K, D]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def patchify(image: Tensor, patch: int) -> Tensor:
    """image [B, C, H, W] -> [B, N, C * patch * patch], pixels in the order of the patch convolution's weights."""
    return torch.nn.functional.unfold(image, patch, stride=patch).transpose(1, 2)
