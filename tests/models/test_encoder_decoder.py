"""models/encoder_decoder.py: resolution, skips, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from hpc_neuro.models.config import FeatureTubesConfig
from hpc_neuro.models.encoder_decoder import Decoder, Encoder, level_strides

CHANNELS = (3, 4, 5)
UNSHUFFLES = [(1, 2, 2), (2, 2, 2), (1, 1, 1)]


@pytest.mark.parametrize("unshuffle", UNSHUFFLES, ids=str)
@pytest.mark.parametrize("tubes", [None, FeatureTubesConfig(taps=3, width=2)], ids=["plain", "tubes"])
def test_every_voxel_gets_a_logit_and_every_parameter_a_gradient(
    unshuffle: tuple[int, int, int], tubes: FeatureTubesConfig | None
) -> None:
    torch.manual_seed(0)
    encoder, decoder = Encoder(unshuffle, CHANNELS, tubes), Decoder(unshuffle, CHANNELS)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    image = torch.rand(2, 1, *(8 * n for n in unshuffle))
    features = encoder(image)
    for feature, channels, stride in zip(features, CHANNELS, level_strides(unshuffle), strict=True):
        assert feature.shape == (2, channels, *(8 * n // s for n, s in zip(unshuffle, stride, strict=True)))
    logits = decoder(features)
    assert logits.shape == image.shape

    logits.square().sum().backward()
    parameters = [*encoder.named_parameters(), *decoder.named_parameters()]
    assert not [name for name, p in parameters if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("level", [0, 1])
def test_each_level_enters_at_its_own_resolution(level: int) -> None:
    """With nothing coming up from the next coarser level, a level is still read, and those below it are not."""
    decoder = Decoder((1, 2, 2), CHANNELS)
    sizes = zip(CHANNELS, (8, 4, 2), strict=True)
    features = [torch.randn(1, channels, side, side, side, requires_grad=True) for channels, side in sizes]
    with torch.no_grad():
        decoder.up[level].weight.zero_()
    decoder(features).square().sum().backward()
    assert [bool(x.grad is not None and x.grad.any()) for x in features] == [i <= level for i in range(3)]


def test_an_untrained_decoder_predicts_a_rare_class() -> None:
    torch.manual_seed(0)
    encoder, decoder = Encoder((1, 2, 2), (16, 32, 64)), Decoder((1, 2, 2), (16, 32, 64))
    logit = decoder(encoder(torch.rand(1, 1, 16, 32, 32))).mean().item()
    assert logit == pytest.approx(math.log(0.01 / 0.99), abs=1.5)


def test_no_tensor_has_full_resolution_and_few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every activation is a quarter as fine as the image and at least 16 channels wide."""
    encoder, decoder = Encoder((1, 2, 2), (16, 32, 64)), Decoder((1, 2, 2), (16, 32, 64))
    shapes = []
    for module in [*encoder.modules(), *decoder.modules()]:
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    decoder(encoder(torch.rand(1, 1, 16, 32, 32)))
    assert shapes
    assert max(math.prod(shape[2:]) if shape[1] > 16 else 0 for shape in shapes) <= 16 * 16 * 16
