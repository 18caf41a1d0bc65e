"""The student in a checkpoint, without the engine that saved it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hpc_neuro.data.neurite_width import list_widths
from hpc_neuro.train.checkpoint import folder
from hpc_neuro.train.checkpoint.folder import TrainingState
from hpc_neuro.train.checkpoint.tensor_files import list_kinds, stream_tensors

PREFIX = "student."
"""Beginning of the names of the student's parameters; those of the distiller begin otherwise."""


@dataclass(frozen=True)
class SavedWeights:
    """The student's parameters in a checkpoint."""

    checkpoint: Path
    state: TrainingState
    is_averaged: bool
    """The running average, not the weights themselves."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the student -> shape."""
        shapes = self.state.shapes.items()
        return {name.removeprefix(PREFIX): shape for name, shape in shapes if name.startswith(PREFIX)}

    @property
    def is_scored(self) -> bool:
        """Whether the checkpoint knows the validation of its own step."""
        return self.state.score is not None and self.state.scored == self.state.step

    def stream(self) -> Iterator[Tensor]:
        """The parameters in the order of `shapes`, float32, one at a time. Raises InputError."""
        names = {PREFIX + name: shape for name, shape in self.shapes.items()}
        return stream_tensors(self.checkpoint, "average" if self.is_averaged else "weight", names)

    def make_extra(self) -> dict[str, Any]:
        """What student.yaml has besides the config, as `train` writes it."""
        state = self.state
        return {
            "window": list(state.window),
            "contrast": state.contrast,
            "voxel_sizes": [list(size) for size in state.voxel_sizes],
            "neurite_widths": list_widths(state.neurite_widths),
            "mirrored": state.mirrored,
            "threshold": 0.5 if state.score is None else state.score.threshold,
            "step": state.step,
            "val_dice": state.score.dice_best if state.score is not None and self.is_scored else None,
        }


def open_weights(checkpoint: Path, plain: bool = False) -> SavedWeights:
    """The student of a checkpoint: its running average if one was kept, the weights themselves with `plain`.

    Raises InputError for a damaged checkpoint.
    """
    folder.require_intact(checkpoint)
    is_averaged = not plain and "average" in list_kinds(checkpoint)
    return SavedWeights(checkpoint, folder.read_training_state(checkpoint), is_averaged)
