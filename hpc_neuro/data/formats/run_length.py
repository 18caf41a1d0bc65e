"""Run-length codes of microscopy formats: Vaa3D's PBD (8 and 16 bit) and Amira's HxByteRLE.

All three are a chain of operations: a code byte, then its data. A short loop finds where the operations begin (each
code tells how far it is to the next); everything else is done for thousands of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.data.formats.volume import Array

_LITERAL, _DIFFERENCE, _REPEAT, _UNKNOWN = range(4)


@dataclass(frozen=True)
class Code:
    """For each of the 256 code bytes: what it does, how many values it gives, how many bytes it takes with its data."""

    kind: NDArray[np.int8]
    count: NDArray[np.int64]
    step: tuple[int, ...]
    bits: int  # bits per difference; 0 where the format has none
    end: bytes  # what may follow the last operation


def _code(ranges: tuple[tuple[int, int, int, int], ...], size: int, bits: int, end: bytes = b"") -> Code:
    """From (first code, last code, kind, count of the first code) rows."""
    kind = np.full(256, _UNKNOWN, np.int8)
    count, step = np.zeros(256, np.int64), np.ones(256, np.int64)
    for first, last, what, least in ranges:
        codes = np.arange(first, last + 1)
        kind[codes] = what
        count[codes] = codes - first + least
        bytes_of = {_LITERAL: count[codes] * size, _DIFFERENCE: -(-count[codes] * bits // 8)}
        step[codes] = 1 + bytes_of.get(what, np.full(len(codes), size))
    return Code(kind, count, tuple(step.tolist()), bits, end)


PBD8 = _code(((0, 32, _LITERAL, 1), (33, 127, _DIFFERENCE, 1), (128, 255, _REPEAT, 1)), 1, 2)
PBD16 = _code(((0, 31, _LITERAL, 1), (32, 79, _DIFFERENCE, 1), (223, 255, _REPEAT, 1)), 2, 3)
BYTE_RLE = _code(((0, 127, _REPEAT, 0), (128, 255, _LITERAL, 0)), 1, 0, b"\0")


def decode_runs(chunks: Iterable[bytes], code: Code, dtype: np.dtype[Any]) -> Iterator[Array]:
    """Values of a stream given in chunks of bytes, as arrays of `dtype` (its byte order is that of the stream).

    Raises ValueError for a code that the format does not have and for a stream that ends inside an operation.
    """
    rest, prior = b"", 0
    for chunk in chunks:
        data = rest + chunk
        begins, end = _operations(data, code)
        rest = data[end:]
        if len(begins):
            values = _values(np.frombuffer(data + b"\0", np.uint8), begins, code, dtype, prior)
            prior = int(values[-1]) if len(values) else prior
            yield values
    if rest and rest != code.end:
        raise ValueError(f"its run-length stream ends {code.step[rest[0]] - len(rest)} bytes early")


def _operations(data: bytes, code: Code) -> tuple[NDArray[np.int64], int]:
    """Where the operations begin that lie wholly in `data`, and where the first incomplete one does."""
    begins: list[int] = []
    step, size, at = code.step, len(data), 0
    while at < size:
        after = at + step[data[at]]
        if after > size:
            break
        begins.append(at)
        at = after
    return np.array(begins, dtype=np.int64), at


def _values(data: NDArray[np.uint8], begins: NDArray[np.int64], code: Code, dtype: np.dtype[Any], prior: int) -> Array:
    """All values of the operations that begin at `begins`; `prior` is the value before the first."""
    kinds = code.kind[data[begins]]
    if (kinds == _UNKNOWN).any():
        bad = int(data[begins[np.argmax(kinds == _UNKNOWN)]])
        raise ValueError(f"its run-length stream holds the code {bad}, which the format does not have")
    counts = code.count[data[begins]]
    owner = np.repeat(np.arange(len(begins)), counts)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = begins[owner] + 1
    kind = kinds[owner]
    here = at + np.where(kind == _LITERAL, nth * dtype.itemsize, 0)
    values = data[here].astype(np.int64)
    if dtype.itemsize == 2:
        first, second = values, data[here + 1].astype(np.int64)
        values = first << 8 | second if dtype.str.startswith(">") else second << 8 | first
    if code.bits and (kind == _DIFFERENCE).any():
        change = np.zeros(len(values), np.int64)
        some = np.flatnonzero(kind == _DIFFERENCE)
        change[some] = _differences(data, at[some], nth[some], code.bits)
        total = np.cumsum(change)
        last = np.maximum.accumulate(np.where(kind == _DIFFERENCE, -1, np.arange(len(values))))
        base = np.where(last >= 0, values[last] - total[last], prior)
        values = np.where(kind == _DIFFERENCE, base + total, values)
    return values.astype(dtype.newbyteorder("="))  # wraps around, as the format's own arithmetic does


def _differences(
    data: NDArray[np.uint8], at: NDArray[np.int64], nth: NDArray[np.int64], bits: int
) -> NDArray[np.int64]:
    if bits == 2:  # four to a byte, lowest bits first; 3 stands for -1
        pair: NDArray[np.int64] = data[at + nth // 4].astype(np.int64) >> 2 * (nth % 4) & 3
        return np.where(pair == 3, -1, pair)
    place = 3 * nth  # eight to three bytes, highest bits first; 5, 6, 7 stand for -1, -2, -3
    low = np.minimum(at + place // 8 + 1, len(data) - 1)
    raw: NDArray[np.int64] = (data[at + place // 8].astype(np.int64) << 8 | data[low]) >> (13 - place % 8) & 7
    return np.where(raw < 5, raw, 4 - raw)
