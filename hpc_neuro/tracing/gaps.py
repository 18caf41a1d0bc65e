"""Join pieces over gaps: first along what the image shows (see image_links), then by straight bridges.

A straight bridge is blind: an end that points at another piece is joined to it, over a limited length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from hpc_neuro.tracing.centerlines import Centerlines
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.graph import (
    Bridges,
    CenterlineGraph,
    CenterlineIndex,
    DisjointSets,
    build_centerline_graph,
    build_straight_bridges,
    concatenate_bridges,
    mark_first,
    measure_ends,
    no_bridges,
)
from hpc_neuro.tracing.image_links import find_image_links
from hpc_neuro.tracing.probability import Bools, Floats, Ints, ReadBox
from hpc_neuro.tracing.voxel_graph import SurfaceIndex, VoxelGraph

_WIDEST_ANGLE = 60.0
"""[degree] Largest angle between the direction of an end and the bridge that leaves it."""
_WORTH = 1.0
"""[cable of the smaller piece] Highest cost of a bridge: specks are not worth a leap."""
_HINTED = 0.5
"""Factor on the cost of a bridge where the probability between is almost the lower threshold."""
_FLANK = 1.0
"""[voxel] How far outside the radius of a centerline a voxel still lies on its flank."""
_ANGLES = 7
"""Angles at which the longest bridge is looked at, for the ball that holds all."""
_ROUNDING = 1e-6
"""[voxel], [degree] Margin for what rounding may leave out."""
_ENDS_AT_ONCE = 4096
"""Ends whose surroundings are held in memory together."""
_ROUNDS = 20
"""Rounds of bridges: a string of beads gets its direction bead by bead."""


@dataclass(frozen=True)
class _Pieces:
    """P pieces: components joined by bridges."""

    of_component: Ints
    """[C] piece of each component."""
    of_node: Ints
    """[K] piece of each node of the centerlines and bridges."""
    cable: Floats
    """[P] in the metric's unit."""

    def __len__(self) -> int:
        return len(self.cable)


@dataclass(frozen=True)
class _Ends:
    """E ends of the centerlines (see LineEnds), by voxels of the graph, which no round renumbers."""

    voxels: Ints
    """[E] the anchor of each."""
    directions: Floats
    """[E, 3] unit vector out of the piece; zero where the end is that of a blob."""


@dataclass(frozen=True)
class _Candidates:
    """Possible bridges."""

    cost: Floats
    ends: Ints
    """Voxel at which each begins."""
    targets: Ints
    """Voxel at which it arrives."""

    def __len__(self) -> int:
        return len(self.cost)


def join_gaps(
    graph: VoxelGraph,
    centerlines: Centerlines,
    cfg: TraceConfig,
    image: ReadBox | None = None,
    roots: Sequence[int] = (),
) -> Bridges:
    """The bridges that join pieces, without a cycle: along what the image shows, if one is given, then straight ones.

    A straight bridge of length g whose direction differs from the end's by an angle a costs g * (3 - 2 cos a), down to
    half of that where the probability between is almost the lower threshold, and may cost `cfg.gap`. So the stated
    limit holds for straight continuations and shrinks for bends. Two blobs without direction join over a third of it.
    Cheap bridges come first, and what they join has new ends in the next round. `roots` are the voxels of given roots
    (see find_image_links).
    """
    index = CenterlineIndex(graph, centerlines)
    bridges = no_bridges()

    # Links along the image come first: they rest on evidence, and straight bridges on none.
    if image is not None and cfg.signal_gap > 0:
        bridges = find_image_links(graph, centerlines, index, image, cfg, roots)

    is_used = np.zeros(len(graph.voxels), dtype=bool)
    changed = np.arange(graph.components)
    ends = _Ends(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))

    # What a round joins has longer pieces and new ends, which may allow further bridges.
    for _ in range(_ROUNDS if cfg.gap > 0 else 0):
        lines = build_centerline_graph(graph, centerlines, bridges)
        pieces = _measure_pieces(graph, lines)
        if len(pieces) < 2:
            break

        is_changed = np.zeros(len(pieces), dtype=bool)
        is_changed[pieces.of_component[changed]] = True

        ends = _update_ends(graph, lines, pieces, is_changed, ends)
        candidates = _find_candidates(graph, ends, pieces, is_changed, cfg)
        chosen = _choose_bridges(graph, pieces, candidates, is_used)
        if not len(chosen):
            break

        starts, targets = candidates.ends[chosen], candidates.targets[chosen]
        is_used[starts] = True
        changed = np.unique(graph.component[np.concatenate([starts, targets])])

        # A bridge should reach the middle of the neurite and not its surface.
        centered = index.find_beside(graph.points[targets], graph.component[targets], _FLANK)
        targets = np.where(centered >= 0, centered, targets)

        bridges = concatenate_bridges([bridges, build_straight_bridges(graph, starts, targets)])
    return bridges


