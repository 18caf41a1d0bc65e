"""TeraFly and TeraStitcher volumes: tiles in `RES(YxXxZ)/Y/Y_X/Y_X_Z.tif`, placed by mdata.bin, else by their names.

Names hold tenths of a micrometer; mdata.bin (version 2) holds the place of every tile in voxels, the voxel size in
micrometers and the origin in millimeters.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.files import format_count
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.image_names import is_system_file
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import tiff, vaa3d
from hpc_neuro.data.formats.decompress import DecodedCache
from hpc_neuro.data.formats.volume import Array, Index, StoredArray, check_shape, translate_errors

_LEVEL_NAME = re.compile(r"RES\((\d+)x(\d+)x(\d+)\)$")
_TILE_SUFFIXES = (".tif", ".tiff", ".v3draw", ".raw")
_MAX_OPEN = 32
"""Tiles that are kept open."""


@dataclass(frozen=True)
class Tile:
    """One file of the volume; its path is None where the volume declares the tile as empty."""

    path: Path | None
    box: Box


@dataclass(frozen=True)
class _TilePlan:
    """Where the tiles of a level lie."""

    tiles: tuple[Tile, ...]
    voxel_size: tuple[float, float, float] | None = None
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Micrometers z y x."""


def matches(path: Path, head: bytes = b"") -> bool:
    """Whether the folder is a resolution level, or holds some."""
    return bool(_LEVEL_NAME.search(path.name)) or (path / "mdata.bin").is_file() or bool(_list_levels(path))


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """The finest level of a TeraFly folder, or the one that `dataset` names (`RES(512x512x64)`)."""
    folder = _choose_level(path, dataset)
    plan = _plan_from_metadata(folder) if (folder / "mdata.bin").is_file() else _plan_from_names(folder)

    # The shape is where the last tiles end; the folder's name states it as well.
    z, y, x = (max(t.box.stop[i] for t in plan.tiles) for i in range(3))
    declared = _LEVEL_NAME.search(folder.name)
    if declared and (y, x, z) != tuple(int(n) for n in declared.groups()):
        raise InputError(
            f"{folder} holds tiles for {y} x {x} x {z} voxels (y x z), not what its name says; it is incomplete"
        )

    # Channels and type are those of the first tile that is stored.
    first = next((t.path for t in plan.tiles if t.path is not None), None)
    if first is None:
        raise InputError(f"{folder} declares only empty tiles; it is incomplete, copy it again")
    sample = _open_tile(None, first)
    shape = check_shape(folder, (sample.shape[0], z, y, x))

    spacing, world = None, None
    if plan.voxel_size is not None:
        spacing, world = (math.nan, *plan.voxel_size), np.zeros((3, 5))
        world[:, 1:4], world[:, 4] = np.diag(plan.voxel_size), plan.origin
    notes = (f"{format_count(len(plan.tiles), 'tile')} in {folder.name}",)
    return StoredArray("TeraFly", shape, "CZYX", sample.dtype, _Mosaic(plan.tiles, sample), spacing, world, notes)


class _Mosaic:
    """Reads a box from the tiles that it meets; InputError where no tile covers a part of the box."""

    def __init__(self, tiles: Sequence[Tile], sample: StoredArray) -> None:
        self.tiles, self.sample = tiles, sample
        self.starts = np.array([t.box.start for t in tiles])
        self.stops = np.array([t.box.stop for t in tiles])
        self.get_tile = functools.lru_cache(_MAX_OPEN)(functools.partial(_open_tile, DecodedCache(tiff.CACHE_BYTES)))

    def __call__(self, index: Index) -> Array:
        # Tiles that meet the box, found for all tiles at once: a brain has thousands.
        channels = index[0]
        start, stop = np.array([s.start for s in index[1:]]), np.array([s.stop for s in index[1:]])
        box = Box(tuple(start), tuple(stop))
        out = np.zeros((channels.stop - channels.start, *box.shape), self.sample.dtype)

        # Tiles touch and do not overlap, so the covered voxels add up.
        covered = 0
        for i in np.flatnonzero(np.all((self.starts < stop) & (self.stops > start), axis=1)).tolist():
            tile = self.tiles[i]
            part = tile.box.clip(box)
            covered += part.size
            if tile.path is not None:
                voxels = self._read_tile(tile.path, tile.box, part, channels)
                out[(slice(None), *part.relative_to(box.start).slices)] = voxels

        if covered != box.size:
            raise InputError(f"tiles cover {covered} of {box.size} voxels of a box at {box.start}; tiles are missing")
        return out

    def _read_tile(self, path: Path, own: Box, part: Box, channels: slice) -> Array:
        """The voxels of `part` from the tile that fills `own`. Raises InputError for another shape or type."""
        with translate_errors(path, "a TeraFly tile"):
            array = self.get_tile(path)
            shape = (self.sample.shape[0], *own.shape)
            if array.shape != shape or array.dtype != self.sample.dtype:
                raise InputError(
                    f"{path} is {array.shape} {array.dtype}, where {shape} {self.sample.dtype} (c z y x) is "
                    "wanted; the tile is damaged, copy it again"
                )

            return array.read((channels, *part.relative_to(own.start).slices))


