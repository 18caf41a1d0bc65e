"""Links along faint signal: a stalk too thin for the mask often still shows in the image.

Round each end of a piece, the smoothed image is cut at a level between the background and the dimmer of two pieces. If
the two hang together above it, the brightest way between them is a link.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from hpc_neuro.geometry import Box
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.foreground import Floats, Foreground, Ints, Read, neighbours
from hpc_neuro.tracing.wires import Join

_BLUR = 1.0  # [voxel] of the image, against noise
_NOISE = 4.0  # [standard deviations] above the background
_MARGIN = 3  # [voxel] read besides, for the blur


@dataclass(frozen=True)
class Link:
    """A possible join and its price: length divided by the contrast of its darkest place."""

    price: float
    join: Join


@dataclass(frozen=True)
class _Surroundings:
    """A box round an end."""

    start: Ints  # [3] its first voxel
    signal: Floats  # [Z, Y, X] smoothed image above the background
    noise: float
    inside: Ints  # [M] foreground voxels in it


def links(found: Foreground, ends: Ints, piece: NDArray[np.int32], image: Read, cfg: TraceConfig) -> list[Link]:
    """Links from the pieces of `ends` (foreground voxels) to other pieces within `cfg.signal_gap`."""
    options = []
    spread = cfg.signal_gap / found.spacing
    balls = found.near.query_ball_point(found.points[ends], cfg.signal_gap)
    for end, ball in zip(ends.tolist(), balls, strict=True):
        others = np.unique(piece[np.array(ball, dtype=np.int64)])
        others = others[others != piece[end]]
        if len(others):
            around = _surroundings(found, end, spread, image)
            for other in others:
                link = _brightest(found, around, piece, int(piece[end]), int(other), cfg)
                if link is not None:
                    options.append(link)
    return options


def _surroundings(found: Foreground, end: int, spread: Floats, image: Read) -> _Surroundings:
    whole = Box.whole(found.shape)
    centre = found.voxels[end].astype(np.int64)
    low, high = np.floor(centre - spread).astype(int), np.ceil(centre + spread).astype(int) + 1
    box = Box((low[0], low[1], low[2]), (high[0], high[1], high[2])).clipped(whole)
    grown = box.grown((_MARGIN,) * 3).clipped(whole)
    smooth = gaussian_filter(np.asarray(image(grown), dtype=np.float64), _BLUR)
    smooth = smooth[box.relative_to(grown.start).slices]
    inside = np.flatnonzero(np.all((found.voxels >= box.start) & (found.voxels < box.stop), axis=1))
    start = np.array(box.start)
    dark = np.ones(box.shape, dtype=bool)
    dark[tuple((found.voxels[inside] - start).T)] = False
    values = smooth[dark] if dark.any() else smooth.ravel()
    background = float(np.median(values))
    noise = 1.4826 * float(np.median(np.abs(values - background)))
    return _Surroundings(start, smooth - background, noise, inside)


def _brightest(
    found: Foreground, around: _Surroundings, piece: NDArray[np.int32], own: int, other: int, cfg: TraceConfig
) -> Link | None:
    """The best way between two pieces, None when they do not hang together above the level."""
    label = np.full(around.signal.shape, -1, dtype=np.int64)  # foreground voxel at each place of the box
    label[tuple((found.voxels[around.inside] - around.start).T)] = around.inside
    mine, theirs = (around.inside[piece[around.inside] == p] for p in (own, other))
    if not len(theirs):
        return None
    dimmer = min(float(np.median(around.signal[np.isin(label, v)])) for v in (mine, theirs))
    level = max(cfg.signal * dimmer, _NOISE * around.noise)
    if dimmer <= level:
        return None
    free = (label < 0) & (around.signal >= level)
    usable = free | np.isin(label, mine) | np.isin(label, theirs)
    voxels = np.argwhere(usable).astype(np.int32)
    pairs, step = neighbours(voxels, around.signal.shape, found.spacing)
    price = (dimmer / np.maximum(around.signal[usable], level)) ** 2
    weight = step * (price[pairs[:, 0]] + price[pairs[:, 1]]) / 2
    graph = csr_array((weight, (pairs[:, 0], pairs[:, 1])), shape=(len(voxels), len(voxels)))
    at = label[usable]
    total, before, _ = dijkstra(
        graph, directed=False, indices=np.flatnonzero(np.isin(at, mine)), min_only=True, return_predecessors=True
    )
    goals = np.flatnonzero(np.isin(at, theirs))
    goal = int(goals[total[goals].argmin()])
    if not np.isfinite(total[goal]):
        return None
    way = [goal]
    while before[way[-1]] >= 0:
        way.append(int(before[way[-1]]))
    between = way[1:-1][::-1]
    via = (voxels[between] + around.start) * found.spacing
    line = np.concatenate([found.points[[at[way[-1]]]], via, found.points[[at[goal]]]])
    length = float(np.linalg.norm(np.diff(line, axis=0), axis=1).sum())
    if length > cfg.signal_gap:
        return None
    darkest = float(np.minimum(around.signal[usable][between], dimmer).min() / dimmer) if between else 1.0
    return Link(length / darkest, Join(int(at[way[-1]]), int(at[goal]), via))