def _measure_pieces(graph: VoxelGraph, lines: CenterlineGraph) -> _Pieces:
    count, label = lines.label_pieces()

    # Points on bridges belong to no component.
    is_voxel = lines.voxels >= 0
    of_component = np.zeros(graph.components, dtype=np.int64)
    of_component[graph.component[lines.voxels[is_voxel]]] = label[is_voxel]

    cable = np.bincount(label[lines.edges[:, 0]], weights=lines.edge_lengths, minlength=count)
    return _Pieces(of_component, label.astype(np.int64), cable.astype(np.float64))


def _update_ends(graph: VoxelGraph, lines: CenterlineGraph, pieces: _Pieces, is_changed: Bools, ends: _Ends) -> _Ends:
    """The ends of all pieces: those that are changed [P] are measured, and the `ends` of the others are kept."""
    part = lines if is_changed.all() else lines.select(is_changed[pieces.of_node])
    measured = measure_ends(part)

    is_kept = ~is_changed[pieces.of_component[graph.component[ends.voxels]]]
    return _Ends(
        np.concatenate([ends.voxels[is_kept], part.voxels[measured.anchors]]),
        np.concatenate([ends.directions[is_kept], measured.directions]),
    )


def _find_candidates(
    graph: VoxelGraph, ends: _Ends, pieces: _Pieces, is_changed: Bools, cfg: TraceConfig
) -> _Candidates:
    """The cheapest bridge from each end to each piece that its cost allows.

    The last round joined the pieces that are changed [P]. All bridges between other pieces have been decided: they were
    built, or their end is used. So only bridges from or to the changed pieces are looked for.
    """
    end_piece = pieces.of_component[graph.component[ends.voxels]]

    # Two blobs have no direction that could speak against a bridge between them.
    has_direction = np.asarray(ends.directions.any(axis=1))
    is_blob = np.ones(len(pieces), dtype=bool)
    is_blob[end_piece[has_direction]] = False

    search = _BridgeSearch(graph, ends, pieces, end_piece, has_direction, is_blob, cfg)

    # Changed pieces may reach out to all others. The others can only gain a bridge to a changed one.
    parts = list(search.run(np.flatnonzero(is_changed[end_piece]), graph.surfaces))
    if not is_changed.all():
        targets = np.flatnonzero(is_changed[pieces.of_component[graph.component]])
        parts += search.run(np.flatnonzero(~is_changed[end_piece]), SurfaceIndex(graph, targets))

    return _Candidates(
        np.concatenate([np.zeros(0), *(part.cost for part in parts)]),
        np.concatenate([np.zeros(0, dtype=np.int64), *(part.ends for part in parts)]),
        np.concatenate([np.zeros(0, dtype=np.int64), *(part.targets for part in parts)]),
    )


