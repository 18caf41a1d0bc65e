"""Files in a folder of photographs that are none, or that would be read wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc_neuro.core.schema import InputError
from hpc_neuro.teacher.photographs import list_photographs, open_tiles

SIDE = 32


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photographs."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 200, (40, 60, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def save_16_bits(path: Path) -> None:
    Image.fromarray(np.full((40, 60), 20_000, np.uint16)).save(path)


def save_strip(path: Path) -> None:
    Image.fromarray(np.zeros((1, 3000), np.uint8)).save(path)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "16 bits": (save_16_bits, "more than 8 bits .*save it with 8 bits, or remove it"),
    "strip": (save_strip, "3000 x 1 pixels, a strip; cut it, or remove it"),
    "empty": (Path.touch, "cannot be read as a picture .*remove or replace it"),
    "FIFO": (os.mkfifo, "is no regular file .*give the path of a photograph"),
    "broken link": (lambda path: path.symlink_to("nowhere.png"), "No such file or directory.*; remove or replace it"),
    "link in circles": (lambda path: path.symlink_to(path.name), "cannot be read .*; remove or replace it"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_photograph_is_named(photos: Path, tmp_path: Path, case: str) -> None:
    make, message = CASES[case]
    make(photos / "x.png")
    with pytest.raises(InputError, match=f"x.png.*{message}"):
        open_tiles(list_photographs(photos, 1), tmp_path / "cache", SIDE, 1)

    # The advice: without it, the others are read.
    (photos / "x.png").unlink()
    tiles = open_tiles(list_photographs(photos, 1), tmp_path / "cache", SIDE, 1)
    assert (len(tiles.held), len(tiles.train)) == (1, 1)


def test_folders_are_no_photographs(photos: Path) -> None:
    (photos / "more.jpg").mkdir()
    (photos / "more.jpg" / "2.png").write_bytes((photos / "0.png").read_bytes())
    assert list_photographs(photos, 1).names == ("0.png", "1.png", "more.jpg/2.png")
