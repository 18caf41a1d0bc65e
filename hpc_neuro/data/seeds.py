"""Seed files of Vaa3D: where neurons begin.

.marker   one point a line, `x, y, z, radius, shape, name, ...`, counted from 1
.apo      one point a line, `number, order, name, comment, z, x, y, ...`, counted from 0
"""

from __future__ import annotations

import math
from pathlib import Path

from hpc_neuro.core.geometry import Point
from hpc_neuro.core.schema import InputError

SUFFIXES = (".marker", ".apo")
"""Endings of seed files."""
_COLUMNS = {".marker": (2, 1, 0), ".apo": (4, 6, 5)}
"""Columns of z, y and x."""
_FIRST = {".marker": 1.0, ".apo": 0.0}
"""Coordinate of the first voxel."""


def read_seeds(path: Path) -> tuple[Point, ...]:
    """The points of a seed file in its order, z y x in voxels.

    Raises InputError for a file that cannot be read, another ending, a line without numbers, and a file without points.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is no seed file; expected a file of Vaa3D, {' or '.join(SUFFIXES)}")
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give the path of a seed file") from None

    points = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            points.append(_read_point(path, number, line, suffix))
    if not points:
        raise InputError(f"{path} holds no point; save it again with a marker at each neuron's root")
    return tuple(points)


def find_seed_file(image: Path, stem: str) -> Path | None:
    """The seed file beside an image: of its stem, or of its whole name as Vaa3D writes it. None without one."""
    for name in (stem, image.name):
        for suffix in SUFFIXES:
            path = image.parent / f"{name}{suffix}"
            if path.is_file():
                return path
    return None


def _read_point(path: Path, number: int, line: str, suffix: str) -> Point:
    words = line.split(",")
    try:
        z, y, x = (float(words[column]) - _FIRST[suffix] for column in _COLUMNS[suffix])
    except (ValueError, IndexError):
        z = y = x = math.nan
    if not all(math.isfinite(value) for value in (z, y, x)):
        wanted = "x, y, z" if suffix == ".marker" else "number, order, name, comment, z, x, y"
        raise InputError(f"{path}, line {number}: {line.strip()!r} is no point; expected `{wanted}`")
    return z, y, x
