"""The tube operator as Triton kernels: nothing but the result is written, taps live in registers.

A program holds a block of tubes and walks along their taps. Values are read channels last, so that a neighbour is one
contiguous read. bfloat16 and float16 values are interpolated in float32 and multiplied on tensor cores; float32 is
multiplied in full precision unless `torch.backends.cuda.matmul.allow_tf32` says otherwise. Gradients of values are
summed by float32 atomics: their last bits depend on the order of the programs.

Shapes as in `tubular_torch`: rows [B*N, C], path [B, 2, K, P] displacements, centres [3, P] (along the axis first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpc_neuro.models.tubular_torch import Tubes, displacements, step_gradient
from hpc_neuro.schema import InputError

_TUBES = 64
"""Tubes per program."""
_PROGRAMS = 1024
"""Programs that share the sum of a weight's gradient: enough to fill a GPU, few enough atomics."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's language, not Python: their arguments are pointers and numbers without Python types.


@triton.jit
def _neighbours(path, centres, box, b, k, p, live, tubes, taps, half, WIDE: tl.constexpr):
    """Rows of the four neighbours of tap k of tubes p, and the two fractions; see `tubular_torch._corners`."""
    na, sa, nu, su, nv, sv, voxels = box  # size and stride along the axis and across it, voxels of a volume
    at = (b * 2 * taps + k).to(tl.int64) * tubes
    after = ((b * 2 + 1) * taps + k).to(tl.int64) * tubes
    mu = tl.load(path + at + p, mask=live, other=0.0)
    mv = tl.load(path + after + p, mask=live, other=0.0)
    wu = tl.floor(mu)
    wv = tl.floor(mv)
    along = tl.load(centres + p, mask=live, other=0) + (k - half)
    # a displacement beyond all bounds still ends at the right face
    u = tl.load(centres + tubes + p, mask=live, other=0) + tl.clamp(wu, -1073741824.0, 1073741824.0).to(tl.int32)
    v = tl.load(centres + 2 * tubes + p, mask=live, other=0) + tl.clamp(wv, -1073741824.0, 1073741824.0).to(tl.int32)
    start = tl.minimum(tl.maximum(along, 0), na - 1) * sa
    if WIDE:
        start = start.to(tl.int64) + b.to(tl.int64) * voxels
    else:
        start += b * voxels
    u0 = start + tl.minimum(tl.maximum(u, 0), nu - 1) * su
    u1 = start + tl.minimum(tl.maximum(u + 1, 0), nu - 1) * su
    v0 = tl.minimum(tl.maximum(v, 0), nv - 1) * sv
    v1 = tl.minimum(tl.maximum(v + 1, 0), nv - 1) * sv
    return u0 + v0, u0 + v1, u1 + v0, u1 + v1, mu - wu, mv - wv


