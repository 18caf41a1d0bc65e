"""Bridges over breaks: along what the image shows (see links), then blindly: an end that points at another piece is
joined to it by a straight line of limited length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hpc_neuro.tracing.centerlines import Skeleton
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.graph import Join, Lines, Wires, straight, wires
from hpc_neuro.tracing.image_links import links
from hpc_neuro.tracing.voxel_graph import Floats, Foreground, Ints, Read

Bridge = tuple[int, int]
_BASE = 8.0  # [voxel] shortest stretch behind an end that gives its direction
_SLENDER = 3.0  # an end is a tube's, and has a direction, when that stretch is this many radii long
_WORTH = 1.0  # a bridge may cost this many times the cable of the smaller piece it joins: specks are not worth a leap
_HINTED = 0.5  # a bridge costs this share of its price where the probability between is almost `floor`
_FLANK = 1.0  # [voxel] farther out than its radius, a voxel still lies on a centre line's flank
_AT_ONCE = 256  # ends whose surroundings are held together
_ROUNDS = 20  # a string of beads gets its direction bead by bead


@dataclass(frozen=True)
class _Ends:
    anchor: Ints  # [E] node near the end
    direction: Floats  # [E, 3] unit vector out of the piece; zero where the end is a blob's, not a tube's


@dataclass(frozen=True)
class _Candidate:
    price: float
    end: int
    target: int


def bridges(
    found: Foreground, traced: Skeleton, cfg: TraceConfig, image: Read | None = None, starts: Sequence[int] = ()
) -> list[Join]:
    """What joins pieces, without a cycle: links along what the image, if one is given, shows, then blind bridges.

    A blind bridge of length g whose direction differs from the end's by an angle a costs g * (3 - 2 cos a), down to
    half of that where the probability between is almost `floor`; it may cost `cfg.gap`. So the stated limit holds for
    straight continuations and shrinks for bends. Two blobs without direction join over a third of it. Cheap ones come
    first, and what they join has new ends in the next round. `starts`: voxels of given roots (see links).
    """
    lines = Lines(found, traced)
    chosen = [] if image is None or cfg.signal_gap == 0 else links(found, traced, lines, image, cfg, starts)
    used: set[int] = set()
    for _ in range(_ROUNDS if cfg.gap > 0 else 0):
        net = wires(found, traced, chosen)
        piece, cable = _pieces(found, net)
        if len(cable) < 2:
            break
        options = _candidates(found, net, piece, cable, cfg)
        fresh = _spanning(options, piece, len(cable), used)
        if not fresh:
            break
        used |= {end for end, _ in fresh}
        chosen += [straight(found, end, _centred(found, lines, target)) for end, target in fresh]
    return chosen


def _centred(found: Foreground, lines: Lines, target: int) -> int:
    """The voxel of the centre lines on whose flank a voxel is; itself where on none's."""
    line = lines.beside(found.points[target], int(found.component[target]), _FLANK)
    return target if line is None else line


def _pieces(found: Foreground, net: Wires) -> tuple[NDArray[np.int32], Floats]:
    """[N] piece of each foreground voxel (components joined by bridges), and [P] cable of each piece."""
    n = len(net.points)
    graph = csr_array((np.ones(len(net.edges)), (net.edges[:, 0], net.edges[:, 1])), shape=(n, n))
    count, label = connected_components(graph, directed=False)
    real = net.voxels >= 0
    of_component = np.zeros(found.components, dtype=np.int32)
    of_component[found.component[net.voxels[real]]] = label[real]
    cable = np.bincount(label[net.edges[:, 0]], weights=net.lengths, minlength=count).astype(np.float64)
    return of_component[found.component], cable


def _ends(net: Wires) -> _Ends:
    """Every node with one neighbour, looked at from a place a radius or so inside, where the path runs in the middle.

    The direction is taken from there back along the way that holds most cable.
    """
    around = net.neighbor_lists()
    behind = _cable_behind(net, around)
    anchors, directions = [], []
    for end, beside in enumerate(around):
        if len(beside) <= 1:
            anchor, direction = _look(net, around, behind, end)
            anchors.append(anchor)
            directions.append(direction)
    return _Ends(np.array(anchors, dtype=np.int64), np.array(directions).reshape(-1, 3))


def _cable_behind(net: Wires, around: Sequence[Sequence[int]]) -> dict[tuple[int, int], float]:
    """For each step from a node to a neighbour, the cable that lies that way."""
    parent = np.full(len(around), -2)
    order: list[int] = []
    for start in range(len(around)):
        stack = [start] if parent[start] == -2 else []
        if stack:
            parent[start] = -1
        while stack:
            node = stack.pop()
            order.append(node)
            for other in around[node]:
                if parent[other] == -2:
                    parent[other] = node
                    stack.append(other)
    below = np.zeros(len(around))
    for node in reversed(order):
        if parent[node] >= 0:
            below[parent[node]] += below[node] + np.linalg.norm(net.points[node] - net.points[parent[node]])
    total = below.copy()
    for node in order:
        if parent[node] >= 0:
            total[node] = total[parent[node]]
    found = {}
    for node, above in enumerate(parent.tolist()):
        if above >= 0:
            found[above, node] = float(below[node])
            found[node, above] = float(total[node] - below[node])
    return found