def _open_tile(cache: DecodedCache | None, path: Path) -> StoredArray:
    """A tile as c z y x, whatever its format keeps."""
    with translate_errors(path, "a TeraFly tile"):
        if path.suffix.lower() in (".v3draw", ".raw"):
            return vaa3d.open_raw(path, None)
        array = tiff.open_source(path, None, cache)

    if array.axes not in ("YX", "ZYX", "CZYX"):
        raise InputError(f"{path} has the axes {array.axes}; a tile holds one gray stack, export the volume again")
    # A single slice or channel is stored without that axis.
    missing = 4 - len(array.shape)

    def read(index: Index) -> Array:
        part: Array = array.read(index[missing:])
        return part[(np.newaxis,) * missing]

    return StoredArray(array.format, (1,) * missing + array.shape, "CZYX", array.dtype, read)


def _choose_level(path: Path, dataset: str | None) -> Path:
    """The folder of the level `dataset`, or of the finest; `path` itself where it is a level."""
    levels = _list_levels(path)
    if not levels:
        return path

    names = [p.name for p in levels]
    if dataset is not None and dataset not in names:
        raise InputError(f"{path} has no level {dataset!r}; it has {', '.join(names)}")
    return levels[names.index(dataset)] if dataset else levels[-1]


def _list_levels(path: Path) -> list[Path]:
    """Resolution folders, coarse to fine."""
    # The level with the most voxels is the finest.
    sizes = {}
    for folder in path.iterdir():
        match = _LEVEL_NAME.search(folder.name)
        if match and folder.is_dir() and not is_system_file(folder):
            sizes[folder] = math.prod(int(n) for n in match.groups())

    return sorted(sizes, key=lambda folder: (sizes[folder], folder))


