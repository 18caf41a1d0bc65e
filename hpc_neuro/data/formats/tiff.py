"""TIFF: ImageJ, OME, BigTIFF, LSM, tiled or in strips, compressed. Only the segments that a box touches are decoded."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import tiff_pages, tiff_voxel_size
from hpc_neuro.data.formats.decompress import DecodedCache
from hpc_neuro.data.formats.volume import (
    Array,
    Index,
    StoredArray,
    check_dtype,
    check_shape,
    invert_array,
    map_array,
    note_outside,
    scale_array,
)

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".lsm")
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

CACHE_BYTES = 128 << 20
"""Bytes of decoded segments that a volume keeps: neighboring boxes of one slab meet the same strips."""

_INTENSITIES = {
    tifffile.PHOTOMETRIC.MINISWHITE,
    tifffile.PHOTOMETRIC.MINISBLACK,
    tifffile.PHOTOMETRIC.RGB,
    tifffile.PHOTOMETRIC.MASK,
    tifffile.PHOTOMETRIC.LINEAR_RAW,
}
"""Photometric interpretations under which a sample is an intensity; zero is white under MINISWHITE."""
_JPEG = {tifffile.COMPRESSION.OJPEG, tifffile.COMPRESSION.JPEG}

_CALIBRATION_KINDS = (0, 20)
"""ImageJ's calibration functions that are read: a straight line, and none."""
_COUNTED_KINDS = ("imagej", "ome", "shaped")
"""Kinds of series whose number of pages is that of a description, which may differ from the pages of the file."""

_HEADER_BYTES = 8
"""Bytes of the shortest header of a TIFF."""
_MAX_EXPANSION = 100_000
"""Decoded bytes per stored byte; no codec in use packs tighter, so a segment that claims more has a damaged header."""


def matches(path: Path, head: bytes) -> bool:
    """Whether the file begins as a TIFF does."""
    return head[:4] in MAGIC


def open_source(path: Path, dataset: str | None, cache: DecodedCache | None = None) -> StoredArray:
    """The stack in a TIFF; `dataset` is the number of the series where a file holds several.

    Files that make up one volume share a `cache` of decoded segments.

    Raises InputError for a chain of pages that leaves the file, for pages that are missing and for samples that no
    reader could mean as intensity (a color palette).
    """
    files.require_regular_file(path, "an image")
    # tifffile stops silently at a broken chain, and would return the pages before it.
    forms = tiff_pages.read_page_forms(path)

    tif, series = _choose_series(path, dataset)
    if tif.is_imagej:
        tiff_voxel_size.require_single_values(path, str(getattr(tif.pages[0], "description", "")))
    _check_page_count(path, tif, series, len(forms))
    tiff_pages.require_one_form(path, forms, _list_page_numbers(tif, series, len(forms)))
    if series.kind == "ome":
        _check_ome_pages(path, tif, series, forms)
    shape = check_shape(path, series.shape)
    dtype = check_dtype(path, np.dtype(series.dtype))

    # What the file says of axes, voxel size and the meaning of its samples.
    axes, notes = _name_axes(series.axes, shape)
    names = tuple(tifffile.TIFF.AXES_NAMES.get(a, a) for a in series.axes) if "Q" in axes else ()
    notes += _note_further_series(tif, series) + note_outside(path, _list_other_files(series))
    spacing, size_notes = tiff_voxel_size.read_spacing(tif, series, axes)
    palette, photometric_notes = _interpret_samples(path, tif, series.keyframe)
    notes += size_notes + photometric_notes + _note_orientation(series.keyframe)
    notes += _note_ome_type(tif, dtype) if series.kind == "ome" else ()

    # Uncompressed pages that follow one another are one plain array.
    if series.dataoffset is not None and palette is None:
        read: Any = map_array(path, np.dtype(tif.byteorder + dtype.char), shape, series.dataoffset)
        tif.close()
    else:
        read = _Pages(path, tif, series, shape, palette, cache or DecodedCache(CACHE_BYTES))
        dtype = dtype if palette is None else palette.dtype

    array = StoredArray("TIFF", shape, axes, dtype, read, spacing, notes=notes, axis_names=names)
    if tif.is_imagej:
        array = _calibrate_values(path, array, tif.imagej_metadata or {})
    array = _apply_gdal_tags(path, array, series.keyframe)
    if series.keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        return invert_array(path, array, series.keyframe.bitspersample)
    return array


