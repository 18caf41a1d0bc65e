"""The weights that a student starts from when it was trained before, and the parts that stay as they were."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_neuro.core import files, schema
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import Student, load_student
from hpc_neuro.models.student_folder import find_student, read_contrast

PARTS = {
    "encoder": ("encoder.",),
    "decoder": ("decoder.",),
    "transformer": ("vit.", "tokenizer.", "to_tokens.", "from_tokens.", "token_gain."),
}
"""Part of a student -> beginnings of the names of its parameters."""
_TOKEN_GAIN = "token_gain."
"""Beginning of the name of the factor on what the transformer adds."""


@dataclass(frozen=True)
class StartWeights:
    """Values of a student's parameters before the first step; names are those of the student."""

    values: dict[str, Tensor] = field(default_factory=dict)
    lr_scales: dict[str, float] = field(default_factory=dict)
    """Learning rate relative to that of a new parameter."""
    lines: tuple[str, ...] = ()
    """Where the values come from, for people."""


@dataclass(frozen=True)
class InitialStudent:
    """A trained student that another one starts from."""

    folder: Path
    cfg: StudentConfig
    values: dict[str, Tensor]
    digest: str
    """SHA-256 of its weights."""
    contrast: str
    """How brightness became [0, 1] in its training."""

    @property
    def has_transformer(self) -> bool:
        """Whether it has a transformer."""
        return self.cfg.transformer

    def require_contrast(self, contrast: str) -> None:
        """Raise ConfigError where a store has another contrast than the student was trained on."""
        if contrast != self.contrast:
            raise ConfigError(
                f"init: the student of {self.folder} was trained on volumes of contrast {self.contrast}, and the store "
                f"has {contrast}; prepare the store again in another folder, with contrast={self.contrast}"
            )


def open_initial_student(init: Path) -> InitialStudent:
    """The student that `train init=` names. Raises InputError where there is none, or it is damaged."""
    folder = find_student(init)
    student, extra = load_student(folder)
    values = {name: value.clone() for name, value in student.state_dict().items()}
    digest = files.sha256(folder / "model.safetensors")
    return InitialStudent(folder, student.cfg, values, digest, read_contrast(extra))


def add_initial_student(weights: StartWeights, start: InitialStudent, blank: Student, scale: float) -> StartWeights:
    """`weights` with those of a trained student, which win; what that one lacks stays as it is.

    The result predicts what the trained student predicts: a transformer that it lacks starts without effect. `scale`:
    learning rate of its parameters. Raises ConfigError, with the keys to set, where a tensor has no place.
    """
    own = blank.state_dict()
    misfits = [name for name, value in start.values.items() if name not in own or own[name].shape != value.shape]
    if misfits:
        raise ConfigError(_describe_misfit(start, blank.cfg, misfits))

    values = dict(start.values)
    added = own.keys() - values.keys()
    # Nothing but the transformer can be missing, because all else has a place in every student.
    values |= {name: torch.zeros(own[name].shape) for name in added if name.startswith(_TOKEN_GAIN)}

    count = sum(value.numel() for value in start.values.values())
    lines = [f"init: {count / 1e6:.2f} M weights in {len(start.values)} tensors come from {start.folder}"]
    if added:
        elements = sum(own[name].numel() for name in added)
        lines.append(f"  {elements / 1e6:.2f} M in {len(added)} tensors are new, and add nothing to it at first")
    return StartWeights(
        weights.values | values,
        weights.lr_scales | dict.fromkeys(start.values, scale),
        (*weights.lines, *lines),
    )


def freeze_parts(weights: StartWeights, blank: Student, parts: Sequence[str]) -> StartWeights:
    """`weights` with a learning rate of 0 for some parts of the student. Raises ConfigError for one that it lacks."""
    frozen = dict[str, float]()
    for part in parts:
        names = [name for name in blank.state_dict() if name.startswith(PARTS[part])]
        if not names:
            raise ConfigError(f"freeze: the student has no {part}; leave it out of freeze")
        frozen |= dict.fromkeys(names, 0.0)

    lines = [f"frozen: {', '.join(parts)}, {len(frozen)} tensors"] if frozen else []
    return replace(weights, lr_scales=weights.lr_scales | frozen, lines=(*weights.lines, *lines))


def _describe_misfit(start: InitialStudent, cfg: StudentConfig, misfits: list[str]) -> str:
    start_settings, settings = schema.to_plain(start.cfg), schema.to_plain(cfg)
    # A transformer may be added, but not left out.
    keys = [
        f"student.{key}={_format_value(value)}"
        for key, value in start_settings.items()
        if value != settings[key] and (key != "transformer" or start.has_transformer)
    ]
    return (
        f"init: {len(misfits)} tensors of {start.folder}, among them {misfits[0]}, have no place in this student; give "
        f"it the same form:  {' '.join(keys)}"
    )


def _format_value(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else shlex.quote(json.dumps(value, separators=(",", ":")))
