"""The averaged weights: the recursion itself, exact swapping, and a span that fits the run."""

from __future__ import annotations

import pytest
import torch

from hpc_neuro.train.optim import Ema, decay_at


def nothing() -> None:
    """What the weights in use are when they are the master weights themselves."""


def test_the_average_follows_the_recursion():
    weight = torch.randn(3, 2)
    ema = Ema({0: weight}, nothing)
    expected = weight.clone()
    for step in range(5):
        weight += 1.0 + step
        ema.update(0.9)
        expected = 0.9 * expected + 0.1 * weight
    assert torch.allclose(ema.average[0], expected, atol=1e-6)


def test_inside_the_average_is_in_use_and_after_it_the_weights_again():
    master, used = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    ema = Ema({3: master}, lambda: used.copy_(master))
    master += 0.123456
    used.copy_(master)
    before = master.clone(), used.clone()
    with ema.swap_in():
        assert torch.equal(used, torch.zeros(4, dtype=torch.bfloat16))
    assert torch.equal(master, before[0])
    assert torch.equal(used, before[1])


def test_a_rank_that_holds_nothing_meets_the_others_all_the_same():
    met = []
    ema = Ema({}, lambda: met.append(1))
    ema.update(0.5)
    with ema.swap_in():
        assert met == [1]
    assert met == [1, 1]


def test_the_span_grows_with_the_steps_and_ends_at_the_window():
    decays = [decay_at(s, 1000, 0.05) for s in range(1000)]
    assert decays == sorted(decays)
    assert decays[0] == 0.0
    assert decays[-1] == pytest.approx(1 - 1 / 50)
