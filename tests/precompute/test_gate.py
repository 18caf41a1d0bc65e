"""The gate: what a teacher has to know, and what gives a teacher away that knows position only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.store import Store
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.precompute import gate
from hpc_neuro.precompute.gate import Encode, Figures, Judgment, Tiles
from hpc_neuro.precompute.gate_table import describe_judgment
from tests.helpers.tiny_store import write_store

PATCH = 8
SIDE = 64


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    """Bright lines in two random places of each tile, dim in half of the tiles, so that brightness is no mask."""
    draws = torch.Generator().manual_seed(0)
    mask = torch.zeros(24, SIDE, SIDE, dtype=torch.uint8)
    for image in mask:
        row, column = torch.randint(0, SIDE - 2, (2,), generator=draws).tolist()
        image[row : row + 2] = 1
        image[:, column : column + 2] = 1
    light = torch.where(torch.arange(24) % 2 == 0, 0.9, 0.3)[:, None, None]
    noise = 0.02 * torch.rand(mask.shape, generator=draws)
    return Tiles((mask * light + noise).clamp(0, 1), mask)


def make_knowing(pixels: Tensor) -> Tensor:
    """The share of neurite in the parts of each token, which is what the probe asks for."""
    return split(F.avg_pool2d((pixels > 0.1).float()[:, None], PATCH // 4)[:, 0])


def make_constant(pixels: Tensor) -> Tensor:
    return torch.ones(len(pixels), pixels.shape[1] // PATCH, pixels.shape[2] // PATCH, 5)


def make_position(pixels: Tensor) -> Tensor:
    """Nothing but the place of the token."""
    row = torch.linspace(0, 1, pixels.shape[1] // PATCH)
    column = torch.linspace(0, 1, pixels.shape[2] // PATCH)
    place = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1)
    return place.expand(len(pixels), -1, -1, -1)


def make_placed(pixels: Tensor) -> Tensor:
    """Content whose channels are turned by the row: the same pixels look different in a shifted tile."""
    content = make_knowing(pixels)
    rolled = [content[:, row].roll(5 * row, -1) for row in range(content.shape[1])]
    return torch.stack(rolled, 1)


def split(values: Tensor) -> Tensor:
    n, height, width = values.shape
    grid = values.view(n, height // 4, 4, width // 4, 4).transpose(2, 3)
    return grid.reshape(n, height // 4, width // 4, 16)


def judge(teacher: Figures, *untrained: Figures) -> Judgment:
    """The teacher beside its copies, on one sample."""
    return Judgment("a", (teacher,), tuple((copy,) for copy in untrained), (0.0,))


def measure(encode: Encode, tiles: Tiles) -> Figures:
    """The figures of one sample."""
    (figures,) = gate.measure(encode, PATCH, [tiles])
    return figures


def test_a_teacher_that_knows_neurites_passes(tiles: Tiles) -> None:
    knowing = measure(make_knowing, tiles)
    blind = measure(lambda p: F.avg_pool2d(p[:, None], PATCH).movedim(1, -1), tiles)

    assert knowing.probe > 0.99
    assert knowing.shift == pytest.approx(1, abs=1e-4)
    assert knowing.position < 0.2
    assert judge(knowing, blind).passes


def test_tiles_without_neurite_do_not_lower_the_agreement(tiles: Tiles) -> None:
    """Every fourth tile is compared; where none of those shows a neurite, others are."""
    mask = tiles.mask.clone()
    mask[:: gate.SHIFT_EVERY] = 0
    pixels = torch.where(mask.bool() | (tiles.mask == 0), tiles.pixels, torch.zeros(()))
    assert measure(make_knowing, Tiles(pixels, mask)).shift == pytest.approx(1, abs=1e-4)
    assert measure(make_knowing, Tiles(pixels, torch.zeros_like(mask))).shift == 0


def test_a_constant_teacher_fails(tiles: Tiles) -> None:
    constant = measure(make_constant, tiles)

    # The mean of one part is no better a guess for the other than its own mean.
    assert constant.probe <= 0
    assert constant.shift == 0
    assert constant.position == 0
    assert not judge(constant, constant).passes


def test_features_of_position_alone_are_recognized(tiles: Tiles) -> None:
    place = measure(make_position, tiles)

    assert place.position == pytest.approx(1)
    assert place.probe < 0.05
    # What is left after f(black) is subtracted is nothing.
    assert place.shift == 0


def test_features_that_depend_on_the_place_of_their_pixels_do_not_agree(tiles: Tiles) -> None:
    placed = measure(make_placed, tiles)

    assert placed.shift < gate.MIN_SHIFT
    assert not judge(placed, measure(make_constant, tiles)).passes


def test_position_added_to_content_does_not_change_the_agreement(tiles: Tiles) -> None:
    both = measure(lambda p: torch.cat([make_knowing(p), 50 * make_position(p)], -1), tiles)

    assert both.shift == pytest.approx(1, abs=1e-3)
    assert both.position > 0.95


def test_tokens_without_labels_are_left_out(tiles: Tiles) -> None:
    mask = tiles.mask.clone()
    # What is neurite there counts for nothing: neither in the fit nor in the score.
    mask[:, :PATCH] = UNLABELED
    wrong = tiles.pixels.clone()
    wrong[:, :PATCH] = 1

    assert measure(make_knowing, Tiles(wrong, mask)).probe > 0.99
    assert measure(make_knowing, Tiles(wrong, tiles.mask)).probe < 0.95


@pytest.mark.parametrize(("probe", "shift", "passes"), [(0.53, 0.8, True), (0.52, 0.9, False), (0.9, 0.79, False)])
def test_the_rule(probe: float, shift: float, passes: bool) -> None:
    assert judge(Figures(probe, shift, 0.9), Figures(0.4999, 0.1, 0.1)).passes == passes


def test_tiles_of_both_parts_share_no_pixel_and_follow_the_seed(tmp_path: Path) -> None:
    volume = Store(write_store(tmp_path / "store", {"a": "train"}, (20, 96, 160)))["a"]
    tiles = gate.sample_tiles(volume, PATCH)

    assert tiles.pixels.shape == tiles.mask.shape == (62, 80, 80)
    assert (tiles.mask == 1).flatten(1).any(1).float().mean() > 0.5
    torch.testing.assert_close(gate.sample_tiles(volume, PATCH).pixels, tiles.pixels, rtol=0, atol=0)
    assert not torch.equal(gate.sample_tiles(volume, PATCH, seed=1).pixels, tiles.pixels)

    # The voxels are noise, so that each row of a tile has one place in the volume.
    rows = [{tuple(row.tolist()) for tile in part for row in tile[:, :8]} for part in tiles.pixels.split(31)]
    assert not rows[0] & rows[1]


def test_a_volume_without_room_is_named(tmp_path: Path) -> None:
    volume = Store(write_store(tmp_path / "store", {"a": "train"}))["a"]
    with pytest.raises(InputError, match=r"volume a is \(20, 52, 56\) voxels.*4 x 4 tokens of 16 pixels"):
        gate.sample_tiles(volume, 16)


def test_an_untrained_teacher_does_not_beat_its_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TOKENS", 400)
    volume = Store(write_store(tmp_path / "store", {"a": "train"}, (12, 64, 160)))["a"]
    judgment = gate.judge_teacher(load_teacher(TeacherConfig(model="random")), volume, samples=2, copies=2)

    # The first copy has the seed of the teacher, the second one has another.
    assert judgment.teachers == judgment.copies[0]
    assert judgment.teachers != judgment.copies[1]
    assert judgment.gains[:2] == (0, 0)
    assert judgment.gain_error > 0
    assert not judgment.passes
    assert judgment.pixels > 0.5


def test_the_mean_decides_and_its_error_is_that_of_samples_and_copies() -> None:
    low, high = Figures(0.4, 0.5, 0.5), Figures(0.6, 0.5, 0.5)

    judgment = judge(Figures(0.535, 0.9, 0.1), low, high)
    assert judgment.gains == pytest.approx((0.135, -0.065))
    assert judgment.gain == pytest.approx(0.035)
    # Two copies: half of their difference.
    assert judgment.gain_error == pytest.approx(0.1)
    assert judgment.is_close
    assert judgment.passes
    assert not judge(Figures(0.525, 0.9, 0.1), low, high).passes
    assert judge(Figures(0.7, 0.9, 0.1), low).gain_error == 0
    assert not judge(Figures(0.7, 0.9, 0.1), low).is_close
    assert "too close" in describe_judgment("teacher", judgment)[0]
    assert "too close" not in describe_judgment("teacher", judge(Figures(0.7, 0.9, 0.1), low))[0]


def test_all_samples_are_fitted_and_each_is_scored(tiles: Tiles) -> None:
    """Labels of the first sample say the opposite: alone it is learned, among three others it is outvoted."""
    opposite = Tiles(tiles.pixels, 1 - tiles.mask)
    assert measure(make_knowing, opposite).probe > 0.99

    first, *others = (one.probe for one in gate.measure(make_knowing, PATCH, [opposite, tiles, tiles, tiles]))
    assert first < min(others) < 0.99


def test_a_sample_does_not_choose_its_own_penalty() -> None:
    # The second penalty is best for two of the three samples; the third one would have chosen the first.
    curves = np.array([(0.1, 0.5), (0.2, 0.4), (0.9, 0.3)])
    assert gate.choose_penalties(curves) == (0.1, 0.2, 0.3)
    assert gate.choose_penalties(curves[2:]) == (0.9,)
