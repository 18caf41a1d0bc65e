"""The tube operator in plain PyTorch, chunk by chunk: a tap is a weighted bag of four rows of a table.

Values lie channels last, one row of C numbers per voxel, so that every neighbor of a tap is one contiguous read, and
`embedding_bag` reads, weighs and sums them in one pass. Only one chunk of tubes is in memory at a time; the backward
pass makes the taps again. Works on any device, in float32 and float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_neuro.core.geometry import Shape

_CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}
"""What the taps of one chunk take: within the last cache of a CPU, enough to fill a GPU."""


@dataclass(frozen=True)
class Tubes:
    """Where tubes lie: K taps along `axis` through a volume of `size` voxels, centered on P voxels."""

    size: Shape
    axis: int
    taps: int
    # [3, P] int64, the z y x voxel of each tube's center.
    centers: Tensor

    @property
    def half(self) -> int:
        """Taps before the center."""
        return self.taps // 2


def forward(rows: Tensor, offsets: Tensor, weight: Tensor | None, tubes: Tubes) -> Tensor:
    """Sample tubes and mix their taps.

    rows [B*N, C] values of the N voxels of B volumes; offsets [B, 2*(K-1), P], whose dtype computes. Gives the taps
    [B, P, K*C] without weight, their weighted sum [B, P, C] for a window [K], the convolution [B, P, O] for [O, C, K].
    """
    rows, (matrix, window) = rows.to(offsets.dtype), _split_weight(weight, offsets.dtype)
    width = matrix.shape[1] if matrix is not None else rows.shape[1] * (1 if window is not None else tubes.taps)
    out = rows.new_zeros(offsets.shape[0], offsets.shape[2], width)

    # All taps together would take up to K times the memory of the volume.
    for b, p in _chunks(rows, offsets, tubes):
        index, share, _ = _corners(offsets[b, :, p], tubes, b, p)

        if window is None:
            samples = _bags(rows, index, share).flatten(1)  # [m, K*C]
        else:
            # The whole tube is one bag.
            samples = _bags(rows, index.flatten(1), (share * window[:, None]).flatten(1))  # [m, C]

        place = out[b, p]
        place.copy_((samples if matrix is None else samples @ matrix).view(place.shape))

    return out


def backward(
    rows: Tensor, offsets: Tensor, weight: Tensor | None, grad: Tensor, tubes: Tubes, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows, offsets and weight from that of `forward`'s result, each only where `needs` says so."""
    rows, (matrix, window) = rows.to(offsets.dtype), _split_weight(weight, offsets.dtype)

    # A gradient that nobody wants is not even allocated.
    grad_rows = torch.zeros_like(rows) if needs[0] else None
    grad_offsets = torch.zeros_like(offsets) if needs[1] else None
    grad_window = torch.zeros_like(window) if needs[2] and window is not None else None
    grad_matrix = torch.zeros_like(matrix) if needs[2] and matrix is not None else None

    for b, p in _chunks(rows, offsets, tubes):
        index, share, fraction = _corners(offsets[b, :, p], tubes, b, p)  # [m, K, 4], [m, K, 4], [2, m, K]
        above = grad[b, p].flatten(0, 1).to(rows.dtype)  # [m, width]

        # Gradient of the taps: [m, K, C], or with a window [m, 1, C] that all taps share up to their weight.
        below = (above if matrix is None else above @ matrix.t()).view(len(above), -1, rows.shape[1])

        # Taps are sampled again, because to keep them from the forward pass would take up to K times the volume.
        if grad_matrix is not None:
            grad_matrix.addmm_(_bags(rows, index, share).view(len(above), -1).t(), above)

        if grad_window is not None:
            grad_window += _bags(rows, index, share).mul_(below).sum((0, 2))

        if grad_offsets is not None:
            slope = torch.stack([_bags(rows, index, d).mul_(below).sum(2) for d in _slopes(fraction)])
            slope = slope if window is None else slope * window
            slope = slope.view(2, b.stop - b.start, -1, tubes.taps).permute(1, 0, 3, 2)  # [b, 2, K, p]

            # A step moves all taps beyond it.
            grad_offsets[b, :, p] = step_gradient(slope, tubes)

        if grad_rows is not None:
            _scatter(grad_rows, index, share if window is None else share * window[:, None], below)

    # The matrix is laid out for the product, the caller's kernel is [O, C, K].
    if weight is not None and grad_matrix is not None:
        o, c, k = weight.shape
        return grad_rows, grad_offsets, grad_matrix.view(k, c, o).permute(2, 1, 0)

    return grad_rows, grad_offsets, grad_window