@dataclass(frozen=True)
class _BridgeSearch:
    """What the search for bridges of one round looks at."""

    graph: VoxelGraph
    ends: _Ends
    pieces: _Pieces
    end_piece: Ints
    """[E] piece of each end."""
    has_direction: Bools
    """[E] whether each end is that of a tube."""
    is_blob: Bools
    """[P] whether no end of a piece has a direction."""
    cfg: TraceConfig

    def run(self, ends: Ints, surfaces: SurfaceIndex) -> Iterator[_Candidates]:
        """The candidates of some of the ends, chunk by chunk; `surfaces` are those of the voxels they may reach."""
        cable = self.pieces.cable[self.end_piece[ends]]

        # The gap is measured between surfaces. A longer bridge would cost too much even where the probability halves
        # its cost.
        depth = self.graph.thickness[self.ends.voxels[ends]] + 0.5
        reach = np.minimum(self.cfg.gap, _WORTH * cable / _HINTED) + depth

        # The shortest bridge costs half a voxel: specks are dismissed before anything is searched.
        is_worth = _WORTH * cable >= _HINTED
        ends, reach = ends[is_worth], reach[is_worth]

        # After the first round, few ends of a large volume are near what has changed.
        if surfaces is not self.graph.surfaces:
            is_near = surfaces.mark_near(self.graph.points[self.ends.voxels[ends]], float(reach.max(initial=0.0)))
            ends, reach = ends[is_near], reach[is_near]

        # The ends of a large volume may have more neighbors than memory holds.
        for begin in range(0, len(ends), _ENDS_AT_ONCE):
            part = slice(begin, begin + _ENDS_AT_ONCE)
            place, target = self._find_targets(ends[part], reach[part], surfaces)
            yield self._select(ends[part][place], target)

    def _find_targets(self, ends: Ints, reach: Floats, surfaces: SurfaceIndex) -> tuple[Ints, Ints]:
        """[m] places in `ends` [n], and [m] the voxels within their `reach` [n] to which a bridge may be cheap enough.

        A bridge that bends must be shorter, so all of them lie in a ball ahead of the end, which is a fraction of the
        ball around it.
        """
        anchors = self.ends.voxels[ends]
        points, directions, has_direction = (
            self.graph.points[anchors], self.ends.directions[ends], self.has_direction[ends]
        )  # fmt: skip
        depth = self.graph.thickness[anchors] + 0.5
        budget = np.minimum(self.cfg.gap, _WORTH * self.pieces.cable[self.end_piece[ends]]) / _HINTED

        def choose_balls(thickest: float) -> tuple[Floats, Floats]:
            def measure_limit(cosine: float) -> Floats:
                # The gap is measured between surfaces.
                return np.minimum(reach + thickest, budget / (3 - 2 * cosine) + depth + thickest)

            # Between two angles a bridge is no longer than at the first, and no farther from the axis than at the
            # second.
            cosines = np.cos(np.radians(np.linspace(0, _WIDEST_ANGLE + _ROUNDING, _ANGLES))).tolist()
            ahead = measure_limit(1.0) / 2
            squared = ahead**2
            for wide, narrow in itertools.pairwise(cosines):
                limit = measure_limit(wide)
                squared = np.maximum(squared, limit**2 + ahead**2 - 2 * limit * ahead * narrow)

            centers = points + np.where(has_direction, ahead, 0.0)[:, None] * directions
            # Without a direction a bridge costs as much as one at a right angle.
            return centers, np.where(has_direction, np.sqrt(squared), measure_limit(0.0)) + _ROUNDING

        place, target, thickest = surfaces.find_in_balls(choose_balls)
        out = self.graph.points[target] - points[place]
        is_within = np.vecdot(out, out) <= (reach[place] + thickest) ** 2
        return place[is_within], target[is_within]

    def _select(self, end: Ints, target: Ints) -> _Candidates:
        """The cheapest of the bridges from `end` [n] to `target` [n] for each end and piece, where it is allowed."""
        graph, pieces = self.graph, self.pieces
        own_piece, other_piece = self.end_piece[end], pieces.of_component[graph.component[target]]
        has_direction = self.has_direction[end]

        # An end without direction may only meet a piece without direction: nothing else tells where it points.
        is_allowed = (own_piece != other_piece) & (has_direction | self.is_blob[other_piece])
        end, target, own_piece, other_piece, has_direction = (
            values[is_allowed] for values in (end, target, own_piece, other_piece, has_direction)
        )

        anchor = self.ends.voxels[end]
        out = graph.points[target] - graph.points[anchor]
        away = np.linalg.norm(out, axis=1)
        cosine = np.vecdot(out, self.ends.directions[end]) / away
        # From surface to surface.
        gap = np.maximum(away - (graph.thickness[anchor] + 0.5) - graph.thickness[target], 1)

        cost = gap * (3 - 2 * cosine)
        most = np.minimum(self.cfg.gap, _WORTH * np.minimum(pieces.cable[other_piece], pieces.cable[own_piece]))

        # The probability between can at best halve the cost, so all that is above twice the limit is out.
        is_ahead = (cosine >= np.cos(np.radians(_WIDEST_ANGLE))) | ~has_direction
        worth = np.flatnonzero(is_ahead & (cost * _HINTED <= most))

        # The cheapest to each piece; only for these the probability between is read. Of equals the first voxel wins.
        worth = worth[np.lexsort((target[worth], cost[worth], other_piece[worth], end[worth]))]
        best = worth[mark_first(end[worth], other_piece[worth])]

        voxels = anchor[best]
        hint = _measure_probability_between(graph, self.cfg.floor, voxels, target[best]) / self.cfg.floor
        total = cost[best] * (1 - (1 - _HINTED) * np.minimum(1.0, hint))

        is_cheap = total <= most[best]
        return _Candidates(total[is_cheap], voxels[is_cheap], target[best][is_cheap])


