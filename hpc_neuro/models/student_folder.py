"""Where the weights of a student lie: in the package, in a folder of `train`, or in a folder of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hpc_neuro.core import run_folder
from hpc_neuro.core.geometry import Point, VoxelSize
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.core.types import Contrast

BUNDLED = "bundled"
"""Name of the student that ships in the package."""
STUDENT_FILES = ("student.yaml", "model.safetensors")
"""Files of a folder of weights."""
_SAME_ZOOM = 1.5
"""Voxels up to so many times as small or large as those of a student's training are taken as they are."""
_MOST_ZOOM = 8.0
"""Voxels up to so many times as small or large as those of a student's training are resampled."""
_THINNER, _WIDER = 1.1, 4.0
"""Neurites down to the lower quartile of the widths in a student's training, divided by the first, and up to the upper
one, multiplied by the second, are taken as they are: thin ones are lost, wide ones cost time."""
Widths = tuple[float | None, float | None]
"""[voxel] Widths of neurites along z and in the plane; None: unknown."""
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


def fit_voxel_size(extra: Mapping[str, Any], model: Path, size: VoxelSize | None, image: str) -> Point | None:
    """Sides, in voxels of an image, of voxels like those of a student's training, z y x; None where the image fits.

    extra: of the student's student.yaml; without the voxel sizes of a training there is nothing to fit. size: [um];
    None where it is unknown, and nothing is resampled.
    Raises InputError for voxels more than `_MOST_ZOOM` times as small or large as those of the training.
    """
    sizes = extra.get("voxel_sizes")
    if sizes is None or size is None:
        return None

    factor = [_choose_factor(side, least, most) for side, least, most in zip(size, *sizes, strict=True)]
    if all(1 / _MOST_ZOOM <= f <= _MOST_ZOOM for f in factor):
        z, y, x = factor
        return None if z == y == x == 1 else (z, y, x)

    raise InputError(
        f"{image} has voxels of {format_sides(size)} um (z y x), and {model} was trained on voxels of "
        f"{format_trained(extra)} um. Voxels up to {_MOST_ZOOM:g} times as small or large are resampled. "
        f"Beyond that an image shows other things: larger voxels hold whole neurites, and in smaller ones a "
        "neurite is wider than all that the student sees at once. Correct a wrong voxel_size=z,y,x, give a student "
        "that was trained on such voxels, or have the image predicted as it is with any_voxel_size=true"
    )


def _choose_factor(side: float, least: float, most: float) -> float:
    """Sides of a voxel that fits a training with voxels from `least` to `most`, along one axis, in voxels of the image;
    1 where the image fits."""
    if least / _SAME_ZOOM <= side <= most * _SAME_ZOOM:
        return 1.0
    return min(max(side, least), most) / side


def fit_widths(extra: Mapping[str, Any], model: Path, widths: Widths, image: str) -> Point | None:
    """Sides, in voxels of an image, of voxels on which its neurites are as wide as in a student's training, z y x.

    extra: of the student's student.yaml; widths: [voxel] medians in the image. 1 along an axis that fits. None where
    nothing can be compared: the training recorded no widths, or none of the image is known.
    Raises InputError for neurites more than `_MOST_ZOOM` times as wide as in the training.
    """
    trained = read_widths(extra)
    if trained is None or widths == (None, None):
        return None

    low, middle, high = trained
    depth, plane = map(_choose_zoom, widths, low, middle, high)
    if max(depth, plane) <= _MOST_ZOOM:
        return depth, plane, plane

    raise InputError(
        f"the neurites in {image} are {format_widths(widths)} voxels wide, and those of the training of {model} "
        f"{format_widths(middle)}. Up to {_MOST_ZOOM:g} times as wide they are resampled; beyond that an image shows "
        "other things. Give a coarser level of the image, or have it taken as it is with any_voxel_size=true"
    )


def _choose_zoom(width: float | None, low: float | None, middle: float | None, high: float | None) -> float:
    """Side of a voxel that fits a training with widths around `middle`, along one axis, in voxels of the image; 1 where
    the image fits, or nothing is known."""
    if width is None or low is None or middle is None or high is None:
        return 1.0
    return 1.0 if low / _THINNER <= width <= high * _WIDER else width / middle


def read_widths(extra: Mapping[str, Any]) -> tuple[Widths, Widths, Widths] | None:
    """[voxel] The lower quartile, the median and the upper quartile of the widths of the neurites in a student's
    training; None where they are not recorded."""
    rows = extra.get("neurite_widths")
    if rows is None:
        return None
    low, middle, high = ((depth, plane) for depth, plane in rows)
    return low, middle, high


def format_widths(widths: Widths) -> str:
    """Widths in words without the unit, such as 3.1 (along z 2.2)."""
    depth, plane = ("?" if width is None else f"{width:.2g}" for width in widths)
    return plane if widths[0] is None else f"{plane} (along z {depth})"


def format_sides(sides: Sequence[float]) -> str:
    """Three lengths, such as 1 x 0.33 x 0.33."""
    return " x ".join(f"{side:.4g}" for side in sides)


def format_trained(extra: Mapping[str, Any]) -> str:
    """The voxel sizes of a student's training, in words without the unit; "" where they are not recorded."""
    return " to ".join(format_sides(sides) for sides in dict.fromkeys(map(tuple, extra.get("voxel_sizes", ()))))
