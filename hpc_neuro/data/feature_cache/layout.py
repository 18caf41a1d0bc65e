"""Names and places of what a feature cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpc_neuro.data.orientation import PLANE
from hpc_neuro.schema import ConfigError

MANIFEST = "manifest.json"
CODING = "coding.npz"
USES = "uses"
__all__ = ["CODING", "MANIFEST", "PLANE", "USES", "CacheMismatch", "Unit"]


class CacheMismatch(ConfigError):
    """The cache holds other features than the config asks for."""


@dataclass(frozen=True)
class Unit:
    """One shard: slices `first`, `first + stride`, ... of one view of one volume, `count` of them."""

    volume: str
    view: str
    first: int  # [voxel] index of the first slice
    stride: int  # [voxel] between slices; a slice stands for the `stride` voxels around it
    count: int
    rows: int  # token rows of a slice
    columns: int
    cell: tuple[float, float]  # [voxel] height and width of one token
    how: str = ""  # how the teacher saw the slices (orientation.laid); kept as the volume stands

    @property
    def name(self) -> str:
        """File name inside the cache folder."""
        return f"{self.volume}.{self.view}{'-' + self.how if self.how else ''}.{self.first:06d}.h5"

    @property
    def tokens(self) -> int:
        """Tokens per layer."""
        return self.count * self.rows * self.columns

    @staticmethod
    def read(entry: Mapping[str, Any]) -> Unit:
        """A unit from its entry in the manifest."""
        return Unit(**{**entry, "cell": tuple(entry["cell"])})
