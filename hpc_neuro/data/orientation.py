"""Mirrors and quarter turns of a volume, and what they do to its slices and to maps on the token grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_neuro.core.schema import ConfigError

# Import torch only for type checking: configs name orientations and stay fast to import.
if TYPE_CHECKING:
    from torch import Tensor

VIEW_AXES = {"z": (0, 1, 2), "y": (1, 0, 2), "x": (2, 0, 1)}
"""View -> array axes of (slices, token rows, token columns)."""

_SWAPPED_VIEW = {"z": "z", "y": "x", "x": "y"}


@dataclass(frozen=True)
class Orientation:
    """y and x exchanged when `swap` is set, then mirrored along the axes z, y, x whose `flips` are set."""

    swap: bool = False
    flips: tuple[bool, bool, bool] = (False, False, False)

    def then(self, other: Orientation) -> Orientation:
        """The orientation that applies this one first and `other` second."""
        # The second orientation exchanges the axes that the first one has flipped.
        z, y, x = self.flips
        own_flips = (z, x, y) if other.swap else (z, y, x)
        z, y, x = (a != b for a, b in zip(own_flips, other.flips, strict=True))
        return Orientation(self.swap != other.swap, (z, y, x))

    def apply(self, values: Tensor) -> Tensor:
        """[..., z, y, x] -> the same values in this orientation; `swap` exchanges the last two sizes."""
        # Counting from the end leaves channel and batch dimensions alone.
        values = values.transpose(-1, -2) if self.swap else values
        return values.flip([axis - 3 for axis in range(3) if self.flips[axis]])

    def source_slices(self, view: str) -> tuple[str, str]:
        """Which slices of the original volume make up `view` of the oriented volume, and their layout in it.

        -> (view, layout). The layout is a text of letters: `t` exchanges rows and columns, then `r` mirrors along the
        rows and `c` along the columns.
        """
        # Only z slices are transposed by a swap; y and x slices change their view instead.
        _, row_axis, column_axis = VIEW_AXES[view]
        layout = "t" * (self.swap and view == "z") + "r" * self.flips[row_axis] + "c" * self.flips[column_axis]
        return _SWAPPED_VIEW[view] if self.swap else view, layout


IDENTITY = Orientation()
"""The volume as it is stored."""

ORIENTATIONS = {
    "flip_z": Orientation(flips=(True, False, False)),
    "flip_y": Orientation(flips=(False, True, False)),
    "flip_x": Orientation(flips=(False, False, True)),
    # The turns are those of numpy.rot90 over the axes (y, x).
    "rot90": Orientation(True, (False, True, False)),
    "rot180": Orientation(False, (False, True, True)),
    "rot270": Orientation(True, (False, False, True)),
}
"""Name in a config -> orientation."""


def parse_orientation(name: str) -> Orientation:
    """Read `flip_y`, `rot90`, or several names joined by `+`, applied from left to right. Raises ConfigError."""
    orientation = IDENTITY

    for word in name.split("+"):
        if word not in ORIENTATIONS:
            raise ConfigError(f"{name!r} is no orientation; want {', '.join(ORIENTATIONS)}, or several joined by +")
        orientation = orientation.then(ORIENTATIONS[word])

    return orientation


def parse_orientations(names: Iterable[str]) -> tuple[Orientation, ...]:
    """The identity and the named orientations, each once."""
    return tuple(dict.fromkeys((IDENTITY, *map(parse_orientation, names))))


def slice_layouts(names: Iterable[str], view: str) -> list[str]:
    """The layouts (see `Orientation.source_slices`) in which the named orientations need slices of `view`.

    "" comes first.
    """
    # A view of the oriented volume may need slices of another view of the stored one.
    sources = [o.source_slices(oriented_view) for o in parse_orientations(names) for oriented_view in VIEW_AXES]
    layouts = {layout for source_view, layout in sources if source_view == view}
    return sorted(layouts, key=lambda layout: (len(layout), layout))


def apply_layout(values: Tensor, layout: str) -> Tensor:
    """Lay out slices [..., rows, columns] of the original volume as the oriented volume has them."""
    values = values.transpose(-1, -2) if "t" in layout else values
    return values.flip(_flipped_dimensions(layout))


def undo_layout(values: Tensor, layout: str) -> Tensor:
    """The inverse of `apply_layout`."""
    # The steps of `apply_layout` in reverse; flips commute with each other.
    values = values.flip(_flipped_dimensions(layout))
    return values.transpose(-1, -2) if "t" in layout else values


def _flipped_dimensions(layout: str) -> list[int]:
    return [dimension for letter, dimension in (("r", -2), ("c", -1)) if letter in layout]
