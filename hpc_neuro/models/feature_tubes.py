"""Deformable tubes on encoder features, as a residual branch.

    y = x + gain * expand(sum over axes a of tube_conv_a(reduce(x)))

A small network bends the tubes. `gain` starts at zero, so that a student with tubes starts as the one without, and the
bends start at zero, so that the tubes start straight. The idea of a chained, deformable kernel is Dynamic Snake
Convolution's (Qi et al., ICCV 2023); placing it on features beside the block kernel is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpc_neuro.models.config import FeatureTubesConfig
from hpc_neuro.models.layers import Conv3d, Downsample, Gain, init_zero
from hpc_neuro.models.tubular import tube_conv
from hpc_neuro.models.vit3d import fill_parameter

_POINT = (1, 1, 1)


class FeatureTubes(nn.Module):
    """Residual branch of three tube convolutions, along z, y and x."""

    def __init__(self, channels: int, cfg: FeatureTubesConfig) -> None:
        super().__init__()
        self.taps, self.extent = cfg.taps, cfg.extent

        # The cost of the tubes grows with the square of their channels, so that they run on few.
        self.reduce = Downsample(channels, cfg.width, _POINT)
        self.expand = Downsample(cfg.width, channels, _POINT)
        self.weight = nn.Parameter(torch.empty(3, cfg.width, cfg.width, cfg.taps))

        # A gain of zero leaves the features as they are: a student with tubes starts as the one without.
        self.gain = Gain(channels, 0.0)

        # Bends of zero keep the tubes straight at the start.
        self.offsets = Conv3d(cfg.width, 3 * 2 * (cfg.taps - 1), (3, 3, 3)) if cfg.kind == "deformable" else None
        if self.offsets is not None:
            self.offsets.apply(init_zero)

        # ZeRO-3 gathers a sharded module's parameters around `apply`.
        self.apply(_init_tubes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Z, Y, X] -> the same shape."""
        narrow = self.reduce(x)

        branch = torch.stack(
            [
                tube_conv(narrow, steps, self.weight[axis].to(narrow.dtype), None, axis)
                for axis, steps in enumerate(self.bend(narrow))
            ]
        ).sum(0)

        y: Tensor = x + self.gain(self.expand(branch))
        return y

    def bend(self, x: Tensor) -> tuple[Tensor, ...]:
        """Sideways steps of the tubes along z, y and x: three [B, 2*(K-1), Z, Y, X] in voxels of `x`, float32."""
        if self.offsets is None:
            # Straight tubes run through the same operator, so that the two kinds differ in the bends alone.
            straight = x.new_zeros(len(x), 2 * (self.taps - 1), *x.shape[2:], dtype=torch.float32)
            return straight, straight, straight

        # Steps are summed along a tube, where the rounding errors of bfloat16 would add up. The bound of each step
        # keeps the tube connected.
        raw = self.offsets(x).to(torch.promote_types(x.dtype, torch.float32))
        return (self.extent * torch.tanh(raw)).chunk(3, 1)


def _init_tubes(module: nn.Module) -> None:
    """A weight of unit gain: its three axes and K taps are summed."""
    if isinstance(module, FeatureTubes):
        width, taps = module.weight.shape[2:]
        fill_parameter(module.weight, nn.init.normal_, std=(3 * width * taps) ** -0.5)
