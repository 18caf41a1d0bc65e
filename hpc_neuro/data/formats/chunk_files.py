"""The files in which zarr, N5 and precomputed keep their chunks: whether there are any, under the names they must have.

In these formats a chunk that is not there is the fill value, so a folder whose chunks have other names reads as zeros.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from hpc_neuro.core.schema import InputError

ZARR = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
_METADATA = {*ZARR, ".zmetadata", "attributes.json", "info", "provenance"}


def require(folder: Path, key: str) -> None:
    """Raise InputError for an array without a single chunk named like `key`, such as 0.0.0 or 0-64_0-64_0-64."""
    other = None
    for name, good in _named(folder, key):
        if good:
            return
        other = other or name
    if other is None:
        raise InputError(f"{folder} describes an array but holds none of its chunks; copy it again")
    advice = "copy or export it again"
    if other.endswith(".gz"):
        advice = f"CloudVolume writes them packed; unpack with:  gunzip -r {folder}"
    elif (folder / ".zarray").is_file():
        separator = "/" if "/" in other else "."
        advice = f'write "dimension_separator": "{separator}" into its .zarray'
    raise InputError(f"{folder} holds files such as {other}, but no chunk with a name like {key}; {advice}")


def absent(folder: Path, key: str, wanted: int) -> str | None:
    """A sentence on the chunks, of `wanted` in all, that are not stored."""
    lost = wanted - sum(good for _, good in _named(folder, key))
    return f"{lost} of {wanted} chunks are not stored and read as the fill value" if lost > 0 else None


def _named(folder: Path, key: str) -> Iterator[tuple[str, bool]]:
    """Each file below `folder` that is no metadata, and whether it is named like `key` with other numbers."""
    pattern = re.compile(re.sub(r"\d+", "-?[0-9a-f]+", re.escape(key)))
    for inside, _, names in os.walk(folder):
        below = "" if Path(inside) == folder else f"{Path(inside).relative_to(folder).as_posix()}/"
        yield from ((below + n, pattern.fullmatch(below + n) is not None) for n in names if n not in _METADATA)
