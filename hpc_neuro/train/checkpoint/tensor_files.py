"""Safetensors files written one tensor at a time, and checkpoints of ranges that any number of ranks can read.

A checkpoint holds one file per rank that owns something. Its keys are `KIND/START/NAME`: the elements from START on of
the flattened parameter NAME, of a KIND such as "weight" or "exp_avg". Together the files hold each element once,
however many ranks and whichever ZeRO stage wrote them, so that a reader takes the ranges it needs and no more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpc_neuro.core.schema import InputError

PATTERN = "rank_*.safetensors"
_CHUNK = 1 << 24  # elements brought to the host at once


@dataclass(frozen=True)
class TensorRange:
    """A range of one flattened parameter, float32 [n]."""

    kind: str
    name: str
    start: int
    values: Tensor


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank writes what it owns."""
    return folder / f"rank_{rank:05d}.safetensors"


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], values: Iterable[Tensor], meta: Mapping[str, str] | None = None
) -> None:
    """Write float32 tensors in the order of `shapes`, never holding more than a part of one on the host; fsynced.

    The layout is that of safetensors: 8 bytes of header length, a JSON header, the raw numbers. Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": dict(meta or {})}
    offset = 0
    for key, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for (key, shape), tensor in zip(shapes.items(), values, strict=True):
            if tensor.numel() != math.prod(shape):
                raise ValueError(f"{key} has {tensor.numel()} elements, its shape {list(shape)} has others")
            for part in torch.split(tensor.detach().reshape(-1), _CHUNK):
                part.to("cpu", torch.float32).numpy().tofile(handle)
        handle.flush()
        os.fsync(handle.fileno())


def write_ranges(path: Path, ranges: Sequence[TensorRange]) -> None:
    """Write what one rank owns. Raises OSError."""
    shapes = {f"{r.kind}/{r.start}/{r.name}": [r.values.numel()] for r in ranges}
    write_tensors(path, shapes, (r.values for r in ranges))


def read_ranges(folder: Path, wanted: Sequence[TensorRange], first: int = 0) -> None:
    """Fill the values of `wanted` from the files of a checkpoint, beginning with that of rank `first`.

    Raises InputError when a file cannot be read or elements are in none of them.
    """
    by_name: dict[tuple[str, str], list[TensorRange]] = {}
    for item in wanted:
        by_name.setdefault((item.kind, item.name), []).append(item)
    left = sum(item.values.numel() for item in wanted)
    paths = sorted(folder.glob(PATTERN), key=lambda p: (p != rank_file(folder, first), p))
    for path in paths:
        if left == 0:
            return
        with _opened(path) as file:
            for kind, name, start, stop, key in _keys(file):
                for item in by_name.get((kind, name), ()):
                    a, b = max(start, item.start), min(stop, item.start + item.values.numel())
                    if a < b:
                        item.values[a - item.start : b - item.start].copy_(file.get_slice(key)[a - start : b - start])
                        left -= b - a
    if left:
        raise InputError(f"{folder} lacks {left} numbers that this model has; remove it, the one before is then taken")


def list_kinds(folder: Path) -> set[str]:
    """The kinds that a checkpoint holds. Raises InputError when a file cannot be read."""
    found = set()
    for path in folder.glob(PATTERN):
        with _opened(path) as file:
            found |= {kind for kind, *_ in _keys(file)}
    return found


def stream_tensors(folder: Path, kind: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[Tensor]:
    """Whole float32 tensors of one kind in the order of `shapes`, one at a time. Raises InputError."""
    paths = sorted(folder.glob(PATTERN))
    where: dict[str, list[Path]] = {}
    for path in paths:
        with _opened(path) as file:
            for held, name, *_ in _keys(file):
                if held == kind:
                    where.setdefault(name, []).append(path)
    for name, shape in shapes.items():
        whole, left = torch.empty(math.prod(shape)), math.prod(shape)
        for path in dict.fromkeys(where.get(name, ())):
            with _opened(path) as file:
                for held, other, start, stop, key in _keys(file):
                    if (held, other) == (kind, name):
                        whole[start:stop] = file.get_tensor(key)
                        left -= stop - start
        if left:
            raise InputError(f"{folder} lacks {left} numbers of {kind} {name}; take another checkpoint")
        yield whole.reshape(tuple(shape))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove the checkpoint, the one before is taken") from None


def _keys(file: Any) -> Iterator[tuple[str, str, int, int, str]]:
    """(kind, name, first element, end, key) of every range in a file."""
    for key in file.keys():  # noqa: SIM118  # no dict
        kind, start, name = key.split("/", 2)
        yield kind, name, int(start), int(start) + file.get_slice(key).get_shape()[0], key
