"""Decoders: from the stem's features and the transformer's tokens to one logit per voxel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hpc_neuro.core.geometry import Shape
from hpc_neuro.models.stem import LAYOUT, ConvBlock, VoxelNorm, level_kernels, level_steps, over, times
from hpc_neuro.models.vit3d import fill_parameter

_PRIOR = 0.01  # share of neurite the untrained student predicts: a rare class starts as rare (RetinaNet, ICCV 2017)


class Head(nn.Module):
    """One logit per voxel from its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        self.linear.apply(_rare)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Z, Y, X] -> [B, 1, Z, Y, X]."""
        y: Tensor = self.linear(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        return y


class Light(nn.Module):
    """LightConfig's network. `layers`: the transformer blocks it reads. `blocks[level]`: finest level first."""

    def __init__(self, dim: int, depth: int, patch: Shape, strides: Sequence[Shape], channels: Sequence[int]) -> None:
        super().__init__()
        self.layers = (depth - 1,)
        self.unfold = _unfold(dim, channels[-1], over(patch, strides[-1]))
        self.up = nn.ModuleList(_unfold(channels[i + 1], channels[i], s) for i, s in enumerate(level_steps(strides)))
        self.blocks = nn.ModuleList(ConvBlock(c, k) for c, k in zip(channels, level_kernels(strides), strict=True))
        self.head = Head(channels[0])

    def forward(self, stem: Sequence[Tensor], tokens: Mapping[int, Tensor]) -> Tensor:
        """stem: per level [B, c, Z/s, Y/s, X/s]; tokens: {layer: [B, C, z, y, x]} -> logits [B, 1, Z, Y, X]."""
        x = stem[-1] + self.unfold(_last(tokens[self.layers[0]]))
        for level in reversed(range(len(stem))):
            x = self.blocks[level](x)
            if level:
                x = stem[level - 1] + self.up[level - 1](x)
        logits: Tensor = self.head(x)
        return logits


class Unetr(nn.Module):
    """UnetrConfig's network: levels go on to the tokens; all but the finest get a hidden state."""

    def __init__(
        self, dim: int, depth: int, patch: Shape, strides: Sequence[Shape], channels: Sequence[int], width: int
    ) -> None:
        super().__init__()
        levels = _levels_to(patch, strides)
        count = len(levels) - 1
        widths = [*channels, *[width] * (len(levels) - len(strides))]
        steps = level_steps(levels)
        self.layers = tuple(max(round(depth * i / count) - 1, 0) for i in range(1, count + 1))  # the last is depth - 1
        self.bottom = nn.Conv3d(dim, widths[-1], 1)
        self.states = nn.ModuleList(_climb(dim, widths[i], steps[i:]) for i in range(1, count))
        self.up = nn.ModuleList(_unfold(widths[i + 1], widths[i], step) for i, step in enumerate(steps))
        self.blocks = nn.ModuleList(nn.Sequential(ConvBlock(w), ConvBlock(w)) for w in widths)
        self.head = Head(widths[0])

    def forward(self, stem: Sequence[Tensor], tokens: Mapping[int, Tensor]) -> Tensor:
        """stem: per level [B, c, Z/s, Y/s, X/s]; tokens: {layer: [B, C, z, y, x]} -> logits [B, 1, Z, Y, X]."""
        x = self.blocks[-1](self.bottom(_last(tokens[self.layers[-1]])))
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
            if level:
                x = x + self.states[level - 1](_last(tokens[self.layers[level - 1]]))
            if level < len(stem):
                x = x + stem[level]
            x = self.blocks[level](x)
        logits: Tensor = self.head(x)
        return logits


class Linear(nn.Module):
    """LinearConfig's network."""

    def __init__(self, dim: int, depth: int, patch: Shape, strides: Sequence[Shape], channels: Sequence[int]) -> None:
        super().__init__()
        self.layers = (depth - 1,)
        self.tokens = _unfold(dim, 1, patch)
        self.skips = nn.ModuleList(_unfold(c, 1, s) for c, s in zip(channels[1:], strides[1:], strict=True))
        self.head = Head(channels[0])

    def forward(self, stem: Sequence[Tensor], tokens: Mapping[int, Tensor]) -> Tensor:
        """stem: per level [B, c, Z/s, Y/s, X/s]; tokens: {layer: [B, C, z, y, x]} -> logits [B, 1, Z, Y, X]."""
        logits: Tensor = self.head(stem[0]) + self.tokens(tokens[self.layers[0]])
        for skip, x in zip(self.skips, stem[1:], strict=True):
            logits = logits + skip(x)
        return logits


def _rare(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if name == "bias":
            nn.init.constant_(parameter, math.log(_PRIOR / (1 - _PRIOR)))
        else:
            fill_parameter(parameter, nn.init.normal_, std=0.1)


def _unfold(channels: int, out: int, step: Shape) -> nn.ConvTranspose3d:
    """Each position becomes a block of `step` finer ones, by one matrix: no overlap."""
    return nn.ConvTranspose3d(channels, out, kernel_size=step, stride=step)


def _levels_to(patch: Shape, strides: Sequence[Shape]) -> list[Shape]:
    """The stem's strides continued to the tokens' by the smallest prime factor left on each axis."""
    levels = list(strides)
    while levels[-1] != patch:
        step = [next((f for f in range(2, n + 1) if n % f == 0), 1) for n in over(patch, levels[-1])]
        levels.append(times(levels[-1], step))
    return levels


def _climb(dim: int, width: int, steps: Sequence[Shape]) -> nn.Sequential:
    """From the tokens up to a level, `width` channels all the way, normalised between the steps."""
    parts: list[nn.Module] = []
    for i, step in enumerate(reversed(steps)):
        parts += [_unfold(width if i else dim, width, step), VoxelNorm(width), nn.LeakyReLU()]
    return nn.Sequential(*parts)


def _last(tokens: Tensor) -> Tensor:
    return tokens.contiguous(memory_format=LAYOUT)
