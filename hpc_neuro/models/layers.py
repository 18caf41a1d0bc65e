"""Layers of the convolutional path: pixel shuffling, convolutions, residual blocks.

The path never holds a tensor at full resolution with few channels: voxels are folded into channels first and unfolded
last (pixel shuffle, Shi et al., CVPR 2016). Tensors lie channels last in memory, which torch's kernels want on CPUs and
on tensor cores alike. Strided and transposed convolutions do not overlap, so each is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_neuro.core.geometry import Shape
from hpc_neuro.models.vit3d import fill_parameter

LAYOUT = torch.channels_last_3d
SLOPE = 0.1
"""Slope of the leaky ReLU below zero."""


def fold_voxels(x: Tensor, block: Shape) -> Tensor:
    """[B, C, Z, Y, X] -> [B, C*prod(block), Z/bz, Y/by, X/bx], channels last; channel c*prod(block) + voxel."""
    b, c, *size = x.shape
    bz, by, bx = block
    z, y, x_ = (n // k for n, k in zip(size, block, strict=True))

    # Channels come last before the copy, so that the result lies channels last in memory without a second one.
    cells = x.reshape(b, c, z, bz, y, by, x_, bx).permute(0, 2, 4, 6, 1, 3, 5, 7)  # [B, z, y, x, C, bz, by, bx]
    return cells.reshape(b, z, y, x_, c * math.prod(block)).permute(0, 4, 1, 2, 3)


def unfold_voxels(x: Tensor, block: Shape) -> Tensor:
    """The inverse of `fold_voxels`: [B, C*prod(block), z, y, x] -> [B, C, z*bz, y*by, x*bx], channels last."""
    b, c, z, y, x_ = x.shape
    bz, by, bx = block
    channels = c // math.prod(block)

    # Channels stay last in the copy, as in `fold_voxels`.
    cells = x.permute(0, 2, 3, 4, 1).reshape(b, z, y, x_, channels, bz, by, bx)
    voxels = cells.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, z, bz, y, by, x, bx, C]
    return voxels.reshape(b, z * bz, y * by, x_ * bx, channels).permute(0, 4, 1, 2, 3)


class Conv3d(nn.Conv3d):
    """A convolution of odd kernel that keeps the size; zeros outside the volume.

    On a CPU it calls oneDNN itself where no gradient is wanted: for a batch of one and small inputs torch chooses a
    kernel of its own that is four times slower.
    """

    def __init__(self, inputs: int, outputs: int, kernel: Shape) -> None:
        self._pad = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        super().__init__(inputs, outputs, kernel, padding=self._pad)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Z, Y, X] -> [B, O, Z, Y, X]."""
        if _wants_onednn(x):
            weight = self.weight.contiguous(memory_format=LAYOUT)
            y: Tensor = torch.mkldnn_convolution(
                x, weight, self.bias, self._pad, self.stride, self.dilation, self.groups
            )
            return y

        if _needs_float32(x, self.kernel_size[0]):
            with torch.autocast(x.device.type, enabled=False):
                bias = None if self.bias is None else self.bias.float()
                exact: Tensor = self._conv_forward(x.float(), self.weight.float(), bias)
                return exact.bfloat16()
        return super().forward(x)


class Downsample(nn.Linear):
    """A convolution whose kernel is its stride: each block of voxels becomes one position."""

    def __init__(self, inputs: int, outputs: int, block: Shape) -> None:
        super().__init__(inputs * math.prod(block), outputs)
        self.block = block
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Z, Y, X] -> [B, O, Z/bz, Y/by, X/bx]."""
        folded = fold_voxels(x, self.block).permute(0, 2, 3, 4, 1)
        y: Tensor = super().forward(folded)
        return y.permute(0, 4, 1, 2, 3)


class Upsample(nn.Linear):
    """A transposed convolution whose kernel is its stride: each position becomes a block of voxels."""

    def __init__(self, inputs: int, outputs: int, block: Shape) -> None:
        super().__init__(inputs, outputs * math.prod(block))
        self.block = block
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, z, y, x] -> [B, O, z*bz, y*by, x*bx]."""
        y: Tensor = super().forward(x.permute(0, 2, 3, 4, 1))
        return unfold_voxels(y.permute(0, 4, 1, 2, 3), self.block)


