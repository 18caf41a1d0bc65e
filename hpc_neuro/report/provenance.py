"""The runs that led to a result, followed through the records in their folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_neuro.core import run_folder, yaml_text
from hpc_neuro.core.run_folder import CONFIG, RECORD, REMAKE
from hpc_neuro.core.schema import InputError
from hpc_neuro.pipeline import STAGES, VERBS


@dataclass(frozen=True)
class RunRecord:
    """One run that led to a result, as its folder records it."""

    verb: str
    folder: Path
    record: Mapping[str, Any] | None
    """Content of run.json; None: the folder or its run.json does not exist."""

    def locate(self, path: str | Path) -> Path:
        """The absolute path of a file or folder that the config or the record of this run names.

        A relative path counts from the folder in which the run was started. Runs that were moved or copied together are
        found beside one another: what lay next to the run's folder then is looked for next to it now.
        """
        record = self.record or {}
        start = Path(record.get("cwd", Path.cwd()))
        recorded = Path(os.path.normpath(start / path))

        # Where the run was, and where it is now, give what moved with it.
        old_home = Path(record.get("folder") or os.path.normpath(start / _read_out(self.folder)))
        home = self.folder.resolve()
        moved = Path(os.path.normpath(home / os.path.relpath(recorded, old_home)))
        return moved if old_home != home and moved.exists() else recorded

    def iter_inputs(self) -> Iterator[tuple[str, Path]]:
        """Verb and folder of each run that this run was built on."""
        record = self.record or {}
        verb, config = str(record.get("verb")), record.get("config", {})

        # The stages of a demo have their folders inside its own.
        if verb == "demo":
            last = list(STAGES.values())[-1]
            yield last.name, self.locate(self.folder / str(last.folder))
            return

        for item in VERBS[verb].inputs if verb in VERBS else ():
            named = config.get(item.key)
            # A key names one folder, or groups of folders (`compare` of evaluate).
            groups = named.values() if isinstance(named, dict) else [[named]] if named else []
            for group in groups:
                for path in group:
                    yield item.verb, self.locate(path)


def find_run_folder(path: Path) -> Path | None:
    """The folder of the run that `path` is or lies in; None when there is none."""
    return next((folder for folder in (path, *path.parents) if (folder / RECORD).exists()), None)


def follow_runs(starts: Mapping[str, Path]) -> list[RunRecord]:
    """The runs that led to the folders `starts` (verb -> folder), each once, each after all that it was built on.

    A folder inside the folder of a run of that verb (weights/best) leads to that run.
    Raises InputError for a run.json that cannot be read.
    """
    runs: dict[Path, RunRecord] = {}
    for verb, path in starts.items():
        runs = _follow(verb, path, runs)
    return list(runs.values())


def _follow(verb: str, path: Path, visited: Mapping[Path, RunRecord]) -> dict[Path, RunRecord]:
    """`visited` (resolved folder -> run), with the run at `path` and those it was built on added before it."""
    # A run that several others read is listed once, before the first of them.
    runs = dict(visited)
    folder = find_run_folder(path)
    record = _read_record(folder) if folder else None

    # A run of another verb around `path` is not meant: the run at `path` has lost its record.
    if folder != path and record and record.get("verb") != verb:
        folder = record = None

    # Links and relative paths may lead to one folder by several names.
    key = (folder or path).resolve()
    if key in runs:
        return runs

    run = RunRecord(str(record.get("verb", verb)) if record else verb, folder or path, record)
    try:
        inputs = list(run.iter_inputs())
    except (TypeError, AttributeError, ValueError):
        raise InputError(f"{run.folder / RECORD} names folders that are not paths; {REMAKE}") from None

    for input_verb, input_path in inputs:
        runs = _follow(input_verb, input_path, runs)
    return {**runs, key: run}


def _read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a folder. Raises InputError when it is damaged."""
    return run_folder.read_record(folder, REMAKE)


def _read_out(folder: Path) -> str:
    """The `out` that the config in a run's folder names; the folder itself when the config cannot be read."""
    try:
        tree = yaml_text.parse((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return str(folder.resolve())
    return str(tree["out"]) if isinstance(tree, dict) and tree.get("out") else str(folder.resolve())


def list_notices(runs: list[RunRecord], digests: Mapping[str, str]) -> list[str]:
    """What a reader must know before the scores, from the runs that led to them.

    digests: scored volume -> digest of its content in the store.
    """
    notices = []
    records = [(run.verb, run.record) for run in runs if run.record]

    # A random teacher is meant for tests of the pipeline; its scores must not be read as results.
    teachers = [record.get("config", {}).get("teacher") for verb, record in records if verb in ("train", "precompute")]
    if any((teacher or {}).get("model") == "random" for teacher in teachers):
        notices.append(
            "The teacher had random weights: these numbers measure the pipeline, not the transfer of natural-image "
            "knowledge."
        )

    # By digest and not by name: a renamed volume is still the same neuron.
    trained_on = {digest for verb, record in records if verb == "train" for digest in record.get("inputs", {}).values()}
    leaked = [name for name, digest in digests.items() if digest in trained_on]
    if leaked:
        notices.append(
            f"The model was trained or validated on {', '.join(leaked)}: "
            f"{'this neuron is' if len(leaked) == 1 else 'these neurons are'} not held out."
        )
    return notices
