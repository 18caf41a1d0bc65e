"""The tube operator against scipy's and torch's interpolation, and the properties that define a tube."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from torch import Tensor

from hpc_neuro.models.tubular import gather, tube_conv, tube_sum

AXES = (0, 1, 2)


def across(axis: int) -> tuple[int, int]:
    first, second = (a for a in AXES if a != axis)
    return first, second


def example(
    shape: tuple[int, int, int] = (5, 6, 7),
    taps: int = 5,
    batch: int = 2,
    channels: int = 3,
    seed: int = 0,
    **like: Any,
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    like = {"dtype": torch.float64, **like}
    x = torch.randn(batch, channels, *shape, generator=g, dtype=torch.float64).to(**like)
    offsets = torch.rand(batch, 2 * (taps - 1), *shape, generator=g, dtype=torch.float64) * 2 - 1
    return x, offsets.to(**like)


def positions_by_the_book(offsets: Tensor, axis: int, b: int, p: tuple[int, int, int], c: int) -> np.ndarray:
    """P_{+c} = p + c*e_a + sum d_{+j}, P_{-c} = p - c*e_a + sum d_{-j}; entry h leads to tap +1, h-1 to tap -1."""
    taps = offsets.shape[1] // 2 + 1
    half = taps // 2
    at = np.array(p, dtype=np.float64)
    at[axis] += c
    for i, a in enumerate(across(axis)):
        for j in range(1, abs(c) + 1):
            entry = half - 1 + j if c > 0 else half - j
            at[a] += float(offsets[(b, i * (taps - 1) + entry, *p)])
    return at


def by_grid_sample(x: Tensor, offsets: Tensor, axis: int) -> Tensor:
    """All taps by torch's own interpolation, [B, C, K, z, y, x]."""
    batch, channels, *size = x.shape
    taps = offsets.shape[1] // 2 + 1
    half = taps // 2
    steps = offsets.view(batch, 2, taps - 1, *size)
    before = steps[:, :, :half].flip(2).cumsum(2).flip(2)
    move = torch.cat([before, torch.zeros_like(steps[:, :, :1]), steps[:, :, half:].cumsum(2)], 2)
    if taps == 1:
        move = x.new_zeros(batch, 2, 1, *size)
    along = torch.arange(-half, taps - half, dtype=x.dtype).view(1, taps, 1, 1, 1).expand(batch, -1, *size)
    moves = [move[:, 0], move[:, 1]]
    moves.insert(axis, along)
    voxels = torch.meshgrid(*(torch.arange(n, dtype=x.dtype) for n in size), indexing="ij")
    unit = [2 * (v + m) / max(n - 1, 1) - 1 for v, m, n in zip(voxels, moves, size, strict=True)]
    grid = torch.stack(unit[::-1], -1).flatten(1, 3).view(batch, -1, 1, 1, 3)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True).view(batch, channels, taps, *size)


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    taps=st.sampled_from([1, 2, 3, 4, 7]),
    batch=st.integers(1, 2),
    channels=st.integers(1, 3),
    axis=st.sampled_from(AXES),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_taps_are_scipys_values_at_the_positions_of_the_formula(
    shape: tuple[int, int, int], taps: int, batch: int, channels: int, axis: int, seed: int
) -> None:
    x, offsets = example(shape, taps, batch, channels, seed)
    values = gather(x, offsets, axis)
    assert values.shape == (batch, channels, taps, *shape)
    rng = np.random.default_rng(seed)
    for _ in range(8):
        b, ch, k = rng.integers(batch), rng.integers(channels), rng.integers(taps)
        p = tuple(int(rng.integers(n)) for n in shape)
        at = positions_by_the_book(offsets, axis, b, p, k - taps // 2)
        want = map_coordinates(x[b, ch].numpy(), at[:, None], order=1, mode="nearest")[0]
        assert float(values[(b, ch, k, *p)]) == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("taps", [1, 3, 9])
def test_values_and_gradients_equal_grid_sample(axis: int, taps: int) -> None:
    x, offsets = (t.requires_grad_() for t in example(taps=taps))
    weight = torch.randn(4, 3, taps, dtype=torch.float64, requires_grad=True)
    window = torch.rand(taps, dtype=torch.float64, requires_grad=True)
    taken = by_grid_sample(x, offsets, axis)
    pairs = [
        (gather(x, offsets, axis), taken, None),
        (tube_conv(x, offsets, weight, None, axis), torch.einsum("ock,bckzyx->bozyx", weight, taken), weight),
        (tube_sum(x, offsets, window, axis), torch.einsum("k,bckzyx->bczyx", window, taken), window),
    ]
    for values, want, mix in pairs:
        torch.testing.assert_close(values, want)
        wanted = [x, *([offsets] if taps > 1 else []), *([mix] if mix is not None else [])]
        up = torch.randn_like(values)
        gradients = torch.autograd.grad(values, wanted, up)
        expected_gradients = torch.autograd.grad(want, wanted, up, retain_graph=True)
        for a, b in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("axis", "taps"), [(0, 3), (1, 4), (2, 3), (2, 1)])
