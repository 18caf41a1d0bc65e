"""Triton kernels of the tube operator; `tubular_triton` launches them.

A program holds a block of BP tubes and walks along their taps. Values are read channels last, BC channels at a time, so
that a neighbor is one contiguous read. What is not float32 is interpolated in float32 and multiplied on tensor cores.

Shapes as in `tubular_torch`: rows [B*N, C], path [B, 2, K, P] displacements, centers [3, P] (along the axis first).
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's language, not Python: their arguments are pointers and numbers without Python types.


@triton.jit
def path_kernel(steps, path, tubes, taps, half, BP: tl.constexpr):
    """`tubular_torch.displacements`. One program: a block of tubes along one of the two axes across them."""
    # The offsets of a large batch do not fit in 32 bits.
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    live = p < tubes

    total = tl.zeros((BP,), dtype=tl.float32)
    steps += row * (taps - 1) * tubes + p
    path += row * taps * tubes + p

    # The center never moves.
    tl.store(path + half * tubes, total, mask=live)

    # Each tap hangs on the one before it, so that sums run outwards from the center.
    for k in range(half + 1, taps):
        total += tl.load(steps + (k - 1) * tubes, mask=live, other=0.0)
        tl.store(path + k * tubes, total, mask=live)

    total = tl.zeros((BP,), dtype=tl.float32)
    for k in range(1, half + 1):
        total += tl.load(steps + (half - k) * tubes, mask=live, other=0.0)
        tl.store(path + (half - k) * tubes, total, mask=live)


@triton.jit
def step_grad_kernel(slope, grad, tubes, taps, half, BP: tl.constexpr):
    """`tubular_torch.step_gradient`. One program: as in `path_kernel`."""
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    live = p < tubes
    total = tl.zeros((BP,), dtype=tl.float32)

    slope += row * taps * tubes + p
    grad += row * (taps - 1) * tubes + p

    # A step moves its own tap and all beyond it, so that sums run inwards from the ends.
    for k in range(0, half):
        total += tl.load(slope + k * tubes, mask=live, other=0.0)
        tl.store(grad + k * tubes, total, mask=live)

    total = tl.zeros((BP,), dtype=tl.float32)
    for k in range(1, taps - half):
        total += tl.load(slope + (taps - k) * tubes, mask=live, other=0.0)
        tl.store(grad + (taps - k - 1) * tubes, total, mask=live)


@triton.jit
def _neighbors(path, centers, box, b, k, p, live, tubes, taps, half, WIDE: tl.constexpr):
    """Rows of the four neighbors of tap k of tubes p, and the two fractions; see `tubular_torch._corners`."""
    # Size and stride along the axis and across it, and the voxels of a volume.
    na, sa, nu, su, nv, sv, voxels = box

    at = (b * 2 * taps + k).to(tl.int64) * tubes
    after = ((b * 2 + 1) * taps + k).to(tl.int64) * tubes
    mu = tl.load(path + at + p, mask=live, other=0.0)
    mv = tl.load(path + after + p, mask=live, other=0.0)

    # The fraction is split off before the center is added: a float32 coordinate would lose it in a large volume.
    wu = tl.floor(mu)
    wv = tl.floor(mv)

    along = tl.load(centers + p, mask=live, other=0) + (k - half)

    # a displacement beyond all bounds still ends at the right face
    u = tl.load(centers + tubes + p, mask=live, other=0) + tl.clamp(wu, -1073741824.0, 1073741824.0).to(tl.int32)
    v = tl.load(centers + 2 * tubes + p, mask=live, other=0) + tl.clamp(wv, -1073741824.0, 1073741824.0).to(tl.int32)

    start = tl.minimum(tl.maximum(along, 0), na - 1) * sa

    # Offsets of large inputs overflow 32 bits.
    if WIDE:
        start = start.to(tl.int64) + b.to(tl.int64) * voxels
    else:
        start += b * voxels

    # Beyond a face both neighbors are the face's voxel, so that the slope is zero there.
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
def sample_kernel(
    rows, path, centers, window, out, box, tubes, taps, half, channels,
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
        r00, r01, r10, r11, fu, fv = _neighbors(path, centers, box, b, k, p, live, tubes, taps, half, WIDE)
        tap = _tap(rows, r00, r01, r10, r11, fu, fv, c, channels, mask)

        # A window is summed in registers, so that its taps are never written.
        if WINDOW:
            total += tap * tl.load(window + k)
        else:
            tl.store(out + (place * taps + k) * channels + c[None, :], tap, mask=mask)

    if WINDOW:
        tl.store(out + place * channels + c[None, :], total, mask=mask)


@triton.jit
def conv_kernel(
    rows, path, centers, matrix, out, box, tubes, taps, half, channels, width,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Convolution [B, P, O] with matrix [K, C, O]. One program: a block of tubes, a block of output channels."""
    b = tl.program_id(1)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    o = tl.program_id(2) * BO + tl.arange(0, BO)
    live = p < tubes

    total = tl.zeros((BP, BO), dtype=tl.float32)

    # Taps are made between the products, so that they are never written.
    for k in range(taps):
        r00, r01, r10, r11, fu, fv = _neighbors(path, centers, box, b, k, p, live, tubes, taps, half, WIDE)
        for first in range(0, channels, BC):
            c = first + tl.arange(0, BC)
            tap = _tap(rows, r00, r01, r10, r11, fu, fv, c, channels, live[:, None] & (c < channels)[None, :])

            at = (k * channels + c)[:, None] * width + o[None, :]
            part = tl.load(matrix + at, mask=(c < channels)[:, None] & (o < width)[None, :], other=0.0)
            total = tl.dot(tap.to(part.dtype), part, total, input_precision=PRECISION)

    place = (b.to(tl.int64) * tubes + p)[:, None] * width + o[None, :]
    tl.store(out + place, total, mask=live[:, None] & (o < width)[None, :])


