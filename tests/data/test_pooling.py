"""Halved images are those of the definition, to the last bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hpc_neuro.data.pooling import halve


@pytest.mark.parametrize("step", itertools.product((1, 2), repeat=3))
@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 9), (1, 2, 3)])
def test_means_and_maxima_are_those_of_the_definition(step: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    draw = np.random.default_rng(sum(shape))
    # Few different values meet every case of rounding; 254 and 255 every carry.
    values = draw.choice(np.array([0, 1, 2, 3, 254, 255], np.uint8), shape)
    padded = np.pad(values, [(0, -n % s) for n, s in zip(shape, step, strict=True)], mode="edge")
    z, y, x = (n // s for n, s in zip(padded.shape, step, strict=True))
    cells = padded.reshape(z, step[0], y, step[1], x, step[2])
    assert np.array_equal(halve(values, step, "mean"), np.rint(cells.mean((1, 3, 5))).astype(np.uint8))
    assert np.array_equal(halve(values, step, "max"), cells.max((1, 3, 5)))


def test_an_array_that_is_not_contiguous_is_read_as_it_is() -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 12), dtype=np.uint8)
    assert np.array_equal(
        halve(values[::2, ::-1, 2:10], (1, 2, 2), "mean"), halve(values[::2, ::-1, 2:10].copy(), (1, 2, 2), "mean")
    )
