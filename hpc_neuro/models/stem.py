"""The full-resolution convolutional path: its levels, its blocks, and the stem whose features skip to the decoder.

A strided token loses thin neurites (a voxel wide in a block of 8 x 16 x 16), so every decoder reads the stem's features
at strides 1, 2 and 4. All normalisation is over the channels of one voxel, never over space: a voxel's features then do
not depend on where a crop or block ends.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_neuro.core.geometry import Shape

LAYOUT = torch.channels_last_3d  # twice as fast as plain order for these few channels


def level_strides(patch: Shape) -> list[Shape]:
    """Strides of the stem's levels, finest first: each halves an axis where the patch allows it, coarsest axes last.

    (8, 16, 16) -> (1, 1, 1), (1, 2, 2), (2, 4, 4): z, half as finely tokenised as y and x, keeps its resolution longer.
    At most two steps; a step that would halve nothing (odd patches) is left out.
    """
    levels: list[Shape] = [(1, 1, 1)]
    for _ in range(2):
        left = over(patch, levels[-1])
        step = [2 if n % 2 == 0 and 2 * n > max(left) else 1 for n in left]
        if max(step) > 1:
            levels.append(times(levels[-1], step))
    return levels


def times(a: Sequence[int], b: Sequence[int]) -> Shape:
    """Elementwise product of two triples."""
    z, y, x = (i * j for i, j in zip(a, b, strict=True))
    return z, y, x


def over(a: Sequence[int], b: Sequence[int]) -> Shape:
    """Elementwise quotient of two triples that divide."""
    z, y, x = (i // j for i, j in zip(a, b, strict=True))
    return z, y, x


def level_steps(strides: Sequence[Shape]) -> list[Shape]:
    """From each level to the next coarser one."""
    return [over(b, a) for a, b in itertools.pairwise(strides)]


def level_kernels(strides: Sequence[Shape]) -> list[Shape]:
    """Kernel of each level's block: 3 along the axes the next level halves, 1 along one it keeps; 3 at the coarsest.

    An axis that is kept is coarse, and is convolved at the next level at the same resolution for a quarter of the cost.
    """
    kernels: list[Shape] = []
    for step in level_steps(strides):
        z, y, x = (3 if s > 1 else 1 for s in step)
        kernels.append((z, y, x))
    return [*kernels, (3, 3, 3)]


class VoxelNorm(nn.LayerNorm):
    """Layer norm over the channels of each voxel."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Z, Y, X] -> the same shape; on CUDA, with Triton, in autocast's dtype where autocast is on."""
        rows = x.permute(0, 2, 3, 4, 1)
        if x.is_cuda and x.dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
            from hpc_neuro.models import voxel_norm_triton  # imported late: a CPU build of torch comes without triton

            normed = voxel_norm_triton.layer_norm(rows, self.weight, self.bias, self.eps)
        else:
            normed = super().forward(rows)
        return normed.permute(0, 4, 1, 2, 3)


class ConvBlock(nn.Module):
    """x + leaky ReLU of a convolution of the normalised x."""

    def __init__(self, channels: int, kernel: Shape = (3, 3, 3)) -> None:
        super().__init__()
        self.norm = VoxelNorm(channels)
        z, y, x = (k // 2 for k in kernel)
        self.conv = nn.Conv3d(channels, channels, kernel, padding=(z, y, x))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Z, Y, X] -> the same shape."""
        return x + F.leaky_relu(self.conv(self.norm(x)))


class FirstConv(nn.Module):
    """A 3x3x3 convolution of one channel, run as a 2D one whose input channels are the three neighbouring slices.

    The same numbers as nn.Conv3d(1, C, 3, padding=1), without torch's slow CPU path for single-channel volumes.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 3, 3, 3))  # [C, z, y, x]
        self.bias = nn.Parameter(torch.zeros(channels))
        if not self.weight.is_meta:  # as in vit3d.fill_parameter
            nn.init.kaiming_normal_(self.weight, nonlinearity="leaky_relu")

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 1, Z, Y, X] -> [B, C, Z, Y, X]."""
        b, _, z, y, x = image.shape
        padded = F.pad(image[:, 0], (0, 0, 0, 0, 1, 1))  # [B, Z + 2, Y, X]
        slices = padded.unfold(1, 3, 1).permute(0, 1, 4, 2, 3).reshape(b * z, 3, y, x)
        out = F.conv2d(slices.contiguous(memory_format=torch.channels_last), self.weight, self.bias, padding=1)
        return out.permute(0, 2, 3, 1).reshape(b, z, y, x, -1).permute(0, 4, 1, 2, 3)


class Stem(nn.Module):
    """Image -> features at each level's stride: one convolution at full resolution, one block at each coarser level."""

    def __init__(self, strides: Sequence[Shape], channels: Sequence[int]) -> None:
        super().__init__()
        steps, kernels = level_steps(strides), level_kernels(strides)
        self.first = FirstConv(channels[0])
        self.down = nn.ModuleList(
            nn.Conv3d(channels[i], channels[i + 1], kernel_size=step, stride=step) for i, step in enumerate(steps)
        )
        self.blocks = nn.ModuleList(ConvBlock(channels[i + 1], kernels[i + 1]) for i in range(len(steps)))

    def forward(self, image: Tensor) -> list[Tensor]:
        """image [B, 1, Z, Y, X] -> per level [B, c, Z/s, Y/s, X/s]."""
        x = F.leaky_relu(self.first(image).contiguous(memory_format=LAYOUT))
        levels = [x]
        for down, block in zip(self.down, self.blocks, strict=True):
            x = block(down(x))
            levels.append(x)
        return levels
