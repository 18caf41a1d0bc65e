"""A plain vision transformer over 3D tokens, with timm's names so that a 2D teacher's blocks fit by name.

Dosovitskiy et al., ICLR 2021; registers: Darcet et al., ICLR 2024; layer scale: Touvron et al., ICCV 2021; drop path:
Huang et al., ECCV 2016; rotary positions: Simeoni et al. (DINOv3), arXiv 2508.10104.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpc_neuro.core.geometry import Shape

_DEPTH_AMPLITUDE = 0.1
"""Amplitude of the depth code at the start; learned 2D tables of DINO teachers have a standard deviation near 0.1."""
# Ratio of the longest to the shortest rotary period, DINOv3's.
TEMPERATURE = 100.0


class Attention(nn.Module):
    """Multi-head self-attention by torch's fused kernel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """x [B, N, C]; rotation [2, M, C/heads] (sine, cosine) of the last M tokens, or None -> [B, N, C]."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # each [B, h, N, c/h]

        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)

        x = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, c))
        return y


class Mlp(nn.Module):
    """Two layers with GELU, four times wider inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class LayerScale(nn.Module):
    """A learnt factor per channel on a branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return x * self.gamma


class DropPath(nn.Module):
    """In training, drop a sample's whole branch with probability `rate` and scale the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> [B, ...]."""
        if not self.training or self.rate == 0:
            return x

        # One draw per sample drops its branch whole. The others are scaled up, as evaluation drops none.
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each with layer scale and drop path."""

    def __init__(self, dim: int, heads: int, eps: float, layer_scale: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()

        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """x [B, N, C], rotation as in Attention -> [B, N, C]."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotation)))
        y: Tensor = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return y


