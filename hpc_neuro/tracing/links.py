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
_FLANK = 2.0  # [voxel] farther out than its radius a strand's own foreground may reach


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
    places: tuple[Ints, Ints, Ints]  # where foreground is in it
    nearest: Ints  # [M] strand voxel nearest to each of these places
    of_piece: NDArray[np.int32]  # [M]


def links(found: Foreground, ends: Ints, piece: NDArray[np.int32], image: Read, cfg: TraceConfig) -> list[Link]:
    """Links from the pieces of `ends` (foreground voxels) to other pieces within `cfg.signal_gap`."""
    options = []
    for end, others in _nearest_ends(found, ends, piece, cfg.signal_gap).items():
        around = _surroundings(found, end, piece, image, cfg)
        ways = (_brightest(found, around, int(piece[end]), other, cfg) for other in others)
        options += [link for link in ways if link is not None]
    return options


def _nearest_ends(found: Foreground, ends: Ints, piece: NDArray[np.int32], reach: float) -> dict[int, list[int]]:
    """The pieces to look for from each end: of a piece's ends the one nearest to the other piece, within reach."""
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for end, ball in zip(ends.tolist(), found.near.query_ball_point(found.points[ends], reach), strict=True):
        near = np.array(ball, dtype=np.int64)
        near = near[piece[near] != piece[end]]
        away = np.linalg.norm(found.points[near] - found.points[end], axis=1)
        order = np.argsort(away, kind="stable")
        others, first = np.unique(piece[near[order]], return_index=True)
        for other, distance in zip(others.tolist(), away[order[first]].tolist(), strict=True):
            pair = (int(piece[end]), other)
            best[pair] = min(best.get(pair, (np.inf, -1)), (distance, end))
    found_ends: dict[int, list[int]] = {}
    for (_, other), (_, end) in best.items():
        found_ends.setdefault(end, []).append(other)
    return found_ends


def _surroundings(
    found: Foreground, end: int, piece: NDArray[np.int32], image: Read, cfg: TraceConfig
) -> _Surroundings:
    whole = Box.whole(found.shape)
    reach = np.ceil(cfg.signal_gap / found.spacing).astype(int)
    low, high = found.voxels[end] - reach, found.voxels[end] + reach + 1
    box = Box((low[0], low[1], low[2]), (high[0], high[1], high[2])).clipped(whole)
    grown = box.grown((_MARGIN,) * 3).clipped(whole)
    smooth = gaussian_filter(np.asarray(image(grown), dtype=np.float32), _BLUR)
    smooth = np.asarray(smooth[box.relative_to(grown.start).slices], dtype=np.float64)
    grid = np.argwhere(np.ones(box.shape, dtype=bool)) + box.start
    lit = grid[found.at(grid.astype(np.float64)) > 0]
    away, nearest = (np.asarray(v) for v in found.near.query(lit * found.spacing))
    own = away <= found.thickness[nearest] + _FLANK  # the rest is noise, of no piece
    nearest = nearest[own]
    z, y, x = (lit[own] - box.start).T
    dark = np.ones(box.shape, dtype=bool)
    dark[z, y, x] = False
    values = smooth[dark] if dark.any() else smooth.ravel()
    background = float(np.median(values))
    noise = 1.4826 * float(np.median(np.abs(values - background)))  # the median absolute deviation of a Gaussian
    return _Surroundings(
        np.array(box.start), np.asarray(smooth - background), noise, (z, y, x), nearest, piece[nearest]
    )


def _brightest(found: Foreground, around: _Surroundings, own: int, other: int, cfg: TraceConfig) -> Link | None:
    """The best way between two pieces, None when they do not hang together above the level."""
    bright = around.signal[around.places]
    mine, theirs = around.of_piece == own, around.of_piece == other
    dimmer = min(float(np.median(bright[mine])), float(np.median(bright[theirs])))
    level = max(cfg.signal * dimmer, _NOISE * around.noise)
    if dimmer <= level:
        return None
    label = np.full(around.signal.shape, -1, dtype=np.int64)  # strand voxel of each place, -2 for a third piece
    label[around.places] = np.where(mine | theirs, around.nearest, -2)
    usable = (label >= 0) | ((label == -1) & (around.signal >= level))
    voxels, at = np.argwhere(usable).astype(np.int32), label[usable]
    z, y, x = usable.shape
    pairs, step = neighbours(voxels, (z, y, x), found.spacing)
    price = (dimmer / np.clip(around.signal[usable], level, dimmer)) ** 2
    weight = step * (price[pairs[:, 0]] + price[pairs[:, 1]]) / 2
    graph = csr_array((weight, (pairs[:, 0], pairs[:, 1])), shape=(len(voxels), len(voxels)))
    begins, goals = (
        np.flatnonzero(np.isin(at, around.nearest[mine])),
        np.flatnonzero(np.isin(at, around.nearest[theirs])),
    )
    total, before, _ = dijkstra(graph, directed=False, indices=begins, min_only=True, return_predecessors=True)
    goal = int(goals[total[goals].argmin()])
    if not np.isfinite(total[goal]):
        return None
    way = [goal]
    while before[way[-1]] >= 0:
        way.append(int(before[way[-1]]))
    between = way[-2:0:-1]
    line = (voxels[way[::-1]] + around.start) * found.spacing
    length = float(np.linalg.norm(np.diff(line, axis=0), axis=1).sum())
    if length > cfg.signal_gap:
        return None
    darkest = float(np.min(around.signal[usable][between], initial=dimmer)) / dimmer
    return Link(length / darkest, Join(int(at[way[-1]]), int(at[goal]), line[1:-1]))
