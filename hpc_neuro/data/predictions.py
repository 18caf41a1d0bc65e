"""predictions.json: what `infer` says of each volume, and its checked reader, which all verbs use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files, run_folder

INDEX = "predictions.json"
"""File of a folder of predictions that lists the volumes and their results."""
_Point = Annotated[list[float], Field(min_length=3, max_length=3)]


@with_config(ConfigDict(extra="allow"))
class _EntryForm(TypedDict):
    """What may be said of one volume; folders of other programs lack what only `infer` knows."""

    probability: NotRequired[str]
    swc_voxel: NotRequired[str | None]
    swc: NotRequired[str | None]
    image: NotRequired[str]
    voxel_size: NotRequired[_Point]
    roots: NotRequired[list[_Point] | None]
    threshold: NotRequired[float]
    trees: NotRequired[int]
    confidence: NotRequired[str | None]
    sha256: NotRequired[dict[str, str]]
    foreground_voxels: NotRequired[int]


def read_predictions(out: Path, hint: str, compare: bool = True) -> dict[str, Any]:
    """Volume -> its entry, from predictions.json in `out`. Raises InputError, which ends with `hint`.

    compare: with the SHA-256 that `infer` recorded; False for what finds differences by itself.
    """
    entries = files.read_json(out / INDEX, hint, dict[str, _EntryForm])
    files.require_plain_names(entries, out / INDEX, hint)
    if compare:
        run_folder.require_unchanged(out / INDEX)
    return dict(entries)
