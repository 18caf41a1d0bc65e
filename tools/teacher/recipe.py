"""What decides the weights of a pre-trained teacher, and how far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

DATA = "natural photographs, one per ImageNet class where 1,000 are given; not distributed with the weights"

METHOD = (
    "masked autoencoder (He et al., CVPR 2022) with a convolutional decoder; target: pixels normalized per patch; "
    "fixed sine-cosine positions at random offset and spacing; patch embedding started from whitened principal "
    "components; crops of 1/4 to 1 of the tile's side, quarter turns, mirroring, gray with probability 0.8, inversion, "
    "gamma, contrast, noise on the input and not on the target; losses are shares of what the patch mean makes"
)


STRUCTURE_METHOD = (
    "masked prediction of structure (after MaskFeat, Wei et al., CVPR 2022): brightness, bright ridges at three "
    "scales, histograms of gradients and directions in parts of each patch, at hidden patches and, with a smaller "
    "weight, at visible ones; rotary positions whose spacing is that of images one to eight times as wide; patch "
    "embedding started from whitened principal components; gray crops of 1/4 to 1 of the tile's side, quarter turns, "
    "mirroring, inversion, gamma, contrast, a dark field in half of them, noise on the input and not on the targets; "
    "losses are shares of the targets' variance"
)


class BadInput(Exception):
    """Options or files that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the photographs."""

    objective: str = "pixels"
    """`pixels`: masked autoencoder; `structure`: ridges, gradients and brightness of hidden and visible patches."""
    patch: int = 16
    crop: int = 128
    """Side of a training crop, pixels; at most 224."""
    side: int = 256
    """Side of the decoded square tiles, pixels."""
    batch: int = 64
    part: int = 16
    """Images that one CPU worker takes at a time."""
    mask: float = 0.75
    """Share of hidden patches."""
    visible_weight: float = 0.5
    """Weight of a visible patch's error beside a hidden one's; objective `structure`."""
    width: int = 128
    """Decoder width, a multiple of 32."""
    decoder: int = 2
    """Decoder blocks."""
    depth: int = 12
    """Encoder blocks; timm's ViT-Tiny has 12, fewer are for tests."""
    lr: float = 1e-3
    decay: float = 0.05
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises."""
    held: int = 100
    """Photographs never trained on, for the probes."""
    seed: int = 0
    steps: int = 0
    """Budget in steps, or 0."""
    minutes: float = 0.0
    """Budget in minutes of training, or 0."""

    @property
    def visible(self) -> int:
        """Patches that the encoder sees."""
        return max(1, round((self.crop // self.patch) ** 2 * (1 - self.mask)))

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))

    def rate(self, progress: float) -> float:
        """Learning rate: linear rise, then half a cosine down to a thousandth."""
        if progress < self.warmup:
            return self.lr * max(progress / self.warmup, 1e-3)
        done = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * max(0.5 * (1 + math.cos(math.pi * done)), 1e-3)


@dataclass
class Progress:
    """What a checkpoint holds besides the tensors."""

    step: int = 0
    seconds: float = 0.0
    """Time spent training, over all sessions."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss since the entry before)."""
    photos: str = ""
    """Digest of the photographs' names and sizes."""
