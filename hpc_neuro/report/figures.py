"""Pictures of volumes: maximum projections along z, y and x side by side, with trees over them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.types import Array

GOLD, RIGHT, WRONG, MISSED = "#f2c14e", "#5bc0ff", "#ff6b4a", "#ffe066"
"""Line colors on a dark image that color-blind readers tell apart too; the caption explains them."""

_MAX_PIXELS = 900
"""[pixel] Longest side of a projection."""
_SLAB = 1 << 24
"""[voxel] How much of a volume is read at a time."""
_BACKGROUND, _INK = "#101418", "#d5dae0"
_PANELS_ACROSS = 3
_PANEL_WIDTH, _TITLE_HEIGHT = 6.0, 0.35
"""[inch] Width of a panel, and space for the title above it."""


@dataclass(frozen=True)
class Projections:
    """The three projections of a volume; pixels may be tiles of voxels."""

    z: NDArray[np.float32]  # [Y, X] maximum along z
    y: NDArray[np.float32]  # [Z, X] maximum along y
    x: NDArray[np.float32]  # [Z, Y] maximum along x


@dataclass(frozen=True)
class TreeLines:
    """Tree edges in one color."""

    segments: NDArray[np.float64]  # [E, 2, 3] z y x in um
    color: str
    label: str


@dataclass(frozen=True)
class Panel:
    """One picture: a background of projections in gray (or three of them as red, green, blue) and lines over it."""

    title: str
    gray: Projections | None = None
    rgb: tuple[Projections, Projections, Projections] | None = None
    lines: Sequence[TreeLines] = field(default_factory=tuple)
    root: tuple[float, float, float] | None = None  # z y x in um
    gamma: float = 0.5
    """Exponent on the gray values; below 1 it brings out faint neurites."""
    brightness: float = 1.0
    """Less than 1 dims the background, so that lines stand out."""


@dataclass(frozen=True)
class _Layout:
    """Where the three views of a volume lie in a panel, in um: along z at the left, x at its right, y below."""

    depth: float
    height: float
    width: float
    gap: float

    @property
    def x_offset(self) -> float:
        """Left edge of the view along x."""
        return self.width + self.gap

    @property
    def y_offset(self) -> float:
        """Upper edge of the view along y."""
        return self.height + self.gap

    @property
    def total_width(self) -> float:
        return self.x_offset + self.depth

    @property
    def total_height(self) -> float:
        return self.y_offset + self.depth


def project_maxima(read: Callable[[Box], Array], shape: Shape) -> Projections:
    """Maximum projections of a volume read slab by slab; large ones are thinned by maxima, so that neurites stay."""
    # All three projections in one pass, in slabs of bounded memory.
    planes = [np.full([n for a, n in enumerate(shape) if a != k], -np.inf, dtype=np.float32) for k in range(3)]
    depth = max(1, _SLAB // (shape[1] * shape[2]))
    for start in range(0, shape[0], depth):
        box = Box((start, 0, 0), (min(start + depth, shape[0]), shape[1], shape[2]))
        block = read(box)

        # The projection along z takes maxima over slabs; the other two fill their own rows.
        for k, plane in enumerate(planes):
            part = plane if k == 0 else plane[box.slices[0]]
            np.maximum(part, block.max(axis=k), out=part)

    return Projections(*(_thin_plane(p) for p in planes))


def draw_panels(
    panels: Sequence[Panel],
    shape: Shape,
    voxel_size: VoxelSize,
    quality: int = 85,
    kind: Literal["jpeg", "png"] = "jpeg",
    unit: str = "\N{MICRO SIGN}m",
) -> bytes:
    """A picture of panels in rows of three. A panel shows the view along z, that along x at its right, along y below.

    +-------+--+
    |  y x  |yz|      all in um on one scale, with a scale bar in `unit`
    +-------+--+
    |  z x  |
    +-------+
    """
    # Axes are in um, so that anisotropic voxels have their true proportions.
    depth, height, width = (n * s for n, s in zip(shape, voxel_size, strict=True))
    layout = _Layout(depth, height, width, gap=0.02 * max(depth, height, width))
    across = min(_PANELS_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    panel_height = _PANEL_WIDTH * layout.total_height / layout.total_width + _TITLE_HEIGHT

    # No pyplot: it would keep every figure of a long run in memory.
    figure = Figure(figsize=(across * _PANEL_WIDTH, down * panel_height), facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        row, column = divmod(i, across)
        bounds = (column / across, 1 - (row + 1) / down, 1 / across, (1 - _TITLE_HEIGHT / panel_height) / down)
        axes = _add_axes(figure, bounds, panel.title, layout)
        _draw_background(axes, panel, layout)
        _draw_lines(axes, panel, layout)
        _draw_scale_bar(axes, layout, unit)

    # Chroma subsampling would blur the colors of thin lines.
    options = {"quality": quality, "optimize": True, "subsampling": 0} if kind == "jpeg" else {}
    with io.BytesIO() as target:
        figure.savefig(target, format=kind, dpi=100, facecolor=_BACKGROUND, pil_kwargs=options)
        return target.getvalue()


def _add_axes(figure: Figure, bounds: tuple[float, float, float, float], title: str, layout: _Layout) -> Any:
    """Axes in um over the layout, with y down."""
    axes = figure.add_axes(bounds, facecolor=_BACKGROUND)
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(-0.5 * layout.gap, layout.total_width + 0.5 * layout.gap)
    axes.set_ylim(layout.total_height + 0.5 * layout.gap, -0.5 * layout.gap)
    axes.set_title(title, color=_INK, fontsize=13, loc="left", pad=4, x=0.01)

    return axes


def _draw_background(axes: Any, panel: Panel, layout: _Layout) -> None:
    extents = {
        "z": (0, layout.width, layout.height, 0),
        "x": (layout.x_offset, layout.total_width, layout.height, 0),
        "y": (0, layout.width, layout.total_height, layout.y_offset),
    }

    # `antialiased` keeps thin neurites visible where the picture is smaller than the data.
    for axis, extent in extents.items():
        image = _compose_image(panel, axis)
        axes.imshow(np.clip(image, 0, 1), extent=extent, interpolation="antialiased", aspect="equal")


def _compose_image(panel: Panel, axis: str) -> NDArray[np.floating]:
    """[rows, columns, 3] the background of the view along an axis; black when the panel has none."""
    # Colors are masks and stay as they are; gray values are brightened or dimmed.
    if panel.rgb is not None:
        return np.stack([_orient_plane(projections, axis) for projections in panel.rgb], axis=-1)
    if panel.gray is not None:
        gray = panel.brightness * np.clip(_orient_plane(panel.gray, axis), 0, 1) ** panel.gamma
        return np.repeat(gray[..., None], 3, axis=-1)

    return np.zeros((1, 1, 3))


def _orient_plane(projections: Projections, axis: str) -> NDArray[np.float32]:
    """A projection as it is laid out: along x with y down and z to the right."""
    plane: NDArray[np.float32] = getattr(projections, axis)
    return plane.T if axis == "x" else plane


def _draw_lines(axes: Any, panel: Panel, layout: _Layout) -> None:
    """Tree lines and the root in all three views, and the legend in the empty corner."""
    # One collection for the three views: thousands of edges are drawn at once.
    for i, line in enumerate(panel.lines):
        z, y, x = (line.segments[..., a] for a in range(3))
        views = ((x, y), (z + layout.x_offset, y), (x, z + layout.y_offset))
        segments = np.concatenate([np.stack(view, axis=-1) for view in views])
        axes.add_collection(LineCollection(list(segments), colors=line.color, linewidths=1.4))

        corner = (layout.x_offset, layout.height + layout.gap * (1.2 + 2.2 * i))
        axes.text(*corner, line.label, color=line.color, fontsize=10, va="top", ha="left", clip_on=True)

    # The ring is hollow, so that the cable below it can be seen.
    if panel.root is not None:
        z0, y0, x0 = panel.root
        points = ([x0, z0 + layout.x_offset, x0], [y0, y0, z0 + layout.y_offset])
        axes.plot(*points, "o", markersize=8, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.2)


def _draw_scale_bar(axes: Any, layout: _Layout, unit_name: str) -> None:
    """A bar of 1, 2 or 5 times a power of ten units, at most a fifth of the width."""
    # The longest round length that is not in the way.
    target = 0.2 * layout.width
    unit = 10.0 ** math.floor(math.log10(target))
    length = unit * max(m for m in (1, 2, 5) if m * unit <= target)

    x, y = layout.width - layout.gap - length, layout.height - layout.gap
    axes.plot([x, x + length], [y, y], color="white", linewidth=2.5, solid_capstyle="butt")
    label = f"{length:g} {unit_name}"
    # Flush with the end of the bar: a label may be wider than the bar, and would leave a small picture.
    axes.text(x + length, y - 0.4 * layout.gap, label, color="white", fontsize=10, ha="right", va="bottom")


def _thin_plane(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """A plane of at most `_MAX_PIXELS` along its longest side; a pixel is the maximum of its tile."""
    factor = -(-max(plane.shape) // _MAX_PIXELS)
    if factor == 1:
        return plane

    # Pad to whole tiles with the border, which adds no maximum.
    padded = np.pad(plane, [(0, -n % factor) for n in plane.shape], mode="edge")
    rows, columns = (n // factor for n in padded.shape)
    thinned: NDArray[np.float32] = padded.reshape(rows, factor, columns, factor).max(axis=(1, 3))

    return thinned