def test_gradcheck(axis: int, taps: int) -> None:
    x, offsets = (t.requires_grad_() for t in example((2, 1, 3), taps, batch=2, channels=2))
    weight = torch.randn(2, 2, taps, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    window = torch.rand(taps, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: gather(*a, axis), (x, offsets))
    assert torch.autograd.gradcheck(lambda *a: tube_sum(*a, axis), (x, offsets, window))
    assert torch.autograd.gradcheck(lambda *a: tube_conv(*a, axis), (x, offsets, weight, bias))


def test_gradcheck_on_a_coarse_grid_of_positions() -> None:
    x, _ = example((3, 3, 4), 3, batch=1, channels=2)
    offsets = (torch.rand(1, 4, 1, 2, 2, dtype=torch.float64) * 2 - 1).requires_grad_()
    positions = torch.randint(0, 3, (3, 1, 2, 2))
    weight = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    given_ = (x.requires_grad_(), offsets, weight)
    assert torch.autograd.gradcheck(lambda *a: tube_conv(*a, None, 1, positions), given_)


def test_the_three_axes_are_permutations_of_one_another() -> None:
    x, offsets = example(taps=5)
    along_z = gather(x, offsets, 0)
    turned = gather(x.transpose(2, 3), offsets.transpose(2, 3), 1)  # z and y change places
    torch.testing.assert_close(along_z, turned.transpose(3, 4), rtol=0, atol=1e-12)
    swapped = torch.cat(offsets.chunk(2, 1)[::-1], 1)  # z and x change places, so the orthogonal axes do as well
    turned = gather(x.transpose(2, 4), swapped.transpose(2, 4), 2)
    torch.testing.assert_close(along_z, turned.transpose(3, 5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("taps", [1, 3, 9, 255])
def test_a_straight_tube_is_a_convolution_along_its_axis(axis: int, taps: int) -> None:
    """Border values outside, sizes that are not powers of two, tubes far longer than the volume."""
    x, _ = example((5, 6, 7))
    offsets = x.new_zeros(2, 2 * (taps - 1), 5, 6, 7)
    weight, bias = torch.randn(4, 3, taps, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    pad, shape = [0] * 6, [4, 3, 1, 1, 1]
    pad[4 - 2 * axis : 6 - 2 * axis] = [taps // 2] * 2
    shape[2 + axis] = taps
    want = F.conv3d(F.pad(x, pad, mode="replicate"), weight.view(shape), bias)
    torch.testing.assert_close(tube_conv(x, offsets, weight, bias, axis), want)
    torch.testing.assert_close(
        tube_sum(x, offsets, weight[0, 0], axis),
        torch.einsum("bckzyx,k->bczyx", gather(x, offsets, axis), weight[0, 0]),
    )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("taps", [1, 3, 9, 255])
def test_the_centre_tap_never_moves(axis: int, taps: int) -> None:
    x, offsets = example((4, 5, 3), taps, dtype=torch.float32)
    offsets = (3 * offsets).requires_grad_()
    center = gather(x, offsets, axis)[:, :, taps // 2]
    torch.testing.assert_close(center, x, rtol=0, atol=0)
    if taps > 1:
        (slope,) = torch.autograd.grad(center.sum(), offsets)
        assert not slope.any()


@pytest.mark.parametrize("axis", AXES)
def test_neighboring_taps_stay_connected(axis: int) -> None:
    """Sampling a volume of coordinates gives the positions themselves: one voxel along, at most the extent across."""
    n, taps, extent = 40, 9, 0.75
    grid = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64)] * 3, indexing="ij"))[None]
    offsets = extent * torch.tanh(4 * torch.randn(1, 2 * (taps - 1), 1, 1, 1, dtype=torch.float64))
    middle = torch.full((3, 1, 1, 1), n // 2)
    path = gather(grid, offsets, axis, middle)[0, :, :, 0, 0, 0]  # [3, K]
    steps = path.diff(dim=1)
    torch.testing.assert_close(steps[axis], torch.ones_like(steps[axis]))
    assert steps[list(across(axis))].abs().max() <= extent + 1e-12
    flat = [float(v) for v in positions_by_the_book(offsets, axis, 0, (0, 0, 0), 4) + n // 2]
    assert path[:, 8].tolist() == pytest.approx(flat)


@pytest.mark.parametrize("face", [(a, s) for a in AXES for s in (-1, 1)])
@pytest.mark.parametrize("far", [1.0, 50.0, 1e12])
def test_outside_lies_the_border_value_at_every_face(face: tuple[int, int], far: float) -> None:
    side_axis, sign = face
    x, _ = example((4, 5, 6))
    for axis in AXES:
        offsets = x.new_zeros(2, 4, 4, 5, 6)
        index = 0 if sign < 0 else x.shape[2 + side_axis] - 1
        if axis == side_axis:  # the tube itself runs out of the face
            last = gather(x, offsets, axis)[:, :, 0 if sign < 0 else 2].select(2 + side_axis, index)
        else:
            which = across(axis).index(side_axis)
            offsets[:, 2 * which : 2 * which + 2] = sign * far
            last = gather(x, offsets, axis)[:, :, 0].select(2 + side_axis, index)
            if axis != side_axis:
                before = x.index_select(2 + axis, (torch.arange(x.shape[2 + axis]) - 1).clamp(min=0))
                torch.testing.assert_close(last, before.select(2 + side_axis, index))
                continue
        torch.testing.assert_close(last, x.select(2 + side_axis, index))


def test_outside_the_volume_nothing_pulls_at_the_offsets() -> None:
    x, offsets = example((3, 4, 5), 3)
    offsets = (offsets.sign() * 100).requires_grad_()
    (slope,) = torch.autograd.grad(gather(x, offsets, 1).square().sum(), offsets)
    assert not slope.any()
