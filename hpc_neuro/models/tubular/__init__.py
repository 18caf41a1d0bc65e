"""Deformable tubes: sample and convolve features along lines that bend through a volume (method section 2).

A tube of K taps along axis a, centered on voxel p, with steps d orthogonal to a:

    P_0 = p        P_{+c} = p + c*e_a + d_{+1} + .. + d_{+c}        P_{-c} = p - c*e_a + d_{-1} + .. + d_{-c}

                      o---o            the center never moves; each tap hangs on the one before it, so a tube whose
                o---o                  steps are bounded stays connected; along a all positions are integers, so a
          o---O                        tap has four neighbors. Outside the volume lies the value of the nearest voxel.
      o--/     center

Offsets [B, 2*(K-1), z, y, x] hold d in voxels: the first orthogonal axis (in z y x order), then the second; within each
the steps from tap -h to tap +h without the center (h = K // 2): entry h-1 leads to tap -1, entry h to tap +1. K is odd;
an even K has one tap more before the center than after it.

Positions and interpolation are float32 whatever the dtype of x (float64 for float64). Dynamic Snake Convolution
(Qi et al., ICCV 2023) had the idea of a chained kernel; nothing here follows its code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.tubular import torch_impl
from hpc_neuro.models.tubular.torch_impl import Tubes

Backend = Literal["auto", "torch", "triton"]
"""Which implementation runs: `auto` takes Triton on CUDA where it is installed, plain PyTorch elsewhere."""


def gather(
    x: Tensor, offsets: Tensor, axis: int, positions: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Values at the taps of every tube.

    x [B, C, Z, Y, X]; offsets [B, 2*(K-1), z, y, x] in voxels; axis 0, 1, 2 for z, y, x. -> [B, C, K, z, y, x], dtype
    of x, channels last in memory.
    positions: integers [3, z, y, x], the center voxel (z, y, x) of every tube. None: the voxels themselves when the
    grids are equal; for a coarser grid that divides the volume the middle voxel i*s + s//2 of each block of s voxels.
    Raises InputError for shapes, an axis or a grid that do not fit.
    """
    rows = _apply(x, offsets, None, axis, positions, backend)  # [B, P, K*C]
    taps = rows.view(len(x), *offsets.shape[2:], offsets.shape[1] // 2 + 1, x.shape[1])
    return taps.permute(0, 5, 4, 1, 2, 3)


def tube_sum(
    x: Tensor,
    offsets: Tensor,
    window: Tensor,
    axis: int,
    positions: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """sum_k window_k * tap_k, without ever holding taps: [B, C, z, y, x], dtype of x.

    window [K]; the rest as in `gather`.
    """
    if window.ndim != 1 or 2 * (len(window) - 1) != offsets.shape[1]:
        raise InputError(
            f"the window is {tuple(window.shape)} for offsets {tuple(offsets.shape)}; want [K], 2*(K-1) channels"
        )
    return _as_volume(_apply(x, offsets, window, axis, positions, backend), offsets)


def tube_conv(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: int,
    positions: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """sum_k weight[:, :, k] tap_k + bias, without ever holding taps: [B, O, z, y, x], dtype of x.

    weight [O, C, K], bias [O] or None; the rest as in `gather`. The backward pass samples again.
    """
    if weight.ndim != 3 or weight.shape[1] != x.shape[1] or 2 * (weight.shape[2] - 1) != offsets.shape[1]:
        raise InputError(
            f"the weight is {tuple(weight.shape)} for {x.shape[1]} channels and offsets {tuple(offsets.shape)}; "
            "want [O, C, K] and 2*(K-1) offset channels"
        )

    out = _as_volume(_apply(x, offsets, weight, axis, positions, backend), offsets)
    return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1, 1)


def _apply(
    x: Tensor, offsets: Tensor, weight: Tensor | None, axis: int, positions: Tensor | None, backend: Backend
) -> Tensor:
    """Check, choose the implementation, run: [B, P, width]."""
    tubes = _tubes(x, offsets, axis, positions)
    result: Tensor = _Tube.apply(  # type: ignore[no-untyped-call]
        x, offsets, weight, tubes, _implementation(x, backend)
    )
    return result


class _Tube(torch.autograd.Function):
    """x [B, C, Z, Y, X], offsets, weight -> [B, P, width]; keeps its inputs only and samples again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, weight: Tensor | None, tubes: Tubes, how: ModuleType) -> Tensor:
        with _exact(x):
            # A neighbor of a tap is then one contiguous read.
            rows = x.permute(0, 2, 3, 4, 1).flatten(0, 3).contiguous()  # [B*N, C]
            result: Tensor = how.forward(rows, _steps(x, offsets), weight, tubes)

        # The rows are saved and not x: they are no copy where x lies channels last, and not copied twice elsewhere.
        ctx.save_for_backward(rows, offsets, weight)
        ctx.tubes, ctx.how, ctx.shape = tubes, how, x.shape

        return result.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, offsets, weight = ctx.saved_tensors
        with _exact(rows):
            grads = ctx.how.backward(rows, _steps(rows, offsets), weight, grad, ctx.tubes, ctx.needs_input_grad[:3])
        of_x, of_offsets, of_weight = grads

        # Implementations compute in float32 on flat rows. Autograd wants the shape and the dtype of each input.
        if of_x is not None:
            batch, channels, *size = ctx.shape
            of_x = of_x.view(batch, *size, channels).permute(0, 4, 1, 2, 3).to(rows.dtype)
        if of_offsets is not None:
            of_offsets = of_offsets.reshape(offsets.shape).to(offsets.dtype)

        return of_x, of_offsets, None if of_weight is None else of_weight.to(weight.dtype), None, None


@contextmanager
def _exact(x: Tensor) -> Iterator[None]:
    """On the device of x and without autocast, which would round what has to be float32."""
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        yield


def _steps(x: Tensor, offsets: Tensor) -> Tensor:
    """Offsets [B, 2*(K-1), P] in the dtype that computes."""
    return offsets.flatten(2).to(torch.promote_types(x.dtype, torch.float32))


def _as_volume(rows: Tensor, offsets: Tensor) -> Tensor:
    """[B, P, width] -> [B, width, z, y, x], channels last in memory."""
    return rows.view(len(rows), *offsets.shape[2:], rows.shape[2]).movedim(-1, 1)


def _implementation(x: Tensor, backend: Backend) -> ModuleType:
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return torch_impl

    if importlib.util.find_spec("triton") is not None:
        # Imported late, because a CPU build of torch comes without triton.
        from hpc_neuro.models.tubular import triton_impl

        return triton_impl

    # `auto` may fall back to another implementation, an explicit choice may not.
    if backend == "triton":
        raise InputError("backend='triton' needs the package triton, which is not installed; use backend='torch'")
    return torch_impl


def _tubes(x: Tensor, offsets: Tensor, axis: int, positions: Tensor | None) -> Tubes:
    """The tubes that the arguments of `gather` describe; InputError where they do not fit together."""
    if axis not in (0, 1, 2):
        raise InputError(f"axis is {axis!r}; want 0, 1 or 2 for z, y, x")

    if x.ndim != 5 or offsets.ndim != 5 or len(x) != len(offsets) or offsets.shape[1] % 2 or offsets.device != x.device:
        raise InputError(
            f"x is {tuple(x.shape)} on {x.device}, offsets are {tuple(offsets.shape)} on {offsets.device}; "
            "want [B, C, Z, Y, X] and [B, 2*(K-1), z, y, x] on one device"
        )

    if not x.is_floating_point() or not offsets.is_floating_point():
        raise InputError(f"x is {x.dtype} and offsets are {offsets.dtype}; want floating point")

    # A tap outside the volume takes the nearest voxel, which an empty volume lacks.
    grid = offsets.shape[2:]
    if grid.numel() and not x.shape[2:].numel():
        raise InputError(
            f"x is {tuple(x.shape)}, a volume without voxels, and tubes are asked for at {grid.numel()} positions"
        )

    if positions is None:
        positions = _block_centers(x, offsets)
    elif positions.shape != (3, *grid) or positions.is_floating_point():
        raise InputError(f"positions are {tuple(positions.shape)} {positions.dtype}; want integers {(3, *grid)}")

    size = (x.shape[2], x.shape[3], x.shape[4])
    centers = positions.to(x.device, torch.int64).reshape(3, -1)
    return Tubes(size=size, axis=axis, taps=offsets.shape[1] // 2 + 1, centers=centers)


def _block_centers(x: Tensor, offsets: Tensor) -> Tensor:
    """[3, z, y, x]: the middle voxel of every block."""
    pairs = list(zip(x.shape[2:], offsets.shape[2:], strict=True))
    if any(m and n % m for n, m in pairs):
        raise InputError(
            f"the grid of offsets {tuple(offsets.shape[2:])} does not divide {tuple(x.shape[2:])}; give positions"
        )

    # An empty grid has no block size to divide by.
    lines = [torch.arange(m, device=x.device) * (n // m) + n // m // 2 if m else torch.arange(0) for n, m in pairs]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))
