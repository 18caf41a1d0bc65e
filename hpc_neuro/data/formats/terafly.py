"""TeraFly and TeraStitcher volumes: tiles in `RES(YxXxZ)/Y/Y_X/Y_X_Z.tif`, placed by mdata.bin, else by their names.

Names hold tenths of a micrometre; mdata.bin (version 2) holds the place of every tile in voxels, the voxel size in
micrometres and the origin in millimetres.
"""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import tiff, vaa3d
from hpc_neuro.data.formats.volume import Array, Index, StoredArray, check_shape, translate_errors

_RES = re.compile(r"RES\((\d+)x(\d+)x(\d+)\)$")
_OPEN = 32  # tiles kept open; they share what one file may keep decoded
_TILES = (".tif", ".tiff", ".v3draw", ".raw")


@dataclass(frozen=True)
class Tile:
    """One file of the volume; None for the path of a tile that the volume declares as empty."""

    path: Path | None
    box: Box


@dataclass(frozen=True)
class _Plan:
    tiles: tuple[Tile, ...]
    voxel_size: tuple[float, float, float] | None = None
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)  # micrometres z y x


def matches(path: Path, head: bytes = b"") -> bool:
    """Whether the folder is a resolution level, or holds some."""
    return bool(_RES.search(path.name)) or (path / "mdata.bin").is_file() or bool(_levels(path))


def open_source(path: Path, dataset: str | None) -> StoredArray:
    """The finest level of a TeraFly folder, or the one that `dataset` names (`RES(512x512x64)`)."""
    levels = _levels(path)
    if levels:
        names = [p.name for p in levels]
        if dataset is not None and dataset not in names:
            raise InputError(f"{path} has no level {dataset!r}; it has {', '.join(names)}")
        folder = levels[names.index(dataset)] if dataset else levels[-1]
    else:
        folder = path
    plan = _from_metadata(folder) if (folder / "mdata.bin").is_file() else _from_names(folder)
    z, y, x = (max(t.box.stop[i] for t in plan.tiles) for i in range(3))
    declared = _RES.search(folder.name)
    if declared and (y, x, z) != tuple(int(n) for n in declared.groups()):
        raise InputError(
            f"{folder} holds tiles for {y} x {x} x {z} voxels (y x z), not what its name says; it is incomplete"
        )
    first = next((t for t in plan.tiles if t.path is not None), None)
    if first is None or first.path is None:
        raise InputError(f"{folder} declares only empty tiles; it is incomplete, copy it again")
    sample = _open(first.path)
    shape = check_shape(folder, (sample.shape[0], z, y, x))
    spacing = None if plan.voxel_size is None else (math.nan, *plan.voxel_size)
    world = None
    if plan.voxel_size is not None:
        world = np.zeros((3, 5))
        world[:, 1:4], world[:, 4] = np.diag(plan.voxel_size), plan.origin
    notes = (f"{len(plan.tiles)} tiles in {folder.name}",)
    return StoredArray("TeraFly", shape, "CZYX", sample.dtype, _Mosaic(plan.tiles, sample), spacing, world, notes)


class _Mosaic:
    """Reads a box from the tiles it meets; what no tile covers would be invented, so it is refused."""

    def __init__(self, tiles: Sequence[Tile], sample: StoredArray) -> None:
        self.tiles, self.sample = tiles, sample
        self.starts = np.array([t.box.start for t in tiles])
        self.stops = np.array([t.box.stop for t in tiles])
        self.opened = functools.lru_cache(_OPEN)(_open)

    def __call__(self, index: Index) -> Array:
        channels = index[0]
        start, stop = np.array([s.start for s in index[1:]]), np.array([s.stop for s in index[1:]])
        wanted = Box(tuple(start), tuple(stop))
        out = np.zeros((channels.stop - channels.start, *wanted.shape), self.sample.dtype)
        covered = 0
        for i in np.flatnonzero(np.all((self.starts < stop) & (self.stops > start), axis=1)).tolist():
            tile = self.tiles[i]
            part = tile.box.clip(wanted)
            covered += part.size
            if tile.path is None:
                continue
            with translate_errors(tile.path, "a TeraFly tile"):
                source = self.opened(tile.path)
                shape = (self.sample.shape[0], *tile.box.shape)
                if source.shape != shape or source.dtype != self.sample.dtype:
                    raise InputError(
                        f"{tile.path} is {source.shape} {source.dtype}, where {shape} {self.sample.dtype} (c z y x) is "
                        "wanted; the tile is damaged, copy it again"
                    )
                inside = part.relative_to(tile.box.start)
                out[(slice(None), *part.relative_to(wanted.start).slices)] = source.read((channels, *inside.slices))
        if covered != wanted.size:
            raise InputError(
                f"tiles cover {covered} of {wanted.size} voxels of a box at {wanted.start}; tiles are missing"
            )
        return out


