"""Boxes and tilings."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpc_neuro.core.geometry import Box, Shape, tile_volume, to_um, to_voxels, zyx_from_xyz

triples = st.tuples(*[st.integers(1, 12)] * 3)


@given(triples, triples, triples)
def test_blocks_tile_the_volume_exactly_once(shape: Shape, write: Shape, halo: Shape) -> None:
    seen = np.zeros(shape, int)
    for block in tile_volume(shape, write, halo):
        seen[block.write.slices] += 1
        assert block.read.contains(block.write)
        assert Box.whole(shape).contains(block.read)
        for a, b, h in zip(block.read.start, block.write.start, halo, strict=True):
            assert a == max(0, b - h)
    assert (seen == 1).all()


@given(triples, triples, triples, triples)
def test_clipping_is_what_indexing_does(a: Shape, b: Shape, c: Shape, d: Shape) -> None:
    one, two = Box.at(a, b), Box.at(c, d)
    canvas = np.zeros((30, 30, 30), int)
    canvas[one.slices] += 1
    canvas[two.slices] += 1
    assert one.clip(two).size == (canvas == 2).sum() == two.clip(one).size


@given(triples, triples, triples)
def test_shift_there_and_back(start: Shape, shape: Shape, by: Shape) -> None:
    box = Box.at(start, shape)
    assert box.shift(by).relative_to(by) == box
    assert box.grow((1, 2, 3)).shape == tuple(n + 2 * h for n, h in zip(shape, (1, 2, 3), strict=True))


def test_units_and_orders_are_their_own_inverse() -> None:
    points = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(zyx_from_xyz(zyx_from_xyz(points)), points)
    assert np.allclose(to_voxels(to_um(points, (1.0, 0.3, 0.5)), (1.0, 0.3, 0.5)), points)
