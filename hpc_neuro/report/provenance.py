"""The chain of runs behind a result, followed through the records in their folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.pipeline import STAGES, VERBS

_AGAIN = "remove it and run that stage again"


@dataclass(frozen=True)
class RunRecord:
    """One run behind the result."""

    name: str  # its verb
    path: Path
    record: Mapping[str, Any] | None  # None: the folder or its run.json is gone

    def locate(self, named: str | Path) -> Path:
        """The path that the run's config or record names, absolute.

        A relative path counts from where the run was started. Runs that were moved or copied together are found
        beside one another: what lay next to the run's folder then is looked for next to it now.
        """
        record = self.record or {}
        start = Path(record.get("cwd", Path.cwd()))
        path = Path(os.path.normpath(start / named))
        home = Path(record.get("folder") or os.path.normpath(start / _out(self.path)))
        here = self.path.resolve()
        beside = Path(os.path.normpath(here / os.path.relpath(path, home)))
        return beside if home != here and beside.exists() else path

    def behind(self) -> Iterator[tuple[str, Path]]:
        """Verb and folder of each run that this one was built on."""
        record = self.record or {}
        verb, config = str(record.get("verb")), record.get("config", {})

        # The demo's stages have their folders inside its own.
        if verb == "demo":
            last = list(STAGES.values())[-1]
            yield last.name, self.locate(self.path / str(last.folder))
            return

        for item in VERBS[verb].inputs if verb in VERBS else ():
            named = config.get(item.key)
            groups = named.values() if isinstance(named, dict) else [[named]] if named else []
            for path in (p for group in groups for p in group):
                yield item.verb, self.locate(path)


def find_run_folder(path: Path) -> Path | None:
    """The folder of the run that `path` is of or lies in; None when there is none."""
    return next((p for p in (path, *path.parents) if (p / "run.json").is_file()), None)


def follow_runs(starts: Mapping[str, Path]) -> list[RunRecord]:
    """The runs that led to the folders `starts` (verb -> folder), each once, each after all that it was built on.

    A folder inside the folder of a run of that verb (weights/best) leads to that run.
    Raises InputError for a run.json that cannot be read.
    """
    found: dict[Path, RunRecord] = {}
    for name, path in starts.items():
        _follow(name, path, found)
    return list(found.values())


def _follow(name: str, path: Path, found: dict[Path, RunRecord]) -> None:
    folder = find_run_folder(path)
    record = _record(folder) if folder else None
    if folder != path and record and record.get("verb") != name:  # another run around one that has lost its record
        folder = record = None
    key = (folder or path).resolve()
    if key in found:
        return
    link = RunRecord(str(record.get("verb", name)) if record else name, folder or path, record)
    try:
        before = list(link.behind())
    except (TypeError, AttributeError, ValueError):
        raise InputError(f"{link.path / 'run.json'} names folders that are none; {_AGAIN}") from None
    for behind, where in before:
        _follow(behind, where, found)
    found[key] = link


def _record(folder: Path) -> dict[str, Any]:
    """The run.json of a folder. Raises InputError when it is damaged."""
    path = folder / "run.json"
    record = files.read_json(path, _AGAIN)
    parts = ("config", "inputs", "outputs", "sources", "summary")
    if not isinstance(record, dict) or any(not isinstance(record.get(k, {}), dict) for k in parts):
        raise InputError(f"{path} is no record of a run; {_AGAIN}")
    return record


def _out(folder: Path) -> str:
    """The `out` that the config in a run's folder names; the folder itself where there is none."""
    try:
        named = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return str(folder.resolve())
    return str(named["out"]) if isinstance(named, dict) and named.get("out") else str(folder.resolve())


def list_notices(links: list[RunRecord], digests: Mapping[str, str]) -> list[str]:
    """What a reader must know of scores before anything else, by the runs that led to them.

    digests: scored volume -> digest of its content, as the store has it.
    """
    found = []
    configs = [link.record.get("config", {}) for link in links if link.record and link.name in ("train", "precompute")]
    if any((c.get("teacher") or {}).get("model") == "random" for c in configs):
        found.append(
            "The teacher had random weights: these numbers measure the pipeline, not the transfer of natural-image "
            "knowledge."
        )
    seen = {v for link in links if link.record and link.name == "train" for v in link.record.get("inputs", {}).values()}
    if known := [name for name, digest in digests.items() if digest in seen]:
        found.append(
            f"The model was trained or validated on {', '.join(known)}: "
            f"{'this neuron is' if len(known) == 1 else 'these neurons are'} not held out."
        )
    return found
