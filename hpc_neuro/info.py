"""`hpc-neuro info PATH [picture=FILE.png]`: what a volume or a tree holds, as the package reads it."""

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
from hpc_neuro.core.constants import EXIT_DONE
from hpc_neuro.core.files import format_count, quote_path
from hpc_neuro.core.geometry import Box, Shape, tile_volume
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import swc
from hpc_neuro.data.formats import ImageSummary, Volume, open_volume, summarize_axes
from hpc_neuro.data.formats.volume import Array
from hpc_neuro.data.remote_path import parse_path

HELP = """usage: hpc-neuro info PATH [key=value ...]

Prints what PATH (an image file, folder or address, or an SWC) is read as: shape, type, axes, voxel size, intensities.
  picture=FILE.png  draw the maximum projections along z, y and x (of a tree: its branches)
  channel=N         of an image with several channels
  axes=LETTERS      what the stored axes are (Z Y X C T), where the file does not say
  dataset=NAME      of a file or folder that holds several arrays"""

_OPTIONS = {"picture", "channel", "axes", "dataset"}
_BLOCK_BYTES = 8 << 20
"""[bytes] Voxels read at a time; counting them takes eight times as much."""
_BINS = 1 << 16
"""Bins of the intensity histogram."""
_PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
_MOST_PIXELS = 1500
"""[pixel] Longest side of a projection in a picture."""
_GAMMA = 0.6
"""Exponent of the brightness in a picture: below 1, faint neurites show."""


@dataclass
class Statistics:
    """Intensities of a whole volume. Percentiles are exact for 8 and 16 bit, else to 1/65536 of the range."""

    low: float
    high: float
    percentiles: dict[float, float]
    nans: int
    zero_share: float


