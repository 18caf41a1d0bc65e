"""Mirrors and quarter turns of a volume, and what they mean for slices and for maps on the token grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from hpc_neuro.core.schema import ConfigError

VIEW_AXES = {"z": (0, 1, 2), "y": (1, 0, 2), "x": (2, 0, 1)}
"""View -> array axes of (slices, token rows, token columns)."""
_SWAPPED = {"z": "z", "y": "x", "x": "y"}


@dataclass(frozen=True)
class Orientation:
    """y and x exchanged when `swap`, then mirrored along the axes z, y, x whose `flips` are set."""

    swap: bool = False
    flips: tuple[bool, bool, bool] = (False, False, False)

    def then(self, other: Orientation) -> Orientation:
        """The orientation of doing this one first, `other` second."""
        z, y, x = self.flips
        mine = (z, x, y) if other.swap else (z, y, x)
        a, b, c = (m != o for m, o in zip(mine, other.flips, strict=True))
        return Orientation(self.swap != other.swap, (a, b, c))

    def apply(self, values: Tensor) -> Tensor:
        """[..., z, y, x] in this orientation; with `swap` the last two sizes change places."""
        values = values.transpose(-1, -2) if self.swap else values
        return values.flip([axis - 3 for axis in range(3) if self.flips[axis]])

    def source_slices(self, view: str) -> tuple[str, str]:
        """Which slices of the volume as it stands the turned volume's `view` consists of, and how they lie in it.

        -> (view, how): letters of `how`: t rows and columns exchanged, then r, c mirrored along rows, columns.
        """
        _, down, right = VIEW_AXES[view]
        how = "t" * (self.swap and view == "z") + "r" * self.flips[down] + "c" * self.flips[right]
        return _SWAPPED[view] if self.swap else view, how


IDENTITY = Orientation()
ORIENTATIONS = {
    "flip_z": Orientation(flips=(True, False, False)),
    "flip_y": Orientation(flips=(False, True, False)),
    "flip_x": Orientation(flips=(False, False, True)),
    "rot90": Orientation(True, (False, True, False)),  # as numpy.rot90 over the axes (y, x)
    "rot180": Orientation(False, (False, True, True)),
    "rot270": Orientation(True, (False, False, True)),
}


def parse_orientation(name: str) -> Orientation:
    """`flip_y`, `rot90`, or several joined by `+`, done from left to right. Raises ConfigError."""
    found = IDENTITY
    for word in name.split("+"):
        if word not in ORIENTATIONS:
            raise ConfigError(f"{name!r} is no orientation; want {', '.join(ORIENTATIONS)}, or several joined by +")
        found = found.then(ORIENTATIONS[word])
    return found


def parse_orientations(names: Iterable[str]) -> tuple[Orientation, ...]:
    """The volume as it stands, then the named orientations, each once."""
    return tuple(dict.fromkeys((IDENTITY, *map(parse_orientation, names))))


def slice_layouts(names: Iterable[str], view: str) -> list[str]:
    """The ways (`how` of `Orientation.slices`) in which slices of `view` are looked at; "" comes first."""
    seen = [o.source_slices(w) for o in parse_orientations(names) for w in VIEW_AXES]
    return sorted({how for held, how in seen if held == view}, key=lambda how: (len(how), how))


def apply_layout(values: Tensor, how: str) -> Tensor:
    """Slices [..., rows, columns] as they lie in the turned volume."""
    values = values.transpose(-1, -2) if "t" in how else values
    return values.flip([d for letter, d in (("r", -2), ("c", -1)) if letter in how])


def undo_layout(values: Tensor, how: str) -> Tensor:
    """The inverse of `laid`."""
    values = values.flip([d for letter, d in (("r", -2), ("c", -1)) if letter in how])
    return values.transpose(-1, -2) if "t" in how else values
