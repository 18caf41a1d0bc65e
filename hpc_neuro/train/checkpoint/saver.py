"""Checkpoints that are complete or absent: written beside, agreed on by all ranks, renamed by one."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from hpc_neuro.core import distributed, files, run_folder
from hpc_neuro.train.config import CheckpointConfig

log = logging.getLogger(__name__)
MARKER = "checkpoint.json"
TRAINING = "training.json"  # what is no tensor
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Marker:
    """What a checkpoint is of; stands beside its files."""

    step: int
    world_size: int
    stage: int
    dtype: str
    score: float | None  # checkpoint.metric of the validation at this very step
    code: str = ""


def find_newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, None when there is none."""
    found = sorted(p for p in folder.glob("step_*") if (p / MARKER).exists())
    return found[-1] if found else None


def read_marker(path: Path) -> Marker:
    """The marker of a checkpoint."""
    return Marker(**files.read_json(path / MARKER, f"remove {path}; the one before it is then taken"))


def is_milestone(step: int, cfg: CheckpointConfig) -> bool:
    """Whether the checkpoint of a step is kept for good."""
    return step > 0 and cfg.milestone > 0 and step % cfg.milestone == 0


def note_score(folder: Path, step: int, score: float) -> None:
    """Mark the checkpoint of a step, when there is one, that a stop had saved before it was validated."""
    path = _path(folder, step)
    if (path / MARKER).exists():
        try:
            files.write_json(path / MARKER, asdict(replace(read_marker(path), score=score)))
        except OSError as error:
            log.warning("the score of %s could not be noted in it (%s); it is not kept as the best", path, error)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


class Saver:
    """The checkpoints of one run, one after the other; all ranks call `begin` and `complete` together.

    A rank's share is written by a thread. No rank waits for another while it writes, so none waits for one that failed:
    when it raises OSError on any rank (disk full, quota), what was there stays and it is said.
    """

    def __init__(self, folder: Path, cfg: CheckpointConfig) -> None:
        self._folder, self._cfg = folder, cfg
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._marker: Marker | None = None  # of the checkpoint that is being written
        self._writing: Future[None] | None = None
        self._failures: list[str] = []

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._writing is None or self._writing.done()

    def begin(self, marker: Marker, write: Callable[[Path], None]) -> None:
        """Start to save `folder`/step_N, after what was begun before is complete.

        `write(part)` writes a rank's share into a folder, in a thread: what it writes must not change meanwhile.
        """
        self.complete()
        self._marker, self._failures = marker, []
        part = self._part(marker)
        if distributed.is_main():
            shutil.rmtree(part, ignore_errors=True)
            _attempt(self._failures, lambda: part.mkdir(parents=True))
        if not _anywhere(self._failures):  # it is also what the others wait for before they write
            self._writing = self._pool.submit(_attempt, self._failures, lambda: write(part))

    def complete(self) -> bool:
        """Wait until what was begun is written by all, and put it in its place; nothing to do when nothing was begun.

        False on all ranks, and said, where any failed.
        """
        if self._marker is None:
            return True
        marker, self._marker = self._marker, None
        part, target = self._part(marker), _path(self._folder, marker.step)
        if self._writing is not None:
            self._writing.result()
            self._writing = None
        if not _anywhere(self._failures) and distributed.is_main():
            _attempt(self._failures, lambda: _complete(part, target, marker))
        if _anywhere(self._failures):
            if distributed.is_main():
                shutil.rmtree(part, ignore_errors=True)
                held = find_newest(self._folder)
                log.warning(
                    "the checkpoint of step %d could not be written (%s); training goes on, %s",
                    marker.step,
                    self._failures[0] if self._failures else "on another rank",
                    f"{held.name} is the last good one" if held else "and there is none yet: make room",
                )
            return False
        if distributed.is_main():
            _prune(self._folder, self._cfg)
        return True

    def close(self) -> None:
        """Wait for the thread; what was begun and not completed is no checkpoint."""
        self._pool.shutdown()

    def _part(self, marker: Marker) -> Path:
        return self._folder / f".step_{marker.step:08d}.part"  # no random name: all ranks must know it


def _attempt(failures: list[str], work: Callable[[], None]) -> None:
    """Note an error of the file system instead of raising it: the ranks then agree on it."""
    try:
        work()
    except OSError as error:
        failures.append(str(error))


def _complete(part: Path, target: Path, marker: Marker) -> None:
    """Mark what all ranks wrote as complete and put it in its place."""
    files.write_json(part / MARKER, asdict(marker) | {"code": run_folder.code_version()})
    _fsync(part)
    if target.exists():
        _remove(target)
    part.replace(target)
    _fsync(target.parent)


def _prune(folder: Path, cfg: CheckpointConfig) -> None:
    """Keep the newest ones, the best validated one and the milestones."""
    held = sorted(p for p in folder.glob("step_*") if (p / MARKER).exists())
    markers = {p: read_marker(p) for p in held}
    scored = [(m.score, p) for p, m in markers.items() if m.score is not None]
    best = max(scored)[1] if scored else None
    for path in held[: -cfg.keep]:
        if path != best and not is_milestone(markers[path].step, cfg):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in between leaves a hidden rest, never half a checkpoint under its own name."""
    part = path.parent / f".{path.name}.old.part"
    shutil.rmtree(part, ignore_errors=True)
    path.replace(part)
    shutil.rmtree(part, ignore_errors=True)


def _anywhere(failures: list[str]) -> bool:
    """Whether any rank failed; the same on all."""
    return distributed.reduce_scalar(float(len(failures)), "sum", _CPU) > 0


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