def main(argv: Sequence[str]) -> int:
    """Print what the path holds. Raises InputError for an unreadable path, ConfigError for an unknown key."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return EXIT_DONE

    # A file may have `=` in its name.
    options = dict(argument.split("=", 1) for argument in argv if "=" in argument and not Path(argument).exists())
    paths = [argument for argument in argv if "=" not in argument or Path(argument).exists()]
    unknown = sorted(set(options) - _OPTIONS)
    if unknown or len(paths) != 1:
        fault = f"unknown {', '.join(unknown)}" if unknown else f"{len(paths)} paths, expected one"
        raise ConfigError(f"info cannot run: {fault}\n{HELP}")

    path = parse_path(paths[0])
    picture = Path(options["picture"]) if "picture" in options else None
    # Given twice, the image itself would be replaced by its picture.
    if picture is not None and picture.suffix.lower() != ".png":
        raise ConfigError(f"picture={picture} is not named as a picture; give a name that ends in .png")

    is_tree = path.suffix.lower() in (".swc", ".eswc")
    lines = _describe_tree(path, picture) if is_tree else _describe_volume(path, picture, options)
    for line in lines:
        sys.stdout.write(line + "\n")
    return EXIT_DONE


# --- Volumes ---


def _describe_volume(path: Path, picture: Path | None, options: dict[str, str]) -> Iterator[str]:
    """Lines about a volume; draws its projections into `picture`."""
    channel = options.get("channel")
    if channel is not None and not channel.isdecimal():
        raise ConfigError(f"channel={channel} is not a whole number of at least 0")
    number = None if channel is None else int(channel)

    axes, dataset = options.get("axes"), options.get("dataset")
    try:
        volume = open_volume(path, channel=number, axes=axes, dataset=dataset)
    except InputError as error:
        summary = summarize_axes(path, axes=axes, dataset=dataset) if number is None and picture is None else None
        if summary is None:
            raise
        yield from _describe_several(path, summary, str(error), axes, dataset)
        return
    yield volume.describe()

    statistics, projections = measure_volume(volume)
    percentiles = ", ".join(f"{percent:g} % {value:.6g}" for percent, value in statistics.percentiles.items())
    yield f"intensity: {statistics.low:.6g} to {statistics.high:.6g}, {100 * statistics.zero_share:.1f} % zero"
    yield f"percentiles: {percentiles}"
    if statistics.nans:
        count = format_count(statistics.nans, "voxel")
        yield f"note: {count} of no finite number; such an image cannot be used for training"
    if statistics.low == statistics.high:
        yield "note: every voxel has the same value; such an image shows nothing"

    if picture is not None:
        _draw_projections(picture, volume, statistics, projections)
        yield f"picture: {picture}"


def _describe_several(
    path: Path, summary: ImageSummary, refusal: str, axes: str | None, dataset: str | None
) -> Iterator[str]:
    """Lines about an image of several channels, colors or time points: each channel, else what other verbs say."""
    if not summary.channels:
        stored = ", ".join(f"{name} {count}" for name, count in zip(summary.axes, summary.shape, strict=True))
        yield f"{path}: {summary.format}, {summary.dtype}\nstored axes: {stored}\nnote: {refusal}"
        return

    for number in range(summary.channels):
        volume = open_volume(path, channel=number, axes=axes, dataset=dataset)
        if number == 0:
            yield volume.describe().replace("; channel 0\n", "\n", 1)
        statistics = measure_volume(volume)[0]
        percentiles = ", ".join(f"{percent:g} % {value:.6g}" for percent, value in statistics.percentiles.items())
        yield f"channel {number}: {statistics.low:.6g} to {statistics.high:.6g}; {percentiles}"
    yield f"note: other verbs read one channel; choose it with channel=0 to {summary.channels - 1}"


def measure_volume(volume: Volume) -> tuple[Statistics, tuple[Array, Array, Array]]:
    """Intensities, and maximum projections along z, y, x (pooled to the size of a picture), block by block."""
    planes = tuple(_Projection(volume.shape, axis, volume.dtype) for axis in range(3))
    low, high, nans, zeros = math.inf, -math.inf, 0, 0
    # Every value of 8 and 16 bit has a bin of its own; other types need the range first.
    is_small = volume.dtype.kind in "ub" and volume.dtype.itemsize <= 2
    counts = np.zeros(_BINS, np.int64)

    # One pass finds the range and draws the projections; types with large ranges need a second pass for percentiles.
    for box, values in _iter_blocks(volume):
        if is_small:
            counts += np.bincount(values.ravel(), minlength=_BINS)
        elif values.dtype.kind == "f":
            finite = values[np.isfinite(values)]
            nans += values.size - finite.size
            values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
            low = min(low, float(finite.min(initial=math.inf)))
            high = max(high, float(finite.max(initial=-math.inf)))
        else:
            low, high = min(low, float(values.min())), max(high, float(values.max()))

        zeros += values.size - int(np.count_nonzero(values))
        for plane in planes:
            plane.add(box, values)

    if is_small:
        filled = np.flatnonzero(counts)
        low, high = float(filled[0]), float(filled[-1])
        edges = np.arange(_BINS, dtype=np.float64)
    elif high > low:
        # A difference of both ends may be beyond the largest number.
        shares = np.linspace(0, 1, _BINS)
        edges = low * (1 - shares) + high * shares
        counts += _count_values(volume, low, high)
    else:
        edges = np.full(_BINS, low)

    total = math.prod(volume.shape)
    statistics = Statistics(low, high, _find_percentiles(counts, edges), nans, (zeros - nans) / total)
    return statistics, (planes[0].pixels, planes[1].pixels, planes[2].pixels)


class _Projection:
    """A maximum projection, pooled to at most a picture's size, filled block by block."""

    def __init__(self, shape: Shape, axis: int, dtype: np.dtype[Any]) -> None:
        self.axis = axis
        self.sides = [side for side in range(3) if side != axis]
        self.factors = [max(1, math.ceil(shape[side] / _MOST_PIXELS)) for side in self.sides]

        size = [math.ceil(shape[side] / factor) for side, factor in zip(self.sides, self.factors, strict=True)]
        lowest = np.iinfo(dtype).min if dtype.kind in "iu" else False if dtype.kind == "b" else -np.inf
        self.pixels: Array = np.full(size, lowest, dtype)

    def add(self, box: Box, values: Array) -> None:
        """Add the values of one box of the volume."""
        plane = values.max(axis=self.axis)
        window = []

        for axis, (side, factor) in enumerate(zip(self.sides, self.factors, strict=True)):
            # Pixel that each row of the box belongs to; a pixel at the border may be shared with the next box.
            pixel = np.arange(box.start[side], box.stop[side]) // factor
            firsts = np.flatnonzero(np.diff(pixel, prepend=-1))
            plane = np.maximum.reduceat(plane, firsts, axis=axis)
            window.append(slice(int(pixel[0]), int(pixel[-1]) + 1))

        # A pixel on the border keeps the larger of what two blocks put there.
        target = self.pixels[tuple(window)]
        np.maximum(target, plane, out=target)


