"""Windows of unlabeled volumes: their place, brightness and size, and which are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_neuro.core.schema import load
from hpc_neuro.data.formats import open_volume
from hpc_neuro.data.intensity import compute_intensity_range, normalize
from hpc_neuro.teacher import augment, slices
from hpc_neuro.teacher.config import TeacherContinueConfig
from tests.teacher.conftest import write_stack


def list_stack(path: Path, *keys: str) -> list[slices.UnlabeledVolume]:
    return slices.list_volumes(load(TeacherContinueConfig, None, ["out=o", *keys], {"volumes": [str(path)]}))


@pytest.mark.parametrize("max_whole", [1 << 27, 100])
def test_windows_are_parts_of_slices_as_the_student_sees_them(
    max_whole: int, stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "MAX_WHOLE", max_whole)
    cut = slices.cut_windows(list_stack(stack), 40, 32, 32, 0, tmp_path)
    assert cut.tiles.array.shape == (40, 1, 32, 32)

    volume = open_volume(stack)
    image = volume[slices.Box.whole(volume.shape)]
    shown = np.rint(255 * normalize(image, *compute_intensity_range(lambda box: image[box.slices], image.shape)))
    places = np.lib.stride_tricks.sliding_window_view(shown.astype(np.uint8), (1, 32, 32))
    for number in (0, 7, 39):
        equal = (places[:, :, :, 0] == cut.tiles.array[number, 0]).all((-1, -2))
        assert equal.any()
        # The last tenth of 20 slices, and nothing else, is held out.
        assert (np.nonzero(equal)[0].min() >= 18) == (number in cut.tiles.held)
    assert cut.tiles.held == [36, 37, 38, 39]


def test_half_of_the_windows_hold_a_bright_voxel_near_it(stack: Path, tmp_path: Path) -> None:
    """The fiber lies in 3 of 20 slices: windows at random places of them, and windows around it."""
    cut = slices.cut_windows(list_stack(stack), 400, 32, 32, 0, tmp_path)
    bright = cut.tiles.array.max((1, 2, 3)) > 250
    assert 0.05 < bright.mean() < 0.2


def test_windows_are_cut_once(stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = list_stack(stack)
    first = np.array(slices.cut_windows(volumes, 40, 32, 32, 0, tmp_path).tiles.array)
    monkeypatch.setattr(slices, "_cut_volume", None)
    assert np.array_equal(slices.cut_windows(volumes, 40, 32, 32, 0, tmp_path).tiles.array, first)


def test_small_slices_are_mirrored_not_enlarged(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "small.tif", (12, 40, 48))
    window = slices.cut_windows(list_stack(path), 4, 64, 32, 0, tmp_path).tiles.array[0, 0]
    assert np.array_equal(window[40:], window[38 : 38 - 24 : -1])
    assert np.array_equal(window[:, 48:], window[:, 46 : 46 - 16 : -1])


def test_local_contrast_is_that_of_trace(stack: Path, tmp_path: Path) -> None:
    (volume,) = list_stack(stack, "contrast=local")
    shown = volume.open()(slices.Box.whole(volume.shape))
    assert shown[6, 22, 40] > 0.5
    assert np.median(shown) < 0.2


def test_slices_keep_their_brightness_and_photographs_do_not() -> None:
    windows = torch.zeros(16, 1, 64, 64)
    windows[:, :, 20:24] = 1
    crops = augment.vary_slices(windows, 32, torch.Generator().manual_seed(0))
    assert crops.shape == (16, 3, 32, 32)
    # Black stays black and white stays white, whatever the gamma.
    assert crops.amin((1, 2, 3)).max() == -1
    assert (crops.median(-1).values.median(-1).values == -1).float().mean() > 0.8
