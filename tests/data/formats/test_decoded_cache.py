"""Decoded pieces: kept in memory, then in a scratch file, and decoded at most twice."""

from __future__ import annotations

import collections
import os
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from hpc_neuro.core.geometry import Box
from hpc_neuro.data.formats import open_volume, tiff
from hpc_neuro.data.formats.decompress import DecodedCache
from tests.helpers.volume_checks import make_image


def make_piece(number: int) -> np.ndarray:
    return np.full((50, 60), number, "uint16")


def test_pieces_beyond_the_limit_are_decoded_twice_at_most() -> None:
    counts: collections.Counter[int] = collections.Counter()

    def decode(number: int) -> np.ndarray:
        counts[number] += 1
        return make_piece(number)

    cache = DecodedCache(3 * make_piece(0).nbytes)
    for _ in range(5):
        for number in range(10):
            np.testing.assert_array_equal(cache.get(number, partial(decode, number)), make_piece(number))
    assert set(counts.values()) == {2}
    # Memory holds what it may.
    assert len(cache.pieces) == 3


def test_one_pass_takes_no_disk() -> None:
    cache = DecodedCache(1)
    for number in range(10):
        cache.get(number, partial(make_piece, number))
    assert cache.scratch.file is None


def test_strips_of_large_pages_are_decoded_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page is one strip, larger than the cache, as some microscopes write."""
    data = make_image(shape=(6, 64, 64))
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack", compression="zlib", rowsperstrip=64)
    counts: collections.Counter[int] = collections.Counter()
    decode = tiff._Pages._decode_segment

    def count(self: Any, number: int, i: int) -> np.ndarray:
        counts[number] += 1
        return decode(self, number, i)

    monkeypatch.setattr(tiff, "CACHE_BYTES", 1000)
    monkeypatch.setattr(tiff._Pages, "_decode_segment", count)
    volume = open_volume(tmp_path / "a.tif")
    for y in range(0, 64, 16):
        for x in range(0, 64, 16):
            box = Box((0, y, x), (6, y + 16, x + 16))
            np.testing.assert_array_equal(volume[box], data[box.slices])
    assert set(counts.values()) == {2}


def test_a_forked_process_has_a_file_of_its_own() -> None:
    cache = DecodedCache(1)
    for _ in range(2):
        for number in range(3):
            cache.get(number, partial(make_piece, number))

    child = os.fork()
    if child == 0:
        # What the child writes must not reach the parent's file.
        for _ in range(3):
            for number in range(10, 13):
                cache.get(number, partial(make_piece, number))
        os._exit(0 if (cache.get(11, lambda: make_piece(0)) == 11).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    for number in range(3):
        assert (cache.get(number, lambda: make_piece(99)) == number).all()


def test_a_full_disk_only_costs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=0))
    cache = DecodedCache(1)
    for _ in range(3):
        for number in range(3):
            assert (cache.get(number, partial(make_piece, number)) == number).all()
    assert cache.scratch.file is None