class _Pages:
    """Reads boxes of a series whose pages are compressed or scattered, segment (strip or tile) by segment."""

    def __init__(
        self,
        path: Path,
        tif: tifffile.TiffFile,
        series: Any,
        shape: tuple[int, ...],
        palette: Array | None,
        cache: DecodedCache,
    ) -> None:
        self.path, self.tif, self.series, self.palette = path, tif, series, palette
        frame = series.keyframe
        if frame.imagedepth != 1:
            raise InputError(f"{path} keeps several slices in one TIFF page; save it with one page per slice")

        # `shaped` is samples in separate planes, depth, length, width, interleaved samples.
        separate, _, length, width, samples = frame.shaped
        self.page_shape = (separate, length, width, samples)
        page_axes = 2 + (separate > 1) + (samples > 1)
        self.lead = shape[: len(shape) - page_axes]
        """Sizes of the axes that count pages."""
        declared = math.prod(self.lead) * math.prod(self.page_shape)
        if math.prod(self.lead) != len(series.pages) or math.prod(shape) != declared:
            raise InputError(
                f"{path} declares an array of shape {shape} but holds {len(series.pages)} pages of {length} x {width}; "
                "it is incomplete, export it again"
            )

        # Strips are tiles of the full width.
        rows_per_strip = max(1, min(frame.rowsperstrip or length, length))
        self.tile = (frame.tilelength, frame.tilewidth) if frame.is_tiled else (rows_per_strip, width)
        self.grid = (math.ceil(length / self.tile[0]), math.ceil(width / self.tile[1]))
        self._check_segments()

        self.lock, self.cache = threading.Lock(), cache

    def __call__(self, index: Index) -> Array:
        # `lead` picks pages; what follows it lies inside a page.
        lead, (rows, columns) = index[: len(self.lead)], self._plane_index(index)
        separate, _, _, samples = self.page_shape
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        places = list(itertools.product(*(range(s.start, s.stop) for s in lead)))
        dtype = self.series.dtype if self.palette is None else self.palette.dtype
        out = np.empty((len(places), separate, *shape, samples), dtype)

        with self.lock:
            for part, place in zip(out, places, strict=True):
                number = int(np.ravel_multi_index(place, self.lead)) if self.lead else 0
                self._read_page(number, rows, columns, part)

        # Pages have an axis of samples only where there are several; those that are asked for are cut out.
        inner = tuple(n for n in (separate,) if n > 1) + shape + tuple(n for n in (samples,) if n > 1)
        array = out.reshape(*(s.stop - s.start for s in lead), *inner)
        if separate > 1:
            array = array[(..., index[-3], slice(None), slice(None))]
        return array[..., index[-1]] if samples > 1 else array

    def _check_segments(self) -> None:
        """Check that every page exists with all its segments, each inside the file and able to hold what it claims."""
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

            # A multi-file OME series has pages in other files.
            is_local = page.parent is self.tif
            for offset, count in zip(offsets, counts, strict=False):
                if count == 0 or (is_local and offset + count > size):
                    raise InputError(
                        f"{self.path} is incomplete: page {number} of {len(self.series.pages)} lies beyond the end of "
                        f"the file ({size} bytes); copy or export it again"
                    )
                # Every TIFF begins with a header of eight bytes, which would be read as voxels.
                if offset < _HEADER_BYTES:
                    raise InputError(
                        f"{self.path}: page {number} places a strip or tile at byte {offset}, in the header of the "
                        "file; copy or export it again"
                    )
                if claimed > _MAX_EXPANSION * count + 65536:
                    raise InputError(
                        f"{self.path}: page {number} claims {claimed} bytes from {count} compressed ones; "
                        "its header is damaged"
                    )

    def _plane_index(self, index: Index) -> tuple[slice, slice]:
        """The rows and columns of an index; color samples stand before or after them."""
        end = len(index) - (self.page_shape[3] > 1)
        return index[end - 2], index[end - 1]

    def _read_page(self, number: int, rows: slice, columns: slice, out: Array) -> None:
        """Fill `out` [separate, rows, columns, samples] from one page."""
        (height, width), (down, across) = self.tile, self.grid

        for plane, i, j in itertools.product(
            range(self.page_shape[0]),
            range(rows.start // height, -(-rows.stop // height)),
            range(columns.start // width, -(-columns.stop // width)),
        ):
            # The part of the segment that lies inside the rows and columns.
            key = (self.path, number, (plane * down + i) * across + j)
            segment = self.cache.get(key, functools.partial(self._decode_segment, *key[1:]))
            top, left = i * height, j * width

            y0, y1 = max(rows.start, top), min(rows.stop, top + segment.shape[0])
            x0, x1 = max(columns.start, left), min(columns.stop, left + segment.shape[1])
            part = segment[y0 - top : y1 - top, x0 - left : x1 - left]
            out[plane, y0 - rows.start : y1 - rows.start, x0 - columns.start : x1 - columns.start] = part

    def _decode_segment(self, number: int, i: int) -> Array:
        """One strip or tile, [rows, columns, samples]."""
        # A multi-file series closes its other files after opening.
        page = self.series.pages[number]
        handle = page.parent.filehandle
        if handle.closed:
            handle.open()
        handle.seek(page.dataoffsets[i])
        data = handle.read(page.databytecounts[i])
        if len(data) != page.databytecounts[i]:
            raise InputError(f"{self.path} is incomplete: page {number} ends early; copy or export it again")

        # tifffile decodes to [depth, rows, columns, samples], which is smaller at the border of the page.
        tables = page.jpegtables if isinstance(page, tifffile.TiffPage) else None
        decoded, _, shape = page.keyframe.decode(data, i, jpegtables=tables)
        if decoded is None or decoded.size < math.prod(shape):
            raise InputError(f"{self.path} is damaged: page {number} decodes to too few voxels; export it again")
        segment: Array = decoded[0, : shape[1], : shape[2]]
        return segment if self.palette is None else self.palette[segment]


def _choose_series(path: Path, dataset: str | None) -> tuple[tifffile.TiffFile, Any]:
    """The open file, and the series in it that `dataset` numbers or the only one that is a stack."""
    tif = tifffile.TiffFile(path)
    if tif.is_ome:
        _check_other_files(path, str(tif.ome_metadata))
    series = list(tif.series)
    if not series:
        raise InputError(f"{path} is a TIFF without images; export it again")
    if dataset is not None:
        if not dataset.isdecimal() or int(dataset) >= len(series):
            raise InputError(f"{path} has {len(series)} TIFF series; dataset={dataset} must be 0 to {len(series) - 1}")
        return tif, series[int(dataset)]

    # Thumbnails and labels are planes; the only stack among them is the image.
    stacks = [s for s in series if len(s.shape) > 2]
    if len(series) == 1 or len(stacks) == 1:
        chosen = (stacks or series)[0]
        _require_alike_pages(path, series, chosen)
        return tif, chosen

    # `tifffile.imwrite(append=True)` in a loop describes each slice as an array of its own.
    if not stacks and tif.is_shaped:
        loose = tifffile.TiffFile(path, is_shaped=False)
        if len(loose.series) == 1:
            tif.close()
            return loose, loose.series[0]
        loose.close()

    # Several images: the user has to choose.
    kinds = collections.Counter(f"{s.shape} {s.dtype}" for s in series)
    shown = ", ".join(f"{count} of shape {kind}" for kind, count in kinds.most_common(4))
    raise InputError(f"{path} holds {len(series)} images ({shown}); choose one with dataset=0 to {len(series) - 1}")


def _check_other_files(path: Path, description: str) -> None:
    """Raise InputError for pages in what is no regular file, such as a FIFO, which a program waits for in vain."""
    with contextlib.suppress(ElementTree.ParseError):
        for element in ElementTree.fromstring(description).iter():
            name = element.get("FileName", "") if element.tag.rpartition("}")[2] == "UUID" else ""
            if name and (path.parent / name).exists():
                files.require_regular_file(path.parent / name, "a file of an OME-TIFF")


def _list_other_files(series: Any) -> list[Path]:
    """The files beside its own that a series has pages in."""
    parents = {page.parent for page in series.pages if page is not None} if series.kind == "ome" else set()
    return [Path(parent.filehandle.path) for parent in parents]


def _check_ome_pages(path: Path, tif: tifffile.TiffFile, series: Any, forms: Sequence[tiff_pages.PageForm]) -> None:
    """Raise InputError for a page that stands for two planes, and for files of a set that do not belong together.

    Such a set is read page by page: a file of another size or type would be decoded as if it were like the first one.
    """
    pages = [page for page in series.pages if page is not None]
    counts = collections.Counter((page.parent, page.index) for page in pages)
    repeated = next((page for page, count in counts.items() if count > 1), None)
    if repeated is not None:
        raise InputError(
            f"{path}: its OME description takes page {repeated[1]} for {counts[repeated]} planes; correct its TiffData "
            "elements, or export the image again"
        )

    expected = _read_ome_uuids(str(tif.ome_metadata))
    if len(pages) < len(series.pages) and (absent := [n for n in expected if not (path.parent / n).is_file()]):
        raise InputError(
            f"{path} is one file of an image, and {_list_few(absent)} of it not beside it; copy the whole image, with "
            "the names of its files"
        )

    # The first page that is here stands for all others.
    wanted, wanted_page = None, ""
    for parent in {page.parent: None for page in sorted(pages, key=lambda page: page.parent is not tif)}:
        file = Path(parent.filehandle.path)
        own = forms if parent is tif else tiff_pages.read_page_forms(file)
        numbers = [page.index for page in pages if page.parent is parent and isinstance(page.index, int)]
        if wanted is None:
            wanted, wanted_page = own[numbers[0]], f"page {numbers[0]} of {file}"
        _check_ome_uuid(file, parent, expected)
        tiff_pages.require_form(file, own, numbers, wanted, wanted_page)


def _list_few(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more files are"


def _read_ome_uuids(description: str) -> dict[str, str]:
    """The identifier of each file of a set, by its name."""
    elements = [e for e in ElementTree.fromstring(description).iter() if e.tag.rpartition("}")[2] == "UUID"]
    return {str(e.get("FileName")): (e.text or "").strip() for e in elements if e.get("FileName")}


def _check_ome_uuid(file: Path, parent: tifffile.TiffFile, expected: Mapping[str, str]) -> None:
    """Raise InputError for a file that is, by the identifier in it, another file of its set."""
    try:
        stated = ElementTree.fromstring(str(getattr(parent.pages[0], "description", ""))).get("UUID", "")
    except ElementTree.ParseError:
        # Only the first file of a set needs a description.
        return
    owner = next((name for name, uuid in expected.items() if stated and uuid == stated), None)
    if owner is not None and Path(owner).name != file.name:
        raise InputError(
            f"{file} is {owner} by the identifier in it; the files of this image were renamed, give them their own "
            "names again"
        )


def _note_ome_type(tif: tifffile.TiffFile, dtype: np.dtype[Any]) -> tuple[str, ...]:
    """A note where an OME description states another type than that of the pages."""
    pixels = [e for e in ElementTree.fromstring(str(tif.ome_metadata)).iter() if e.tag.rpartition("}")[2] == "Pixels"]
    names = {"float": "float32", "double": "float64", "bit": "bool"}
    stated = {names.get(text, text) for e in pixels if (text := e.get("Type", e.get("PixelType", "")).lower())}
    if not stated or dtype.name in stated:
        return ()
    return (f"its OME description says {', '.join(sorted(stated))}, its pages are {dtype}; they are read as stored",)


def _list_page_numbers(tif: tifffile.TiffFile, series: Any, count: int) -> list[int]:
    """Numbers of the pages of a series in the chain of `count` pages; the one that stands for all of them comes first.

    tifffile compares only some pages of a long stack with the first, and reads all of them as that one.
    """
    first = series.keyframe.index
    if not isinstance(first, int) or first >= count:
        return []
    if series.kind == "ome":
        pages = [page for page in series.pages if page is not None and page.parent is tif]
        return [first, *(page.index for page in pages if isinstance(page.index, int) and page.index < count)]
    if series.kind in ("uniform", "shaped", "imagej"):
        return list(range(first, min(count, first + len(series.pages))))
    return []


def _require_alike_pages(path: Path, series: list[Any], chosen: Any) -> None:
    """Raise InputError where pages that belong to the stack would be left out: they differ in type or in their size."""
    others = [other for other in series if other is not chosen]
    # Thumbnails stand before or behind a stack, and are smaller; microscopes interleave them in LSM files.
    is_plain = bool(others) and chosen.kind in ("generic", "uniform")
    numbers = [page.index for page in chosen.pages if page is not None] if is_plain else [0]
    size = chosen.keyframe.shape[:2]
    for other in others:
        is_between = min(numbers) < other.keyframe.index < max(numbers)
        if other.keyframe.shape[:2] == size or is_between:
            raise InputError(
                f"{path}: page {other.keyframe.index} ({_describe_pages(other)}) differs from those of the stack "
                f"({_describe_pages(chosen)}); save all pages alike, or choose one image with dataset=0 to "
                f"{len(series) - 1}"
            )


def _describe_pages(series: Any) -> str:
    frame = series.keyframe
    return f"{' x '.join(map(str, frame.shape))} {frame.dtype}, {tifffile.PHOTOMETRIC(frame.photometric).name}"


def _note_further_series(tif: tifffile.TiffFile, chosen: Any) -> tuple[str, ...]:
    """A note on images of the file that are not read."""
    others = [series for series in tif.series if series is not chosen]
    if not others:
        return ()
    shapes = ", ".join(dict.fromkeys(" x ".join(map(str, series.shape)) for series in others[:4]))
    return (f"{files.format_count(len(others), 'further image')} of the file ({shapes}) not read; dataset= chooses",)


def _apply_gdal_tags(path: Path, array: StoredArray, frame: Any) -> StoredArray:
    """An array with the scale and offset that GDAL noted, and a note on the value of missing voxels.

    Raises InputError where they differ between samples, or are no numbers.
    """
    tags = frame.tags
    nodata = tags.get("GDAL_NODATA")
    if nodata is not None:
        note = f"the value {str(nodata.value).strip()} stands for missing voxels by its tags; it is read as it is"
        array = replace(array, notes=(*array.notes, note))

    metadata = tags.get("GDAL_METADATA")
    if metadata is None:
        return array
    values: dict[str, set[float]] = {"scale": set(), "offset": set()}
    for item in ElementTree.fromstring(str(metadata.value).rstrip("\0")).iter("Item"):
        if (role := item.get("role", "")) in values:
            number = tiff_voxel_size.parse_number((item.text or "").strip())
            values[role].add(math.nan if number is None else number)
    slope, offset = (sum(values[role]) if values[role] else default for role, default in (("scale", 1), ("offset", 0)))
    if max(map(len, values.values())) > 1 or not (math.isfinite(slope) and math.isfinite(offset) and slope):
        raise InputError(f"{path}: GDAL's scale or offset is no single number; save the image without them")
    return array if (slope, offset) == (1, 0) else scale_array(array, slope, offset)


def _check_page_count(path: Path, tif: tifffile.TiffFile, series: Any, pages: int) -> None:
    """Raise InputError when the descriptions in a file speak of fewer pages than it has, or of pages that it lacks.

    A single page may stand for a whole stack, whose slices follow it without pages of their own.
    """
    count = tiff_voxel_size.parse_number((tif.imagej_metadata or {}).get("images", 1)) if tif.is_imagej else 1
    if series.kind != "imagej" and count is not None and count > pages:
        raise InputError(
            f"{path} is incomplete: its ImageJ description speaks of {count:g} images, and it holds {pages}; copy or "
            "export it again"
        )
    if series.kind not in _COUNTED_KINDS or pages == 1:
        return

    described = sum(math.prod(s.shape) // math.prod(s.keyframe.shape) for s in tif.series)
    # An OME series may have pages in other files.
    if described < pages or (described > pages and series.kind == "shaped"):
        raise InputError(
            f"{path} has {pages} pages, but its description speaks of {described}; open it in ImageJ by "
            "File > Import > Bio-Formats and save it again, or correct the description"
        )


def _calibrate_values(path: Path, array: StoredArray, meta: Mapping[str, Any]) -> StoredArray:
    """An array with the values that ImageJ shows: signed 16-bit images are stored as unsigned ones and an offset.

    Raises InputError for a calibration that is no straight line.
    """
    kind = meta.get("cf")
    if kind is None:
        return array

    numbers = [tiff_voxel_size.parse_number(meta.get(key, default)) for key, default in (("c0", 0), ("c1", 1))]
    offset, slope = (math.nan if number is None else number for number in numbers)
    is_line = math.isfinite(offset) and math.isfinite(slope) and slope != 0
    if kind not in _CALIBRATION_KINDS or not is_line:
        raise InputError(
            f"{path} gives its values by ImageJ's calibration function {kind}, and only straight lines are read; take "
            "it away with Analyze > Calibrate > None, and save the image again"
        )
    return array if (slope, offset) == (1.0, 0.0) or kind != 0 else scale_array(array, slope, offset)


def _note_orientation(frame: Any) -> tuple[str, ...]:
    """A note on a tag that asks viewers to turn or mirror the image; programs of microscopy do not."""
    tag = frame.tags.get("Orientation") if hasattr(frame, "tags") else None
    if tag is None or tag.value == 1:
        return ()
    return (f"its tag Orientation {int(tag.value)} asks to turn or mirror it for display; it is read as stored",)


def _name_axes(stored: str, shape: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
    """tifffile's axes in our letters, and notes. Pages without a name are slices: stacks are kept as separate pages."""
    letters = "".join(a if a in "ZYXCTS" else "Q" for a in stored)
    if letters in ("QYX", "QYXS", "QSYX") and stored[0] in "IQ":
        return "Z" + letters[1:], (f"{shape[0]} pages without axis names, taken as slices",)
    return letters, ()


def _interpret_samples(path: Path, tif: tifffile.TiffFile, frame: Any) -> tuple[Array | None, tuple[str, ...]]:
    """The palette that turns stored samples into intensities (None: they are intensities), and notes."""
    photometric = tifffile.PHOTOMETRIC(frame.photometric)
    if photometric == tifffile.PHOTOMETRIC.PALETTE:
        return _choose_palette(path, tif, frame)

    # tifffile turns JPEG's YCbCr into RGB, and leaves all other color spaces as they are.
    is_converted = photometric == tifffile.PHOTOMETRIC.YCBCR and frame.compression in _JPEG
    if photometric not in _INTENSITIES and not is_converted:
        raise InputError(
            f"{path} stores its samples as {photometric.name}, which are no intensities; save it as gray values"
        )
    return None, ()


def _choose_palette(path: Path, tif: tifffile.TiffFile, frame: Any) -> tuple[Array | None, tuple[str, ...]]:
    """The gray values of palette indices; None where the index is the intensity and the palette is for display."""
    # [3, 2^bits] uint16
    colors = np.asarray(frame.colormap)
    is_gray = bool((colors[0] == colors[1]).all() and (colors[0] == colors[2]).all())
    is_rising = bool((np.diff(colors.astype(np.int64).sum(0)) >= 0).all())
    if tif.is_imagej or is_rising:
        return None, ("a palette for display; the stored indices are the intensities",)

    if is_gray:
        # 8-bit grays are stored as multiples of 257.
        has_16_bits = (colors[0] % 257).any()
        return colors[0] if has_16_bits else (colors[0] // 257).astype(np.uint8), ("gray palette, applied",)
    raise InputError(f"{path} stores colors by a palette, which have no order as intensities; save it as gray values")
