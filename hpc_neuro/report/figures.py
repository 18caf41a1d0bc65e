"""Pictures of volumes: maximum projections along z, y and x side by side, with trees over them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.types import Array

GOLD, RIGHT, WRONG, MISSED = "#f2c14e", "#5bc0ff", "#ff6b4a", "#ffe066"
"""Line colours on a dark image, told apart by the colour-blind too; what they stand for is said beside the picture."""

_LARGEST = 900  # pixels along a projection's longest side
_SLAB = 1 << 24  # voxels read at a time
_BACK, _INK = "#101418", "#d5dae0"
_PANELS_ACROSS = 3
_TITLE = 0.35  # inches above a panel


@dataclass(frozen=True)
class Projections:
    """The three projections of a volume; pixels may be tiles of voxels."""

    z: NDArray[np.float32]  # [Y, X] maximum along z
    y: NDArray[np.float32]  # [Z, X] maximum along y
    x: NDArray[np.float32]  # [Z, Y] maximum along x


@dataclass(frozen=True)
class TreeLines:
    """Tree edges in one colour."""

    segments: NDArray[np.float64]  # [E, 2, 3] z y x in um
    color: str
    label: str


@dataclass(frozen=True)
class Panel:
    """One picture: a background of projections in grey (or three of them as red, green, blue) and lines over it."""

    title: str
    gray: Projections | None = None
    rgb: tuple[Projections, Projections, Projections] | None = None
    lines: Sequence[TreeLines] = field(default_factory=tuple)
    root: tuple[float, float, float] | None = None  # z y x in um
    gamma: float = 0.5  # faint neurites must show
    brightness: float = 1.0  # less than 1 dims the background, so that lines stand out


def project_maxima(read: Callable[[Box], Array], shape: Shape) -> Projections:
    """Maximum projections of a volume read slab by slab; large ones are thinned by maxima, so that neurites stay."""
    planes = [np.full([n for a, n in enumerate(shape) if a != k], -np.inf, dtype=np.float32) for k in range(3)]
    depth = max(1, _SLAB // (shape[1] * shape[2]))
    for start in range(0, shape[0], depth):
        box = Box((start, 0, 0), (min(start + depth, shape[0]), shape[1], shape[2]))
        block = read(box)
        for k, plane in enumerate(planes):
            part = plane if k == 0 else plane[box.slices[0]]
            np.maximum(part, block.max(axis=k), out=part)
    return Projections(*(_thinned(p) for p in planes))


def draw_panels(panels: Sequence[Panel], shape: Shape, voxel_size: VoxelSize, quality: int = 85) -> bytes:
    """A JPEG of panels in rows of three. Each panel shows the view along z, that along x at its right, along y below.

    +-------+--+
    |  y x  |yz|      all in um on one scale, with a scale bar
    +-------+--+
    |  z x  |
    +-------+
    """
    size = np.asarray(shape) * np.asarray(voxel_size)  # um, z y x
    gap = 0.02 * float(size.max())
    wide, high = size[2] + gap + size[0], size[1] + gap + size[0]
    across = min(_PANELS_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    panel_width = 6.0
    panel_height = panel_width * high / wide + _TITLE
    figure = Figure(figsize=(across * panel_width, down * panel_height), facecolor=_BACK)
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        row, column = divmod(i, across)
        axes = figure.add_axes(
            (column / across, 1 - (row + 1) / down, 1 / across, (1 - _TITLE / panel_height) / down), facecolor=_BACK
        )
        axes.set_axis_off()
        axes.set_aspect("equal")
        axes.set_xlim(-0.5 * gap, wide + 0.5 * gap)
        axes.set_ylim(high + 0.5 * gap, -0.5 * gap)
        axes.set_title(panel.title, color=_INK, fontsize=13, loc="left", pad=4, x=0.01)
        _background(axes, panel, size, gap)
        _overlay(axes, panel, size, gap)
        _scale_bar(axes, size, gap)
    with io.BytesIO() as target:
        options = {"quality": quality, "optimize": True, "subsampling": 0}  # full colour for thin lines
        figure.savefig(target, format="jpeg", dpi=100, facecolor=_BACK, pil_kwargs=options)
        return target.getvalue()


def _background(axes: Any, panel: Panel, size: NDArray[np.float64], gap: float) -> None:
    depth, height, width = size
    extents = {
        "z": (0, width, height, 0),
        "x": (width + gap, width + gap + depth, height, 0),
        "y": (0, width, height + gap + depth, height + gap),
    }
    for name, extent in extents.items():
        if panel.rgb is not None:
            image: NDArray[np.floating] = np.stack([_plane(v, name) for v in panel.rgb], axis=-1)
        elif panel.gray is not None:
            grey = panel.brightness * np.clip(_plane(panel.gray, name), 0, 1) ** panel.gamma
            image = np.repeat(grey[..., None], 3, axis=-1)
        else:
            image = np.zeros((1, 1, 3))
        axes.imshow(np.clip(image, 0, 1), extent=extent, interpolation="antialiased", aspect="equal")


def _plane(views: Projections, name: str) -> NDArray[np.float32]:
    """A view as it is laid out: along x with y down and z to the right."""
    plane: NDArray[np.float32] = getattr(views, name)
    return plane.T if name == "x" else plane


def _overlay(axes: Any, panel: Panel, size: NDArray[np.float64], gap: float) -> None:
    _, height, width = size
    for line in panel.lines:
        z, y, x = (line.segments[..., a] for a in range(3))
        flat = [np.stack(p, axis=-1) for p in ((x, y), (z + width + gap, y), (x, z + height + gap))]
        axes.add_collection(LineCollection(list(np.concatenate(flat)), colors=line.color, linewidths=1.4))
    if panel.root is not None:
        z0, y0, x0 = panel.root
        places = ([x0, z0 + width + gap, x0], [y0, y0, z0 + height + gap])
        axes.plot(*places, "o", markersize=8, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.2)
    left = width  # the legend stands in the empty corner
    for i, line in enumerate(panel.lines):
        place = (left + gap, height + gap * (1.2 + 2.2 * i))
        axes.text(*place, line.label, color=line.color, fontsize=10, va="top", ha="left", clip_on=True)


def _scale_bar(axes: Any, size: NDArray[np.float64], gap: float) -> None:
    target = 0.2 * float(size[2])
    unit = 10.0 ** math.floor(math.log10(target))
    length = unit * max(m for m in (1, 2, 5) if m * unit <= target)
    x, y = size[2] - gap - length, size[1] - gap
    axes.plot([x, x + length], [y, y], color="white", linewidth=2.5, solid_capstyle="butt")
    axes.text(
        x + length / 2,
        y - 0.4 * gap,
        f"{length:g} \N{MICRO SIGN}m",
        color="white",
        fontsize=10,
        ha="center",
        va="bottom",
    )


def _thinned(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    factor = -(-max(plane.shape) // _LARGEST)
    if factor == 1:
        return plane
    padded = np.pad(plane, [(0, -n % factor) for n in plane.shape], mode="edge")
    rows, columns = (n // factor for n in padded.shape)
    thinned: NDArray[np.float32] = padded.reshape(rows, factor, columns, factor).max(axis=(1, 3))
    return thinned
