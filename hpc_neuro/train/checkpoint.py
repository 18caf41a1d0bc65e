"""Checkpoints that are complete or absent: written beside, agreed on by all ranks, renamed by one."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from hpc_neuro import distributed, files, runs
from hpc_neuro.schema import ConfigError, config

log = logging.getLogger(__name__)
MARKER = "checkpoint.json"
_CPU = torch.device("cpu")


@config
class CheckpointConfig:
    """When training is saved, and how much is kept."""

    every: int = Field(default=500, ge=0)
    """[step] Save every so many steps; 0: only by the clock, on a signal and at the end."""
    minutes: float = Field(default=10.0, ge=0)
    """[min] Save when this long has passed since the last; 0: only by steps."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept, besides the best validated one."""
    margin: float = Field(default=120.0, ge=0)
    """[s] Stop and save this long before the end of a Slurm job's time limit (SLURM_JOB_END_TIME)."""


@dataclass(frozen=True)
class Marker:
    """What a checkpoint is of; stands beside its files."""

    step: int
    world_size: int
    stage: int
    dtype: str
    val_dice: float | None  # of the validation at this very step
    code: str = ""


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, None when there is none."""
    found = sorted(p for p in folder.glob("step_*") if (p / MARKER).exists())
    return found[-1] if found else None


def read_marker(path: Path) -> Marker:
    """The marker of a checkpoint."""
    return Marker(**files.read_json(path / MARKER, f"remove {path}; the one before it is then taken"))


def require_same_ranks(path: Path, world_size: int, stage: int, dtype: str) -> None:
    """Raise ConfigError when a checkpoint was saved by another number of ranks, ZeRO stage or precision."""
    held = read_marker(path)
    pairs = {
        "ranks": (held.world_size, world_size),
        "engine.stage": (held.stage, stage),
        "precision": (held.dtype, dtype),
    }
    faults = [f"{name}: saved with {a}, started with {b}" for name, (a, b) in pairs.items() if a != b]
    if faults:
        raise ConfigError(
            f"{path} cannot be continued with another layout ({'; '.join(faults)}); start it as it was saved, or train "
            "in another `out`"
        )


def save(
    folder: Path, marker: Marker, write: Callable[[Path, dict[str, Any]], list[str]], state: dict[str, Any], keep: int
) -> bool:
    """Save one checkpoint as `folder`/step_N. All ranks call this; the same answer on all: whether it is there.

    write(part, state) is `Engine.save`. When a rank cannot write (disk full, quota), what was there stays; it is said.
    """
    target = folder / f"step_{marker.step:08d}"
    part = folder / f".{target.name}.part"  # no random name: all ranks must know it
    failures: list[str] = []
    if distributed.is_main():
        shutil.rmtree(part, ignore_errors=True)
    distributed.barrier()
    failures += write(part, state)
    if not _anywhere(failures) and distributed.is_main():
        try:
            files.write_json(part / MARKER, asdict(marker) | {"code": runs.code_version()})
            for folder_written in (part, *(p for p in part.iterdir() if p.is_dir())):
                _fsync(folder_written)
            if target.exists():
                _remove(target)
            part.replace(target)
            _fsync(folder)
        except OSError as error:
            failures.append(str(error))
    if _anywhere(failures):
        if distributed.is_main():
            shutil.rmtree(part, ignore_errors=True)
            held = newest(folder)
            log.warning(
                "the checkpoint of step %d could not be written (%s); training goes on, %s",
                marker.step,
                failures[0] if failures else "on another rank",
                f"{held.name} is the last good one" if held else "and there is none yet: make room",
            )
        return False
    if distributed.is_main():
        _prune(folder, keep)
    return True


def _prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` and the best validated one."""
    held = sorted(p for p in folder.glob("step_*") if (p / MARKER).exists())
    scored = [(m.val_dice, p) for p in held if (m := read_marker(p)).val_dice is not None]
    best = max(scored)[1] if scored else None
    for path in held[:-keep]:
        if path != best:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in between leaves a hidden rest, never half a checkpoint under its own name."""
    part = path.parent / f".{path.name}.old.part"
    shutil.rmtree(part, ignore_errors=True)
    path.replace(part)
    shutil.rmtree(part, ignore_errors=True)


def _anywhere(failures: list[str]) -> bool:
    """Whether any rank failed; the same on all."""
    return distributed.reduced(float(len(failures)), "sum", _CPU) > 0


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
