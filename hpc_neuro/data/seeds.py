"""Seed files of Vaa3D: where neurons begin.

.marker   one point a line, `x, y, z, radius, shape, name, ...`, counted from 1
.apo      one point a line, `number, order, name, comment, z, x, y, ...`, counted from 0
"""

from __future__ import annotations

import re
from pathlib import Path

from hpc_neuro.core import files, yaml_text
from hpc_neuro.core.geometry import Point
from hpc_neuro.core.schema import InputError

SUFFIXES = (".marker", ".apo")
"""Endings of seed files."""
_COLUMNS = {".marker": (2, 1, 0), ".apo": (4, 6, 5)}
"""Columns of z, y and x."""
_FIRST = {".marker": 1.0, ".apo": 0.0}
"""Coordinate of the first voxel."""
_WIDTHS = {".marker": 10, ".apo": 18}
"""Columns of the longest line."""
_MAX_BYTES = 16 << 20
"""Size of a seed file that is read."""


def read_seeds(path: Path) -> tuple[Point, ...]:
    """The points of a seed file in its order, z y x in voxels.

    Raises InputError for a file that cannot be read, another ending, a line without numbers, and a file without points.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is no seed file; expected a file of Vaa3D, {' or '.join(SUFFIXES)}")
    try:
        data = files.read_limited(path, _MAX_BYTES, "a seed file")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give the path of a seed file") from None

    points = []
    for number, line in enumerate(data.decode("utf-8-sig", errors="replace").splitlines(), start=1):
        if line.lstrip().startswith("#"):
            _check_header(path, number, line, suffix)
        elif line.strip():
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


def _check_header(path: Path, number: int, line: str, suffix: str) -> None:
    """Raise InputError for a comment that names columns in another order than the format has."""
    names = [word.strip().lower() for word in line.lstrip("# \t").split(",")]
    if all(names.count(axis) == 1 for axis in "zyx") and tuple(map(names.index, "zyx")) != _COLUMNS[suffix]:
        raise InputError(
            f"{path}, line {number}: the columns are {', '.join(names)[:60]}; put them in the order "
            f"`{_describe_columns(suffix)}`"
        )


def _read_point(path: Path, number: int, line: str, suffix: str) -> Point:
    words, columns = line.split(","), _COLUMNS[suffix]
    try:
        z, y, x = (yaml_text.parse_decimal(words[column]) - _FIRST[suffix] for column in columns)
    except (ValueError, IndexError):
        raise InputError(
            f"{path}, line {number}: {line.strip()[:60]!r} is no point; expected `{_describe_columns(suffix)}`"
        ) from None

    # `10,5, 20,5, 30,5` is x 10, y 5, z 20 by its columns.
    blanks = [word.startswith(" ") for word in words[min(columns) + 1 : max(columns) + 1]]
    is_mixed = suffix == ".marker" and any(blanks) and not all(blanks) and not re.search(r"\.\d", line)
    if len(words) > _WIDTHS[suffix] or is_mixed:
        raise InputError(
            f"{path}, line {number}: some commas of {line.strip()[:60]!r} may be decimal points or belong to a name; "
            f"write numbers with points, names without commas, and `{_describe_columns(suffix)}`"
        )
    return z, y, x


def _describe_columns(suffix: str) -> str:
    return "x, y, z" if suffix == ".marker" else "number, order, name, comment, z, x, y"
