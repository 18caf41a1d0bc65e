"""Text files that many workers make and put in order together, each holding one piece at a time.

A part holds items of several streams, such as the trees of one batch and their rows in a table. Each stream becomes one
file, in which the items of all parts stand in the order of their keys. Five steps make it, and workers share
all of them but the second:

    write_part       FOLDER/text_N.bin, items_N.npz      the texts and keys of part N
    plan_stream      FOLDER/NAME.file in its whole size, NAME.items.npy, NAME.runs.npz, NAME.ranges.npy
    write_run        NAME.run_K
    write_range      one range of that file from all parts that have items of it; NAME.range_K
    hash_range       NAME.sum_K

Each step is done with the last of its files. `finish_stream` moves the file to its place. Memory follows a range, in
`write_run` what one part has of a run, and in `plan_stream` the number of items.

The items of a part lie scattered over the file, so that each range needs some of each part: thousands of ranges would
open thousands of parts each. Where that is more than copying once, a run holds what some parts have of some ranges that
follow one another, and a range opens runs:

              range 0   range 1 | range 2   range 3
    part 0                      |
    part 1        run 0         |      run 2
    ----------------------------+-----------------------
    part 2        run 1         |      run 3
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files

Ints = NDArray[np.int64]
RANGE_BYTES = 1 << 27
"""[bytes] About what one worker writes at a time."""
RUN_BYTES = 1 << 31
"""[bytes] About what one worker copies at a time."""
_RUN_OPERATIONS = 5
"""Operations on the file system's metadata that a run takes besides the opening of its parts."""
_RUNS_FROM = 10_000
"""Openings of parts by ranges from which on a file is copied to save some."""
_CHUNKS_AT_ONCE = 16
"""Chunks of a file that one worker hashes at a time."""
_ITEM = np.dtype([("part", np.int32), ("size", np.int32), ("offset", np.int64)])
"""Where the text of an item lies: its part, its bytes, and its first byte among the texts of the part."""


@dataclass(frozen=True)
class Items:
    """n items of one stream."""

    keys: Sequence[NDArray[np.generic]]
    """Arrays [n], the first one decides; no two items of a stream have equal keys."""
    texts: Sequence[bytes]


@dataclass(frozen=True)
class Stream:
    """One file, and what stands in it before the items."""

    name: str
    """Its name in the parts."""
    path: Path
    header: bytes = b""
    is_ranked: bool = False
    """Whether each item begins with its place in the file, from 1, and a comma."""


@dataclass(frozen=True)
class Runs:
    """S x G runs of a stream of B parts and R ranges."""

    parts_at_once: Ints
    """[1] Parts in each of the G groups but the last, which may have fewer."""
    first_ranges: Ints
    """[S + 1] The ranges before each stripe of ranges."""
    chunks: Ints
    """[S, B, 3] What each part has of each stripe: its first byte and the byte after its last one among the texts of
    the part, and its first byte in the run."""

    @property
    def groups(self) -> int:
        """G."""
        parts: int = self.chunks.shape[1]
        return math.ceil(parts / int(self.parts_at_once[0]))

    @property
    def count(self) -> int:
        """S x G; 0 where ranges read the parts themselves."""
        return len(self.chunks) * self.groups

    def list_parts(self, number: int) -> range:
        """The parts in a run."""
        first = number % self.groups * int(self.parts_at_once[0])
        return range(first, min(first + int(self.parts_at_once[0]), self.chunks.shape[1]))


