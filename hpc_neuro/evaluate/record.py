"""Where a result comes from: the records of the runs behind it, as far as their folders are still there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_neuro import files

_BEHIND = {
    "infer": ("model", "store"),
    "train": ("store", "cache"),
    "precompute": ("store",),
    "prepare": (),
}
"""The keys of a verb's config that name folders of other runs."""


@dataclass(frozen=True)
class Link:
    """One run behind the result."""

    name: str
    path: Path
    record: Mapping[str, Any] | None  # None: the folder or its run.json is gone


def chain(starts: Mapping[str, Path]) -> list[Link]:
    """The runs that led to the folders `starts` (name -> folder), each once, the earliest first.

    A folder inside a run's folder (weights/best) leads to that run.
    """
    found: dict[Path, Link] = {}
    for name, path in starts.items():
        _follow(name, path, found)
    return list(found.values())[::-1]


def _follow(name: str, path: Path, found: dict[Path, Link]) -> None:
    folder = next((p for p in (path, *path.parents) if (p / "run.json").exists()), None)
    key = (folder or path).resolve()
    if key in found:
        found[key] = found.pop(key)  # it stands before everything that needs it
        return
    if folder is None:
        found[key] = Link(name, path, None)
        return
    record = files.read_json(folder / "run.json", "remove it and run that stage again")
    found[key] = Link(str(record.get("verb", name)), folder, record)
    config = record.get("config", {})
    for behind in _BEHIND.get(str(record.get("verb")), ()):
        if config.get(behind):
            _follow(behind, Path(config[behind]), found)


def teacher_is_random(links: list[Link]) -> bool:
    """Whether a training run in the chain had a teacher of random weights."""
    configs = [link.record.get("config", {}) for link in links if link.record and link.name in ("train", "precompute")]
    return any((c.get("teacher") or {}).get("model") == "random" for c in configs)
