"""`hpc-neuro info PATH [picture=FILE.png]`: what a volume or a tree holds, as it will be read."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, morphology
from hpc_neuro.core.geometry import Box, Shape, tile_volume
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.data import swc
from hpc_neuro.data.formats import Volume, open_volume
from hpc_neuro.data.formats.volume import Array

HELP = """usage: hpc-neuro info PATH [key=value ...]

Prints what PATH (an image file or folder, or an SWC) is read as: shape, type, axes, voxel size, intensities.
  picture=FILE.png  draw the maximum projections along z, y and x (of a tree: its branches)
  channel=N         of an image with several channels
  axes=LETTERS      what the stored axes are (Z Y X C T), where the file does not say
  dataset=NAME      of a file or folder that holds several arrays"""

_BLOCK_BYTES = 8 << 20  # voxels held at a time; counting them takes eight times as much
_BINS = 1 << 16
_PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
_MOST_PIXELS = 1500  # of a picture's longest side


@dataclass
class Statistics:
    """Intensities of a whole volume. Percentiles are exact for 8 and 16 bit, else to 1/65536 of the range."""

    low: float
    high: float
    percentiles: dict[float, float]
    nans: int
    zero_share: float


def main(argv: Sequence[str]) -> int:
    """Print what the path holds. Raises InputError for what cannot be read, ConfigError for an unknown key."""
    options = dict(a.split("=", 1) for a in argv if "=" in a and not Path(a).exists())
    paths = [a for a in argv if "=" not in a or Path(a).exists()]
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return 0
    unknown = sorted(set(options) - {"picture", "channel", "axes", "dataset"})
    if unknown or len(paths) != 1:
        what = f"unknown {', '.join(unknown)}" if unknown else f"{len(paths)} paths where one is wanted"
        raise ConfigError(f"info cannot be run so: {what}\n{HELP}")
    path, picture = Path(paths[0]), Path(options["picture"]) if "picture" in options else None
    if picture is not None and picture.suffix.lower() != ".png":  # the image itself, given twice, would be replaced
        raise ConfigError(f"picture={picture} is not named as a picture; give a name that ends in .png")
    if path.suffix.lower() == ".swc":
        _tree(path, picture)
        return 0
    channel = options.get("channel")
    if channel is not None and not channel.isdigit():
        raise ConfigError(f"channel={channel} is not a whole number from 0 on")
    number = None if channel is None else int(channel)
    volume = open_volume(path, channel=number, axes=options.get("axes"), dataset=options.get("dataset"))
    sys.stdout.write(volume.describe() + "\n")
    found, planes = statistics(volume)
    for line in _intensities(found):
        sys.stdout.write(line + "\n")
    if picture is not None:
        _draw(picture, volume, found, planes)
        sys.stdout.write(f"picture: {picture}\n")
    return 0


def statistics(volume: Volume) -> tuple[Statistics, tuple[Array, Array, Array]]:
    """Intensities, and maximum projections along z, y, x (pooled to the size of a picture), block by block."""
    planes = tuple(_Plane(volume.shape, along, volume.dtype) for along in range(3))
    low, high, nans, zeros = math.inf, -math.inf, 0, 0
    small = volume.dtype.kind in "ub" and volume.dtype.itemsize <= 2
    counts = np.zeros(_BINS, np.int64)
    for box, part in _parts(volume):
        if small:
            counts += np.bincount(part.ravel(), minlength=_BINS)
        elif part.dtype.kind == "f":
            finite = part[np.isfinite(part)]
            nans += part.size - finite.size
            part = np.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0)
            low, high = min(low, finite.min(initial=math.inf)), max(high, finite.max(initial=-math.inf))
        else:
            low, high = min(low, float(part.min())), max(high, float(part.max()))
        zeros += part.size - int(np.count_nonzero(part))
        for plane in planes:
            plane.add(box, part)
    if small:
        filled = np.flatnonzero(counts)
        low, high, edges = float(filled[0]), float(filled[-1]), np.arange(_BINS, dtype=np.float64)
    else:
        edges = np.linspace(low, high, _BINS) if high > low else np.full(_BINS, low)
        for _, part in _parts(volume) if high > low else ():
            counts += np.histogram(part[np.isfinite(part)], bins=_BINS, range=(low, high))[0]
    total = math.prod(volume.shape)
    found = Statistics(low, high, _percentiles(counts, edges), nans, (zeros - nans) / total)
    return found, (planes[0].pixels, planes[1].pixels, planes[2].pixels)


class _Plane:
    """A maximum projection, pooled to at most a picture's size, filled block by block."""

    def __init__(self, shape: Shape, along: int, dtype: np.dtype[Any]) -> None:
        self.along = along
        self.sides = [i for i in range(3) if i != along]
        self.factor = [max(1, math.ceil(shape[i] / _MOST_PIXELS)) for i in self.sides]
        size = [math.ceil(shape[i] / f) for i, f in zip(self.sides, self.factor, strict=True)]
        least = np.iinfo(dtype).min if dtype.kind in "iu" else False if dtype.kind == "b" else -np.inf
        self.pixels: Array = np.full(size, least, dtype)

    def add(self, box: Box, part: Array) -> None:
        plane = part.max(axis=self.along)
        where = []
        for axis, (side, factor) in enumerate(zip(self.sides, self.factor, strict=True)):
            owner = np.arange(box.start[side], box.stop[side]) // factor
            first = np.flatnonzero(np.diff(owner, prepend=-1))
            plane = np.maximum.reduceat(plane, first, axis=axis)
            where.append(slice(int(owner[0]), int(owner[-1]) + 1))
        target = self.pixels[tuple(where)]
        np.maximum(target, plane, out=target)


