"""Tokenizers: an image becomes one vector per block of voxels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.models.layers import fold_voxels
from hpc_neuro.models.tubular import gather

_HIDDEN = 32
"""Channels between image and tube offsets."""


class BlockConv(nn.Conv3d):
    """A convolution whose stride is its kernel, as one matrix product."""

    def __init__(self, dim: int, block: Shape, bias: bool = True) -> None:
        super().__init__(1, dim, block, block, bias=bias)
        self.block = block

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 1, Z, Y, X] -> [B, dim, Z/d, Y/h, X/w]."""
        blocks = fold_voxels(image, self.block).permute(0, 2, 3, 4, 1)  # [B, z, y, x, d*h*w]
        return F.linear(blocks, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class BlockTokenizer(nn.Module):
    """One strided convolution: each block of `patch` voxels becomes one token of `dim` channels."""

    def __init__(self, patch: Shape, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = BlockConv(dim, patch)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 1, Z, Y, X], Z Y X multiples of `patch` -> [B, dim, z, y, x]; InputError for any other shape."""
        check_image(image, self.patch)
        tokens: Tensor = self.proj(image)
        return tokens


class TubularTokenizer(nn.Module):
    """Each token reads three tubes of K voxels, along z, y and x, that cross in the middle voxel of its block.

    token = bias + fuse over axes a of (sum_k line_weight[a, :, k] * tap_k of the tube along a) [+ block(image)]

    `deformable`: a small network sees the image and bends the tubes sideways, at most `extent` voxels per step; its
    last layer starts at zero, so that training starts from straight tubes. `keep_block` adds a strided convolution of
    the whole block, which starts at zero, too. An even K has one tap more before the center than after it.
    """

    def __init__(
        self,
        patch: Shape,
        dim: int,
        taps: int,
        *,
        fuse: Literal["sum", "mean", "concat"] = "sum",
        deformable: bool = True,
        extent: float = 1.0,
        keep_block: bool = True,
    ) -> None:
        super().__init__()
        if taps < 1 or extent <= 0:
            raise InputError(f"a tubular tokenizer has {taps} taps and extent {extent}; want at least 1, above 0")

        self.patch, self.taps, self.extent, self.how = patch, taps, extent, fuse

        self.line_weight = nn.Parameter(torch.empty(3, dim, taps))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.line_weight, std=0.02)

        # A block kernel of zero leaves the first tokens to the tubes.
        self.block = BlockConv(dim, patch, bias=False) if keep_block else None
        if self.block is not None:
            nn.init.zeros_(self.block.weight)

        self.fuse = nn.Conv3d(3 * dim, dim, 1, bias=False) if fuse == "concat" else None
        # A single tap has no step that could bend.
        self.offsets = _offset_net(patch, taps) if deformable and taps > 1 else None

        # A concatenation starts as the sum.
        if self.fuse is not None:
            with torch.no_grad():
                self.fuse.weight.copy_(torch.eye(dim).repeat(1, 3)[:, :, None, None, None])

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 1, Z, Y, X], Z Y X multiples of `patch` -> [B, dim, z, y, x]; InputError for any other shape."""
        check_image(image, self.patch)

        lines = []
        for axis, steps in enumerate(self._steps(image)):
            taps = gather(image, steps, axis)[:, 0]  # [B, K, z, y, x]
            # Taps stand where a convolution has its channels, so that a pointwise one weighs them for all tokens.
            weight = self.line_weight[axis].to(taps.dtype)
            lines.append(F.conv3d(taps, weight[:, :, None, None, None]))  # [B, dim, z, y, x]

        if self.fuse is not None:
            tokens: Tensor = self.fuse(torch.cat(lines, 1))
        else:
            tokens = lines[0] + lines[1] + lines[2]
            tokens = tokens / 3 if self.how == "mean" else tokens

        if self.block is not None:
            tokens = tokens + self.block(image)

        return tokens + self.bias.view(-1, 1, 1, 1)

    def _steps(self, image: Tensor) -> tuple[Tensor, ...]:
        """Steps sideways of the tubes along z, y and x: three [B, 2*(K-1), z, y, x] in voxels, float32 at least."""
        if self.offsets is None:
            grid = (n // p for n, p in zip(image.shape[2:], self.patch, strict=True))
            straight = image.new_zeros(len(image), 2 * (self.taps - 1), *grid)
            return straight, straight, straight

        # Steps are summed along a tube, where the rounding errors of bfloat16 would add up. The bound of each step
        # keeps the tube connected.
        raw = self.offsets(image)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return (self.extent * torch.tanh(raw)).chunk(3, 1)


def _offset_net(patch: Shape, taps: int) -> nn.Sequential:
    """Image -> raw steps of three tubes per block, [B, 3*2*(K-1), z, y, x]; sees a block and its neighbors."""
    # Steps of zero keep the tubes straight at the start.
    last = nn.Conv3d(_HIDDEN, 3 * 2 * (taps - 1), 1)
    last.apply(_zero)

    first, middle = nn.Conv3d(1, _HIDDEN, patch, patch), nn.Conv3d(_HIDDEN, _HIDDEN, 3, padding=1)
    return nn.Sequential(first, nn.GELU(), middle, nn.GELU(), last)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def check_image(image: Tensor, patch: Shape) -> None:
    """InputError unless `image` is [B, 1, Z, Y, X] with Z, Y, X multiples of `patch`."""
    shape = tuple(image.shape)
    if len(shape) != 5 or shape[1] != 1 or any(n % p or n == 0 for n, p in zip(shape[2:], patch, strict=True)):
        raise InputError(
            f"the image is {shape}, want [B, 1, Z, Y, X] with Z, Y, X multiples of the patch {patch}; pad it"
        )