@triton.jit
def _read(rows, r, c, channels, mask):
    return tl.load(rows + r[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tap(rows, r00, r01, r10, r11, fu, fv, c, channels, mask):
    """Bilinear value of a block of taps, [tubes, channels] float32."""
    low = _read(rows, r00, c, channels, mask) * (1 - fv)[:, None] + _read(rows, r01, c, channels, mask) * fv[:, None]
    high = _read(rows, r10, c, channels, mask) * (1 - fv)[:, None] + _read(rows, r11, c, channels, mask) * fv[:, None]
    return low * (1 - fu)[:, None] + high * fu[:, None]


@triton.jit
def _sample_kernel(
    rows, path, centres, window, out, box, tubes, taps, half, channels,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Taps [B, P, K, C], or their weighted sum [B, P, C]. One program: a block of tubes, a block of channels."""
    b = tl.program_id(1)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    live = p < tubes
    mask = live[:, None] & (c < channels)[None, :]
    total = tl.zeros((BP, BC), dtype=tl.float32)
    place = (b.to(tl.int64) * tubes + p)[:, None]
    for k in range(taps):
        r00, r01, r10, r11, fu, fv = _neighbours(path, centres, box, b, k, p, live, tubes, taps, half, WIDE)
        tap = _tap(rows, r00, r01, r10, r11, fu, fv, c, channels, mask)
        if WINDOW:
            total += tap * tl.load(window + k)
        else:
            tl.store(out + (place * taps + k) * channels + c[None, :], tap, mask=mask)
    if WINDOW:
        tl.store(out + place * channels + c[None, :], total, mask=mask)


@triton.jit
def _conv_kernel(
    rows, path, centres, matrix, out, box, tubes, taps, half, channels, width,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Convolution [B, P, O] with matrix [K, C, O]. One program: a block of tubes, a block of output channels."""
    b = tl.program_id(1)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    o = tl.program_id(2) * BO + tl.arange(0, BO)
    live = p < tubes
    total = tl.zeros((BP, BO), dtype=tl.float32)
    for k in range(taps):
        r00, r01, r10, r11, fu, fv = _neighbours(path, centres, box, b, k, p, live, tubes, taps, half, WIDE)
        for first in range(0, channels, BC):
            c = first + tl.arange(0, BC)
            tap = _tap(rows, r00, r01, r10, r11, fu, fv, c, channels, live[:, None] & (c < channels)[None, :])
            at = (k * channels + c)[:, None] * width + o[None, :]
            part = tl.load(matrix + at, mask=(c < channels)[:, None] & (o < width)[None, :], other=0.0)
            total = tl.dot(tap.to(part.dtype), part, total, input_precision=PRECISION)
    place = (b.to(tl.int64) * tubes + p)[:, None] * width + o[None, :]
    tl.store(out + place, total, mask=live[:, None] & (o < width)[None, :])


@triton.jit
def _input_grad_kernel(
    rows, path, centres, weight, grad, grad_rows, grad_path, grad_window, box, tubes, taps, half, channels, width,
    MODE: tl.constexpr, ROWS: tl.constexpr, PATH: tl.constexpr, WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Gradients of values, displacements and window. One program: one tap of a block of tubes, all channels."""
    k = tl.program_id(2)
    b = tl.program_id(1)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    live = p < tubes
    r00, r01, r10, r11, fu, fv = _neighbours(path, centres, box, b, k, p, live, tubes, taps, half, WIDE)
    gu, gv = 1 - fu, 1 - fv
    place = (b.to(tl.int64) * tubes + p)[:, None]
    slope_u = tl.zeros((BP,), dtype=tl.float32)
    slope_v = tl.zeros((BP,), dtype=tl.float32)
    scale = 1.0
    if MODE == "window":
        scale = tl.load(weight + k)
    for first in range(0, channels, BC):
        c = first + tl.arange(0, BC)
        mask = live[:, None] & (c < channels)[None, :]
        if MODE == "conv":
            below = tl.zeros((BP, BC), dtype=tl.float32)
            for start in range(0, width, BO):
                o = start + tl.arange(0, BO)
                above = tl.load(grad + place * width + o[None, :], mask=live[:, None] & (o < width)[None, :], other=0.0)
                at = (k * channels + c)[None, :] * width + o[:, None]
                part = tl.load(weight + at, mask=(c < channels)[None, :] & (o < width)[:, None], other=0.0)
                below = tl.dot(above.to(part.dtype), part, below, input_precision=PRECISION)
        elif MODE == "window":
            below = tl.load(grad + place * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            below = tl.load(grad + (place * taps + k) * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if PATH or WEIGHT:
            x00 = _read(rows, r00, c, channels, mask)
            x01 = _read(rows, r01, c, channels, mask)
            x10 = _read(rows, r10, c, channels, mask)
            x11 = _read(rows, r11, c, channels, mask)
            if PATH:
                slope_u += scale * tl.sum(below * ((x10 - x00) * gv[:, None] + (x11 - x01) * fv[:, None]), 1)
                slope_v += scale * tl.sum(below * ((x01 - x00) * gu[:, None] + (x11 - x10) * fu[:, None]), 1)
            if WEIGHT:
                tap = (x00 * gv[:, None] + x01 * fv[:, None]) * gu[:, None]
                tap += (x10 * gv[:, None] + x11 * fv[:, None]) * fu[:, None]
                tl.atomic_add(grad_window + k, tl.sum(tl.sum(below * tap, 1), 0), sem="relaxed")
        if ROWS:
            below *= scale
            col = c[None, :]
            tl.atomic_add(grad_rows + r00[:, None] * channels + col, below * (gu * gv)[:, None], mask, sem="relaxed")
            tl.atomic_add(grad_rows + r01[:, None] * channels + col, below * (gu * fv)[:, None], mask, sem="relaxed")
            tl.atomic_add(grad_rows + r10[:, None] * channels + col, below * (fu * gv)[:, None], mask, sem="relaxed")
            tl.atomic_add(grad_rows + r11[:, None] * channels + col, below * (fu * fv)[:, None], mask, sem="relaxed")
    if PATH:
        tl.store(grad_path + (b * 2 * taps + k).to(tl.int64) * tubes + p, slope_u, mask=live)
        tl.store(grad_path + ((b * 2 + 1) * taps + k).to(tl.int64) * tubes + p, slope_v, mask=live)


@triton.jit
def _weight_grad_kernel(
    rows, path, centres, grad, grad_matrix, box, batch, tubes, taps, half, channels, width,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Gradient of the matrix [K, C, O]. One program: one tap, a tile of the matrix, every n-th block of tubes."""
    k = tl.program_id(0)
    c = (tl.program_id(1) // tl.cdiv(width, BO)) * BC + tl.arange(0, BC)
    o = (tl.program_id(1) % tl.cdiv(width, BO)) * BO + tl.arange(0, BO)
    total = tl.zeros((BC, BO), dtype=tl.float32)
    per_volume = tl.cdiv(tubes, BP)
    for block in range(tl.program_id(2), batch * per_volume, tl.num_programs(2)):
        b = block // per_volume
        p = (block % per_volume) * BP + tl.arange(0, BP)
        live = p < tubes
        r00, r01, r10, r11, fu, fv = _neighbours(path, centres, box, b, k, p, live, tubes, taps, half, WIDE)
        tap = _tap(rows, r00, r01, r10, r11, fu, fv, c, channels, live[:, None] & (c < channels)[None, :])
        place = (b.to(tl.int64) * tubes + p)[:, None] * width + o[None, :]
        above = tl.load(grad + place, mask=live[:, None] & (o < width)[None, :], other=0.0)
        total = tl.dot(tl.trans(tap).to(above.dtype), above, total, input_precision=PRECISION)
    at = (k * channels + c)[:, None] * width + o[None, :]
    tl.atomic_add(grad_matrix + at, total, (c < channels)[:, None] & (o < width)[None, :], sem="relaxed")


@dataclass(frozen=True)
class _Plan:
    """What every launch needs, derived from the arguments of `forward`."""

    mode: str  # taps, window or conv
    batch: int
    count: int  # tubes of a volume
    channels: int
    width: int  # output channels of a convolution
    box: tuple[int, ...]
    centres: Tensor  # [3, P] int32: along the axis, then across
    path: Tensor  # [B, 2, K, P] float32
    mix: Tensor  # matrix [K, C, O] in the dtype of rows, or window [K] float32, or the path where nothing is mixed
    tiles: dict[str, Any]


def _plan(rows: Tensor, offsets: Tensor, weight: Tensor | None, tubes: Tubes) -> _Plan:
    if offsets.dtype != torch.float32:
        raise InputError(f"the Triton tubes compute in float32, found {offsets.dtype}; use backend='torch'")
    mode = "taps" if weight is None else "window" if weight.ndim == 1 else "conv"
    order = (tubes.axis, *(a for a in range(3) if a != tubes.axis))
    stride = (tubes.size[1] * tubes.size[2], tubes.size[2], 1)
    voxels = stride[0] * tubes.size[0]
    channels, width = rows.shape[1], weight.shape[0] if weight is not None and mode == "conv" else rows.shape[1]
    mix = path = displacements(offsets, tubes)
    if weight is not None:
        mix = weight.permute(2, 1, 0).to(rows.dtype).contiguous() if mode == "conv" else weight.float().contiguous()
    tiles: dict[str, Any] = {"WIDE": rows.numel() >= 2**31, "BP": _TUBES, "BC": _block(channels)}
    box = (*(n for a in order for n in (tubes.size[a], stride[a])), voxels)
    centres = tubes.centres[list(order)].int()
    return _Plan(mode, len(offsets), offsets.shape[2], channels, width, box, centres, path, mix, tiles)


def _dot(plan: _Plan) -> dict[str, Any]:
    """Compile-time arguments of kernels that multiply."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return {**plan.tiles, "BO": _block(plan.width), "PRECISION": "tf32" if tf32 else "ieee"}


def _block(channels: int) -> int:
    """Channels of a tile: a power of two, at least what a tensor core takes, few enough for the registers."""
    return max(16, min(64, int(triton.next_power_of_2(channels))))


def forward(rows: Tensor, offsets: Tensor, weight: Tensor | None, tubes: Tubes) -> Tensor:
    """`tubular_torch.forward` on CUDA; the result has the dtype of rows. InputError for float64."""
    plan = _plan(rows, offsets, weight, tubes)
    result_width = {"taps": tubes.taps * plan.channels, "window": plan.channels, "conv": plan.width}[plan.mode]
    out = rows.new_empty(plan.batch, plan.count, result_width)
    if not out.numel():
        return out
    source = (rows, plan.path, plan.centres)
    shape = (plan.box, plan.count, tubes.taps, tubes.half, plan.channels)
    blocks = triton.cdiv(plan.count, _TUBES)
    if plan.mode == "conv":
        tiles = _dot(plan)
        grid = (blocks, plan.batch, triton.cdiv(plan.width, tiles["BO"]))
        _conv_kernel[grid](*source, plan.mix, out, *shape, plan.width, **tiles)
    else:
        grid = (blocks, plan.batch, triton.cdiv(plan.channels, plan.tiles["BC"]))
        _sample_kernel[grid](*source, plan.mix, out, *shape, WINDOW=plan.mode == "window", **plan.tiles)
    return out


def backward(
    rows: Tensor, offsets: Tensor, weight: Tensor | None, grad: Tensor, tubes: Tubes, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`tubular_torch.backward` on CUDA; gradients are float32."""
    plan, grad = _plan(rows, offsets, weight, tubes), grad.contiguous()
    grad_rows = torch.zeros_like(rows, dtype=torch.float32) if needs[0] else None
    grad_path = torch.zeros_like(plan.path) if needs[1] else None
    grad_mix = torch.zeros_like(plan.mix, dtype=torch.float32) if needs[2] else None
    source = (rows, plan.path, plan.centres)
    shape = (tubes.taps, tubes.half, plan.channels, plan.width)
    blocks = triton.cdiv(plan.count, _TUBES)
    window = grad_mix if plan.mode == "window" else None
    wanted = {"ROWS": needs[0], "PATH": needs[1], "WEIGHT": window is not None}
    if grad.numel() and any(wanted.values()):
        outputs = [plan.path if g is None else g for g in (grad_rows, grad_path, window)]  # any pointer where unwanted
        _input_grad_kernel[(blocks, plan.batch, tubes.taps)](
            *source, plan.mix, grad, *outputs, plan.box, plan.count, *shape, MODE=plan.mode, **wanted, **_dot(plan)
        )
    if grad.numel() and grad_mix is not None and window is None:
        tiles = _dot(plan)
        parts = triton.cdiv(plan.channels, tiles["BC"]) * triton.cdiv(plan.width, tiles["BO"])
        share = min(blocks * plan.batch, triton.cdiv(_PROGRAMS, tubes.taps * parts))
        _weight_grad_kernel[(tubes.taps, parts, share)](
            *source, grad, grad_mix, plan.box, plan.batch, plan.count, *shape, **tiles
        )
    grad_offsets = None if grad_path is None else step_gradient(grad_path, tubes)
    if grad_mix is not None and plan.mode == "conv":
        grad_mix = grad_mix.permute(2, 1, 0)
    return grad_rows, grad_offsets, grad_mix