def _split_weight(weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The kernel as a matrix [K*C, O], or the window [K]."""
    if weight is None or weight.ndim == 1:
        return None, weight if weight is None else weight.to(dtype)
    return weight.permute(2, 1, 0).flatten(0, 1).to(dtype), None


def _bags(rows: Tensor, index: Tensor, amounts: Tensor) -> Tensor:
    """sum over j of amounts[..., j] * rows[index[..., j]]: [m, K, 4], [m, K, 4] -> [m, K, C]."""
    entries = index.shape[-1]
    sums = F.embedding_bag(index.view(-1, entries), rows, per_sample_weights=amounts.view(-1, entries), mode="sum")
    return sums.view(*index.shape[:-1], rows.shape[1])


def _scatter(into: Tensor, index: Tensor, amounts: Tensor, values: Tensor) -> None:
    """into[index[m, k, j]] += amounts[m, k, j] * values[m, k or 0], the transpose of `_bags`; deterministic.

    Sorted by row, all that falls on one row is again one bag, so that a row of `into` is read and written once.
    """
    # Atomic additions would round differently in every run.
    sorted_rows, order = index.flatten().sort()
    row, count = torch.unique_consecutive(sorted_rows, return_counts=True)

    # There are four entries for each tap.
    source = order >> 2
    # With a window, the taps of a tube share one value.
    source = source if values.shape[1] == index.shape[1] else source // index.shape[1]

    values = values.flatten(0, 1)
    mass = F.embedding_bag(
        source, values, count.cumsum(0) - count, per_sample_weights=amounts.flatten()[order], mode="sum"
    )
    into.index_add_(0, row, mass)


def _chunks(rows: Tensor, offsets: Tensor, tubes: Tubes) -> Iterator[tuple[slice, slice]]:
    """Batches and tubes, few enough at a time: whole volumes while they fit, else pieces of one; none of nothing."""
    batch, _, count = offsets.shape
    if not rows.numel():
        return

    # With few channels the indices and shares of the four neighbors take the most.
    per_tube = tubes.taps * max(rows.shape[1], 4) * rows.element_size()
    room = max(_CHUNK_BYTES.get(rows.device.type, 1 << 28) // per_tube, 16)  # tubes
    volumes = max(room // max(count, 1), 1)

    for b in range(0, batch, volumes):
        for p in range(0, count, room):
            yield slice(b, min(b + volumes, batch)), slice(p, min(p + room, count))


def _corners(offsets: Tensor, tubes: Tubes, b: slice, p: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The four neighbors of every tap: row [m, K, 4], share of the tap [m, K, 4] and fractions [2, m, K].

    m tubes of several volumes, volume by volume. Neighbors beyond a face are the face's voxel, so both neighbors are
    one and the slope is zero there. Displacements are split before the center is added: a float32 coordinate would
    lose its fraction in a large volume, and integers are exact.
    """
    volumes, _, count = offsets.shape
    move = displacements(offsets, tubes).permute(1, 0, 3, 2).reshape(2, volumes * count, tubes.taps)

    whole = move.floor()
    fraction = move.sub_(whole)  # [2, m, K]
    # A displacement beyond all bounds still ends at the right face.
    whole.clamp_(-(2**30), 2**30)

    strides = (tubes.size[1] * tubes.size[2], tubes.size[2], 1)
    voxels = strides[0] * tubes.size[0]
    # Indices of 32 bits halve the memory traffic, where all rows can be counted in them.
    dtype = torch.int32 if b.stop * voxels < 2**31 else torch.int64

    center = tubes.centers[:, p, None].to(dtype).repeat(1, volumes, 1)  # [3, m, 1]
    along = torch.arange(-tubes.half, tubes.taps - tubes.half, device=offsets.device, dtype=dtype) + center[tubes.axis]
    along.clamp_(0, tubes.size[tubes.axis] - 1).mul_(strides[tubes.axis])  # [m, K]

    start = torch.arange(b.start, b.stop, device=offsets.device, dtype=dtype) * voxels
    along += start.repeat_interleave(count)[:, None]

    sides = []
    for i, a in enumerate(n for n in range(3) if n != tubes.axis):
        low = whole[i].to(dtype).add_(center[a])
        high = (low + 1).clamp_(0, tubes.size[a] - 1).mul_(strides[a])
        sides.append((low.clamp_(0, tubes.size[a] - 1).mul_(strides[a]), high))

    (u0, u1), (v0, v1) = sides
    u0, u1 = u0.add_(along), u1.add_(along)
    index = torch.stack([u0 + v0, u0 + v1, u1 + v0, u1 + v1], -1)

    # The four bilinear shares follow from one product.
    fu, fv = fraction
    both = fu * fv
    share = torch.stack([1 - fu - fv + both, fv - both, fu - both, both], -1)

    return index, share, fraction


def _slopes(fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the four shares [m, K, 4] by the two fractions [2, m, K]."""
    fu, fv = fraction
    gu, gv = 1 - fu, 1 - fv
    return torch.stack([-gv, -fv, gv, fv], -1), torch.stack([-gu, gu, -fu, fu], -1)


def displacements(offsets: Tensor, tubes: Tubes) -> Tensor:
    """Steps [B, 2*(K-1), P] -> displacement of every tap [B, 2, K, P]: sums outwards from the center, which is zero."""
    batch, _, count = offsets.shape
    half = tubes.half

    steps = offsets.reshape(batch, 2, tubes.taps - 1, count)
    move = offsets.new_zeros(batch, 2, tubes.taps, count)

    # The center keeps its zero, because it never moves.
    move[:, :, :half] = steps[:, :, :half].flip(2).cumsum(2).flip(2)
    move[:, :, half + 1 :] = steps[:, :, half:].cumsum(2)

    return move


def step_gradient(slope: Tensor, tubes: Tubes) -> Tensor:
    """The transpose of `displacements`: [B, 2, K, P] -> [B, 2*(K-1), P]; a step moves its own tap and all beyond it."""
    half = tubes.half
    before = slope[:, :, :half].cumsum(2)
    after = slope[:, :, half + 1 :].flip(2).cumsum(2).flip(2)

    return torch.cat([before, after], 2).flatten(1, 2)
