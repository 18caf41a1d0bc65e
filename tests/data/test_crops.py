"""The crop of a sample is a pure function of (seed, index), lies where it should, and never outside by mistake."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.data.crops import KINDS, CropConfig, CropSampler, VolumePoints, draw_validation_boxes, make_rng
from hpc_neuro.data.orientation import IDENTITY, parse_orientation

GRID = (8, 16, 16)


def place(name: str, shape: tuple[int, int, int], count: int = 50) -> VolumePoints:
    draw = np.random.default_rng(len(name))
    points = {k: draw.integers(0, shape, size=(count, 3)).astype(np.int32) for k in KINDS[:3]}
    return VolumePoints(name, shape, points)


shapes = st.tuples(st.integers(1, 90), st.integers(1, 300), st.integers(1, 300))


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 10_000), st.integers(0, 2**40), st.floats(0, 1))
def test_every_crop_covers_its_volume_or_lies_inside(shape, index, seed, jitter):
    cfg = CropConfig(size=(16, 64, 48), jitter=jitter)
    sampler = CropSampler(cfg, [place("a", shape)], seed, GRID, distill_fraction=0.5)
    draw = sampler(index)

    assert draw.box.shape == cfg.size
    for start, stop, length, size, patch in zip(draw.box.start, draw.box.stop, shape, cfg.size, GRID, strict=True):
        if draw.distilled:
            assert start % patch == 0
            assert 0 <= start < length
            assert stop <= max(size, length + patch - 1)  # at most the last token is padded
        elif length >= size:
            assert start >= 0
            assert stop <= length
        else:
            assert start <= 0
            assert stop >= length


def test_a_sample_depends_on_seed_and_index_only():
    places = [place("a", (40, 200, 200)), place("bb", (60, 300, 150))]
    cfg = CropConfig()
    first = [CropSampler(cfg, places, 3, GRID, 0.5)(i) for i in range(40)]
    one = CropSampler(cfg, places, 3, GRID, 0.5)

    assert [one(i) for i in reversed(range(40))] == first[::-1]
    assert [one.is_distilled(i) for i in range(40)] == [d.distilled for d in first]
    assert [CropSampler(cfg, places, 4, GRID, 0.5)(i) for i in range(40)] != first
    assert len({d.box for d in first}) > 25


def test_ranks_draw_the_same_samples_however_they_are_cut():
    sampler = CropSampler(CropConfig(), [place("a", (40, 200, 200))], 0, GRID)
    whole = [sampler(i) for i in range(12)]
    for ranks in (2, 3, 4):
        cut = [[sampler(i) for i in range(r, 12, ranks)] for r in range(ranks)]
        assert sorted(d for part in cut for d in [x.box for x in part]) == sorted(d.box for d in whole)


def test_shares_are_kept():
    far = {"skeleton": [[5, 5, 5]], "branch": [[5, 100, 100]], "tip": [[5, 190, 190]]}
    where = VolumePoints("a", (10, 200, 200), {k: np.array(v, dtype=np.int32) for k, v in far.items()})
    cfg = CropConfig(size=(4, 8, 8), skeleton=0.5, branch=0.3, tip=0.2, uniform=0.0, jitter=0.0)
    sampler = CropSampler(cfg, [where], 0, (1, 1, 1))
    middles = np.array([sampler(i).box.start[1] + 4 for i in range(2000)])
    shares = [np.mean(abs(middles - y) < 3) for y in (5, 100, 190)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


def test_the_chosen_point_is_in_the_crop():
    where = VolumePoints("a", (64, 200, 200), {"skeleton": np.array([[30, 90, 110]], dtype=np.int32)})
    cfg = CropConfig(size=(16, 32, 32), uniform=0.0, jitter=0.9)
    for fraction in (0.0, 1.0):
        sampler = CropSampler(cfg, [where], 0, (8, 16, 16), fraction)
        hits = [sampler(i).box.contains(Box((30, 90, 110), (31, 91, 111))) for i in range(200)]
        assert np.mean(hits) > (0.999 if fraction == 0 else 0.6)  # rounding to the token grid may push it out


def test_volumes_are_drawn_equally_by_length_or_by_size():
    small, large = place("a", (10, 20, 20), 10), place("b", (20, 40, 40), 90)
    for how, share in (("equal", 0.5), ("length", 0.1), ("size", 1 / 9)):
        sampler = CropSampler(CropConfig(size=(4, 4, 4), volumes=how), [small, large], 1, (1, 1, 1))
        got = np.mean([sampler(i).volume == "a" for i in range(2000)])
        assert got == pytest.approx(share, abs=0.04)


def test_a_volume_without_points_is_sampled_anywhere():
    empty = VolumePoints("a", (40, 80, 80), {k: np.zeros((0, 3), dtype=np.int32) for k in KINDS[:3]})
    sampler = CropSampler(CropConfig(size=(8, 8, 8), uniform=0.0), [empty], 0, (1, 1, 1))
    assert len({sampler(i).box for i in range(50)}) > 45


@pytest.mark.parametrize(
    ("free", "share", "turns", "is_mirrored"),
    [
        (True, 0.0, (IDENTITY,), True),
        (True, 0.5, (IDENTITY,), True),
        (True, 1.0, (IDENTITY,), False),
        (False, 0.0, (IDENTITY,), False),
        (False, 1.0, (IDENTITY, parse_orientation("rot90"), parse_orientation("rot180")), False),
        (False, 1.0, (IDENTITY, parse_orientation("flip_z+flip_y")), False),
        (False, 1.0, (IDENTITY, parse_orientation("flip_z")), True),
        (False, 0.0, (IDENTITY, parse_orientation("flip_z")), False),
    ],
)
def test_whether_anything_is_ever_mirrored(free, share, turns, is_mirrored):
    sampler = CropSampler(CropConfig(size=(8, 16, 16)), [place("a", (40, 200, 200))], 0, GRID, share, turns)
    assert sampler.has_mirrored_crops(free) is is_mirrored


def test_no_volume_is_an_error():
    with pytest.raises(ConfigError, match="no volume"):
        CropSampler(CropConfig(), [], 0, GRID)


def test_crops_without_a_share_are_an_error():
    with pytest.raises(ValueError, match="all 0"):
        CropConfig(skeleton=0, branch=0, tip=0, uniform=0)


def test_streams_and_indices_do_not_share_numbers():
    draws = [make_rng(0, stream, index).random(8) for stream in ("crop", "warp") for index in range(50)]
    draws += [make_rng(1, "crop", index).random(8) for index in range(50)]
    assert len(np.unique(np.concatenate(draws))) == 8 * 150


def test_validation_boxes_are_fixed_and_take_volumes_in_turn():
    places = [place("a", (40, 200, 200)), place("bb", (60, 300, 150))]
    boxes = draw_validation_boxes(places, CropConfig(), GRID, 7, seed=5)
    assert boxes == draw_validation_boxes(places, CropConfig(), GRID, 7, seed=5)
    assert [name for name, _ in boxes] == ["a", "bb", "a", "bb", "a", "bb", "a"]
    assert draw_validation_boxes(places, CropConfig(), GRID, 3, seed=5) == boxes[:3]
