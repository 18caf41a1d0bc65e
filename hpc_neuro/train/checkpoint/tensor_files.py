"""Safetensors files written one tensor at a time, and checkpoints of ranges that any number of ranks can read.

A checkpoint has one file per rank that owns something. Its keys are `KIND/START/NAME`: the elements from START on of
the flattened parameter NAME, of a KIND such as "weight" or "exp_avg". Together the files contain each element once,
however many ranks and whichever ZeRO stage wrote them, so a reader takes the ranges it needs and no more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpc_neuro.core.schema import InputError

PATTERN = "rank_*.safetensors"
"""Files of tensors in a checkpoint."""

DIGEST_SUFFIX = ".sha256"
"""Of the file beside a rank's tensors that holds their SHA-256 while a checkpoint is written."""

_CHUNK = 1 << 24
"""[element] Most elements copied to the host at once."""


@dataclass(frozen=True)
class TensorRange:
    """A range of one flattened parameter."""

    kind: str
    name: str
    start: int
    values: Tensor
    """float32 [n]."""


@dataclass(frozen=True)
class _StoredRange:
    """Where a range lies in an open file."""

    key: str
    kind: str
    name: str
    start: int
    stop: int


def rank_file(folder: Path, rank: int) -> Path:
    """File that a rank writes."""
    return folder / f"rank_{rank:05d}.safetensors"


# --- Writing ---


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], values: Iterable[Tensor], meta: Mapping[str, str] | None = None
) -> str:
    """Write float32 tensors in the order of `shapes`, with at most a part of one on the host; fsynced.

    Returns the SHA-256 of the file. The layout is that of safetensors: 8 bytes of header length, a JSON header, the raw
    numbers. Raises OSError.
    """
    header = _make_header(shapes, meta or {})
    start = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(start)
    with path.open("wb") as handle:
        handle.write(start)
        for (key, shape), tensor in zip(shapes.items(), values, strict=True):
            if tensor.numel() != math.prod(shape):
                raise ValueError(f"{key} has {tensor.numel()} elements, its shape {list(shape)} has others")

            # A large tensor is copied in parts, so that the host never holds all of it.
            for part in torch.split(tensor.detach().reshape(-1), _CHUNK):
                numbers = part.to("cpu", torch.float32).contiguous().numpy()
                numbers.tofile(handle)
                digest.update(numbers.data)

        # A checkpoint is published right after, and must survive a loss of power.
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


def _make_header(shapes: Mapping[str, Sequence[int]], meta: Mapping[str, str]) -> bytes:
    """The JSON header, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(meta)}
    offset = 0
    for key, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size

    # Readers map the numbers into memory, so these begin at a multiple of 8 bytes.
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def write_ranges(path: Path, ranges: Sequence[TensorRange]) -> None:
    """Write what one rank owns, and its SHA-256 beside it until the marker has it. Raises OSError."""
    shapes = {f"{r.kind}/{r.start}/{r.name}": [r.values.numel()] for r in ranges}
    digest = write_tensors(path, shapes, (r.values for r in ranges))
    path.with_suffix(DIGEST_SUFFIX).write_text(digest, encoding="utf-8")


# --- Reading ---


def read_ranges(folder: Path, wanted: Sequence[TensorRange], first: int = 0) -> None:
    """Fill the values of `wanted` from the files of a checkpoint, beginning with that of rank `first`.

    Raises InputError when a file cannot be read, or elements are in none of them.
    """
    by_name: dict[tuple[str, str], list[TensorRange]] = {}
    for item in wanted:
        by_name.setdefault((item.kind, item.name), []).append(item)

    # Files together have each element once, so counting tells when all are read.
    missing = sum(item.values.numel() for item in wanted)

    for path in sorted(folder.glob(PATTERN), key=lambda p: (p != rank_file(folder, first), p)):
        if missing == 0:
            return
        with _open_file(path) as (file, stored_ranges):
            for stored in stored_ranges:
                for item in by_name.get((stored.kind, stored.name), ()):
                    missing -= _copy_overlap(file, stored, item)

    if missing:
        raise InputError(
            f"{folder} lacks {missing} numbers that this model has; remove it, the checkpoint before it is then used"
        )


def _copy_overlap(file: Any, stored: _StoredRange, item: TensorRange) -> int:
    """Copy the elements that a stored range and an item share; returns their number."""
    begin = max(stored.start, item.start)
    end = min(stored.stop, item.start + item.values.numel())
    if begin >= end:
        return 0

    # Only the slice is read from the file, however large the stored range is.
    values = file.get_slice(stored.key)[begin - stored.start : end - stored.start]
    item.values[begin - item.start : end - item.start].copy_(values)
    return end - begin


def list_kinds(folder: Path) -> set[str]:
    """The kinds in a checkpoint. Raises InputError when a file cannot be read."""
    kinds = set()
    for path in folder.glob(PATTERN):
        with _open_file(path) as (_, stored_ranges):
            kinds |= {stored.kind for stored in stored_ranges}
    return kinds


def stream_tensors(folder: Path, kind: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[Tensor]:
    """Whole float32 tensors of one kind in the order of `shapes`, one at a time. Raises InputError."""
    # Names are looked up once, and not in every file for each parameter.
    paths = _find_files_by_name(folder, kind)
    for name, shape in shapes.items():
        tensor = torch.empty(math.prod(shape))
        missing = tensor.numel()

        for path in paths.get(name, ()):
            with _open_file(path) as (file, stored_ranges):
                for stored in stored_ranges:
                    if (stored.kind, stored.name) == (kind, name):
                        tensor[stored.start : stored.stop] = file.get_tensor(stored.key)
                        missing -= stored.stop - stored.start

        if missing:
            raise InputError(f"{folder} lacks {missing} numbers of {kind} {name}; use another checkpoint")
        yield tensor.reshape(tuple(shape))


def _find_files_by_name(folder: Path, kind: str) -> dict[str, list[Path]]:
    """Parameter name -> the files with ranges of it, of one kind."""
    paths: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(PATTERN)):
        with _open_file(path) as (_, stored_ranges):
            names = {stored.name for stored in stored_ranges if stored.kind == kind}

        for name in names:
            paths.setdefault(name, []).append(path)
    return paths


@contextmanager
def _open_file(path: Path) -> Iterator[tuple[Any, list[_StoredRange]]]:
    """An open file and the ranges in it. Raises InputError when it cannot be read."""
    try:
        file: Any = safe_open(path, "pt")
        stored_ranges = [_locate_range(file, key) for key in file.keys()]  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); remove the checkpoint, the one before it is then used"
        ) from None

    with file:
        yield file, stored_ranges


def _locate_range(file: Any, key: str) -> _StoredRange:
    """Where a key's range lies. Raises ValueError for a key that is none of a range."""
    kind, start, name = key.split("/", 2)

    size = file.get_slice(key).get_shape()[0]
    return _StoredRange(key, kind, name, int(start), int(start) + size)
