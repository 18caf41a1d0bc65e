"""A folder of 2D TIFF slices, in natural order (2.tif before 10.tif)."""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

from hpc_neuro.core.files import format_count
from hpc_neuro.core.image_names import is_system_file
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.units import um_per
from hpc_neuro.data.formats import tiff, tiff_voxel_size
from hpc_neuro.data.formats.decompress import DecodedCache
from hpc_neuro.data.formats.volume import Array, Index, StoredArray, translate_errors

_MAX_OPEN = 64
"""Slices that are kept open."""


def matches(path: Path, head: bytes = b"") -> bool:
    """Whether the folder holds TIFF files itself."""
    return any(_is_slice(file) for file in path.iterdir())


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """The slices as one stack; `dataset` is a pattern such as `*_C1_*.tif` where a folder holds more than one series.

    Raises InputError for a gap in the numbering, for slices of other shapes or types, and for a folder of whole stacks.
    """
    names = sort_slices(path, dataset)

    # The first slice stands for all; the others are compared with it when they are read.
    with translate_errors(path / names[0], "TIFF"):
        first = tiff.open_source(path / names[0], None)
    if len([n for n in first.shape if n > 1]) > 2 and "S" not in first.axes:
        raise InputError(
            f"{path} is a folder of {len(names)} stacks ({names[0]} is {first.shape}), not of 2D slices; give one file"
        )

    spacing = None if first.spacing is None else (_read_slice_distance(path / names[0]), *first.spacing)
    # A slice never states a size along z; the note below says it for the stack.
    notes = tuple(n for n in first.notes if "no size along" not in n)
    notes += (f"{format_count(len(names), 'slice')}, {names[0]} to {names[-1]}",)
    if spacing is not None and not math.isfinite(spacing[0]):
        y, x = spacing[1:3]
        notes += (f"the slices give {y:.6g} x {x:.6g} um along y x, but no distance between them",)

    shape = (len(names), *first.shape)
    read = _SliceStack(path, names, first)
    return StoredArray("TIFF slices", shape, "Z" + first.axes, first.dtype, read, spacing, notes=notes)


def sort_slices(path: Path, pattern: str | None) -> list[str]:
    """Names of the slices in natural order; InputError when they follow no single number or one is missing."""
    names = _list_slices(path, pattern)
    if len(names) == 1:
        return names
    numbers = {name: tuple(int(d) for d in re.findall(r"\d+", Path(name).stem)) for name in names}

    # The number that counts the slices is the only one that differs between their names.
    columns = list(zip(*numbers.values(), strict=True))
    counting = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(counting) != 1:
        fault = f"{len(counting)} numbers differ" if counting else "no number differs"
        raise InputError(
            f"{path}: in the names of its slices ({names[0]} ... {names[-1]}) {fault}, so their order is open; keep "
            "one channel or time per folder, or choose with dataset='PATTERN'"
        )

    # The order is that of the numbers, 2 before 10.
    names.sort(key=lambda name: numbers[name][counting[0]])
    _check_steps(path, names, np.diff([numbers[name][counting[0]] for name in names]))
    return names


def _list_slices(path: Path, pattern: str | None) -> list[str]:
    """The slices named like `pattern`; InputError unless their names differ in numbers alone."""
    names = sorted(p.name for p in path.iterdir() if _is_slice(p))
    if pattern is not None:
        names = [n for n in names if fnmatch.fnmatch(n, pattern)]
        if not names:
            raise InputError(f"{path} holds no TIFF named like dataset={pattern}")

    # Names of one series are equal once their digits are masked.
    series: dict[str, list[str]] = {}
    for name in names:
        series.setdefault(re.sub(r"\d+", "#", Path(name).stem), []).append(name)
    if len(series) > 1:
        shown = ", ".join(f"{len(v)} like {v[0]}" for v in list(series.values())[:3])
        raise InputError(f"{path} holds slices of different names ({shown}); choose with dataset='PATTERN'")
    return names


def _check_steps(path: Path, names: Sequence[str], steps: np.ndarray) -> None:
    """Raise InputError for two slices of one number, and for a step larger than the smallest."""
    if (steps == 0).any():
        i = int(np.argmin(steps))
        raise InputError(f"{path}: {names[i]} and {names[i + 1]} have the same number; keep one of them")

    if (gaps := np.flatnonzero(steps != steps.min())).size:
        i = int(gaps[0])
        raise InputError(
            f"{path} has a gap in its slices between {names[i]} and {names[i + 1]}; restore them, or renumber"
        )


class _SliceStack:
    """Reads each slice of a box from its own file, and checks that it has the first one's shape and type."""

    def __init__(self, path: Path, names: Sequence[str], first: StoredArray) -> None:
        self.path, self.names, self.first = path, names, first
        self.cache = DecodedCache(tiff.CACHE_BYTES)
        self.get_slice = functools.lru_cache(_MAX_OPEN)(self._open_slice)

    def __call__(self, index: Index) -> Array:
        out = np.empty([s.stop - s.start for s in index], self.first.dtype)
        for part, number in zip(out, range(index[0].start, index[0].stop), strict=True):
            with translate_errors(self.path / self.names[number], "TIFF"):
                part[...] = self.get_slice(number).read(index[1:])
        return out

    def _open_slice(self, number: int) -> StoredArray:
        path = self.path / self.names[number]
        array = tiff.open_source(path, None, self.cache)

        if (array.shape, array.dtype) != (self.first.shape, self.first.dtype):
            raise InputError(
                f"{path} is {array.shape} {array.dtype}, but the first slice {self.names[0]} is {self.first.shape} "
                f"{self.first.dtype}; slices of one stack must agree"
            )
        return array


def _read_slice_distance(path: Path) -> float:
    """Micrometers between slices as ImageJ notes it in a slice; nan where it does not."""
    with tifffile.TiffFile(path) as tif:
        meta = tif.imagej_metadata or {}
    per, distance = um_per(tiff_voxel_size.imagej_unit(meta, "Z")), tiff_voxel_size.parse_number(meta.get("spacing"))
    return distance * per if per and distance else math.nan


def _is_slice(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff") and not is_system_file(path)
