"""Names and places of what a feature cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_neuro.core import files
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data.orientation import VIEW_AXES

FORMAT = 2
"""Raised when shards of an older version would be read wrongly; they are then built again."""
MANIFEST = "manifest.json"
CODING = "coding.npz"
USES = "uses"
__all__ = [
    "CODING",
    "FORMAT",
    "MANIFEST",
    "USES",
    "VIEW_AXES",
    "CacheMismatch",
    "Unit",
    "hash_manifest",
    "read_manifest",
    "tiles",
]


class CacheMismatch(ConfigError):
    """The cache holds other features than the config asks for."""


@dataclass(frozen=True)
class Unit:
    """One shard: slices `first`, `first + stride`, ... of one view of one volume, `count` of them."""

    volume: str
    view: str
    first: int  # [voxel] index of the first slice
    stride: int  # [voxel] between slices; a slice stands for the `stride` voxels around it
    count: int
    rows: int  # token rows of a slice
    columns: int
    cell: tuple[float, float]  # [voxel] height and width of one token
    how: str = ""  # how the teacher saw the slices (orientation.laid); kept as the volume stands

    @property
    def name(self) -> str:
        """File name inside the cache folder."""
        return f"{self.volume}.{self.view}{'-' + self.how if self.how else ''}.{self.first:06d}.h5"

    @property
    def tokens(self) -> int:
        """Tokens per layer."""
        return self.count * self.rows * self.columns

    @staticmethod
    def read(entry: Mapping[str, Any]) -> Unit:
        """A unit from its entry in the manifest."""
        return Unit(**{**entry, "cell": tuple(entry["cell"])})


def read_manifest(folder: Path, hint: str) -> dict[str, Any]:
    """The manifest of a cache. Raises InputError when there is none, with `hint`, or one of another format."""
    held = files.read_json(folder / MANIFEST, hint)
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise InputError(
            f"{folder / MANIFEST} is not of format {FORMAT}; build the cache again in another folder with `hpc-neuro "
            "precompute`"
        )
    return held


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides a cache's features: where its store lay and which version built it may change."""
    facts = {key: value for key, value in manifest.items() if key not in ("store", "code")}
    return files.sha256_json(facts)


def tiles(rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut a map of tokens into tiles of at most size x size: (rows, columns) of each, row by row."""
    for r in range(0, rows, size):
        for c in range(0, columns, size):
            yield slice(r, min(r + size, rows)), slice(c, min(c + size, columns))
