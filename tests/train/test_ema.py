"""The averaged weights: the recursion itself, exact swapping, and a span that fits the run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_neuro.train.ema import Ema, decay_at


def test_the_average_follows_the_recursion():
    layer = nn.Linear(2, 2)
    ema = Ema(layer)
    expected = layer.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            layer.weight += 1.0 + step
        ema.update(0.9)
        expected = 0.9 * expected + 0.1 * layer.weight.detach()
    assert torch.allclose(ema.average["weight"], expected, atol=1e-6)


def test_inside_the_module_computes_with_the_average_and_is_itself_again_after():
    layer = nn.Linear(2, 2)
    ema = Ema(layer)
    with torch.no_grad():
        layer.weight.fill_(7.0)
    before = layer.weight.detach().clone()
    with ema.applied():
        assert torch.equal(layer.weight, ema.average["weight"])
        assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before)


def test_the_module_is_itself_again_after_an_error():
    layer = nn.Linear(1, 1)
    ema = Ema(layer)
    with torch.no_grad():
        layer.weight.fill_(7.0)
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert layer.weight.item() == 7.0


def test_half_precision_weights_are_averaged_in_float32():
    layer = nn.Linear(1, 1).bfloat16()
    ema = Ema(layer)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    ema.average["weight"].fill_(0.0)
    for _ in range(100):
        ema.update(0.999)
    assert ema.average["weight"].item() == pytest.approx(1 - 0.999**100, rel=1e-4)  # bfloat16 would stand still at 0


def test_the_span_grows_with_the_steps_and_ends_at_the_window():
    decays = [decay_at(s, 1000, 0.05) for s in range(1000)]
    assert decays == sorted(decays)
    assert decays[0] == 0.0
    assert decays[-1] == pytest.approx(1 - 1 / 50)


def test_a_saved_average_is_taken_over():
    layer = nn.Linear(2, 1)
    ema = Ema(layer)
    ema.load({"weight": torch.full((1, 2), 3.0), "bias": torch.full((1,), 4.0)})
    with ema.applied():
        assert layer(torch.ones(1, 2)).item() == 10.0