def _measure_probability_between(graph: VoxelGraph, floor: float, starts: Ints, stops: Ints) -> Floats:
    """[n] mean probability of the background on the straight line between two voxels; 1 where there is none."""
    a, b = graph.voxels[starts].astype(np.int64), graph.voxels[stops].astype(np.int64)
    counts = np.maximum(np.abs(b - a).max(axis=1, initial=0) - 1, 0)

    # The points of all lines lie in one array, so that each cell is read once.
    line = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(line)) - np.repeat(np.cumsum(counts) - counts, counts)

    share = ((number + 1) / (counts[line] + 1))[:, None]
    values = graph.sampler.sample_background(a[line] * (1 - share) + b[line] * share)

    # Foreground on the line would count as a hint, though it is a piece of its own.
    is_dark = values < floor
    values, dark_counts = values[is_dark], np.bincount(line[is_dark], minlength=len(starts))
    firsts = np.cumsum(dark_counts) - dark_counts

    mean = np.ones(len(starts))
    # Lines of one length are averaged together, each by itself: the mean must not depend on the other lines.
    for count in np.unique(dark_counts[dark_counts > 0]).tolist():
        own = np.flatnonzero(dark_counts == count)
        mean[own] = values[firsts[own][:, None] + np.arange(count)].mean(axis=1)
    return mean


def _choose_bridges(graph: VoxelGraph, pieces: _Pieces, candidates: _Candidates, is_used: Bools) -> Ints:
    """The cheapest candidates that join pieces without a cycle, each end used once (Kruskal's algorithm)."""
    # Equal costs are ordered by voxels, so that the choice does not depend on the search.
    order = np.lexsort((candidates.targets, candidates.ends, candidates.cost))
    order = order[~is_used[candidates.ends[order]]]

    own = pieces.of_component[graph.component[candidates.ends[order]]]
    other = pieces.of_component[graph.component[candidates.targets[order]]]

    # Where no end is used twice, the cheapest candidates without a cycle are a minimum spanning tree of all pieces.
    spans = _mark_spanning(own, other, len(pieces))
    is_used_twice = np.bincount(candidates.ends[order[spans]], minlength=len(graph.voxels)) > 1
    if not is_used_twice.any():
        return order[spans]

    # Candidates of pieces that are not joined by any have no influence on one another.
    links = csr_array((np.ones(len(own), dtype=np.int8), (own, other)), shape=(len(pieces),) * 2)
    group = connected_components(links, directed=False)[1][own]
    is_slow = np.isin(group, group[is_used_twice[candidates.ends[order]]])

    slow = np.flatnonzero(is_slow)
    spans[slow] = _mark_chosen(candidates.ends[order[slow]], own[slow], other[slow], len(pieces))
    return order[spans]


def _mark_spanning(own: Ints, other: Ints, pieces: int) -> Bools:
    """[n] whether each link of two pieces, cheapest first, joins what those before it do not."""
    # Of several links of the same two pieces only the first can.
    low, high = np.minimum(own, other), np.maximum(own, other)
    rank = np.arange(len(own))
    by_pair = np.lexsort((rank, high, low))
    first = np.sort(by_pair[mark_first(low[by_pair], high[by_pair])])

    # Scipy takes a weight of 0 for no link, so ranks begin at 1.
    links = csr_array((first + 1.0, (low[first], high[first])), shape=(pieces, pieces))
    spans = np.zeros(len(own), dtype=bool)
    spans[minimum_spanning_tree(links).data.astype(np.int64) - 1] = True
    return spans


def _mark_chosen(ends: Ints, own: Ints, other: Ints, pieces: int) -> Bools:
    """[n] whether each candidate, cheapest first, joins two pieces without a cycle from an end that is not used."""
    joined, used = DisjointSets(pieces), set[int]()
    chosen = np.zeros(len(ends), dtype=bool)
    # Plain lists: single values of numpy's arrays are slow in a loop.
    for number, (end, piece, target) in enumerate(zip(ends.tolist(), own.tolist(), other.tolist(), strict=True)):
        if end not in used and joined.merge(piece, target):
            used.add(end)
            chosen[number] = True
    return chosen
