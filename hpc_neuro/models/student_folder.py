"""Where the weights of a student lie: in the package, in a folder of `train`, or in a folder of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hpc_neuro.core import run_folder
from hpc_neuro.core.geometry import VoxelSize
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.core.types import Contrast

BUNDLED = "bundled"
"""Name of the student that ships in the package."""
STUDENT_FILES = ("student.yaml", "model.safetensors")
"""Files of a folder of weights."""
_MOST_ZOOM = 2.0
"""An image may have voxels so many times as small or as large as those of a student's training."""
_ASSET = Path(__file__).parent.parent / "assets" / "student"


def find_student(model: Path, which: Literal["best", "last"] = "best") -> Path:
    """The folder of the weights that `model` names: `bundled`, the folder of a training run, or one of its weights.

    `which`: of a run. Raises ConfigError for `last` of a folder that holds weights itself, InputError without weights
    and for files that changed since they were written.
    """
    if str(model) == BUNDLED:
        return _ASSET

    has_weights = (model / STUDENT_FILES[1]).is_file()
    # A folder of weights stands for itself; the wish for others would be ignored silently.
    if has_weights and which == "last" and model.resolve().name != "last":
        raise ConfigError(f"weights: {model} holds weights itself and no `last`; give the folder that train wrote")

    for folder in (model, model / "weights" / which):
        if (folder / STUDENT_FILES[1]).is_file():
            for name in STUDENT_FILES:
                run_folder.require_unchanged(folder / name)
            return folder

    raise InputError(
        f"{model} holds no weights; give a folder that `hpc-neuro train` has finished, or its weights/best"
    )


def read_contrast(extra: Mapping[str, Any]) -> Contrast:
    """How brightness became [0, 1] in a student's training, from the `extra` of its student.yaml."""
    # Students that were saved before there was a choice saw the range of the whole volume.
    contrast: Contrast = extra.get("contrast", "range")
    return contrast


def require_voxel_size(extra: Mapping[str, Any], model: Path, size: VoxelSize | None, image: str) -> None:
    """Raise InputError where the voxels of an image differ much from those of a student's training.

    extra: of its student.yaml; the bundled student, which was trained on neurites of many widths, has no voxel size.
    size: [um] z y x; None where it is unknown, which is accepted.
    """
    sizes = extra.get("voxel_sizes")
    if sizes is None or size is None:
        return
    least, most = sizes
    fits = all(a / _MOST_ZOOM <= side <= b * _MOST_ZOOM for side, a, b in zip(size, least, most, strict=True))
    if not fits:
        trained = " to ".join(" x ".join(f"{side:.4g}" for side in sides) for sides in dict.fromkeys(map(tuple, sizes)))
        raise InputError(
            f"{image} has voxels of {' x '.join(f'{side:.4g}' for side in size)} um (z y x), and {model} was trained "
            f"on voxels of {trained} um, at most {_MOST_ZOOM:g} times as small or large are expected: neurites would "
            "be too wide or too thin for it. Resample the image, correct a wrong voxel_size=z,y,x, or give "
            "any_voxel_size=true"
        )