def choose_runs(parts: int, ranges: int, size: int) -> tuple[int, int]:
    """Stripes of ranges, and groups of parts, of the runs of a file of `size` bytes; (0, 0) where runs do not pay."""
    count = max(1, -(-size // RUN_BYTES))
    # A stripe opens all parts once, and a range all groups.
    stripes = min(max(1, round((ranges * count / max(parts, 1)) ** 0.5)), count, max(ranges, 1))
    groups = min(-(-count // stripes), max(parts, 1))
    operations = stripes * parts + ranges * groups + _RUN_OPERATIONS * stripes * groups
    return (stripes, groups) if max(operations, _RUNS_FROM) < parts * ranges else (0, 0)


def name_part(number: int) -> str:
    """The file with which a part counts as written."""
    return _items_path(Path(), number).name


def write_part(
    folder: Path, number: int, streams: Mapping[str, Items], facts: Mapping[str, NDArray[np.generic]]
) -> None:
    """Write one part. `facts` are kept with it (see `read_facts`)."""
    arrays, offset = {f"fact {name}": values for name, values in facts.items()}, 0
    with files.atomic(_text_path(folder, number)) as part, part.open("wb") as handle:
        for name, items in streams.items():
            # Of one part, the items of a range stand next to one another.
            order = np.lexsort(tuple(reversed(items.keys))).tolist()
            sizes = np.array([len(items.texts[place]) for place in order], dtype=np.int64)
            handle.writelines(items.texts[place] for place in order)

            arrays[f"{name} size"] = sizes
            arrays[f"{name} offset"] = np.cumsum(sizes) - sizes + offset
            arrays |= {f"{name} key {level}": key[order] for level, key in enumerate(items.keys)}
            offset += int(sizes.sum())

    # The index comes last: with it the part counts as written.
    files.write_npz(_items_path(folder, number), arrays)


def read_facts(folder: Path, number: int) -> dict[str, NDArray[np.generic]]:
    """The facts of a part."""
    with np.load(_items_path(folder, number)) as arrays:
        return {name.removeprefix("fact "): arrays[name] for name in arrays.files if name.startswith("fact ")}


def plan_stream(folder: Path, parts: int, stream: Stream) -> None:
    """Put the items of all parts in order, and give the file its size and header."""
    items, keys = _read_items(folder, parts, stream.name)
    items = items[np.lexsort(tuple(reversed(keys)))]

    sizes = items["size"].astype(np.int64)
    if stream.is_ranked:
        sizes += _count_digits(np.arange(1, len(items) + 1)) + 1
    ends = np.cumsum(sizes) + len(stream.header)

    with _unfinished_path(folder, stream).open("wb") as handle:
        handle.write(stream.header)
        handle.truncate(int(ends[-1]) if len(ends) else len(stream.header))

    # A range begins with the first item that begins in its stretch of the file.
    begins = ends - sizes
    firsts = np.flatnonzero(np.diff(begins // RANGE_BYTES, prepend=-1))
    files.write_npy(folder / f"{stream.name}.items.npy", items)
    runs = _plan_runs(items, firsts, parts, int(items["size"].sum(dtype=np.int64)))
    files.write_npz(_runs_path(folder, stream), vars(runs))
    files.write_npy(_ranges_path(folder, stream), np.stack([firsts, begins[firsts]], axis=1))


def _plan_runs(items: NDArray[np.void], firsts: Ints, parts: int, size: int) -> Runs:
    """The runs of `items` in their order, of which ranges begin with the `firsts` [R]."""
    stripes, groups = choose_runs(parts, len(firsts), size)
    parts_at_once = -(-parts // groups) if groups else 1
    first_ranges = np.arange(stripes + 1) * len(firsts) // max(stripes, 1)
    bounds = np.append(firsts, len(items))[first_ranges]

    chunks = np.zeros((stripes, parts, 3), dtype=np.int64)
    for stripe, (begin, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        own = items[begin:stop]
        own = own[np.argsort(own["part"], kind="stable")]
        present, begins = np.unique(own["part"], return_index=True)
        # The items of one part stand next to one another there, too.
        chunks[stripe, present, 0] = np.minimum.reduceat(own["offset"], begins)
        chunks[stripe, present, 1] = np.maximum.reduceat(own["offset"] + own["size"], begins)

        sizes = chunks[stripe, :, 1] - chunks[stripe, :, 0]
        for first in range(0, parts, parts_at_once):
            group = slice(first, first + parts_at_once)
            chunks[stripe, group, 2] = np.cumsum(sizes[group]) - sizes[group]
    return Runs(np.array([parts_at_once]), first_ranges, chunks)


def list_missing_runs(folder: Path, stream: Stream) -> list[int]:
    """The runs of a planned stream that are not written."""
    count, kept = _read_runs(folder, stream).count, _list_names(folder)
    return [number for number in range(count) if _run_path(folder, stream, number).name not in kept]


def write_run(folder: Path, stream: Stream, number: int) -> None:
    """Copy what some parts have of some ranges into one file."""
    runs = _read_runs(folder, stream)
    chunks = runs.chunks[number // runs.groups]
    with files.atomic(_run_path(folder, stream, number)) as part, part.open("wb") as target:
        for own in runs.list_parts(number):
            begin, stop, _ = chunks[own].tolist()
            if begin < stop:
                with _text_path(folder, own).open("rb") as source:
                    source.seek(begin)
                    target.write(_read_exactly(source, stop - begin))


def _read_exactly(handle: BinaryIO, size: int) -> bytes:
    content = handle.read(size)
    if len(content) < size:
        folder = Path(handle.name).parent
        raise OSError(f"{handle.name} ends {size - len(content)} bytes too early; remove {folder} and start again")
    return content


def _read_runs(folder: Path, stream: Stream) -> Runs:
    with np.load(_runs_path(folder, stream)) as arrays:
        return Runs(**arrays)


def _list_names(folder: Path) -> set[str]:
    """All files of a folder: one listing, where a look at each takes an hour."""
    return {path.name for path in folder.iterdir()}


def is_planned(folder: Path, stream: Stream) -> bool:
    """Whether the items of a stream are in order."""
    return _ranges_path(folder, stream).exists()


def list_missing_ranges(folder: Path, stream: Stream) -> list[int]:
    """The ranges of a planned stream that are not written."""
    count, kept = len(np.load(_ranges_path(folder, stream))), _list_names(folder)
    return [number for number in range(count) if _done_path(folder, stream, number).name not in kept]


def write_range(folder: Path, stream: Stream, number: int) -> None:
    """Write the items of one range to their place in the file."""
    ranges = np.load(_ranges_path(folder, stream))
    first, target = ranges[number].tolist()
    # The last range ends with the stream.
    stop = int(ranges[number + 1, 0]) if number + 1 < len(ranges) else None
    items = files.read_npy_rows(folder / f"{stream.name}.items.npy", first, stop)

    texts = _read_texts(_list_sources(folder, stream, number), items)
    if stream.is_ranked:
        texts = [b"%d,%b" % (rank, text) for rank, text in enumerate(texts, start=first + 1)]

    # Only written to, never read: a client of NFS that reads a page may write all of it, with what others wrote.
    handle = os.open(_unfinished_path(folder, stream), os.O_WRONLY)
    try:
        files.write_all(handle, b"".join(texts), target)
        os.fsync(handle)
    finally:
        os.close(handle)
    _done_path(folder, stream, number).write_bytes(b"")


def list_missing_sums(folder: Path, stream: Stream) -> list[int]:
    """The stretches of a written file that are not hashed."""
    stretches = -(-_locate(folder, stream).stat().st_size // (files.CHUNK_BYTES * _CHUNKS_AT_ONCE))
    kept = _list_names(folder)
    return [number for number in range(stretches) if _sum_path(folder, stream, number).name not in kept]


def hash_range(folder: Path, stream: Stream, number: int) -> None:
    """Hash one stretch of the file, as it is read back."""
    digests = files.sha256_of_chunks(_locate(folder, stream), number * _CHUNKS_AT_ONCE, _CHUNKS_AT_ONCE)
    files.write_text(_sum_path(folder, stream, number), "".join(f"{digest}\n" for digest in digests))


def finish_stream(folder: Path, stream: Stream) -> str:
    """Give the file its name; its checksum, as `files.checksum` has it."""
    size = _locate(folder, stream).stat().st_size
    stretches = -(-size // (files.CHUNK_BYTES * _CHUNKS_AT_ONCE))
    texts = [_sum_path(folder, stream, number).read_text(encoding="utf-8") for number in range(stretches)]

    # A run that was killed here has renamed it already.
    if (path := _unfinished_path(folder, stream)).exists():
        stream.path.parent.mkdir(parents=True, exist_ok=True)
        path.replace(stream.path)
    return files.combine_chunks("".join(texts).split())


def _locate(folder: Path, stream: Stream) -> Path:
    path = _unfinished_path(folder, stream)
    return path if path.exists() else stream.path


def _read_items(folder: Path, parts: int, name: str) -> tuple[NDArray[np.void], list[NDArray[np.generic]]]:
    """Where the texts of all items of a stream lie, part by part, and their keys."""
    items, keys = [np.zeros(0, dtype=_ITEM)], list[list[NDArray[np.generic]]]()
    for number in range(parts):
        with np.load(_items_path(folder, number)) as arrays:
            sizes = arrays[f"{name} size"]
            own = np.zeros(len(sizes), dtype=_ITEM)
            own["part"], own["size"], own["offset"] = number, sizes, arrays[f"{name} offset"]
            items.append(own)
            levels = sum(file.startswith(f"{name} key ") for file in arrays.files)
            keys.append([arrays[f"{name} key {level}"] for level in range(levels)])
    return np.concatenate(items), [np.concatenate(level) for level in zip(*keys, strict=True)]


@dataclass(frozen=True)
class _Source:
    """A file with the texts of some parts."""

    path: Path
    parts: range
    shifts: Ints
    """What is added to the offset of an item of each of these parts."""


def _list_sources(folder: Path, stream: Stream, number: int) -> Iterator[_Source]:
    """The files that hold the items of a range."""
    runs = _read_runs(folder, stream)
    if not runs.count:
        for part in range(runs.chunks.shape[1]):
            yield _Source(_text_path(folder, part), range(part, part + 1), np.zeros(1, dtype=np.int64))
        return

    stripe = int(np.searchsorted(runs.first_ranges, number, side="right")) - 1
    for run in range(stripe * runs.groups, (stripe + 1) * runs.groups):
        chunks = runs.chunks[stripe][runs.list_parts(run)]
        yield _Source(_run_path(folder, stream, run), runs.list_parts(run), chunks[:, 2] - chunks[:, 0])


def _read_texts(sources: Iterable[_Source], items: NDArray[np.void]) -> list[bytes]:
    """The texts of the items of one range, in their order."""
    texts = [b""] * len(items)
    order = np.argsort(items["part"], kind="stable")
    sorted_parts = items["part"][order]

    for source in sources:
        bounds = np.searchsorted(sorted_parts, [*source.parts, source.parts.stop]).tolist()
        if bounds[0] == bounds[-1]:
            continue
        with source.path.open("rb") as handle:
            for (first, stop), shift in zip(itertools.pairwise(bounds), source.shifts.tolist(), strict=True):
                _read_texts_of_part(handle, shift, items, order[first:stop], texts)
    return texts


def _read_texts_of_part(
    handle: BinaryIO, shift: int, items: NDArray[np.void], places: Ints, texts: list[bytes]
) -> None:
    """Read the texts of the items at some `places` of a range, all of one part, into `texts`."""
    if not len(places):
        return
    # One reading for all of a part: they stand next to one another.
    begins, ends = items["offset"][places], items["offset"][places] + items["size"][places]
    handle.seek(int(begins[0]) + shift)
    block = _read_exactly(handle, int(ends[-1] - begins[0]))
    for place, begin, end in zip(
        places.tolist(), (begins - begins[0]).tolist(), (ends - begins[0]).tolist(), strict=True
    ):
        texts[place] = block[begin:end]


def _count_digits(numbers: Ints) -> Ints:
    """[n] decimal digits of whole numbers from 1 on."""
    return np.searchsorted(10 ** np.arange(1, 19), numbers, side="right") + 1


def _items_path(folder: Path, number: int) -> Path:
    return folder / f"items_{number}.npz"


def _text_path(folder: Path, number: int) -> Path:
    return folder / f"text_{number}.bin"


def _runs_path(folder: Path, stream: Stream) -> Path:
    return folder / f"{stream.name}.runs.npz"


def _run_path(folder: Path, stream: Stream, number: int) -> Path:
    return folder / f"{stream.name}.run_{number}"


def _unfinished_path(folder: Path, stream: Stream) -> Path:
    return folder / f"{stream.name}.file"


def _ranges_path(folder: Path, stream: Stream) -> Path:
    return folder / f"{stream.name}.ranges.npy"


def _done_path(folder: Path, stream: Stream, number: int) -> Path:
    return folder / f"{stream.name}.range_{number}"


def _sum_path(folder: Path, stream: Stream, number: int) -> Path:
    return folder / f"{stream.name}.sum_{number}"