def _parts(volume: Volume) -> Iterator[tuple[Box, Array]]:
    """The whole volume in boxes of bounded size: slabs of slices, cut along y and x where one slice is too large."""
    z, y, x = volume.shape
    voxels = _BLOCK_BYTES // volume.dtype.itemsize
    x = min(x, voxels)
    y = min(y, max(1, voxels // x))
    for block in tile_volume(volume.shape, (min(z, max(1, voxels // (x * y))), y, x), (0, 0, 0)):
        yield block.write, volume.read_unchecked(block.write)


def _percentiles(counts: NDArray[np.int64], edges: NDArray[np.float64]) -> dict[float, float]:
    reached = np.cumsum(counts)
    if not reached[-1]:
        return {p: float(edges[0]) for p in _PERCENTILES}
    return {p: float(edges[np.searchsorted(reached, p / 100 * reached[-1])]) for p in _PERCENTILES}


def _intensities(found: Statistics) -> Iterator[str]:
    yield f"intensity: {found.low:.6g} to {found.high:.6g}, {100 * found.zero_share:.1f} % zero"
    yield "percentiles: " + ", ".join(f"{p:g} % {v:.6g}" for p, v in found.percentiles.items())
    if found.nans:
        yield f"note: {found.nans} voxels are no finite numbers; such an image cannot be used for training"
    if found.low == found.high:
        yield "note: every voxel has the same value; such an image holds nothing to find"


def _draw(path: Path, volume: Volume, found: Statistics, planes: tuple[Array, Array, Array]) -> None:
    """Three projections in one PNG, in their true proportions, brightened so that faint neurites show."""
    from matplotlib.figure import Figure  # takes a third of a second: only for a picture

    size = volume.voxel_size or (1.0, 1.0, 1.0)
    z, y, x = (n * s for n, s in zip(volume.shape, size, strict=True))
    low, high = (float(v) for v in np.percentile(np.nan_to_num(planes[0].astype(np.float64)), (5, 99.7)))
    high = high if high > low else found.high if found.high > low else low + 1
    figure = Figure(figsize=(9, 9 * (y + z) / (x + z) + 0.6), dpi=150, layout="constrained")
    grid = figure.subplots(2, 2, width_ratios=(x, z), height_ratios=(y, z), squeeze=False)
    views = ((grid[0, 0], planes[0], (x, y), "x y"), (grid[1, 0], planes[1], (x, z), "x z"))
    turned = (grid[0, 1], planes[2].T, (z, y), "z y")
    for axes, plane, (wide, high_side), name in (*views, turned):
        shown = np.clip((plane.astype(np.float64) - low) / (high - low), 0, 1) ** 0.6
        axes.imshow(shown, cmap="gray", extent=(0, wide, high_side, 0), aspect="auto", vmin=0, vmax=1)
        axes.set_xlabel(f"{name[0]} [{'um' if volume.voxel_size else 'voxel'}]")
        axes.set_ylabel(f"{name[2]} [{'um' if volume.voxel_size else 'voxel'}]")
    grid[1, 1].axis("off")
    figure.suptitle(f"{volume.path.name}  maximum projections", fontsize=10)
    with files.atomic(path) as part:
        figure.savefig(part, format="png")


def _tree(path: Path, picture: Path | None) -> None:
    tree, header = swc.read(path), swc.read_header(path)
    low, high = tree.points.min(0), tree.points.max(0)
    unit = header.unit or "units of the file, which does not say"
    lines = [
        f"{path}: SWC, {len(tree)} nodes, {len(tree.roots)} roots, {len(morphology.tips(tree))} tips, "
        f"{len(morphology.branch_points(tree))} branch points",
        f"length: {morphology.length(tree):.6g} {unit}",
        "extent z y x: " + ", ".join(f"{a:.6g} to {b:.6g}" for a, b in zip(low, high, strict=True)),
        f"radius: {tree.radii.min():.4g} to {tree.radii.max():.4g}, median {np.median(tree.radii):.4g}",
        f"types: {', '.join(f'{t} ({n})' for t, n in zip(*np.unique(tree.types, return_counts=True), strict=True))}",
    ]
    if header.voxel_size:
        lines.append("voxel size: " + " x ".join(f"{v:.6g}" for v in header.voxel_size) + " um (z y x)")
    if findings := swc.check(path):
        lines.append(f"note: {len(findings)} findings; see them with:  hpc-neuro swc check {path}")
    if picture is not None:
        _draw_tree(picture, path, tree, unit)
        lines.append(f"picture: {picture}")
    sys.stdout.write("\n".join(lines) + "\n")


def _draw_tree(path: Path, source: Path, tree: morphology.Tree, unit: str) -> None:
    from matplotlib.collections import LineCollection  # as above
    from matplotlib.figure import Figure

    z, y, x = np.ptp(tree.points, axis=0) + 1e-9
    rows, columns = (2, 1) if x > y + z else (1, 2)
    figure = Figure(figsize=(9, 5 if rows == 2 else 6), dpi=150, layout="constrained")
    edges = tree.edges
    for axes, (i, j) in zip(figure.subplots(rows, columns), ((2, 1), (2, 0)), strict=True):
        axes.add_collection(LineCollection(list(tree.points[edges][..., [i, j]]), linewidths=0.6, colors="black"))
        axes.plot(tree.points[tree.roots, i], tree.points[tree.roots, j], "o", color="crimson", markersize=4)
        axes.autoscale()
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xlabel(f"{'zyx'[i]} [{unit.split()[0]}]")
        axes.set_ylabel("zyx"[j])
    figure.suptitle(source.name, fontsize=10)
    with files.atomic(path) as part:
        figure.savefig(part, format="png")
