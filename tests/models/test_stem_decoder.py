"""models/stem.py and models/decoder.py: resolution, locality, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hpc_neuro.models.config import LightConfig, LinearConfig, UnetrConfig
from hpc_neuro.models.stem import FirstConv, Stem, VoxelNorm, level_kernels, level_strides

DECODERS = [LightConfig(), UnetrConfig(width=12), LinearConfig()]


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((16, 16, 16), [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
        ((8, 16, 16), [(1, 1, 1), (1, 2, 2), (2, 4, 4)]),
        ((4, 16, 16), [(1, 1, 1), (1, 2, 2), (1, 4, 4)]),
        ((14, 14, 14), [(1, 1, 1), (2, 2, 2)]),
        ((16, 8, 8), [(1, 1, 1), (2, 1, 1), (4, 2, 2)]),
        ((7, 7, 7), [(1, 1, 1)]),
    ],
)
def test_strides_follow_the_patch(patch: tuple[int, int, int], strides: list[tuple[int, int, int]]) -> None:
    assert level_strides(patch) == strides


@settings(deadline=None)
@given(st.tuples(*[st.integers(1, 32)] * 3))
def test_strides_divide_the_patch_and_one_another(patch: tuple[int, int, int]) -> None:
    strides = level_strides(patch)
    assert len(level_kernels(strides)) == len(strides)
    for fine, coarse in zip(strides, [*strides[1:], patch], strict=True):
        assert all(c % f == 0 for f, c in zip(fine, coarse, strict=True))


def test_first_convolution_is_a_3d_one() -> None:
    conv = FirstConv(5)
    image = torch.randn(2, 1, 4, 6, 7)
    expected = F.conv3d(image, conv.weight[:, None], conv.bias, padding=1)
    torch.testing.assert_close(conv(image), expected)


def test_norm_is_over_channels_of_a_voxel() -> None:
    norm = VoxelNorm(6)
    x = torch.randn(2, 6, 2, 3, 4)
    torch.testing.assert_close(norm(x)[1, :, 1, 2, 3], F.layer_norm(x[1, :, 1, 2, 3], (6,)))


def test_stem_does_not_know_where_a_crop_ends() -> None:
    """Away from the rim a crop's features are the whole's: nothing is averaged over space."""
    torch.manual_seed(0)
    strides = level_strides((8, 16, 16))
    stem = Stem(strides, (4, 6, 8))
    image = torch.rand(1, 1, 24, 64, 64)
    whole, crop = stem(image), stem(image[:, :, 8:, 16:, 16:])
    for stride, a, b in zip(strides, whole, crop, strict=True):
        z, y, x = (n // s for n, s in zip((8, 16, 16), stride, strict=True))
        inner = slice(4, None)  # of the crop; its own rim is padded with zeros
        torch.testing.assert_close(a[0, :, z:, y:, x:][:, inner, inner, inner], b[0, :, inner, inner, inner])


@pytest.mark.parametrize("patch", [(8, 16, 16), (16, 16, 16), (14, 14, 14), (7, 7, 7), (1, 8, 8), (6, 12, 10)])
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: d.kind)
def test_decoders_give_every_voxel_a_logit_and_every_parameter_a_gradient(
    decoder: LightConfig | UnetrConfig | LinearConfig, patch: tuple[int, int, int]
) -> None:
    strides = level_strides(patch)
    channels = (3, 4, 5)[: len(strides)]
    stem, net = Stem(strides, channels), decoder.build(10, 8, patch, strides, channels)
    assert max(net.layers) == 7
    image = torch.rand(2, 1, patch[0], 2 * patch[1], patch[2])
    tokens = {i: torch.randn(2, 10, 1, 2, 1) for i in net.layers}
    logits = net(stem(image), tokens)
    assert logits.shape == image.shape
    logits.square().sum().backward()
    parameters = [*stem.named_parameters(), *net.named_parameters()]
    assert not [name for name, p in parameters if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("decoder", DECODERS[:2], ids=lambda d: d.kind)
@pytest.mark.parametrize("level", [0, 1])
def test_each_level_of_the_stem_enters_at_its_own_resolution(decoder: LightConfig | UnetrConfig, level: int) -> None:
    """With nothing coming up from the next coarser level, a level is still read, and those below it are not."""
    strides = level_strides((8, 16, 16))
    net = decoder.build(10, 8, (8, 16, 16), strides, (3, 4, 5))
    stem = [torch.randn(1, c, *n, requires_grad=True) for c, n in ((3, (8, 16, 16)), (4, (8, 8, 8)), (5, (4, 4, 4)))]
    with torch.no_grad():
        net.up[level].weight.zero_()
    net(stem, {i: torch.randn(1, 10, 1, 1, 1) for i in net.layers}).square().sum().backward()
    assert [bool(x.grad is not None and x.grad.any()) for x in stem] == [i <= level for i in range(3)]


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: d.kind)
def test_an_untrained_decoder_predicts_a_rare_class(decoder: LightConfig | UnetrConfig | LinearConfig) -> None:
    torch.manual_seed(0)
    strides = level_strides((8, 16, 16))
    stem, net = Stem(strides, (8, 16, 48)), decoder.build(192, 12, (8, 16, 16), strides, (8, 16, 48))
    tokens = {i: torch.randn(1, 192, 2, 2, 2) for i in net.layers}
    logit = net(stem(torch.rand(1, 1, 16, 32, 32)), tokens).mean().item()
    assert logit == pytest.approx(math.log(0.01 / 0.99), abs=1.5)


def test_the_linear_decoder_is_linear() -> None:
    strides = level_strides((8, 16, 16))
    net = LinearConfig().build(10, 8, (8, 16, 16), strides, (3, 4, 5))
    shapes = [(3, 8, 16, 16), (4, 8, 8, 8), (5, 4, 4, 4)]
    (a, s), (b, t) = (({7: torch.randn(1, 10, 1, 1, 1)}, [torch.randn(1, *x) for x in shapes]) for _ in range(2))
    both = net([x + y for x, y in zip(s, t, strict=True)], {7: a[7] + b[7]})
    zero = net([torch.zeros_like(x) for x in s], {7: torch.zeros_like(a[7])})
    torch.testing.assert_close(both, net(s, a) + net(t, b) - zero, atol=1e-4, rtol=1e-4)
