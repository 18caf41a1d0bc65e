"""The folder of a run's checkpoints: what each contains, which one is the newest, which ones are removed.

checkpoints/step_00000500/checkpoint.json        the marker: step, ranks, stage, score; written last
                          training.json          everything that is no tensor
                          rank_00000.safetensors ranges of tensors, one file per rank that owns some
checkpoints/.step_00001000.00000000.part/        being written, or left by a kill
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.geometry import VoxelSize
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.neurite_width import WidthQuartiles
from hpc_neuro.train.checkpoint.tensor_files import DIGEST_SUFFIX
from hpc_neuro.train.config import CheckpointConfig
from hpc_neuro.train.validate import ValidationScore

log = logging.getLogger(__name__)

MARKER = "checkpoint.json"
"""Name of the marker."""

TRAINING = "training.json"
"""Name of the file with everything that is no tensor."""

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Marker:
    """What a checkpoint is of; makes its folder a checkpoint."""

    step: Count
    world_size: int
    stage: int
    dtype: str
    score: float | None
    """checkpoint.metric of the validation at this very step."""
    code: str = ""
    files: dict[str, str] = field(default_factory=dict)
    """File of the checkpoint -> its SHA-256; {} in a checkpoint of an earlier version."""


@dataclass(frozen=True)
class OptimizerState:
    """What the optimizer keeps besides tensors."""

    updates: Count
    """Updates made: fewer than steps when half precision skipped some."""
    scaler: dict[str, float]
    """State of the dynamic loss scale; {} without one."""


@dataclass(frozen=True)
class BestScore:
    """The best validation so far."""

    score: float = -1.0
    step: int = -1


@dataclass(frozen=True)
class TrainingState:
    """Everything that is no tensor. `tools.export_weights` needs nothing but this and the tensors."""

    step: Count
    seconds: float
    """[s] Time that all starts of the run have taken."""
    best: BestScore
    score: ValidationScore | None
    """Of the latest validation."""
    scored: int
    """Step of the latest validation of crops; -1: none."""
    volumes_scored: int
    """Step of the latest validation of whole volumes; -1: none."""
    student: dict[str, Any]
    """Config of the student."""
    window: tuple[int, int, int]
    """[voxel] Size of the training crops, z y x."""
    mirrored: bool
    """Whether training crops were mirrored."""
    shapes: dict[str, tuple[int, ...]]
    """Name -> shape of every trained parameter, in order."""
    engine: OptimizerState
    contrast: str
    """How brightness became [0, 1]: range or local."""
    voxel_sizes: tuple[VoxelSize, VoxelSize]
    """[um] Smallest and largest sides of the training voxels, z y x."""
    neurite_widths: WidthQuartiles | None = None
    """[voxel] Of the neurites in the training volumes; None where they were not measured."""


# --- Finding and reading ---


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, by step."""
    return sorted(path for path in folder.glob("step_*") if (path / MARKER).exists())


def find_newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step; None without any."""
    return max(find_checkpoints(folder), default=None)


def read_marker(path: Path) -> Marker:
    """Read the marker of a checkpoint. Raises InputError."""
    return files.read_json(path / MARKER, _advice(path), Marker)


def list_damaged(path: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """The files of a checkpoint that are missing or do not have their SHA-256; of several ranks each reads a share.

    Raises InputError for a marker that cannot be read, or is of another step.
    """
    marker = read_marker(path)
    if path.name.startswith("step_") and path.name != path_of_step(path.parent, marker.step).name:
        raise InputError(f"{path / MARKER} is of step {marker.step}; {_advice(path)}")
    return [
        name
        for name, digest in sorted(marker.files.items())[rank::ranks]
        if not (path / name).is_file() or files.sha256(path / name) != digest
    ]


def require_intact(path: Path) -> None:
    """Raise InputError for a checkpoint that is not as it was written."""
    if damaged := list_damaged(path):
        raise InputError(describe_damage(path, damaged[0]))


def describe_damage(path: Path, name: str) -> str:
    """The sentence on a damaged file of a checkpoint."""
    return f"{path / name} does not have the checksum it was written with; {_advice(path)}"


def read_training_state(path: Path) -> TrainingState:
    """Read what is no tensor of a checkpoint. Raises InputError."""
    return files.read_json(path / TRAINING, _advice(path), TrainingState)


def _advice(path: Path) -> str:
    return f"remove {path}; the checkpoint before it is then used"


# --- Writing ---


def path_of_step(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def part_of_step(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of a step while it is written. All ranks must know it, so its name is not random."""
    return files.part_path_of_all(path_of_step(folder, step))


def publish(part: Path, target: Path, marker: Marker) -> None:
    """Mark what all ranks wrote to `part` as complete and move it to its place. Raises OSError."""
    digests = {TRAINING: files.sha256(part / TRAINING)}
    for path in sorted(part.glob(f"*{DIGEST_SUFFIX}")):
        digests[path.with_suffix(".safetensors").name] = path.read_text(encoding="utf-8")
        path.unlink()
    files.write_json(part / MARKER, asdict(marker) | {"code": run_folder.code_version(), "files": digests})

    # The marker must be on the disk before the folder has its final name.
    _fsync(part)

    if target.exists():
        _remove(target)
    part.replace(target)

    _fsync(target.parent)


def note_score(folder: Path, step: int, score: float) -> None:
    """Note the score of a step in its checkpoint, if a stop had it saved before it was validated."""
    path = path_of_step(folder, step)
    if not (path / MARKER).exists():
        return

    # The score only decides which checkpoint is kept, and is not worth the end of a run.
    try:
        files.write_json(path / MARKER, asdict(replace(read_marker(path), score=score)))
    except OSError as error:
        log.warning("the score of %s could not be noted in it (%s); it is not kept as the best", path, error)


def is_milestone(step: int, cfg: CheckpointConfig) -> bool:
    """Whether the checkpoint of a step is never removed."""
    return step > 0 and cfg.milestone > 0 and step % cfg.milestone == 0


def prune(folder: Path, cfg: CheckpointConfig) -> None:
    """Remove all checkpoints but the newest ones, the best validated one and the milestones."""
    paths = find_checkpoints(folder)
    markers = {path: read_marker(path) for path in paths}

    # Of equal scores the later step wins.
    scored = [(marker.score, path) for path, marker in markers.items() if marker.score is not None]
    best = max(scored)[1] if scored else None

    for path in paths[: -cfg.keep]:
        if path != best and not is_milestone(markers[path].step, cfg):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves a hidden rest, never half a checkpoint under its own name."""
    part = files.part_path_of_all(path.with_name(f"{path.name}.old"))
    shutil.rmtree(part, ignore_errors=True)

    path.replace(part)
    shutil.rmtree(part, ignore_errors=True)


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
