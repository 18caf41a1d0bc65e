"""models/layers.py: against torch's own layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from hpc_neuro.models import layers
from hpc_neuro.models.layers import Conv3d, Downsample, Upsample, fold_voxels, unfold_voxels

BLOCKS = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 3)]


@given(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 3)] * 3), st.integers(1, 3))
def test_folding_is_undone_exactly(block: tuple[int, int, int], grid: tuple[int, int, int], channels: int) -> None:
    x = torch.randn(2, channels, *(b * n for b, n in zip(block, grid, strict=True)))
    folded = fold_voxels(x, block)
    assert folded.shape == (2, channels * block[0] * block[1] * block[2], *grid)
    torch.testing.assert_close(unfold_voxels(folded, block), x, rtol=0, atol=0)


def test_folding_in_the_plane_is_torchs_pixel_unshuffle() -> None:
    x = torch.randn(2, 3, 1, 8, 6)
    torch.testing.assert_close(fold_voxels(x, (1, 2, 2))[:, :, 0], F.pixel_unshuffle(x[:, :, 0], 2), rtol=0, atol=0)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_downsampling_is_a_strided_convolution(block: tuple[int, int, int]) -> None:
    layer, x = Downsample(3, 5, block), torch.randn(2, 3, 4, 6, 6)
    weight = layer.weight.view(5, 3, *block)
    torch.testing.assert_close(layer(x), F.conv3d(x, weight, layer.bias, stride=block))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_upsampling_is_a_transposed_convolution(block: tuple[int, int, int]) -> None:
    layer, x = Upsample(3, 5, block), torch.randn(2, 3, 4, 3, 2)
    with torch.no_grad():
        layer.bias.copy_(layer.bias.view(5, -1)[:, :1].expand(5, layer.bias.numel() // 5).reshape(-1))
    weight = layer.weight.view(5, *block, 3).permute(4, 0, 1, 2, 3)
    torch.testing.assert_close(layer(x), F.conv_transpose3d(x, weight, layer.bias.view(5, -1)[:, 0], stride=block))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1)], ids=str)
def test_the_cpu_path_without_gradients_is_the_same_convolution(kernel: tuple[int, int, int], batch: int) -> None:
    conv, x = Conv3d(4, 6, kernel), torch.randn(batch, 4, 5, 6, 7).to(memory_format=layers.LAYOUT)
    with torch.inference_mode():
        fast = conv(x)
    torch.testing.assert_close(fast, F.conv3d(x, conv.weight, conv.bias, padding=conv.padding))


@pytest.mark.parametrize("is_cast", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gradients_in_bfloat16_are_those_of_float32(depth: int, is_cast: bool) -> None:
    torch.manual_seed(0)
    conv = Conv3d(16, 16, (3, 3, 3))
    x, slope = torch.rand(2, 16, depth, 8, 16), torch.randn(2, 16, depth, 8, 16)
    exact = torch.autograd.grad(conv(x), conv.weight, slope)[0]

    with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        y = conv(x) if is_cast else conv.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # Memory that a kernel reads without having written it holds these infinities.
    litter = [torch.full((2**n,), float("inf")) for n in range(6, 19) for _ in range(8)]
    del litter
    rounded = torch.autograd.grad(y, conv.weight, slope.bfloat16())[0]
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


def test_a_residual_block_adds_its_chain() -> None:
    block, x = layers.ResidualBlock(3, 2), torch.randn(2, 3, 4, 5, 6)
    expected = x
    for layer in block.layers:
        expected = F.leaky_relu(F.conv3d(expected, layer.conv.weight, layer.conv.bias, padding=1), layers.SLOPE)
    torch.testing.assert_close(block(x), x + expected)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 5))
def test_resampling_weights_are_means_by_overlap(count: int, cell: int, new_count: int, new_cell: int) -> None:
    """Against voxels: each old cell repeated, the last one without end, then averaged over each new cell."""
    values = torch.rand(count)
    voxels = torch.cat([values.repeat_interleave(cell), values[-1].expand(new_count * new_cell)])
    expected = voxels[: new_count * new_cell].view(new_count, new_cell).mean(1)
    torch.testing.assert_close(layers.overlap_weights(count, cell, new_count, new_cell) @ values, expected)


def test_resampling_a_grid_that_divides_is_block_mean_and_repetition() -> None:
    layer, x = layers.ResampleLinear(3, 3), torch.randn(2, 3, 4, 6, 6)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.eye(3))
        layer.linear.bias.zero_()
    down = layer(x, (4, 8, 8), (2, 3, 3), (8, 16, 16))
    torch.testing.assert_close(down, F.avg_pool3d(x, 2))
    up = layer(down, (8, 16, 16), (4, 6, 6), (4, 8, 8))
    torch.testing.assert_close(up, F.interpolate(down, scale_factor=2, mode="nearest"))
