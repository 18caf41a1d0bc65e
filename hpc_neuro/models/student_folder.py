"""Where the weights of a student lie: in the package, in a folder of `train`, or in a folder of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hpc_neuro.core import run_folder
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.core.types import Contrast

BUNDLED = "bundled"
"""Name of the student that ships in the package."""
STUDENT_FILES = ("student.yaml", "model.safetensors")
"""Files of a folder of weights."""
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