class _BinaryReader:
    """Reads little-endian numbers and texts of mdata.bin, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def numbers(self, form: str) -> tuple[float, ...]:
        """The next numbers, by their `struct` format. Raises InputError at the end of the file."""
        size = struct.calcsize("<" + form)
        if self.at + size > len(self.data):
            raise InputError(f"{self.path} ends early; it is damaged, remove it to place tiles by their names")
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += size
        return values

    def integers(self, form: str) -> list[int]:
        """The next numbers as ints."""
        return [int(n) for n in self.numbers(form)]

    def text(self) -> str:
        """The next text: its length in 2 bytes, then that many characters."""
        (size,) = self.integers("H")
        raw = self.data[self.at : self.at + size]
        self.at += size
        return raw.rstrip(b"\0").decode("utf-8", "replace")


def _plan_from_metadata(folder: Path) -> _TilePlan:
    """Tiles as mdata.bin version 2 places them."""
    reader = _BinaryReader(folder / "mdata.bin")
    if reader.numbers("f") != (2.0,):
        raise InputError(f"{reader.path} is not of version 2; remove it to place tiles by their names")

    # Reference axes and their voxel sizes, then voxel size and origin along y x z, then the size of the volume.
    reader.numbers("3i3f")
    vy, vx, vz, oy, ox, oz = reader.numbers("6f")
    reader.numbers("3I")

    # Places along y and x, each with a column of tiles along z.
    rows, columns = reader.integers("2H")
    tiles = [tile for _ in range(rows * columns) for tile in _read_tile_column(reader, folder)]

    missing = [t.path for t in tiles if t.path is not None and not t.path.is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of its {len(tiles)} tiles, the first is {missing[0]}; copy it again"
        )
    if not tiles:
        raise InputError(f"{reader.path} places no tile; it is damaged, remove it to place tiles by their names")

    # A sign tells in which direction the stage moved.
    size = (abs(vz), abs(vy), abs(vx))
    return _TilePlan(tuple(tiles), size if min(size) > 0 else None, (oz * 1000, oy * 1000, ox * 1000))


def _read_tile_column(reader: _BinaryReader, folder: Path) -> list[Tile]:
    """The tiles of one place y x, along z; a tile without a file name is empty."""
    # Height, width, depth, tiles along z, channels; then the place y, x of the column in voxels.
    height, width, _, count, _ = reader.integers("5I")
    y, x = reader.integers("2i")
    name = reader.text()

    tiles = []
    for _ in range(count):
        file = reader.text()
        depth, z = reader.integers("Ii")
        if min(height, width, depth) <= 0 or min(y, x, z) < 0:
            raise InputError(f"{reader.path} places a tile of {depth} x {height} x {width}; it is damaged")
        tiles.append(Tile(folder / name / file if file else None, Box.at((z, y, x), (depth, height, width))))

    # Bytes per channel.
    reader.numbers("I")
    return tiles


def _plan_from_names(folder: Path) -> _TilePlan:
    """Tiles in the order of the numbers in their names; each touches the next, as TeraFly writes them."""
    grid = _list_named_tiles(folder)
    if not grid:
        raise InputError(f"{folder} holds no tiles in the form Y/Y_X/Y_X_Z.tif; give a folder that TeraConverter wrote")

    # Every z y x of the grid must have its tile.
    places = [sorted({key[i] for key in grid}) for i in range(3)]
    for key in itertools.product(*places):
        if key not in grid:
            raise InputError(f"{folder} lacks the tile at z y x = {key} (tenths of um); copy it again")

    # The tiles along one edge give the sizes along that axis, and so where each tile begins.
    sizes = [_measure_along(grid, places, axis) for axis in range(3)]
    begins: list[NDArray[np.int64]] = [np.cumsum([0, *s[:-1]]) for s in sizes]
    tiles = []
    for key, file in grid.items():
        order = [places[i].index(key[i]) for i in range(3)]
        start: Shape = (int(begins[0][order[0]]), int(begins[1][order[1]]), int(begins[2][order[2]]))
        tiles.append(Tile(file, Box.at(start, (sizes[0][order[0]], sizes[1][order[1]], sizes[2][order[2]]))))

    # Two neighbors along an axis give its voxel size; with one tile along it, it stays unknown.
    steps = [(p[1] - p[0]) / 10 / s[0] if len(p) > 1 else 0.0 for p, s in zip(places, sizes, strict=True)]
    voxel_size = (steps[0], steps[1], steps[2])
    return _TilePlan(tuple(tiles), voxel_size if min(voxel_size) > 0 else None)


def _list_named_tiles(folder: Path) -> dict[tuple[int, ...], Path]:
    """The tiles of a level by the numbers z y x in their names."""
    # The layout is Y/Y_X/Y_X_Z.tif: the last number of each name is the one that is new.
    grid: dict[tuple[int, ...], Path] = {}
    for row in _by_last_number([p for p in folder.iterdir() if p.is_dir() and not is_system_file(p)]).values():
        for leaf in _by_last_number([p for p in row.iterdir() if p.is_dir() and not is_system_file(p)]).values():
            y, x = _parse_numbers(leaf)[-2:]
            files = [p for p in leaf.iterdir() if p.suffix.lower() in _TILE_SUFFIXES and not is_system_file(p)]
            for z, file in _by_last_number(files).items():
                grid[z, y, x] = file

    return grid


def _measure_along(grid: dict[tuple[int, ...], Path], places: list[list[int]], axis: int) -> list[int]:
    """Voxels along one axis of the tiles that lie on the first edge of the grid along it."""
    corner = tuple(p[0] for p in places)
    keys = [(*corner[:axis], place, *corner[axis + 1 :]) for place in places[axis]]
    return [_open_tile(None, grid[key]).shape[1 + axis] for key in keys]


def _by_last_number(paths: Sequence[Path]) -> dict[int, Path]:
    """Paths by the last number in their names. Names without a number and hidden files are no part of the volume.

    macOS writes a hidden `._NAME` beside each file on disks of other systems.
    """
    return {_parse_numbers(p)[-1]: p for p in paths if _parse_numbers(p) and not p.name.startswith(".")}


def _parse_numbers(path: Path) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", path.stem if path.is_file() else path.name)]
