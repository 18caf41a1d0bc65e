"""Text files that many workers make and put in order together, each holding one piece at a time.

A part holds items of several streams, such as the trees of one batch and their rows in a table. Each stream becomes one
file, in which the items of all parts stand in the order of their keys. Four steps make it, and workers share
all of them but the second:

    write_part       FOLDER/text_N.bin, items_N.npz      the texts and keys of part N
    plan_stream      FOLDER/NAME.file in its whole size, NAME.items.npy, NAME.ranges.npy
    write_range      one range of that file from all parts that have items of it; NAME.range_K
    hash_range       NAME.sum_K

Each step is done with the last of its files. `finish_stream` moves the file to its place. Memory follows a range, and
in `plan_stream` the number of items.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files

Ints = NDArray[np.int64]
RANGE_BYTES = 1 << 27
"""[bytes] About what one worker writes at a time."""
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


def has_part(folder: Path, number: int) -> bool:
    """Whether a part is written."""
    return _items_path(folder, number).exists()


def write_part(
    folder: Path, number: int, streams: Mapping[str, Items], facts: Mapping[str, NDArray[np.generic]]
) -> None:
    """Write one part. `facts` are kept with it (see `read_facts`)."""
    arrays, offset = {f"fact {name}": values for name, values in facts.items()}, 0
    with files.atomic(folder / f"text_{number}.bin") as part, part.open("wb") as handle:
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
    files.write_npy(_ranges_path(folder, stream), np.stack([firsts, begins[firsts]], axis=1))


def is_planned(folder: Path, stream: Stream) -> bool:
    """Whether the items of a stream are in order."""
    return _ranges_path(folder, stream).exists()


def list_missing_ranges(folder: Path, stream: Stream) -> list[int]:
    """The ranges of a planned stream that are not written."""
    count = len(np.load(_ranges_path(folder, stream)))
    return [number for number in range(count) if not _done_path(folder, stream, number).exists()]


def write_range(folder: Path, stream: Stream, number: int) -> None:
    """Write the items of one range to their place in the file."""
    ranges = np.load(_ranges_path(folder, stream))
    first, target = ranges[number].tolist()
    stored = np.load(folder / f"{stream.name}.items.npy", mmap_mode="r")
    stop = int(ranges[number + 1, 0]) if number + 1 < len(ranges) else len(stored)
    items = np.array(stored[first:stop])

    texts = _read_texts(folder, items)
    if stream.is_ranked:
        texts = [b"%d,%b" % (rank, text) for rank, text in enumerate(texts, start=first + 1)]

    # Only written to, never read: a client of NFS that reads a page may write all of it, with what others wrote.
    handle = os.open(_unfinished_path(folder, stream), os.O_WRONLY)
    try:
        files.write_all(handle, b"".join(texts), target)
        os.fsync(handle)
    finally:
        os.close(handle)
    _done_path(folder, stream, number).touch()


def list_missing_sums(folder: Path, stream: Stream) -> list[int]:
    """The stretches of a written file that are not hashed."""
    stretches = -(-_locate(folder, stream).stat().st_size // (files.CHUNK_BYTES * _CHUNKS_AT_ONCE))
    return [number for number in range(stretches) if not _sum_path(folder, stream, number).exists()]


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


def _read_texts(folder: Path, items: NDArray[np.void]) -> list[bytes]:
    """The texts of the items of one range, in their order."""
    texts = [b""] * len(items)
    order = np.argsort(items["part"], kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(items["part"][order])) + 1) if len(order) else []

    for places in groups:
        # One reading for all of a part: they stand next to one another.
        begins, ends = items["offset"][places], items["offset"][places] + items["size"][places]
        with (folder / f"text_{items['part'][places[0]]}.bin").open("rb") as handle:
            handle.seek(int(begins[0]))
            block = handle.read(int(ends[-1] - begins[0]))
        for place, begin, end in zip(
            places.tolist(), (begins - begins[0]).tolist(), (ends - begins[0]).tolist(), strict=True
        ):
            texts[place] = block[begin:end]
    return texts


def _count_digits(numbers: Ints) -> Ints:
    """[n] decimal digits of whole numbers from 1 on."""
    return np.searchsorted(10 ** np.arange(1, 19), numbers, side="right") + 1


def _items_path(folder: Path, number: int) -> Path:
    return folder / f"items_{number}.npz"


def _unfinished_path(folder: Path, stream: Stream) -> Path:
    return folder / f"{stream.name}.file"


def _ranges_path(folder: Path, stream: Stream) -> Path:
    return folder / f"{stream.name}.ranges.npy"


def _done_path(folder: Path, stream: Stream, number: int) -> Path:
    return folder / f"{stream.name}.range_{number}"


def _sum_path(folder: Path, stream: Stream, number: int) -> Path:
    return folder / f"{stream.name}.sum_{number}"