class ViT3D(nn.Module):
    """Transformer blocks over a token grid of any size.

    Positions `grid`: a learned 2D table `pos_embed` [1, H, W, C], resampled to the token grid and shared over depth,
    plus a learned depth table `depth_embed` [1, D, C] that starts as sines of the depth from the middle, so that the
    transformer can order slices from the first step. A grid of depth 1 sees the 2D table alone.
    Positions `rotary`: 3D rotary, no table.
    Class and register tokens carry no position of their own (a teacher's is folded into them).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        registers: int = 0,
        class_token: bool = True,
        positions: str = "grid",
        grid: Shape = (8, 14, 14),
        layer_scale: bool = False,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.depth, self.heads, self.checkpointing = dim, depth, heads, checkpointing

        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.prefix = registers + class_token

        # Rotary positions turn queries and keys, and need no table.
        learnt = positions == "grid"
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid[1:], dim)) if learnt else None
        self.depth_embed = nn.Parameter(torch.zeros(1, grid[0], dim)) if learnt else None

        # Deeper blocks are dropped more often, because early features serve all later blocks.
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, norm_eps, layer_scale, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

        # Constructors of the layers draw torch's start, which is not that of a transformer.
        self.apply(_start)

    def forward(self, tokens: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """tokens [B, C, z, y, x] -> (last block's map, {layer: map}), maps after the final norm, [B, C, z, y, x]."""
        b, c, *grid = tokens.shape
        shape = (grid[0], grid[1], grid[2])
        x = tokens.flatten(2).transpose(1, 2)  # [B, N, C]

        if self.pos_embed is not None and self.depth_embed is not None:
            x = x + grid_positions(self.pos_embed, self.depth_embed, shape).to(x.dtype)

        # Class and register tokens come first, in timm's order.
        prefix = [t.expand(b, -1, -1).to(x.dtype) for t in (self.cls_token, self.reg_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1)

        # The angles depend on the grid of the crop. They leave out the prefix, which has no position.
        rotation = None if self.pos_embed is not None else rotary(shape, self.dim // self.heads).to(x.device)

        maps: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            # Without gradients nothing is kept, so that a recomputation would save nothing.
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)

            # The decoder needs the last map, whatever layers were asked for.
            if index in layers or index == self.depth - 1:
                maps[index] = self.norm(x)[:, self.prefix :].transpose(1, 2).reshape(b, c, *shape)

        return maps[self.depth - 1], {i: maps[i] for i in layers}


def _start(module: nn.Module) -> None:
    """The start of a linear layer and of the transformer's tokens, which its layers' constructors do not know."""
    if isinstance(module, nn.Linear):
        fill_parameter(module.weight, nn.init.trunc_normal_, std=0.02)
        nn.init.zeros_(module.bias)

    if isinstance(module, ViT3D):
        for token in (module.cls_token, module.reg_token, module.pos_embed):
            if token is not None:
                fill_parameter(token, nn.init.trunc_normal_, std=0.02)

        if module.depth_embed is not None:
            fill_parameter(module.depth_embed, _write_depth_code)


def _write_depth_code(table: Tensor) -> Tensor:
    """Fill `table` [1, D, C] with sines of the depth from the middle, `_DEPTH_AMPLITUDE` high.

    They are odd about the middle: reversed slices get other codes, and a grid resampled to depth 1 gets zero.
    """
    _, depth, channels = table.shape
    octaves = torch.arange(channels) / max(channels - 1, 1)

    # The periods go from four slices to twice the table.
    period = 4.0 * (2.0 * depth / 4.0) ** octaves
    offset = torch.arange(depth)[:, None] - (depth - 1) / 2

    # A code that is equal in all channels would be lost in the next layer norm.
    sign = 1.0 - 2.0 * (torch.arange(channels) % 2)

    return table.copy_(_DEPTH_AMPLITUDE * sign * torch.sin(2 * math.pi * offset / period))


@torch.no_grad()
def fill_parameter(parameter: Tensor, how: Callable[..., Tensor], **knobs: float) -> None:
    """Fill a parameter by one of `nn.init`, with numbers that do not depend on the device it lies on.

    To be called by `Module.apply`, around which ZeRO-3 gathers a layer's parameters that it has shared out already.
    """
    # A meta tensor holds nothing to fill, and torch's way to do so would import its compiler (1.4 s).
    if parameter.is_meta:
        return

    # Generators of other devices would draw other numbers.
    parameter.copy_(how(torch.empty(parameter.shape), **knobs))


def resample_plane(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """Position table [1, H, W, C] -> [1, *size, C]: bicubic, antialiased, as timm does; untouched where it fits."""
    if plane.shape[1:3] == size:
        return plane
    table = plane.float().permute(0, 3, 1, 2)
    return F.interpolate(table, size=size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)


def grid_positions(plane: Tensor, depth: Tensor, shape: Shape) -> Tensor:
    """plane [1, H, W, C] and depth [1, D, C] resampled to the token grid `shape` and added -> [1, z*y*x, C].

    In the plane bicubic, along depth linear.
    """
    z, y, x = shape
    plane = resample_plane(plane, (y, x))
    # A table that fits stays as it is, bit for bit.
    if depth.shape[1] != z:
        depth = F.interpolate(depth.float().transpose(1, 2), size=z, mode="linear").transpose(1, 2)
    return (plane[:, None] + depth[:, :, None, None]).flatten(1, 3)


def rotary(shape: Shape, head_dim: int) -> Tensor:
    """Sine and cosine of 3D rotary positions for a token grid -> [2, z*y*x, head_dim] float32.

    A quarter of the channel pairs turns with y, a quarter with x, at DINOv3's periods; coordinates are token centers
    scaled to [-1, 1] per axis. Depth, in units of the longer in-plane axis, is added to the angle of every second
    frequency and taken from the others, oppositely for y and x. So a grid of depth 1 gets exactly the teacher's 2D
    rotation, no channel is taken from it, and still no two 3D displacements look alike.
    """
    quarter = head_dim // 4
    period = TEMPERATURE ** (torch.arange(quarter) * 2 / (head_dim // 2))  # [quarter]
    sign = 1.0 - 2.0 * (torch.arange(quarter) % 2)  # [quarter]

    _, y, x = shape
    unit = (2 / max(y, x), 2 / y, 2 / x)
    axes = [(torch.arange(n) + 0.5 - n / 2) * u for n, u in zip(shape, unit, strict=True)]
    cz, cy, cx = (c.reshape(-1, 1) for c in torch.meshgrid(*axes, indexing="ij"))  # each [N, 1]

    angle = 2 * math.pi * torch.cat([(cy + sign * cz) / period, (cx - sign * cz) / period], dim=1)  # [N, head_dim / 2]
    # The pairs (i, i + c/2) that `rotate` turns share an angle.
    angle = angle.repeat(1, 2)
    return torch.stack([angle.sin(), angle.cos()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn channel pairs (i, i + c/2) of the last M tokens of x [B, h, N, c] by rotation [2, M, c], in float32."""
    sine, cosine = rotation
    # Prefix tokens have no position and stay as they are.
    head, tail = x[:, :, : -len(sine)], x[:, :, -len(sine) :].float()

    first, second = tail.chunk(2, dim=-1)
    turned = tail * cosine + torch.cat([-second, first], dim=-1) * sine

    return torch.cat([head, turned.to(x.dtype)], dim=2)