class ResampleLinear(nn.Module):
    """Features on one grid of cells -> other channels on another grid, by area; grids start at the same corner.

    A cell of the new grid gets the mean of the old cells that it overlaps, weighted by the overlap.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.linear.apply(_init_weights)

    def forward(self, x: Tensor, cell: Shape, grid: Sequence[int], new_cell: Shape) -> Tensor:
        """x [B, C, z, y, x] of cells of `cell` voxels -> [B, O, *grid] of cells of `new_cell` voxels."""
        for axis in range(3):
            # Overlaps of boxes are products over the axes, so that one small matrix per axis suffices.
            weights = overlap_weights(x.shape[2], cell[axis], grid[axis], new_cell[axis], x.device)

            # The axis that is resampled moves to the end, so that the next one is axis 2 again.
            x = torch.tensordot(x, weights.to(x.dtype), dims=([2], [1]))

        y: Tensor = self.linear(x.permute(0, 2, 3, 4, 1))
        return y.permute(0, 4, 1, 2, 3)


def overlap_weights(count: int, cell: int, new_count: int, new_cell: int, device: torch.device | str = "cpu") -> Tensor:
    """[new_count, count] float32: share of each new cell that each old one covers; rows sum to 1.

    A new cell beyond the last old one takes the last.
    """
    index = torch.arange(count, device=device)
    starts, stops = index * cell, (index + 1) * cell
    # The old cells may end before the new grid. The last one reaches to its end, so that rows sum to 1.
    stops = torch.where(index == count - 1, max(count * cell, new_count * new_cell), stops)
    new_starts = torch.arange(new_count, device=device)[:, None] * new_cell

    overlap = torch.minimum(new_starts + new_cell, stops) - torch.maximum(new_starts, starts)
    return overlap.clamp(min=0) / new_cell


class ConvLayer(nn.Module):
    """A 3 x 3 x 3 convolution and a leaky ReLU, without a norm.

    Norms over a crop depend on how much of it is dark: they amplify the noise of empty windows, and cost time. The path
    is shallow and its blocks are residual, so that it trains without them.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv3d(inputs, outputs, (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Z, Y, X] -> [B, O, Z, Y, X]."""
        return F.leaky_relu(self.conv(x), SLOPE)


class ResidualBlock(nn.Module):
    """x + a chain of convolutions, each with its leaky ReLU."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ConvLayer(channels, channels) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Z, Y, X] -> the same shape."""
        y: Tensor = x + self.layers(x)
        return y


class Gain(nn.Module):
    """A learned factor per channel."""

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Z, Y, X] -> the same shape."""
        return x * self.weight.to(x.dtype).view(-1, 1, 1, 1)


def init_zero(layer: nn.Module) -> None:
    """Set all parameters of `layer` to zero; for `Module.apply`."""
    for parameter in layer.parameters(recurse=False):
        nn.init.zeros_(parameter)


def _needs_float32(x: Tensor, depth: int) -> bool:
    """Whether a kernel of `depth` slices must not be trained in bfloat16.

    On CPUs with AVX-512, oneDNN (as of torch 2.13) reads memory that was never written when it computes the gradient of
    a bfloat16 kernel deeper than one slice, for an input two slices deep: the gradient may be infinite.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or x.shape[2] != 2 or depth == 1:
        return False
    is_cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return is_cast or x.dtype == torch.bfloat16


def _wants_onednn(x: Tensor) -> bool:
    """Whether a convolution of `x` is for oneDNN, called past torch's choice of kernel."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    return plain and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _init_weights(layer: nn.Module) -> None:
    """He's initialization; through `Module.apply`, around which ZeRO-3 gathers a sharded layer."""
    if isinstance(layer, (nn.Conv3d, nn.Linear)):
        fill_parameter(layer.weight, nn.init.kaiming_normal_, a=SLOPE)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