@triton.jit
def _scatter(into, r, share, values, c, channels, mask):
    """Add share of values [tubes, channels] to rows r; whole voxels have three neighbors without a share."""
    tl.atomic_add(
        into + r[:, None] * channels + c[None, :], values * share[:, None], mask & (share != 0)[:, None], sem="relaxed"
    )


# One kernel for three modes: each mode's branch is decided when the kernel is compiled.
@triton.jit
def input_grad_kernel(  # noqa: C901
    rows, path, centers, weight, grad, grad_rows, grad_path, grad_window, box, tubes, taps, half, channels, width,
    MODE: tl.constexpr, ROWS: tl.constexpr, PATH: tl.constexpr, WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Gradients of values, displacements and window. One program: one tap of a block of tubes, all channels.

    All taps of a block before the next block: the planes they read and add to, and the block's gradient, are then in
    the cache, which the volume need not fit into.
    """
    k = tl.program_id(0) % taps
    b = tl.program_id(1)
    p = (tl.program_id(0) // taps) * BP + tl.arange(0, BP)
    live = p < tubes

    r00, r01, r10, r11, fu, fv = _neighbors(path, centers, box, b, k, p, live, tubes, taps, half, WIDE)
    gu, gv = 1 - fu, 1 - fv
    place = (b.to(tl.int64) * tubes + p)[:, None]

    slope_u = tl.zeros((BP,), dtype=tl.float32)
    slope_v = tl.zeros((BP,), dtype=tl.float32)

    # A window has one number for each tap, so that it scales the sums and not every value.
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

        # Values are read again, because the forward pass keeps no taps.
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
            _scatter(grad_rows, r00, gu * gv, below, c, channels, mask)
            _scatter(grad_rows, r01, gu * fv, below, c, channels, mask)
            _scatter(grad_rows, r10, fu * gv, below, c, channels, mask)
            _scatter(grad_rows, r11, fu * fv, below, c, channels, mask)

    # One program alone holds a tap's slopes, so that no atomics are needed.
    if PATH:
        tl.store(grad_path + (b * 2 * taps + k).to(tl.int64) * tubes + p, slope_u, mask=live)
        tl.store(grad_path + ((b * 2 + 1) * taps + k).to(tl.int64) * tubes + p, slope_v, mask=live)


@triton.jit
def weight_grad_kernel(
    rows, path, centers, grad, grad_matrix, box, batch, tubes, taps, half, channels, width,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Gradient of the matrix [K, C, O]. One program: one tap, a tile of the matrix, every n-th block of tubes."""
    k = tl.program_id(0)
    c = (tl.program_id(1) // tl.cdiv(width, BO)) * BC + tl.arange(0, BC)
    o = (tl.program_id(1) % tl.cdiv(width, BO)) * BO + tl.arange(0, BO)

    total = tl.zeros((BC, BO), dtype=tl.float32)
    per_volume = tl.cdiv(tubes, BP)

    # Blocks are dealt out in turn, so that programs differ by one block at most.
    for block in range(tl.program_id(2), batch * per_volume, tl.num_programs(2)):
        b = block // per_volume
        p = (block % per_volume) * BP + tl.arange(0, BP)
        live = p < tubes

        r00, r01, r10, r11, fu, fv = _neighbors(path, centers, box, b, k, p, live, tubes, taps, half, WIDE)
        tap = _tap(rows, r00, r01, r10, r11, fu, fv, c, channels, live[:, None] & (c < channels)[None, :])

        place = (b.to(tl.int64) * tubes + p)[:, None] * width + o[None, :]
        above = tl.load(grad + place, mask=live[:, None] & (o < width)[None, :], other=0.0)
        total = tl.dot(tl.trans(tap).to(above.dtype), above, total, input_precision=PRECISION)

    # Several programs add to one tile of the matrix.
    at = (k * channels + c)[:, None] * width + o[None, :]
    tl.atomic_add(grad_matrix + at, total, (c < channels)[:, None] & (o < width)[None, :], sem="relaxed")
