"""The tube operator by Triton kernels: nothing but the result is written, taps live in registers.

float32 is multiplied in full precision, where it pays by three tf32 products on tensor cores, whose sum is as exact
(by one if `torch.backends.cuda.matmul.allow_tf32` is set). Gradients of values and weights are summed by float32
atomics: their last bits depend on the order of the programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.tubular.torch_impl import Tubes
from hpc_neuro.models.tubular.triton_kernels import (
    conv_kernel,
    input_grad_kernel,
    path_kernel,
    sample_kernel,
    step_grad_kernel,
    weight_grad_kernel,
)

_TUBES = 64
"""Tubes per program that only samples."""
_LINE = 256
"""Tubes per program where there is one number for each."""
TILES = {
    torch.float32: {"conv": (32, 2, 3), "gradient": (32, 2, 3), "weight": (64, 4, 3)},
    torch.bfloat16: {"conv": (64, 4, 3), "gradient": (32, 4, 3), "weight": (64, 4, 3)},
}
"""Tubes, warps and stages per program of the kernels that multiply, for float32 and what is shorter.

As they were fastest on an H100, of few tried; `tools.bench.tune_tubular` tries many.
"""
_PROGRAMS = 1024
"""Programs that share the sum of a weight's gradient: enough to fill a GPU, few enough atomics."""


@dataclass(frozen=True)
class _Plan:
    """What every launch needs, derived from the arguments of `forward`."""

    # One of taps, window and conv.
    mode: str
    batch: int
    # Tubes of a volume.
    count: int
    channels: int
    # Output channels of a convolution.
    width: int
    box: tuple[int, ...]
    # [3, P] int32: along the axis, then across.
    centers: Tensor
    # [B, 2, K, P] float32.
    path: Tensor
    # Matrix [K, C, O] in the dtype of rows, or window [K] float32, or the path where nothing is mixed.
    mix: Tensor
    tiles: dict[str, Any]


def _plan(rows: Tensor, offsets: Tensor, weight: Tensor | None, tubes: Tubes) -> _Plan:
    if offsets.dtype != torch.float32:
        raise InputError(f"the Triton tubes compute in float32, found {offsets.dtype}; use backend='torch'")

    mode = "taps" if weight is None else "window" if weight.ndim == 1 else "conv"

    # Kernels take the tube's own axis first, so that one kernel serves all three.
    order = (tubes.axis, *(a for a in range(3) if a != tubes.axis))
    stride = (tubes.size[1] * tubes.size[2], tubes.size[2], 1)
    voxels = stride[0] * tubes.size[0]

    channels, width = rows.shape[1], weight.shape[0] if weight is not None and mode == "conv" else rows.shape[1]

    # A launch needs a pointer even where nothing is mixed.
    mix = path = _displacements(offsets, tubes)
    if weight is not None:
        mix = weight.permute(2, 1, 0).to(rows.dtype).contiguous() if mode == "conv" else weight.float().contiguous()

    # Offsets of 64 bits take more registers, so that they are compiled in only where they are needed.
    tiles: dict[str, Any] = {"WIDE": rows.numel() >= 2**31, "BC": _block(channels)}
    box = (*(n for a in order for n in (tubes.size[a], stride[a])), voxels)
    centers = tubes.centers[list(order)].int()

    return _Plan(mode, len(offsets), offsets.shape[2], channels, width, box, centers, path, mix, tiles)


def _displacements(offsets: Tensor, tubes: Tubes) -> Tensor:
    batch, _, count = offsets.shape
    path = offsets.new_empty(batch, 2, tubes.taps, count)
    # A grid without programs cannot be launched.
    if path.numel():
        grid = (triton.cdiv(count, _LINE), 2 * batch)
        path_kernel[grid](offsets.contiguous(), path, count, tubes.taps, tubes.half, BP=_LINE)

    return path


def _step_gradient(slope: Tensor, tubes: Tubes) -> Tensor:
    batch, _, _, count = slope.shape
    grad = slope.new_empty(batch, 2 * (tubes.taps - 1), count)
    if grad.numel():
        grid = (triton.cdiv(count, _LINE), 2 * batch)
        step_grad_kernel[grid](slope, grad, count, tubes.taps, tubes.half, BP=_LINE)

    return grad


