"""The manifest of a feature cache, the description of one shard, and the list of trainings that read the cache."""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files
from hpc_neuro.core.schema import ConfigError, InputError

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised when shards of an older version would be read wrongly; they are then built again."""

MANIFEST = "manifest.json"
"""File name of the manifest, which is written last."""

CODING = "coding.npz"
"""File name of the codings of compressed features."""

_Count = Annotated[int, Field(ge=0)]

USES = "uses"
"""Folder with one small file per training that reads the cache, so that many may start at once."""


class CacheMismatch(ConfigError):
    """The cache holds other features than the config asks for."""


@dataclass(frozen=True)
class ShardSpec:
    """One shard: slices `first`, `first + stride`, ... of one view of one volume, `count` of them."""

    volume: str
    view: str
    first: int  # [voxel] index of the first slice
    stride: int  # [voxel] between slices; a slice stands for the `stride` voxels around it
    count: int
    rows: int  # token rows of a slice
    columns: int
    cell: tuple[float, float]  # [voxel] height and width of one token
    layout: str = ""  # how the slices lay before the teacher (orientation.apply_layout); stored as in the volume

    @property
    def name(self) -> str:
        """File name inside the cache folder."""
        return f"{self.volume}.{self.view}{'-' + self.layout if self.layout else ''}.{self.first:06d}.h5"

    @property
    def tokens(self) -> int:
        """Tokens per layer."""
        return self.count * self.rows * self.columns

    def to_json(self) -> dict[str, Any]:
        """The entry of the manifest."""
        # The manifest's key for the layout is `how`.
        entry = {**vars(self), "how": self.layout}
        del entry["layout"]
        return entry

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> ShardSpec:
        """The inverse of `to_json`."""
        fields = {**entry, "cell": tuple(entry["cell"]), "layout": entry["how"]}
        del fields["how"]
        return ShardSpec(**fields)


@with_config(ConfigDict(extra="allow"))
class _UnitForm(TypedDict):
    """A ShardSpec as JSON."""

    volume: str
    view: str
    first: _Count
    stride: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1)]
    columns: Annotated[int, Field(ge=1)]
    cell: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]
    how: str


@with_config(ConfigDict(extra="allow"))
class _ShardForm(TypedDict):
    """One shard of the manifest."""

    file: str
    unit: _UnitForm
    bytes: _Count
    sha256: str


class _StatisticsForm(TypedDict):
    """Mean and standard deviation of the channels, [L][D]."""

    mean: list[list[float]]
    std: list[list[float]]


class _TeacherForm(TypedDict):
    name: str
    sha256: str


@with_config(ConfigDict(extra="allow"))
class _ManifestForm(TypedDict):
    """What a reader of manifest.json needs; `cache info` needs more."""

    teacher: _TeacherForm
    dim: Annotated[int, Field(ge=1)]
    layers: Annotated[list[int], Field(min_length=1)]
    views: Annotated[list[Literal["z", "y", "x"]], Field(min_length=1)]
    augment_views: NotRequired[list[str]]
    coding: NotRequired[str | None]
    volumes: dict[str, str]
    statistics: dict[str, _StatisticsForm]
    shards: list[_ShardForm]


class _UseForm(TypedDict):
    """A file in OUT/uses."""

    out: str
    host: str
    first: str


def read_manifest(folder: Path, hint: str) -> dict[str, Any]:
    """The manifest of a cache. InputError when it is missing (the message ends with `hint`) or of another format."""
    manifest = files.read_json(folder / MANIFEST, hint)

    # Shards of another format may be read without an error, but wrongly.
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(
            f"{folder / MANIFEST} is not of format {FORMAT}; build the cache again in another folder with `hpc-neuro "
            "precompute`"
        )
    checked = dict(files.check_form(manifest, _ManifestForm, str(folder / MANIFEST), hint))

    # Shards are named after what the manifest says, and written again by a repair.
    for shard in manifest["shards"]:
        files.resolve_inside(folder, shard["file"], folder / MANIFEST, hint)
    return checked


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides a cache's features; not of the store's path and the code version."""
    # A cache may be moved, or repaired by another version, and still hold the same features.
    facts = {key: value for key, value in manifest.items() if key not in ("store", "code")}
    return files.sha256_json(facts)


def iter_tiles(rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut a map of tokens into tiles of at most size x size: (rows, columns) of each, row by row."""
    for row in range(0, rows, size):
        for column in range(0, columns, size):
            yield slice(row, min(row + size, rows)), slice(column, min(column + size, columns))


def record_use(cache: Path, out: Path) -> None:
    """Note that the training in `out` reads `cache`. A training that is started again keeps its first date."""
    training = str(out.resolve())

    # One file per training folder: a restart writes the same name.
    path = cache / USES / f"{hashlib.sha256(training.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return

    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    try:
        files.write_json(path, {"out": training, "host": platform.node(), "first": now})
    except PermissionError:
        log.info("%s is read-only: `hpc-neuro cache info` will not list this training", cache)


def list_uses(cache: Path) -> list[dict[str, Any]]:
    """What `record_use` wrote, the earliest first: {"out", "host", "first"}."""
    # ISO dates of one time zone sort as texts.
    uses = [files.read_json(path, f"remove {path}", _UseForm) for path in (cache / USES).glob("*.json")]
    return sorted(map(dict, uses), key=lambda use: str(use["first"]))