def _open(path: Path) -> StoredArray:
    """A tile as c z y x, whatever its format keeps."""
    with translate_errors(path, "a TeraFly tile"):
        if path.suffix.lower() in (".v3draw", ".raw"):
            return vaa3d.open_raw(path, None)
        found = tiff.open_source(path, None, tiff.CACHE_BYTES // _OPEN)
    if found.axes not in ("YX", "ZYX", "CZYX"):
        raise InputError(f"{path} has the axes {found.axes}; a tile holds one grey stack, export the volume again")
    missing = 4 - len(found.shape)

    def read(index: Index) -> Array:
        part: Array = found.read(index[missing:])
        return part[(np.newaxis,) * missing]

    return StoredArray(found.format, (1,) * missing + found.shape, "CZYX", found.dtype, read)


def _levels(path: Path) -> list[Path]:
    """Resolution folders, coarse to fine."""
    found = [
        (math.prod(int(n) for n in m.groups()), p) for p in path.iterdir() if (m := _RES.search(p.name)) and p.is_dir()
    ]
    return [p for _, p in sorted(found)]


def _from_metadata(folder: Path) -> _Plan:
    """Tiles as mdata.bin version 2 places them."""
    data = (folder / "mdata.bin").read_bytes()
    at = 0

    def take(form: str) -> tuple[float, ...]:
        nonlocal at
        size = struct.calcsize("<" + form)
        if at + size > len(data):
            raise InputError(
                f"{folder / 'mdata.bin'} ends early; it is damaged, remove it to place tiles by their names"
            )
        values = struct.unpack_from("<" + form, data, at)
        at += size
        return values

    def text() -> str:
        nonlocal at
        (size,) = take("H")
        raw = data[at : at + int(size)]
        at += int(size)
        return raw.rstrip(b"\0").decode("utf-8", "replace")

    if take("f") != (2.0,):
        raise InputError(f"{folder / 'mdata.bin'} is not of version 2; remove it to place tiles by their names")
    take("3i3f")
    vy, vx, vz, oy, ox, oz = take("6f")
    take("3I")
    rows, columns = (int(n) for n in take("2H"))
    tiles: list[Tile] = []
    for _ in range(rows * columns):
        height, width, _, count, _ = (int(n) for n in take("5I"))
        y, x = (int(n) for n in take("2i"))
        name = text()
        for _ in range(count):
            file = text()
            depth, z = (int(n) for n in take("Ii"))
            if min(height, width, depth) <= 0 or min(y, x, z) < 0:
                raise InputError(f"{folder / 'mdata.bin'} places a tile of {depth} x {height} x {width}; it is damaged")
            tiles.append(Tile(folder / name / file if file else None, Box.at((z, y, x), (depth, height, width))))
        take("I")
    if missing := [t.path for t in tiles if t.path is not None and not t.path.is_file()]:
        raise InputError(
            f"{folder} lacks {len(missing)} of its {len(tiles)} tiles, the first is {missing[0]}; copy it again"
        )
    if not tiles:
        raise InputError(
            f"{folder / 'mdata.bin'} places no tile; it is damaged, remove it to place tiles by their names"
        )
    size = (abs(vz), abs(vy), abs(vx))
    return _Plan(tuple(tiles), size if min(size) > 0 else None, (oz * 1000, oy * 1000, ox * 1000))


def _from_names(folder: Path) -> _Plan:
    """Tiles in the order of the numbers in their names; each touches the next, as TeraFly writes them."""
    rows = _numbered([p for p in folder.iterdir() if p.is_dir()], -1)
    grid: dict[tuple[int, int, int], Path] = {}
    for row in rows.values():
        for leaf in _numbered([p for p in row.iterdir() if p.is_dir()], -1).values():
            y, x = _numbers(leaf)[-2:]
            for z, file in _numbered([p for p in leaf.iterdir() if p.suffix.lower() in _TILES], -1).items():
                grid[z, y, x] = file
    if not grid:
        raise InputError(f"{folder} holds no tiles in the form Y/Y_X/Y_X_Z.tif; give a folder that TeraConverter wrote")
    places = [sorted({key[i] for key in grid}) for i in range(3)]
    if len(grid) != math.prod(len(p) for p in places):
        lost = next((z, y, x) for z in places[0] for y in places[1] for x in places[2] if (z, y, x) not in grid)
        raise InputError(f"{folder} lacks the tile at z y x = {lost} (tenths of um); copy it again")
    corner = tuple(p[0] for p in places)
    sizes: list[list[int]] = []
    for i, along in enumerate(places):
        keys = [(*corner[:i], value, *corner[i + 1 :]) for value in along]
        sizes.append([_open(grid[key[0], key[1], key[2]]).shape[1 + i] for key in keys])
    begins: list[NDArray[np.int64]] = [np.cumsum([0, *s[:-1]]) for s in sizes]
    tiles = []
    for key, file in grid.items():
        order = [places[i].index(key[i]) for i in range(3)]
        start: Shape = (int(begins[0][order[0]]), int(begins[1][order[1]]), int(begins[2][order[2]]))
        tiles.append(Tile(file, Box.at(start, (sizes[0][order[0]], sizes[1][order[1]], sizes[2][order[2]]))))
    steps = [(p[1] - p[0]) / 10 / s[0] if len(p) > 1 else 0.0 for p, s in zip(places, sizes, strict=True)]
    size = (steps[0], steps[1], steps[2])
    return _Plan(tuple(tiles), size if min(size) > 0 else None)


def _numbered(paths: Sequence[Path], which: int) -> dict[int, Path]:
    """Paths by one of the numbers in their names; names without a number are no part of the volume."""
    return {_numbers(p)[which]: p for p in paths if _numbers(p)}


def _numbers(path: Path) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", path.stem if path.is_file() else path.name)]