def _look(
    net: Wires, around: Sequence[Sequence[int]], behind: dict[tuple[int, int], float], end: int
) -> tuple[int, Floats]:
    """A node near the end from which it is looked at, and the unit vector that leads out (zero: nothing is slender)."""
    before, here, anchor = -1, end, end
    thick = net.radii[end]
    while True:
        if np.linalg.norm(net.points[here] - net.points[end]) <= 1.5 * net.radii[here] and net.voxels[here] >= 0:
            anchor = here
        away = float(np.linalg.norm(net.points[anchor] - net.points[here]))
        if away >= max(_BASE, _SLENDER * thick):
            break
        onward = [node for node in around[here] if node != before]
        if not onward:
            break
        ahead = max(onward, key=lambda node: behind[here, node])
        before, here = here, ahead
        thick = max(thick, net.radii[here])
    if away < max(_BASE / 2, _SLENDER * thick):
        return anchor, np.zeros(3)
    return anchor, np.asarray((net.points[anchor] - net.points[here]) / away)


def _candidates(
    found: Foreground,
    net: Wires,
    piece: NDArray[np.int32],
    cable: Floats,
    cfg: TraceConfig,
) -> list[_Candidate]:
    points, ends = found.points, _ends(net)
    anchors = net.voxels[ends.anchor]
    steepest = np.cos(np.radians(cfg.gap_angle))
    blob = np.ones(len(cable), dtype=bool)
    blob[piece[anchors[ends.direction.any(axis=1)]]] = False
    inside = net.radii[ends.anchor] + 0.5
    options = []
    thick = found.thickness
    reach = cfg.gap + inside + thick.max()
    some = (slice(i, i + _AT_ONCE) for i in range(0, len(anchors), _AT_ONCE))
    balls = (ball for part in some for ball in found.near.query_ball_point(points[anchors[part]], reach[part]))
    for anchor, direction, depth, ball in zip(anchors, ends.direction, inside, balls, strict=True):
        others = np.array(ball, dtype=np.int64)
        others = others[piece[others] != piece[anchor]]
        if not direction.any():
            others = others[blob[piece[others]]]
        if not len(others):
            continue
        out = points[others] - points[anchor]
        away = np.linalg.norm(out, axis=1)
        cosine = out @ direction / away
        price = np.maximum(away - depth - thick[others], 1) * (3 - 2 * cosine)  # from surface to surface
        allowed = (cosine >= steepest) | (not direction.any())
        most = np.minimum(cfg.gap, _WORTH * np.minimum(cable[piece[others]], cable[piece[anchor]]))
        # what half the price would be too much for is too dear whatever lies between: nearly all specks, in noise
        worth = np.flatnonzero(allowed & (price * _HINTED <= most))
        worth = worth[np.lexsort((price[worth], piece[others[worth]]))]
        for best in worth[np.unique(piece[others[worth]], return_index=True)[1]]:  # the cheapest of each piece
            hint = _between(found, cfg.floor, int(anchor), int(others[best])) / cfg.floor
            total = float(price[best]) * (1 - (1 - _HINTED) * min(1.0, hint))
            if total <= most[best]:
                options.append(_Candidate(total, int(anchor), int(others[best])))
    return options


def _spanning(options: list[_Candidate], piece: NDArray[np.int32], pieces: int, used: set[int]) -> list[Bridge]:
    """The cheapest of the options that join pieces without a cycle, each end used once."""
    joined = np.arange(pieces)
    chosen = []
    for option in sorted(options, key=lambda c: (c.price, c.end, c.target)):
        a, b = (int(joined[piece[v]]) for v in (option.end, option.target))
        if a != b and option.end not in used:
            joined[joined == b] = a
            used.add(option.end)
            chosen.append((option.end, option.target))
    return chosen


def _between(found: Foreground, floor: float, a: int, b: int) -> float:
    """Mean probability on the straight line between two voxels, where there is no foreground."""
    ends = found.voxels[[a, b]].astype(np.int64)
    count = int(np.abs(ends[1] - ends[0]).max()) - 1
    if count < 1:
        return 1.0
    share = (np.arange(count) + 1)[:, None] / (count + 1)
    values = found.at.plain(ends[0] * (1 - share) + ends[1] * share)
    dark = values[values < floor]
    return float(dark.mean()) if len(dark) else 1.0
