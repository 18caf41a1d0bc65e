"""TIFF: ImageJ, OME, BigTIFF, LSM, tiled or in strips, compressed. Reads only the segments that a box touches."""

from __future__ import annotations

import collections
import itertools
import math
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import tiff_voxel_size
from hpc_neuro.data.formats.volume import Array, Index, StoredArray, check_dtype, check_shape, map_array, require_bytes

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".lsm")
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CACHE_BYTES = 128 << 20  # decoded segments kept: neighbouring boxes of one slab meet the same strips
_MOST_EXPANSION = 100_000  # no codec in use packs tighter; a segment that matches more is a lying header


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as a TIFF does."""
    return head[:4] in MAGIC


def open_source(path: Path, dataset: str | None, cache_bytes: int = CACHE_BYTES) -> StoredArray:
    """The stack in a TIFF; `dataset` is the number of the series where a file holds several.

    Raises InputError for a chain of pages that leaves the file, for pages that are missing and for samples that no
    reader could mean as intensity (a colour palette).
    """
    _check_chain(path)
    tif, series = _series(path, dataset)
    shape = check_shape(path, series.shape)
    dtype = check_dtype(path, np.dtype(series.dtype))
    axes, notes = _axes(series.axes, series.kind, shape)
    spacing, more = tiff_voxel_size.spacing(tif, series, axes)
    notes += more
    keyframe = series.keyframe
    table = None
    if keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE:
        table, more = _palette(path, tif, keyframe)
        notes += more
    if keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        notes += ("zero is displayed as white; the stored values are read as they are",)
    if series.dataoffset is not None and table is None:
        read = map_array(path, np.dtype(tif.byteorder + dtype.char), shape, series.dataoffset)
        tif.close()
        return StoredArray("TIFF", shape, axes, dtype, read, spacing, notes=notes)
    pages = _Pages(path, tif, series, shape, table, cache_bytes)
    return StoredArray("TIFF", shape, axes, dtype if table is None else table.dtype, pages, spacing, notes=notes)


class _Pages:
    """Reads boxes of a series whose pages are compressed or scattered, segment by segment."""

    def __init__(
        self,
        path: Path,
        tif: tifffile.TiffFile,
        series: Any,
        shape: tuple[int, ...],
        table: Array | None,
        cache_bytes: int,
    ) -> None:
        self.path, self.tif, self.series, self.table = path, tif, series, table
        self.cache_bytes = cache_bytes
        frame = series.keyframe
        if frame.imagedepth != 1:
            raise InputError(f"{path} keeps several slices in one TIFF page; save it with one page per slice")
        separate, _, length, width, samples = frame.shaped
        self.page_shape = (separate, length, width, samples)
        self.page_axes = 2 + (separate > 1) + (samples > 1)
        self.lead = shape[: len(shape) - self.page_axes]
        if math.prod(self.lead) != len(series.pages) or math.prod(shape) != math.prod(self.lead) * math.prod(
            self.page_shape
        ):
            raise InputError(
                f"{path} declares an array of shape {shape} but holds {len(series.pages)} pages of {length} x {width}; "
                "it is incomplete, export it again"
            )
        self.tile = (
            (frame.tilelength, frame.tilewidth)
            if frame.is_tiled
            else (max(1, min(frame.rowsperstrip or length, length)), width)
        )
        self.grid = (math.ceil(length / self.tile[0]), math.ceil(width / self.tile[1]))
        self.lock = threading.Lock()
        self.kept: collections.OrderedDict[tuple[int, int], Array] = collections.OrderedDict()
        self.kept_bytes = 0
        self._check()

    def _check(self) -> None:
        """Every page is there, has all its segments, and each lies inside the file and can hold what it matches."""
        segments = self.page_shape[0] * self.grid[0] * self.grid[1]
        size = self.path.stat().st_size
        claimed = math.prod(self.tile) * self.page_shape[3] * self.series.dtype.itemsize
        for number, page in enumerate(self.series.pages):
            if page is None:
                raise InputError(f"{self.path}: page {number} of {len(self.series.pages)} is missing; export it again")
            offsets, counts = page.dataoffsets, page.databytecounts
            if len(offsets) < segments or len(counts) < segments:
                raise InputError(
                    f"{self.path}: page {number} lists {min(len(offsets), len(counts))} of its {segments} strips or "
                    "tiles; its header is damaged"
                )
            local = page.parent is self.tif  # a multi-file OME series has pages elsewhere
            for offset, count in zip(offsets, counts, strict=False):
                if count == 0 or (local and offset + count > size):
                    raise InputError(
                        f"{self.path} is incomplete: page {number} of {len(self.series.pages)} lies beyond the end of "
                        f"the file ({size} bytes); copy or export it again"
                    )
                if claimed > _MOST_EXPANSION * count + 65536:
                    raise InputError(
                        f"{self.path}: page {number} matches {claimed} bytes from {count} compressed ones; "
                        "its header is damaged"
                    )

    def __call__(self, index: Index) -> Array:
        lead, (rows, columns) = index[: len(self.lead)], self._plane(index)
        separate, _, _, samples = self.page_shape
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        picked = list(itertools.product(*(range(s.start, s.stop) for s in lead)))
        dtype = self.series.dtype if self.table is None else self.table.dtype
        out = np.empty((len(picked), separate, *shape, samples), dtype)
        with self.lock:
            for part, place in zip(out, picked, strict=True):
                number = int(np.ravel_multi_index(place, self.lead)) if self.lead else 0
                self._page(number, rows, columns, part)
        inner = tuple(n for n in (separate,) if n > 1) + shape + tuple(n for n in (samples,) if n > 1)
        array = out.reshape(*(s.stop - s.start for s in lead), *inner)
        if separate > 1:
            array = array[(..., index[-3], slice(None), slice(None))]
        return array[..., index[-1]] if samples > 1 else array

    def _plane(self, index: Index) -> tuple[slice, slice]:
        """The asked rows and columns; colour samples stand before or after them."""
        end = len(index) - (self.page_shape[3] > 1)
        return index[end - 2], index[end - 1]

    def _page(self, number: int, rows: slice, columns: slice, out: Array) -> None:
        """Fill `out` [separate, rows, columns, samples] from one page."""
        (high, wide), (down, across) = self.tile, self.grid
        for plane, i, j in itertools.product(
            range(self.page_shape[0]),
            range(rows.start // high, -(-rows.stop // high)),
            range(columns.start // wide, -(-columns.stop // wide)),
        ):
            segment = self._segment(number, (plane * down + i) * across + j)
            top, left = i * high, j * wide
            y0, y1 = max(rows.start, top), min(rows.stop, top + segment.shape[0])
            x0, x1 = max(columns.start, left), min(columns.stop, left + segment.shape[1])
            out[plane, y0 - rows.start : y1 - rows.start, x0 - columns.start : x1 - columns.start] = segment[
                y0 - top : y1 - top, x0 - left : x1 - left
            ]

    def _segment(self, number: int, i: int) -> Array:
        """One decoded strip or tile, [rows, columns, samples], from the cache where it is."""
        if (number, i) in self.kept:
            self.kept.move_to_end((number, i))
            return self.kept[number, i]
        page = self.series.pages[number]
        handle = page.parent.filehandle
        if handle.closed:
            handle.open()
        handle.seek(page.dataoffsets[i])
        data = handle.read(page.databytecounts[i])
        if len(data) != page.databytecounts[i]:
            raise InputError(f"{self.path} is incomplete: page {number} ends early; copy or export it again")
        tables = page.jpegtables if isinstance(page, tifffile.TiffPage) else None
        decoded, _, shape = page.keyframe.decode(data, i, jpegtables=tables)
        if decoded is None or decoded.size < math.prod(shape):
            raise InputError(f"{self.path} is damaged: page {number} decodes to too few voxels; export it again")
        segment: Array = decoded[0, : shape[1], : shape[2]]
        segment = segment if self.table is None else self.table[segment]
        self.kept[number, i] = segment
        self.kept_bytes += segment.nbytes
        while self.kept_bytes > self.cache_bytes:
            self.kept_bytes -= self.kept.popitem(last=False)[1].nbytes
        return segment


def _series(path: Path, dataset: str | None) -> tuple[tifffile.TiffFile, Any]:
    """The open file and the asked series in it, or the only one that is a stack."""
    tif = tifffile.TiffFile(path)
    found = list(tif.series)
    if not found:
        raise InputError(f"{path} is a TIFF without images; export it again")
    if dataset is not None:
        if not dataset.isdigit() or int(dataset) >= len(found):
            raise InputError(f"{path} has {len(found)} TIFF series; dataset={dataset} must be 0 to {len(found) - 1}")
        return tif, found[int(dataset)]
    stacks = [s for s in found if len(s.shape) > 2]
    if len(found) == 1 or len(stacks) == 1:
        return tif, (stacks or found)[0]
    if not stacks and tif.is_shaped:  # tifffile wrote a stack slice by slice, each as an array of its own
        loose = tifffile.TiffFile(path, is_shaped=False)
        if len(loose.series) == 1:
            tif.close()
            return loose, loose.series[0]
        loose.close()
    kinds = collections.Counter(f"{s.shape} {s.dtype}" for s in found)
    shown = ", ".join(f"{count} of shape {kind}" for kind, count in kinds.most_common(4))
    raise InputError(f"{path} holds {len(found)} images ({shown}); choose one with dataset=0 to {len(found) - 1}")


def _axes(found: str, kind: str, shape: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
    """tifffile's axes in our letters. Pages without any name are slices: stacks are kept as separate pages."""
    known = "".join(a if a in "ZYXCTS" else "Q" for a in found)
    if known in ("QYX", "QYXS", "QSYX"):
        return "Z" + known[1:], (f"{shape[0]} pages without axis names, taken as slices",)
    return known, ()


