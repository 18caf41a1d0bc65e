"""Configuration of the distillation loss. The module that it builds is `losses.distill.Distiller`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hpc_neuro.core.schema import ConfigError, config
from hpc_neuro.core.types import Array

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_neuro.losses.distill import Distiller, TubeSum

View = Literal["z", "y", "x"]
"""Axis that the slices of a teacher's view are orthogonal to."""


@config
class Distill:
    """Distill a frozen 2D teacher's cached features into the student's tokens, along tubes (losses/distill.py)."""

    axes: Literal["none", "straight", "deformable"] = "deformable"
    """What is compared: single tokens, straight tubes along z, y and x, or tubes that bend with the neurite."""
    views: tuple[View, ...] = ("z", "y", "x")
    """Teacher views (slices orthogonal to this axis) to learn from; the cache must hold them."""
    layers: tuple[tuple[int, int], ...] = ((-1, -1),)
    """Pairs of student block and teacher layer; negative: counted from the last block and the cache's last layer."""
    taps: int = Field(default=5, ge=3)
    """[token] Taps K of a tube, odd."""
    window: Literal["triangular", "uniform"] = "triangular"
    """Weight of the taps of a tube, normalized to a sum of 1."""
    extent: float = Field(default=1.0, gt=0)
    """[token] Largest sideways bend of a tube per step."""
    smoothness: float = Field(default=0.01, ge=0)
    """Penalty on the squared change of direction from one step of a tube to the next."""
    floor: float = Field(default=0.02, ge=0, le=1)
    """Weight of a token without any neurite, beside 1 of a token with some."""
    cosine: float = Field(default=0.9, ge=0, le=1)
    """Share of the cosine distance in the loss; the rest is smooth L1."""
    weight: float = Field(default=5.0, ge=0)
    """Factor of this loss in the total. Most tokens have no neurite and weigh `floor`, hence more than 1."""

    def __post_init__(self) -> None:
        if self.taps % 2 == 0:
            raise ValueError(f"taps is {self.taps}; a tube has its token in the middle, so it must be odd")

        if not self.views or len(set(self.views)) != len(self.views):
            raise ValueError(f"views is {list(self.views)}; name one to three of z, y, x, each once")

        if not self.layers or len(set(self.layers)) != len(self.layers):
            pairs = [list(pair) for pair in self.layers]
            raise ValueError(f"layers is {pairs}; give [student block, teacher layer] pairs, each once")

    def build(
        self,
        *,
        student_dim: int,
        student_depth: int,
        teacher_layers: Sequence[int],
        mean: Mapping[str, Array | Tensor],
        std: Mapping[str, Array | Tensor],
        tube_sum: TubeSum,
    ) -> Distiller:
        """Build the trainable module for a student and a feature cache.

        student_dim: channels C of the student's tokens; student_depth: its number of blocks; teacher_layers: the layers
        in the cache, in its order; mean, std: view -> [L, D] of the cache; tube_sum: `models.tubular.tube_sum`.
        Raises ConfigError for a view, layer or block that does not exist.
        """
        # Only building needs torch, and a config is read without it.
        from hpc_neuro.losses.distill import Distiller

        # All faults are reported together, so that one correction is enough.
        faults = [
            f"distill.views: the cache holds the views {sorted(mean)}, not {v!r}; drop it or run precompute with it"
            for v in self.views
            if v not in mean or v not in std
        ]
        faults += self._check_layers(student_depth, teacher_layers)
        if faults:
            raise ConfigError("\n".join(faults))

        # Negative numbers end here: the module counts from the first block and the first row.
        pairs = [(block % student_depth, _index_of_layer(layer, teacher_layers)) for block, layer in self.layers]
        return Distiller(self, student_dim, pairs, {v: (mean[v], std[v]) for v in self.views}, tube_sum)

    def _check_layers(self, student_depth: int, teacher_layers: Sequence[int]) -> list[str]:
        """Faults of `layers` for this student and cache."""
        faults = []
        for block, layer in self.layers:
            if not -student_depth <= block < student_depth:
                faults.append(f"distill.layers: the student has blocks 0 to {student_depth - 1}, not {block}")

            if layer not in teacher_layers and not -len(teacher_layers) <= layer < 0:
                faults.append(
                    f"distill.layers: the cache holds layers {list(teacher_layers)}, not {layer}; precompute it"
                )
        return faults


def _index_of_layer(layer: int, teacher_layers: Sequence[int]) -> int:
    """Row of the cache that holds a layer; negative layers count from the cache's last."""
    return layer % len(teacher_layers) if layer < 0 else list(teacher_layers).index(layer)
