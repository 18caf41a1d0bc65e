"""Layer norm over the few channels of a voxel by Triton kernels: a program takes a block of rows, not one row.

Torch's kernel gives every row a thread block of its own, most of it idle for 8 or 48 numbers. Arithmetic is float32.
Gradients of weight and bias are partial sums of a bounded number of programs, added by torch: the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's language, not Python: their arguments are pointers and numbers without Python types.

_TILE = 2048
"""Numbers of a tile, rows times channels."""
_PROGRAMS = 1024
"""Programs that share the gradients of weight and bias: enough to fill a GPU, few partial sums."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.layer_norm` over the last axis: x [..., C] float32 or shorter, weight and bias [C] -> [..., C].

    The result has the dtype of x, under CUDA autocast autocast's (torch's own gives float32 there): the convolution
    that follows would round to it anyway.
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    result: Tensor = _LayerNorm.apply(x, weight, bias, eps, dtype)  # type: ignore[no-untyped-call]
    return result


class _LayerNorm(torch.autograd.Function):
    """Keeps x and weight; mean and deviation are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        out = torch.empty_like(x, dtype=dtype)
        count, tile = _tile(x)
        if out.numel():
            with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
                norm_kernel[(triton.cdiv(count, tile["BR"]),)](x, weight, bias, out, count, eps, **tile)
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        count, tile = _tile(x)
        programs = min(triton.cdiv(count, tile["BR"]), _PROGRAMS)
        grad_x = torch.empty_like(x) if of_x else None
        parts = torch.empty(2, programs, x.shape[-1], dtype=torch.float32, device=x.device)
        if x.numel():
            target = x if grad_x is None else grad_x  # any pointer if unwanted
            wanted = {"ROWS": of_x, "WEIGHT": of_weight or of_bias}
            with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
                norm_grad_kernel[(programs,)](
                    x, weight, grad.contiguous(), target, parts[0], parts[1], count, ctx.eps, **wanted, **tile
                )
        grad_weight = parts[0].sum(0).to(weight.dtype) if of_weight else None
        grad_bias = parts[1].sum(0).to(ctx.bias_dtype) if of_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _tile(x: Tensor) -> tuple[int, dict[str, int]]:
    """Rows of x, and compile-time arguments of the kernels."""
    channels = x.shape[-1]
    block = int(triton.next_power_of_2(channels))
    return x.numel() // channels, {"C": channels, "BR": max(1, _TILE // block), "BC": block}


@triton.jit
def _normalize_rows(x, at, live, eps, C: tl.constexpr):
    """(x - mean) / deviation [BR, BC] of the rows at these places, zero where not live, and 1 / deviation [BR, 1]."""
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    value = tl.where(live, value - (tl.sum(value, 1) / C)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / C + eps)
    return value * scale[:, None], scale[:, None]


@triton.jit
def norm_kernel(x, weight, bias, out, count, eps, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """out = normalised x * weight + bias. One program: BR rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    at = row[:, None] * C + c[None, :]
    live = (row < count)[:, None] & (c < C)[None, :]
    value, _ = _normalize_rows(x, at, live, eps, C)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out + at, value * w[None, :] + b[None, :], mask=live)


@triton.jit
def norm_grad_kernel(
    x,
    weight,
    grad,
    grad_rows,
    grad_weight,
    grad_bias,
    count,
    eps,
    ROWS: tl.constexpr,
    WEIGHT: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradient of the rows, and a program's share [C] of weight's and bias's. One program: every n-th block of rows."""
    c = tl.arange(0, BC)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((BR, BC), dtype=tl.float32)
    of_bias = tl.zeros((BR, BC), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(count, BR), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BR + tl.arange(0, BR)
        at = row[:, None] * C + c[None, :]
        live = (row < count)[:, None] & (c < C)[None, :]
        value, scale = _normalize_rows(x, at, live, eps, C)
        g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
        if WEIGHT:
            of_weight += g * value
            of_bias += g
        if ROWS:
            g *= w
            along = (tl.sum(g * value, 1) / C)[:, None]
            tl.store(grad_rows + at, scale * (g - (tl.sum(g, 1) / C)[:, None] - value * along), mask=live)
    if WEIGHT:
        place = tl.program_id(0) * C + c
        tl.store(grad_weight + place, tl.sum(of_weight, 0), mask=c < C)
        tl.store(grad_bias + place, tl.sum(of_bias, 0), mask=c < C)