def _palette(path: Path, tif: tifffile.TiffFile, frame: Any) -> tuple[Array | None, tuple[str, ...]]:
    """What turns palette indices into grey values: None where the index is the grey value or a display colour table."""
    colours = np.asarray(frame.colormap)  # [3, 2^bits] uint16
    grey = bool((colours[0] == colours[1]).all() and (colours[0] == colours[2]).all())
    rising = bool((np.diff(colours.astype(np.int64).sum(0)) >= 0).all())
    if tif.is_imagej or rising:
        return None, ("a palette for display; the stored indices are the intensities",)
    if grey:
        return colours[0] if (colours[0] % 257).any() else (colours[0] // 257).astype(np.uint8), (
            "grey palette, applied",
        )
    raise InputError(f"{path} stores colours by a palette, which have no order as intensities; save it as grey values")


def _check_chain(path: Path) -> None:
    """Follow the chain of pages; InputError where it leaves the file or turns back (a truncated or damaged file)."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        order = "<" if handle.read(2) == b"II" else ">"
        big = struct.unpack(order + "H", _bytes(path, handle, 2))[0] == 43
        number, entry, place = ("Q", 20, "Q") if big else ("H", 12, "I")
        handle.seek(8 if big else 4)
        seen: set[int] = set()
        offset = struct.unpack(order + place, _bytes(path, handle, struct.calcsize(place)))[0]
        while offset:
            if offset in seen or offset + struct.calcsize(number) > size:
                what = "turns back on itself" if offset in seen else f"leaves the file ({size} bytes)"
                raise InputError(
                    f"{path} is damaged or incomplete: after {len(seen)} pages its chain of pages {what}; "
                    "copy or export it again"
                )
            seen.add(offset)
            handle.seek(offset)
            entries = struct.unpack(order + number, _bytes(path, handle, struct.calcsize(number)))[0]
            end = offset + struct.calcsize(number) + entries * entry
            require_bytes(path, end, struct.calcsize(place), f"page {len(seen)}")
            handle.seek(end)
            offset = struct.unpack(order + place, _bytes(path, handle, struct.calcsize(place)))[0]


def _bytes(path: Path, handle: Any, count: int) -> bytes:
    data: bytes = handle.read(count)
    if len(data) != count:
        raise InputError(f"{path} is incomplete: it ends inside its TIFF header; copy or export it again")
    return data