def _dot(plan: _Plan, kernel: str) -> dict[str, Any]:
    """Compile-time arguments of a kernel that multiplies."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    tubes, warps, stages = TILES[torch.float32 if plan.mix.dtype == torch.float32 else torch.bfloat16][kernel]

    # transposing the weight's operand costs more than tensor cores save
    precision = "tf32" if tf32 else "ieee" if kernel == "weight" else "tf32x3"

    launch = {"num_warps": warps, "num_stages": stages}
    return {**plan.tiles, "BO": _block(plan.width), "PRECISION": precision, "BP": tubes, **launch}


def _block(channels: int) -> int:
    """Channels of a tile: a power of two, at least what a tensor core takes, few enough for the registers."""
    return max(16, min(64, int(triton.next_power_of_2(channels))))


def forward(rows: Tensor, offsets: Tensor, weight: Tensor | None, tubes: Tubes) -> Tensor:
    """`tubular_torch.forward` on CUDA; the result has the dtype of rows. InputError for float64."""
    plan = _plan(rows, offsets, weight, tubes)
    result_width = {"taps": tubes.taps * plan.channels, "window": plan.channels, "conv": plan.width}[plan.mode]
    out = rows.new_empty(plan.batch, plan.count, result_width)
    # A grid without programs cannot be launched.
    if not out.numel():
        return out

    source = (rows, plan.path, plan.centers)
    shape = (plan.box, plan.count, tubes.taps, tubes.half, plan.channels)

    if plan.mode == "conv":
        tiles = _dot(plan, "conv")
        grid = (triton.cdiv(plan.count, tiles["BP"]), plan.batch, triton.cdiv(plan.width, tiles["BO"]))
        conv_kernel[grid](*source, plan.mix, out, *shape, plan.width, **tiles)
    else:
        grid = (triton.cdiv(plan.count, _TUBES), plan.batch, triton.cdiv(plan.channels, plan.tiles["BC"]))
        sample_kernel[grid](*source, plan.mix, out, *shape, WINDOW=plan.mode == "window", BP=_TUBES, **plan.tiles)

    return out


def backward(
    rows: Tensor, offsets: Tensor, weight: Tensor | None, grad: Tensor, tubes: Tubes, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`tubular_torch.backward` on CUDA; gradients are float32."""
    plan, grad = _plan(rows, offsets, weight, tubes), grad.contiguous()

    # Sums are float32, because in bfloat16 a small addend would vanish in a large sum.
    grad_rows = torch.zeros_like(rows, dtype=torch.float32) if needs[0] else None
    grad_path = torch.zeros_like(plan.path) if needs[1] else None
    grad_mix = torch.zeros_like(plan.mix, dtype=torch.float32) if needs[2] else None

    source = (rows, plan.path, plan.centers)
    shape = (tubes.taps, tubes.half, plan.channels, plan.width)

    window = grad_mix if plan.mode == "window" else None
    is_needed = {"ROWS": needs[0], "PATH": needs[1], "WEIGHT": window is not None}

    if grad.numel() and any(is_needed.values()):
        # A launch needs a pointer even where a gradient is unwanted. Any will do.
        outputs = [plan.path if g is None else g for g in (grad_rows, grad_path, window)]
        tiles = _dot(plan, "gradient")
        input_grad_kernel[(triton.cdiv(plan.count, tiles["BP"]) * tubes.taps, plan.batch)](
            *source, plan.mix, grad, *outputs, plan.box, plan.count, *shape, MODE=plan.mode, **is_needed, **tiles
        )

    # The matrix's gradient is a sum over all tubes, so that its kernel has a grid of its own.
    if grad.numel() and grad_mix is not None and window is None:
        tiles = _dot(plan, "weight")
        blocks = triton.cdiv(plan.count, tiles["BP"])
        parts = triton.cdiv(plan.channels, tiles["BC"]) * triton.cdiv(plan.width, tiles["BO"])
        # More programs would fill no more of the GPU, and would cost more atomics.
        share = min(blocks * plan.batch, triton.cdiv(_PROGRAMS, tubes.taps * parts))

        weight_grad_kernel[(tubes.taps, parts, share)](
            *source, grad, grad_mix, plan.box, plan.batch, plan.count, *shape, **tiles
        )

    grad_offsets = None if grad_path is None else _step_gradient(grad_path, tubes)
    if grad_mix is not None and plan.mode == "conv":
        grad_mix = grad_mix.permute(2, 1, 0)

    return grad_rows, grad_offsets, grad_mix
