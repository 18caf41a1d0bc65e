"""The tensors that pass between data, losses, models and training, with their shapes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpc_neuro.core.geometry import Box

# Import torch only for type checking: code that needs arrays alone stays fast to import.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
"""A numpy array of any shape and dtype; the docstring that uses it gives both."""

Contrast = Literal["range", "local"]
"""How brightness becomes [0, 1]: by the range of the whole volume (data/intensity.py), or above the local background
and relative to the level of the foreground (data/foreground.py)."""


@dataclass(frozen=True)
class Sample:
    """One training crop as read from disk. Z, Y, X in voxels."""

    volume: str
    """Id of the volume in the store."""
    box: Box
    """Where in the volume the crop lies."""
    image: Tensor
    """[1, Z, Y, X] float32, normalized by the volume's percentiles."""
    mask: Tensor
    """[1, Z, Y, X] uint8, 1 on neurite, UNLABELED where there is no label."""
    skeleton: Tensor
    """[1, Z, Y, X] uint8, 1 in a tube around the centerline."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """View -> [L, D, z, y, x] float16 on the token grid."""
    distilled: bool = False
    """Whether `features` holds the teacher's features of this crop, whose geometry must then not change."""


@dataclass(frozen=True)
class Batch:
    """B samples, stacked."""

    image: Tensor
    """[B, 1, Z, Y, X] float32."""
    mask: Tensor
    """[B, 1, Z, Y, X] uint8, UNLABELED where there is no label."""
    skeleton: Tensor
    """[B, 1, Z, Y, X] uint8."""
    features: dict[str, Tensor]
    """View -> [B, L, D, z, y, x]; zeros for samples that are not distilled, {} if none is."""
    distilled: Tensor
    """[B] bool."""
    index: Tensor
    """[B] int64, the global sample index."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`. Copies from pinned memory do not block the host."""
        # Every field, so that a new one cannot be forgotten here.
        return Batch(**{f.name: _move(getattr(self, f.name), device) for f in fields(self)})


@dataclass(frozen=True)
class StudentOutput:
    """The output of the student network."""

    logits: Tensor
    """[B, 1, Z, Y, X]."""
    features: dict[int, Tensor]
    """Block index -> token map [B, C, z, y, x]; {} unless requested."""


def copy_to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy values of the host to the device through pinned memory; from other memory the host waits for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True)
