"""The convolutional path of the student: an encoder of three levels and the decoder that mirrors it.

    image [B, 1, Z, Y, X]
      fold voxels into channels      unshuffle (1, 2, 2)
      encoder 0    16 channels       stride (1, 2, 2)    ------------------- skip ---- decoder 0 -> logits
      encoder 1    32 channels       stride (2, 4, 4)    ------ skip ---- decoder 1
      encoder 2    64 channels       stride (4, 8, 8)    -- + tokens -- decoder 2

Channels are those of size `tiny`. Level 0 holds most of the voxels and has one convolution in the encoder; the others
have a residual block of two. The decoder has a residual block of one on the two finer levels. Skips are added, which
keeps the decoder as narrow as the encoder. Nothing is normalized, so that a voxel's features depend on its neighborhood
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from hpc_neuro.core.geometry import Shape
from hpc_neuro.models.config import FeatureTubesConfig
from hpc_neuro.models.feature_tubes import FeatureTubes
from hpc_neuro.models.layers import (
    ConvLayer,
    Downsample,
    ResidualBlock,
    Upsample,
    fold_voxels,
    unfold_voxels,
)
from hpc_neuro.models.vit3d import fill_parameter

HALVE: Shape = (2, 2, 2)
"""From each level to the next coarser one."""
ENCODER_LAYERS, DECODER_LAYERS = 2, 1
"""Convolutions of a residual block."""
LAYERS = (1 + DECODER_LAYERS, ENCODER_LAYERS + DECODER_LAYERS, ENCODER_LAYERS)
"""Convolutions of 3 x 3 x 3 at each level, encoder and decoder, finest first."""
_PRIOR = 0.01
"""Share of neurite that the untrained student predicts: a rare class starts as rare (RetinaNet, ICCV 2017)."""


def level_strides(unshuffle: Shape) -> list[Shape]:
    """Strides of the three levels in voxels, finest first: (1, 2, 2) -> (1, 2, 2), (2, 4, 4), (4, 8, 8)."""
    z, y, x = unshuffle
    return [(z * n, y * n, x * n) for n in (1, 2, 4)]


class Encoder(nn.Module):
    """Image -> features at each level's stride."""

    def __init__(self, unshuffle: Shape, channels: Sequence[int], tubes: FeatureTubesConfig | None = None) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.unshuffle = unshuffle

        # The first convolution sees folded voxels, so that no tensor of few channels is at full resolution.
        self.first = ConvLayer(math.prod(unshuffle), fine)
        self.down = nn.ModuleList([Downsample(fine, middle, HALVE), Downsample(middle, coarse, HALVE)])
        self.blocks = nn.ModuleList([ResidualBlock(middle, ENCODER_LAYERS), ResidualBlock(coarse, ENCODER_LAYERS)])

        self.tubes = FeatureTubes(middle, tubes) if tubes else None

    def forward(self, image: Tensor) -> list[Tensor]:
        """image [B, 1, Z, Y, X] -> per level [B, c, Z/sz, Y/sy, X/sx], finest first.

        An image that the coarsest stride does not divide is padded with zeros at its far ends.
        """
        # Each level halves the one before, so that a size which suits the coarsest level suits all.
        coarsest = level_strides(self.unshuffle)[-1]
        missing = [-n % s for n, s in zip(image.shape[2:], coarsest, strict=True)]
        if any(missing):
            image = F.pad(image, [pad for n in reversed(missing) for pad in (0, n)])

        fine = self.first(fold_voxels(image, self.unshuffle))
        middle = self.blocks[0](self.down[0](fine))

        # The gain of the tubes starts at zero: a student with tubes starts as the one without.
        if self.tubes is not None:
            middle = self.tubes(middle)

        coarse = self.blocks[1](self.down[1](middle))
        return [fine, middle, coarse]


class Decoder(nn.Module):
    """Features of all levels -> one logit per voxel."""

    def __init__(self, unshuffle: Shape, channels: Sequence[int]) -> None:
        super().__init__()
        fine, middle, coarse = channels

        self.unshuffle = unshuffle
        self.up = nn.ModuleList([Upsample(middle, fine, HALVE), Upsample(coarse, middle, HALVE)])
        self.blocks = nn.ModuleList([ResidualBlock(fine, DECODER_LAYERS), ResidualBlock(middle, DECODER_LAYERS)])

        # One position stands for a block of voxels, so that the head has a logit for each of them.
        self.head = nn.Linear(fine, math.prod(unshuffle))
        self.head.apply(_init_head)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Per level [B, c, Z/sz, Y/sy, X/sx], finest first -> logits [B, 1, Z, Y, X]."""
        x = features[2]
        for level in (1, 0):
            x = self.blocks[level](features[level] + self.up[level](x))

        # A linear layer works on the last axis, where the channels lie in memory already.
        logits = self.head(x.permute(0, 2, 3, 4, 1))
        return unfold_voxels(logits.permute(0, 4, 1, 2, 3), self.unshuffle)


def _init_head(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if name == "bias":
            # The untrained logits lie near the bias, so that the bias is the log odds of the prior.
            nn.init.constant_(parameter, math.log(_PRIOR / (1 - _PRIOR)))
        else:
            fill_parameter(parameter, nn.init.normal_, std=0.1)
