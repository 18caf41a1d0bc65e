"""What a metric is, and what it is computed from.

A metric is one number per volume. Its row, a `Metric`, stands in the file of its function, and
`hpc_neuro.metrics.list_metrics` lists all rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from hpc_neuro.core.constants import TOLERANCE_VOX
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array

T = TypeVar("T")
ToleranceUnit = Literal["vox", "um"]

MAX_VOXELS_IN_MEMORY = 1 << 30
"""Masks of larger volumes are compared block by block, so that memory does not grow with the volume."""


@dataclass(frozen=True)
class Metric:
    """One number per volume and method."""

    key: str
    """Name in metrics.json and metrics.csv."""
    title: str
    """Column heading, without the unit."""
    unit: str
    """Unit of the number; empty for shares and counts."""
    direction: Literal["higher", "lower", ""]
    """Which values are better; empty for a number that describes a tree and is compared with that of gold."""
    digits: int
    """Decimals that are printed."""
    definition: str
    """What is printed under the numbers."""
    compute: Callable[[Comparison], float]
    main: bool = False
    """Whether the metric stands in the report's first table."""

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title

    @property
    def describes_tree(self) -> bool:
        """Whether the number belongs to one tree alone, so that gold has it too."""
        return not self.direction

    def find_best(self, values: Sequence[float]) -> float | None:
        """The best of several values; None where none is better than another."""
        # Where all methods are equal, none of them stands out.
        if not self.direction or len(set(values)) < 2:
            return None
        return max(values) if self.direction == "higher" else min(values)

    def mark_best(self, values: Sequence[float]) -> list[bool]:
        """Whether each of several values is the best one. Values that are printed alike count as equal."""
        printed = [round(value, self.digits) for value in values]
        best = self.find_best(printed)
        return [value == best for value in printed]


@dataclass(frozen=True)
class Tolerance:
    """How near cable must lie to agree, as keys and texts name it."""

    value: float
    unit: ToleranceUnit = "vox"

    @property
    def unit_name(self) -> str:
        """`voxel` or `µm`."""
        return "voxel" if self.unit == "vox" else "µm"

    @property
    def text(self) -> str:
        """`4 voxels`, `1 voxel` or `2.5 µm`."""
        # Micrometers are written as a symbol, which has no plural.
        plural = "s" if self.unit == "vox" and self.value != 1 else ""
        return f"{self.value:g} {self.unit_name}{plural}"

    def key(self, name: str) -> str:
        """Key of a metric at this tolerance."""
        return tolerance_key(name, self.value, self.unit)


def tolerance_key(name: str, tolerance: float, unit: ToleranceUnit = "vox") -> str:
    """Name the key of a metric at a tolerance: `f1` at 4 voxels is `f1_4vox`."""
    return f"{name}_{tolerance:g}{unit}"


def read_tolerance(keys: Iterable[str]) -> float:
    """[voxel] the tolerance that the keys of one evaluation name: 4 for `f1_4vox`."""
    (value,) = {match[1] for key in keys if (match := re.fullmatch(r"f1_(.+)vox", key))}
    return float(value)


@dataclass(eq=False)
class Comparison:
    """The prediction and the gold standard of one volume: what every metric is computed from.

    Metrics that need the same intermediate result share it: `comparison.once(step)` runs `step(comparison)` at the
    first call and returns the same result afterwards.
    """

    predicted_mask: Callable[[Box], Array]
    """Box -> [Z, Y, X]; non-zero is foreground."""
    gold_mask: Callable[[Box], Array]
    """Box -> [Z, Y, X]; non-zero is foreground, 255 is unlabelled."""
    predicted_tree: Tree
    """In voxels; empty when nothing was traced."""
    gold_tree: Tree
    """In voxels."""
    shape: Shape
    voxel_size: VoxelSize
    root: tuple[float, float, float] | None = None
    """[voxel] z y x of the gold root; None: the first root of `gold_tree`."""
    tolerance_vox: float = TOLERANCE_VOX
    """[voxel] How near cable must lie to agree."""
    tolerance_um: float | None = None
    """[um] A second tolerance; None: no second one."""
    _results: dict[Callable[[Comparison], Any], Any] = field(default_factory=dict, repr=False)

    def once(self, step: Callable[[Comparison], T]) -> T:
        """Result of `step(self)`, computed at the first call."""
        # A step is a function, so it is its own key.
        if step not in self._results:
            self._results[step] = step(self)
        return cast(T, self._results[step])

    @property
    def fits_in_memory(self) -> bool:
        """Whether the masks are compared as whole arrays."""
        return math.prod(self.shape) <= MAX_VOXELS_IN_MEMORY

    @property
    def diagonal_vox(self) -> float:
        """[voxel] Diagonal of the volume: the distance that counts when there is no tree."""
        return measure_diagonal(self.shape, (1.0, 1.0, 1.0))


def measure_diagonal(shape: tuple[int, ...], voxel_size: VoxelSize) -> float:
    """Length of a volume's diagonal in um."""
    return math.dist((0, 0, 0), [n * s for n, s in zip(shape, voxel_size, strict=True)])


def divide(part: float, whole: float, empty: float) -> float:
    """part / whole, or `empty` when `whole` is 0."""
    return float(part / whole) if whole else empty


def harmonic_mean(a: float, b: float) -> float:
    """Harmonic mean of two shares; 0 when both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0