def _iter_blocks(volume: Volume) -> Iterator[tuple[Box, Array]]:
    """The volume in boxes of bounded size: slabs of slices, cut along y and x where one slice is too large."""
    # Whole slices where they fit, because most formats store slices together.
    z, y, x = volume.shape
    voxels = _BLOCK_BYTES // volume.dtype.itemsize
    x = min(x, voxels)
    y = min(y, max(1, voxels // x))
    z = min(z, max(1, voxels // (x * y)))

    for block in tile_volume(volume.shape, (z, y, x)):
        yield block.write, volume.read_unchecked(block.write)


def _count_values(volume: Volume, low: float, high: float) -> NDArray[np.int64]:
    """[BINS] histogram of the finite values between `low` and `high`."""
    counts = np.zeros(_BINS, np.int64)
    for _, values in _iter_blocks(volume):
        # Halved, so that no difference is beyond the largest number.
        finite = values[np.isfinite(values)].astype(np.float64) / 2
        places = (finite - low / 2) / (high / 2 - low / 2) * (_BINS - 1)
        counts += np.bincount(np.rint(places).astype(np.int64).clip(0, _BINS - 1), minlength=_BINS)
    return counts


def _find_percentiles(counts: NDArray[np.int64], edges: NDArray[np.float64]) -> dict[float, float]:
    cumulative = np.cumsum(counts)
    if not cumulative[-1]:
        return {percent: float(edges[0]) for percent in _PERCENTILES}
    return {
        percent: float(edges[np.searchsorted(cumulative, percent / 100 * cumulative[-1])]) for percent in _PERCENTILES
    }


def _draw_projections(
    path: Path, volume: Volume, statistics: Statistics, projections: tuple[Array, Array, Array]
) -> None:
    """Draw three projections into one PNG, in their true proportions, brightened so that faint neurites show."""
    # Importing matplotlib takes a third of a second.
    from matplotlib.figure import Figure

    voxel_size = volume.voxel_size or (1.0, 1.0, 1.0)
    unit = "um" if volume.voxel_size else "voxel"
    z, y, x = (n * size for n, size in zip(volume.shape, voxel_size, strict=True))

    # The darkest and brightest few percent are clipped: one bright soma would leave the rest black.
    low, high = (float(v) for v in np.percentile(np.nan_to_num(projections[0].astype(np.float64)), (5, 99.7)))
    if high <= low:
        high = statistics.high if statistics.high > low else low + 1

    figure = Figure(figsize=(9, 9 * (y + z) / (x + z) + 0.6), dpi=150, layout="constrained")
    grid = figure.subplots(2, 2, width_ratios=(x, z), height_ratios=(y, z), squeeze=False)
    views = (
        (grid[0, 0], projections[0], (x, y), "xy"),
        (grid[1, 0], projections[1], (x, z), "xz"),
        # Turned by a quarter, so that its y axis continues that of the first view.
        (grid[0, 1], projections[2].T, (z, y), "zy"),
    )

    for axes, plane, (width, height), names in views:
        brightness = np.clip((plane.astype(np.float64) - low) / (high - low), 0, 1) ** _GAMMA
        axes.imshow(brightness, cmap="gray", extent=(0, width, height, 0), aspect="auto", vmin=0, vmax=1)
        axes.set_xlabel(f"{names[0]} [{unit}]")
        axes.set_ylabel(f"{names[1]} [{unit}]")

    grid[1, 1].axis("off")
    figure.suptitle(f"{volume.path.name}  maximum projections", fontsize=10)
    with files.atomic(path) as part:
        figure.savefig(part, format="png")


# --- Trees ---


def _describe_tree(path: Path, picture: Path | None) -> Iterator[str]:
    """Lines about a tree; draws its branches into `picture`."""
    tree, header = swc.read(path), swc.read_header(path)
    unit = header.unit or "units of the file, which does not say"
    # The file may not state its unit; then no unit is printed as if it did.
    low, high = tree.points.min(0), tree.points.max(0)
    types = [f"{kind} ({count})" for kind, count in zip(*np.unique(tree.types, return_counts=True), strict=True)]

    counts = (
        format_count(len(tree), "node"),
        format_count(len(tree.roots), "root"),
        format_count(len(morphology.tips(tree)), "tip"),
        format_count(len(morphology.branch_points(tree)), "branch point"),
    )
    yield f"{path}: SWC, {', '.join(counts)}"
    yield f"length: {morphology.length(tree):.6g} {unit}"
    yield "extent z y x: " + ", ".join(f"{a:.6g} to {b:.6g}" for a, b in zip(low, high, strict=True))
    yield f"radius: {tree.radii.min():.4g} to {tree.radii.max():.4g}, median {np.median(tree.radii):.4g}"
    yield f"types: {', '.join(types)}"
    if header.voxel_size:
        yield "voxel size: " + " x ".join(f"{size:.6g}" for size in header.voxel_size) + " um (z y x)"

    if header.unit:
        yield f"unit: {header.unit}, by line {header.unit_line} of the header"
    if header.conflict:
        yield f"note: {header.conflict}"

    findings = swc.check(path)
    if findings:
        yield f"note: {format_count(len(findings), 'finding')}; list them with:  hpc-neuro swc check {quote_path(path)}"
    if picture is not None:
        _draw_tree(picture, path.name, tree, unit)
        yield f"picture: {picture}"


def _draw_tree(path: Path, title: str, tree: morphology.Tree, unit: str) -> None:
    """Draw a tree seen along z and along y into one PNG."""
    # Importing matplotlib takes a third of a second.
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    z, y, x = np.ptp(tree.points, axis=0) + 1e-9
    # A wide tree leaves room below, a tall one beside.
    rows, columns = (2, 1) if x > y + z else (1, 2)
    figure = Figure(figsize=(9, 5 if rows == 2 else 6), dpi=150, layout="constrained")
    edges = tree.edges

    # Axes of the points (0 z, 1 y, 2 x) along the picture's width and height.
    for axes, (across, down) in zip(figure.subplots(rows, columns), ((2, 1), (2, 0)), strict=True):
        axes.add_collection(
            LineCollection(list(tree.points[edges][..., [across, down]]), linewidths=0.6, colors="black")
        )
        roots = tree.points[tree.roots]
        axes.plot(roots[:, across], roots[:, down], "o", color="crimson", markersize=4)
        axes.autoscale()
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xlabel(f"{'zyx'[across]} [{unit.split()[0]}]")
        axes.set_ylabel("zyx"[down])

    figure.suptitle(title, fontsize=10)
    with files.atomic(path) as part:
        figure.savefig(part, format="png")
