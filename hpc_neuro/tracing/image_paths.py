"""What the image shows between two pieces of a mask.

The smoothed image round the two is cut at a level above its local background and the noise of that. If they hang
together above it, the brightest way between them is a link. A mask's threshold is one for the whole volume, or a
network's that has seen no neurite so faint; what a link asks for is told by the surroundings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.ndimage import label as labelled
from skimage.graph import MCP_Geometric

from hpc_neuro.core.geometry import Box
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.graph import Join, Lines
from hpc_neuro.tracing.voxel_graph import Bools, Cells, Floats, Foreground, Ints, Read

CHEAPEST = 0.5
"""Price of a link per length where the image is as bright between as on the dimmer piece; else up to 1."""
_BLUR = 1.0  # [voxel] of the image, against noise
_NOISE = 4.0  # [standard deviations] above the background
_BESIDE = 8.0  # [voxel] what is looked at round the two places, and
_BOW = 0.25  # of their distance more: a way bends
_FLANK = 2.0  # [voxel] farther out than its radius a strand's own foreground may reach
_GLOW = 1  # [voxel] round a third piece no way is seen: the light is that piece's
_FREE = 1e-6  # price of a way within a piece
_NEAREST = 8  # components that an end is compared with
_AT_ONCE = 256  # ends whose surroundings are searched together
_CELLS = 64  # of the image that are kept

Pair = tuple[int, int]


@dataclass(frozen=True)
class Link:
    """A possible join and its price."""

    price: float  # its length, down to half of it the brighter its darkest place is
    join: Join


@dataclass(frozen=True)
class _Scene:
    """A box round two places."""

    start: Ints  # [3] its first voxel
    signal: Floats  # [Z, Y, X] smoothed image above the background
    noise: float  # standard deviation of its dark part
    patch: NDArray[np.int32]  # [Z, Y, X] connected foreground from 1, 0 in the dark
    component: NDArray[np.int32]  # [Z, Y, X] -1 in the dark, on specks, and on patches without a strand in the box

    def places(self, where: Bools) -> Ints:
        """[K, 3] a voxel of each patch that is there."""
        _, first = np.unique(self.patch[where], return_index=True)
        return np.argwhere(where)[first]


class Sight:
    """What the image shows between the `large` [C] components of a foreground; the others are specks."""

    def __init__(self, found: Foreground, lines: Lines, image: Read, cfg: TraceConfig, large: Bools) -> None:
        self._found, self._lines, self._cfg, self._large = found, lines, cfg, large
        self._image = Cells(image, found.shape, _CELLS)
        order = np.lexsort((-found.probability, found.component))
        self._most_likely = order[np.unique(found.component[order], return_index=True)[1]].tolist()
        self._known: dict[int, bool] = {}
        self._places: dict[Pair, tuple[int, int, float]] = {}

    def near(self, ends: Ints) -> dict[Pair, float]:
        """The (component, other component) whose ends lie within reach, with the distance from surface to surface.

        Of a component's `ends` (strand voxels) the one nearest to the other counts. Each end looks at some components
        only, however many are near.
        """
        found, reach, large = self._found, self._cfg.signal_gap, self._large
        ends = ends[large[found.component[ends]]]
        thick, component = found.thickness, found.component
        for some in (ends[i : i + _AT_ONCE] for i in range(0, len(ends), _AT_ONCE)):
            balls = found.near.query_ball_point(found.points[some], reach + thick[some] + thick.max())
            for end, ball in zip(some.tolist(), balls, strict=True):
                others = np.array(ball, dtype=np.int64)
                others = others[(component[others] != component[end]) & large[component[others]]]
                away = np.linalg.norm(found.points[others] - found.points[end], axis=1) - thick[others] - thick[end]
                order = np.lexsort((others, away))
                kinds, first = np.unique(component[others[order]], return_index=True)
                nearest = np.argsort(first, kind="stable")[:_NEAREST]
                for kind, at in zip(kinds[nearest].tolist(), order[first[nearest]].tolist(), strict=True):
                    pair, gap = (int(component[end]), kind), max(float(away[at]), 0.0)
                    if gap <= reach and gap < self._places.get(pair, (0, 0, np.inf))[2]:
                        self._places[pair] = (end, int(others[at]), gap)
        return {pair: gap for pair, (_, _, gap) in self._places.items()}

    def between(self, pair: Pair) -> Link | None:
        """The best link of two components that `near` named, None when the image shows none."""
        if not all(self._visible(component) for component in pair):
            return None
        end, target, _ = self._places[pair]
        return self._brightest(self._scene(end, target), *pair)

    def _visible(self, component: int) -> bool:
        """Whether a component stands out of the noise, where its foreground is most likely; noise does not."""
        if component not in self._known:
            voxel = self._most_likely[component]
            scene = self._scene(voxel, voxel)
            bright = float(np.median(scene.signal[scene.component == component]))
            self._known[component] = bright > _NOISE * scene.noise
        return self._known[component]

    def _brightest(self, scene: _Scene, own: int, other: int) -> Link | None:
        found, cfg, signal = self._found, self._cfg, scene.signal
        mine, theirs = scene.component == own, scene.component == other
        if not (mine.any() and theirs.any()):
            return None
        dimmer = min(float(np.median(signal[mine])), float(np.median(signal[theirs])))
        level = max(cfg.signal * dimmer, _NOISE * scene.noise)
        if dimmer <= level:
            return None
        third = binary_dilation((scene.component >= 0) & ~mine & ~theirs, np.ones((3, 3, 3), dtype=bool), _GLOW)
        price = np.where(~third & (signal >= level), (dimmer / np.clip(signal, level, dimmer)) ** 2, -1.0)
        price[mine | theirs] = _FREE
        search = MCP_Geometric(price, fully_connected=True, sampling=tuple(found.spacing.tolist()))
        goals = scene.places(theirs)
        total, _ = search.find_costs(scene.places(mine), goals)
        reached = total[tuple(goals.T)]
        if not np.isfinite(reached).any():
            return None
        way = np.array(search.traceback(goals[reached.argmin()]), dtype=np.int64)
        way = way[np.flatnonzero(mine[tuple(way.T)])[-1] :]
        way = way[: np.flatnonzero(theirs[tuple(way.T)])[0] + 1]
        line = (way + scene.start) * found.spacing
        length = float(np.linalg.norm(np.diff(line, axis=0), axis=1).sum())
        if length > cfg.signal_gap:
            return None
        share = min(float(np.min(signal[tuple(way[1:-1].T)], initial=dimmer)) / dimmer, 1.0)
        end, target = (self._centred(own, line[0]), self._centred(other, line[-1]))
        return Link(length * (1 - (1 - CHEAPEST) * share), Join(end, target, line[1:-1]))

    def _centred(self, component: int, place: Floats) -> int:
        """The voxel of a component's centre lines that a place on its surface is nearest to; where none is near, the
        nearest of its strands: then a path to it is laid."""
        if (line := self._lines.beside(place, component, _FLANK)) is not None:
            return line
        own = np.flatnonzero(self._found.component == component)
        return int(own[np.linalg.norm(self._found.points[own] - place, axis=1).argmin()])

    def _scene(self, end: int, target: int) -> _Scene:
        found = self._found
        whole, pair = Box.whole(found.shape), found.voxels[[end, target]].astype(np.int64)
        away = float(np.linalg.norm(found.points[end] - found.points[target]))
        margin = np.ceil((_BESIDE + _BOW * away) / found.spacing).astype(np.int64)
        (z0, y0, x0), (z1, y1, x1) = (pair.min(axis=0) - margin).tolist(), (pair.max(axis=0) + margin + 1).tolist()
        box = Box((z0, y0, x0), (z1, y1, x1)).clip(whole)
        grown = box.grow((int(np.ceil(3 * _BLUR)),) * 3).clip(whole)
        blurred = gaussian_filter(np.asarray(self._image.box(grown), dtype=np.float32), _BLUR, truncate=3.0)
        smooth: Floats = blurred[box.relative_to(grown.start).slices].astype(np.float64)
        inside = found.at.inside(box)
        values = smooth[~inside] if not inside.all() else smooth.ravel()
        background = float(np.median(values))
        noise = 1.4826 * float(np.median(np.abs(values - background)))  # the median absolute deviation of a Gaussian
        patch = np.empty(inside.shape, dtype=np.int32)
        count = labelled(inside, np.ones((3, 3, 3)), output=patch)
        strands = _strands(found, box)
        of = np.full(count + 1, -1, dtype=np.int32)
        strands = strands[self._large[found.component[strands]]]
        of[patch[tuple((found.voxels[strands] - box.start).T)]] = found.component[strands]
        return _Scene(np.array(box.start), smooth - background, noise, patch, of[patch])


def _strands(found: Foreground, box: Box) -> Ints:
    """The strand voxels in a box."""
    middle = (np.array(box.start) + box.stop) / 2
    radius = float(np.linalg.norm(np.array(box.shape) / 2 * found.spacing))
    near = np.array(found.near.query_ball_point(middle * found.spacing, radius), dtype=np.int64)
    voxels = found.voxels[near]
    return near[np.all((voxels >= box.start) & (voxels < box.stop), axis=1)]
