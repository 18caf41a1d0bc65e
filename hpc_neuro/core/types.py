"""What flows between the parts: tensors with their shapes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_neuro.core.geometry import Box

if TYPE_CHECKING:  # who only names an array does not wait for torch
    import torch
    from torch import Tensor

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
"""A numpy array of any shape and dtype; the docstring that uses it gives both."""


@dataclass(frozen=True)
class Sample:
    """One training crop as read from disk. Z, Y, X in voxels."""

    volume: str
    box: Box
    image: Tensor  # [1, Z, Y, X] float32, normalised by the volume's percentiles
    mask: Tensor  # [1, Z, Y, X] uint8, 1 on neurite, 255 where unlabelled
    skeleton: Tensor  # [1, Z, Y, X] uint8, tubed centreline
    features: dict[str, Tensor] = field(default_factory=dict)  # view -> [L, D, z, y, x] float16 on the token grid
    distilled: bool = False  # features are there, of the crop as it is here; its geometry stays


@dataclass(frozen=True)
class Batch:
    """B samples stacked."""

    image: Tensor  # [B, 1, Z, Y, X] float32
    mask: Tensor  # [B, 1, Z, Y, X] uint8, 255 where unlabelled
    skeleton: Tensor  # [B, 1, Z, Y, X] uint8
    features: dict[str, Tensor]  # view -> [B, L, D, z, y, x]; zeros for samples that are not distilled; {} when none is
    distilled: Tensor  # [B] bool
    index: Tensor  # [B] int64, the global sample index

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies do not block the host when its memory is pinned."""
        return Batch(**{f.name: _to(getattr(self, f.name), device) for f in fields(self)})


@dataclass(frozen=True)
class StudentOutput:
    """What the student gives."""

    logits: Tensor  # [B, 1, Z, Y, X]
    features: dict[int, Tensor]  # block index -> token map [B, C, z, y, x]; {} unless asked for


def copy_to_device(values: Tensor, device: torch.device) -> Tensor:
    """The host's numbers on the device, out of pinned memory: for any other the host waits until the device is idle."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value.to(device, non_blocking=True)
