"""N5 blocks whose header states another size than their place: at the end of the array, where both are allowed."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.cli import main
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from tests.helpers.volume_checks import SHAPE, assert_reads, make_image
from tests.helpers.web_store import WebStore, serve_folder

Size = tuple[int, ...]
MODES = {"default": 0, "varlength": 1}
BLOCKS = [(4, 4, 2), (16, 16, 16)]
BEYOND = 60_000
"""Value of voxels beyond the end of the array, which the image does not have."""


def clip(place: Size, inside: Size, block: Size) -> Size:
    return inside


def fill_up(place: Size, inside: Size, block: Size) -> Size:
    return block


def go_beyond(place: Size, inside: Size, block: Size) -> Size:
    return tuple(min(n + 1, limit) for n, limit in zip(inside, block, strict=True))


def cut_axis(axis: int) -> Callable[[Size, Size, Size], Size]:
    """The last block along one axis lacks its last voxels."""

    def choose(place: Size, inside: Size, block: Size) -> Size:
        is_last = place[axis] == -(-SHAPE[::-1][axis] // block[axis]) - 1
        return tuple(max(n - 1, 0) if i == axis and is_last else n for i, n in enumerate(inside))

    return choose


def cut_first(place: Size, inside: Size, block: Size) -> Size:
    return inside if any(place) else (inside[0] - 1, *inside[1:])


def exceed(place: Size, inside: Size, block: Size) -> Size:
    return inside if any(place) else (block[0] + 1, *block[1:])


def write_blocks(path: Path, mode: str, block: Size, choose: Callable[[Size, Size, Size], Size]) -> Path:
    """An N5 array of make_image, byte by byte; `choose` gives the size of a block, dimensions x y z."""
    image = make_image().T
    path.mkdir()
    described = {"dimensions": image.shape, "blockSize": block, "dataType": "uint16", "compression": {"type": "raw"}}
    (path / "attributes.json").write_text(json.dumps(described))

    for place in itertools.product(*(range(-(-n // b)) for n, b in zip(image.shape, block, strict=True))):
        begin = [i * b for i, b in zip(place, block, strict=True)]
        inside = tuple(min(b, n - o) for b, n, o in zip(block, image.shape, begin, strict=True))
        size = choose(place, inside, block)
        values = np.full(size, BEYOND, ">u2")
        part = image[tuple(slice(o, o + min(n, m)) for o, n, m in zip(begin, size, inside, strict=True))]
        values[tuple(slice(0, n) for n in part.shape)] = part

        file = path.joinpath(*map(str, place))
        file.parent.mkdir(parents=True, exist_ok=True)
        length = struct.pack(">I", math.prod(size)) if MODES[mode] else b""
        file.write_bytes(struct.pack(">HH3I", MODES[mode], 3, *size) + length + values.tobytes(order="F"))
    return path


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("choose", [clip, fill_up, go_beyond])
def test_blocks_at_the_end_are_clipped_or_whole(
    tmp_path: Path, choose: Callable[[Size, Size, Size], Size], mode: str, block: Size
) -> None:
    assert_reads(write_blocks(tmp_path / "a.n5", mode, block, choose), make_image())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("choose", [cut_axis(0), cut_axis(1), cut_axis(2), cut_first], ids=["x", "y", "z", "first"])
def test_voxels_that_no_block_holds_are_not_zeros(
    tmp_path: Path, choose: Callable[[Size, Size, Size], Size], mode: str, block: Size
) -> None:
    volume = open_volume(write_blocks(tmp_path / "a.n5", mode, block, choose))
    with pytest.raises(InputError, match="holds a block of|holds no values"):
        volume[Box.whole(SHAPE)]
    # Each single voxel is right or refused.
    for start in itertools.product(*map(range, SHAPE)):
        box = Box(start, tuple(i + 1 for i in start))
        with contextlib.suppress(InputError):
            assert volume[box] == make_image()[box.slices]


@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_are_larger_than_the_array_says_are_refused(tmp_path: Path, mode: str) -> None:
    volume = open_volume(write_blocks(tmp_path / "a.n5", mode, (4, 4, 2), exceed))
    with pytest.raises(InputError, match=r"0/0/0.*exceeds blockSize|is larger than the \(4, 4, 2\) of the array"):
        volume[Box.whole(SHAPE)]


def test_dark_and_absent_blocks_are_zeros(tmp_path: Path) -> None:
    path = write_blocks(tmp_path / "a.n5", "default", (4, 4, 2), clip)
    expected = make_image()
    (path / "0" / "0" / "0").unlink()
    expected[:2, :4, :4] = 0
    dark = path / "1" / "1" / "1"
    dark.write_bytes(dark.read_bytes()[:16].ljust(dark.stat().st_size, b"\0"))
    expected[2:4, 4:, 4:8] = 0
    assert_reads(path, expected)


def test_a_short_block_is_exported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice: the image is written again, and is read."""
    path = write_blocks(tmp_path / "a.n5", "default", (4, 4, 2), cut_first)
    command = ["trace", str(path), f"out={tmp_path / 'out'}", "model=none", "voxel_size=1,1,1"]
    assert main(command) != 0
    assert "a block of (3, 4, 2) voxels where the array has (4, 4, 2)" in capsys.readouterr().err
    path.rename(tmp_path / "damaged.n5")
    np.testing.assert_array_equal(
        open_volume(write_blocks(path, "default", (4, 4, 2), clip))[Box.whole(SHAPE)], make_image()
    )


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebStore]:
    with serve_folder(tmp_path) as store:
        yield store


@pytest.mark.parametrize("has_ranges", [True, False])
def test_blocks_of_a_remote_array(web: WebStore, has_ranges: bool) -> None:
    web.has_ranges = has_ranges
    write_blocks(web.folder / "whole.n5", "default", (4, 4, 2), clip)
    assert_reads(f"{web.address}/whole.n5", make_image())  # type: ignore[arg-type]
    write_blocks(web.folder / "short.n5", "default", (4, 4, 2), cut_first)
    with pytest.raises(InputError, match=r"short.n5/0/0/0 holds a block of \(3, 4, 2\) voxels"):
        open_volume(f"{web.address}/short.n5")[Box.whole(SHAPE)]
