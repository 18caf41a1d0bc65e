"""Draw one picture per volume: three projections with the tree over the image, so that a misaligned tree shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import to_um
from hpc_neuro.data.intensity import iter_slabs, normalize
from hpc_neuro.data.store import StoredVolume

GAMMA = 0.5
"""Exponent of the intensities, so that faint neurites show."""

MAX_PIXELS = 1500
"""[pixel] Longest side of a projection."""

EDGE, GAP = 0.6, 0.5
"""[inch] Space around the views and between them."""

MIN_THICKNESS = 0.15
"""A thin stack is drawn with at least this share of its longest side along z, so that it stays legible."""

_VIEWS = ((0, 1, 2), (2, 1, 0), (1, 0, 2))
"""(projected axis, axis down, axis across) of the views along z, along x beside it, and along y below it."""


class _Projections(NamedTuple):
    """Pictures for each projected axis z, y, x; rows and columns are the other two axes in z y x order."""

    images: list[NDArray[np.float32]]
    masks: list[NDArray[np.bool_]]
    unlabelled: list[NDArray[np.bool_]]


def draw_picture(volume: StoredVolume, path: Path, title: str) -> None:
    """Write a PNG: the maximum along z, beside it along x, below it along y; and again with tree and mask over it."""
    # The two halves have the same scale, so that the overlay can be compared with the bare image.
    projections = _project(volume)
    z, y, x = (n * s for n, s in zip(volume.shape, volume.voxel_size, strict=True))  # um
    z = max(z, MIN_THICKNESS * max(y, x))
    inches_per_um = 7.5 / max(x + z, y + z)
    width, height, depth = inches_per_um * x, inches_per_um * y, inches_per_um * z

    figure_width = 2 * (width + depth + GAP) + 2 * EDGE
    figure_height = height + depth + GAP + EDGE + 0.9
    figure = Figure(figsize=(figure_width, figure_height))
    FigureCanvasAgg(figure)

    for overlay in (False, True):
        left = EDGE + overlay * (width + depth + GAP + EDGE / 2)
        boxes = (
            (left, EDGE + depth + GAP, width, height),
            (left + width + GAP, EDGE + depth + GAP, depth, height),
            (left, EDGE, width, depth),
        )
        for (a, b, w, h), view in zip(boxes, _VIEWS, strict=True):
            axes = figure.add_axes((a / figure_width, b / figure_height, w / figure_width, h / figure_height))
            extent = _extent(volume, view)
            _draw_image(axes, projections, view, extent)
            if overlay:
                _draw_overlay(axes, volume, projections, view, extent)
            else:
                _label_axes(axes, view)

    figure.suptitle(title, fontsize=10)
    with files.atomic(path) as part:
        # Without the Software entry the same picture gives the same bytes.
        figure.savefig(part, format="png", dpi=90, metadata={"Software": None})


def _extent(volume: StoredVolume, view: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """[um] left, right, bottom and top of a view; voxel centers are at multiples of the voxel size."""
    _, down, across = view
    size = volume.voxel_size
    right, bottom = ((volume.shape[axis] - 0.5) * size[axis] for axis in (across, down))
    return -0.5 * size[across], right, bottom, -0.5 * size[down]


def _draw_image(axes: Any, projections: _Projections, view: tuple[int, int, int], extent: tuple[float, ...]) -> None:
    # Axes in micrometers: a neurite looks as it is in space.
    image = _orient(projections.images, view)
    axes.imshow(image**GAMMA, cmap="gray", extent=extent, vmin=0, vmax=1, interpolation="nearest", aspect="auto")


def _label_axes(axes: Any, view: tuple[int, int, int]) -> None:
    _, down, across = view
    axes.set_xlabel(f"{'zyx'[across]} [um]", labelpad=1)
    axes.set_ylabel(f"{'zyx'[down]} [um]", labelpad=1)
    axes.tick_params(labelsize=8)


def _draw_overlay(
    axes: Any,
    volume: StoredVolume,
    projections: _Projections,
    view: tuple[int, int, int],
    extent: tuple[float, float, float, float],
) -> None:
    """Contours of mask and unlabelled voxels, the tree's edges, and its root."""
    _, down, across = view
    axes.set_xticks([])
    axes.set_yticks([])

    for pictures, color in ((projections.masks, "tab:cyan"), (projections.unlabelled, "yellow")):
        mask = _orient(pictures, view)

        # There is no contour where a mask is constant.
        if mask.any() and not mask.all():
            axes.contour(mask, levels=[0.5], extent=extent, origin="upper", colors=color, linewidths=0.5)

    # The annotator's tree, not the fitted one: the picture is to show its faults.
    tree = volume.tree()
    lines = to_um(tree.points, volume.voxel_size)[tree.edges][:, :, [across, down]]
    axes.add_collection(LineCollection(list(lines), colors="red", linewidths=0.6))
    if volume.root is not None:
        root = np.asarray(volume.root) * np.asarray(volume.voxel_size)
        axes.plot(root[across], root[down], "o", markersize=7, markerfacecolor="none", markeredgecolor="yellow")

    # A tree that leaves the image must not widen the view.
    axes.set_xlim(extent[0], extent[1])
    axes.set_ylim(extent[2], extent[3])


def _orient(pictures: list[NDArray[Any]], view: tuple[int, int, int]) -> NDArray[Any]:
    """The picture of a view with its axes down and across."""
    projected, down, across = view
    return pictures[projected].T if down > across else pictures[projected]


def _project(volume: StoredVolume) -> _Projections:
    """Maxima of normalized image, mask and unlabelled voxels; streamed, thinned to MAX_PIXELS a side."""
    # One pass over the volume for all three projections.
    planes = [tuple(n for a, n in enumerate(volume.shape) if a != axis) for axis in range(3)]
    images = [np.zeros(plane, dtype=np.float32) for plane in planes]
    masks = [np.zeros(plane, dtype=bool) for plane in planes]
    unlabelled = [np.zeros(plane, dtype=bool) for plane in planes]

    for box in iter_slabs(volume.shape, max(4, volume.dtype.itemsize)):
        image = normalize(volume.image(box), volume.low, volume.high)
        mask = volume.mask(box)
        for axis in range(3):
            window = tuple(s for a, s in enumerate(box.slices) if a != axis)
            np.maximum(images[axis][window], image.max(axis=axis), out=images[axis][window])
            masks[axis][window] |= (mask == 1).any(axis=axis)
            unlabelled[axis][window] |= (mask == UNLABELED).any(axis=axis)

    return _Projections(
        [_thin(image) for image in images], [_thin(mask) for mask in masks], [_thin(mask) for mask in unlabelled]
    )


def _thin(image: NDArray[Any]) -> NDArray[Any]:
    """Maxima over whole tiles, so that thin neurites stay."""
    factor = -(-max(image.shape) // MAX_PIXELS)
    if factor == 1:
        return image

    # Zeros do not change a maximum of values from 0 to 1.
    padded = np.pad(image, [(0, -n % factor) for n in image.shape])
    rows, columns = (n // factor for n in padded.shape)
    tiles: NDArray[Any] = padded.reshape(rows, factor, columns, factor)
    thinned: NDArray[Any] = tiles.max(axis=(1, 3))
    return thinned
