"""Draw the picture of the README: a synthetic stack, its foreground, and the tree that `trace` finds.

    python -m tools.draw_overview            # writes docs/images/overview.png

Nothing but the package and a seed goes into the picture, so that it can be drawn again.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data.synthetic import Microscope, TreeForm, grow_random_tree, render_stack
from hpc_neuro.trace_stacks.tracer import trace_image

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "overview.png"
SHAPE: Shape = (56, 260, 260)
"""[voxel] z y x of the stack."""
VOXEL_SIZE: VoxelSize = (1.0, 0.33, 0.33)
"""[um] z y x."""
SEED = 12
"""Seed of the neuron and of its image."""
FOREGROUND = 128
"""[probability, 255 is 1] Voxels from which on are foreground."""
_PANEL_INCHES, _TITLE_INCHES = 3.2, 0.35
_DPI = 150
_PAPER, _INK, _BLUE = "#101418", "#d5dae0", "#5bc0ff"
_GRAY = LinearSegmentedColormap.from_list("gray", [_PAPER, "#ffffff"])
_AMBER = LinearSegmentedColormap.from_list("amber", [_PAPER, "#f2c14e"])
_SKY = LinearSegmentedColormap.from_list("sky", [_PAPER, _BLUE])
_SHADES = 40
"""Shades of each of the three colors in the file."""
_DIM = 0.45
"""Brightness of the image under the tree."""
_SCALE_BAR_UM = 20.0


def main() -> int:
    """Write the picture."""
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(PICTURE) as part:
        part.write_bytes(draw_overview(SEED))
    sys.stdout.write(f"{PICTURE}, {PICTURE.stat().st_size / 1000:.0f} kB\n")
    return 0


def draw_overview(seed: int) -> bytes:
    """A PNG with three panels, each a maximum projection along z: image, foreground, and the tree over the image."""
    neuron = grow_random_tree(seed, SHAPE, VOXEL_SIZE, TreeForm(soma=1.0, cable=900.0))
    microscope = Microscope(brightness=0.45, background=0.012, specks=12.0, fragments=0)
    image = render_stack(neuron, SHAPE, VOXEL_SIZE, microscope, seed)

    result = trace_image(lambda box: image[box.slices], SHAPE, VOXEL_SIZE)
    foreground = result.foreground.probability(Box.whole(SHAPE)) >= FOREGROUND

    figure = Figure(figsize=(3 * _PANEL_INCHES, _PANEL_INCHES + _TITLE_INCHES), facecolor=_PAPER)
    FigureCanvasAgg(figure)

    plane = _stretch_brightness(image.max(axis=0))
    _draw_plane(figure, 0, "image", plane, _GRAY)
    _draw_plane(figure, 1, "foreground", np.asarray(foreground.max(axis=0), dtype=np.float64), _AMBER)
    axes = _draw_plane(figure, 2, "tree (SWC)", _DIM * plane, _GRAY)
    for tree in result.trees:
        _draw_tree(axes, tree)
    _draw_scale_bar(figure)

    with io.BytesIO() as target:
        figure.savefig(target, format="png", dpi=_DPI, facecolor=_PAPER)
        return _reduce_colors(target.getvalue())


def _stretch_brightness(plane: Array) -> NDArray[np.float64]:
    """Brightness from the darkest voxel to the brightest neurites as 0 to 1, with faint ones raised."""
    low, high = np.quantile(np.asarray(plane, dtype=np.float64), [0.02, 0.995])
    return np.asarray(np.clip((plane - low) / (high - low), 0, 1) ** 0.8)


def _draw_plane(figure: Figure, column: int, title: str, plane: NDArray[np.float64], colors: Colormap) -> Axes:
    axes = _add_axes(figure, column, title)
    axes.imshow(plane, cmap=colors, vmin=0, vmax=1, interpolation="bilinear", extent=(0, SHAPE[2], SHAPE[1], 0))
    return axes


def _draw_tree(axes: Axes, tree: Tree) -> None:
    # Voxel centers lie half a voxel from the corner of the picture.
    points = tree.points[:, :0:-1] + 0.5
    axes.add_collection(LineCollection(list(points[tree.edges]), colors=_BLUE, linewidths=1.8))
    axes.plot(*points[0], "o", ms=11, mfc="none", mec=_BLUE, mew=2)


def _add_axes(figure: Figure, column: int, title: str) -> Axes:
    height = _PANEL_INCHES / (_PANEL_INCHES + _TITLE_INCHES)
    axes = figure.add_axes((column / 3 + 0.003, 0.005, 1 / 3 - 0.006, height - 0.01))
    axes.set_axis_off()
    figure.text((column + 0.5) / 3, 0.5 + height / 2, title, color=_INK, ha="center", va="center", fontsize=13)
    return axes


def _draw_scale_bar(figure: Figure) -> None:
    axes = figure.axes[0]
    length = _SCALE_BAR_UM / VOXEL_SIZE[2]
    axes.plot([10, 10 + length], [SHAPE[1] - 12] * 2, color=_INK, lw=3, solid_capstyle="butt")
    axes.text(10, SHAPE[1] - 17, f"{_SCALE_BAR_UM:g} \N{MICRO SIGN}m", color=_INK, fontsize=11)


def _reduce_colors(png: bytes) -> bytes:
    """The picture with a palette of few grays and shades of the two colors, which makes a smaller file."""
    shades = [colors(np.linspace(0, 1, _SHADES))[:, :3] for colors in (_GRAY, _AMBER, _SKY)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.rint(255 * np.concatenate(shades)).astype(np.uint8).tobytes())

    with io.BytesIO(png) as source, io.BytesIO() as target:
        picture = Image.open(source).convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
        picture.save(target, format="PNG", optimize=True)
        return target.getvalue()


if __name__ == "__main__":
    sys.exit(main())
