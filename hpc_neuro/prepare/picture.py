"""A picture per volume: three projections, the tree over the image, so that a misaligned tree is seen at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import to_um
from hpc_neuro.data.intensity import iter_slabs, normalize
from hpc_neuro.data.store import StoredVolume

_GAMMA = 0.5  # faint neurites must show
_LARGEST = 1500  # pixels along a projection's longest side
_EDGE, _GAP = 0.6, 0.5  # inches around and between the views
_VIEWS = ((0, 1, 2), (2, 1, 0), (1, 0, 2))  # (projected axis, axis down, axis across): z, beside it x, below it y


class _Projections(NamedTuple):
    """Each a picture per axis z, y, x; rows and columns are the other two in z y x order."""

    images: list[NDArray[np.float32]]
    masks: list[NDArray[np.bool_]]
    blanks: list[NDArray[np.bool_]]  # unlabelled


def draw(volume: StoredVolume, path: Path, title: str) -> None:
    """Write a PNG: maximum along z, beside it along x, below it along y; and the same with tree and mask over it."""
    seen = _project(volume)
    z, y, x = (n * s for n, s in zip(volume.shape, volume.voxel_size, strict=True))  # um
    z = max(z, 0.15 * max(y, x))  # thin stacks stay legible
    scale = 7.5 / max(x + z, y + z)  # inches per um
    wide, high, thick = scale * x, scale * y, scale * z
    total = (2 * (wide + thick + _GAP) + 2 * _EDGE, high + thick + _GAP + _EDGE + 0.9)
    figure = Figure(figsize=total)
    FigureCanvasAgg(figure)
    for overlay in (False, True):
        left = _EDGE + overlay * (wide + thick + _GAP + _EDGE / 2)
        boxes = (
            (left, _EDGE + thick + _GAP, wide, high),
            (left + wide + _GAP, _EDGE + thick + _GAP, thick, high),
            (left, _EDGE, wide, thick),
        )
        for (a, b, w, h), view in zip(boxes, _VIEWS, strict=True):
            axes = figure.add_axes((a / total[0], b / total[1], w / total[0], h / total[1]))
            _show(axes, volume, seen, view, overlay=overlay)
    figure.suptitle(title, fontsize=10)
    with files.atomic(path) as part:
        figure.savefig(part, format="png", dpi=90, metadata={"Software": None})  # the same bytes each time


def _show(axes: Any, volume: StoredVolume, seen: _Projections, view: tuple[int, int, int], *, overlay: bool) -> None:
    along, down, across = view
    size = np.asarray(volume.voxel_size)
    turned = down > across
    edge = (np.asarray(volume.shape) - 0.5) * size
    extent = (-0.5 * size[across], edge[across], edge[down], -0.5 * size[down])
    image = seen.images[along].T if turned else seen.images[along]
    axes.imshow(image**_GAMMA, cmap="gray", extent=extent, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    if not overlay:
        axes.set_xlabel(f"{'zyx'[across]} [um]", labelpad=1)
        axes.set_ylabel(f"{'zyx'[down]} [um]", labelpad=1)
        axes.tick_params(labelsize=8)
        return
    axes.set_xticks([])
    axes.set_yticks([])
    for pictures, colour in ((seen.masks, "tab:cyan"), (seen.blanks, "yellow")):
        mask = pictures[along].T if turned else pictures[along]
        if mask.any() and not mask.all():
            axes.contour(mask, levels=[0.5], extent=extent, origin="upper", colors=colour, linewidths=0.5)
    tree = volume.tree()
    lines = to_um(tree.points, volume.voxel_size)[tree.edges][:, :, [across, down]]
    axes.add_collection(LineCollection(list(lines), colors="red", linewidths=0.6))
    if volume.root is not None:
        place = np.asarray(volume.root) * size
        axes.plot(place[across], place[down], "o", markersize=7, markerfacecolor="none", markeredgecolor="yellow")
    axes.set_xlim(extent[0], extent[1])
    axes.set_ylim(extent[2], extent[3])


def _project(volume: StoredVolume) -> _Projections:
    """Maxima of normalised image, mask and unlabelled voxels; streamed, thinned to 1500 pixels a side."""
    planes = [tuple(n for a, n in enumerate(volume.shape) if a != k) for k in range(3)]
    images = [np.zeros(plane, dtype=np.float32) for plane in planes]
    masks = [np.zeros(plane, dtype=bool) for plane in planes]
    blanks = [np.zeros(plane, dtype=bool) for plane in planes]
    for box in iter_slabs(volume.shape, max(4, volume.dtype.itemsize)):
        image = normalize(volume.image(box), volume.low, volume.high)
        mask = volume.mask(box)
        for k in range(3):
            where = tuple(s for a, s in enumerate(box.slices) if a != k)
            np.maximum(images[k][where], image.max(axis=k), out=images[k][where])
            masks[k][where] |= (mask == 1).any(axis=k)
            blanks[k][where] |= (mask == 255).any(axis=k)
    return _Projections([_thinned(i) for i in images], [_thinned(m) for m in masks], [_thinned(b) for b in blanks])


def _thinned(image: NDArray[Any]) -> NDArray[Any]:
    """Maxima over whole tiles, so that thin neurites stay."""
    factor = -(-max(image.shape) // _LARGEST)
    if factor == 1:
        return image
    padded = np.pad(image, [(0, -n % factor) for n in image.shape])
    rows, columns = (n // factor for n in padded.shape)
    thinned: NDArray[Any] = padded.reshape(rows, factor, columns, factor).max(axis=(1, 3))
    return thinned
