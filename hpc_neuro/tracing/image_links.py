"""Links along faint neurites: what joins pieces of a broken mask along what the image shows."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.cluster.hierarchy import DisjointSet
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hpc_neuro.tracing.centerlines import Skeleton
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.graph import Join, Lines, Wires, wires
from hpc_neuro.tracing.image_paths import CHEAPEST, Link, Pair, Sight
from hpc_neuro.tracing.voxel_graph import Floats, Foreground, Read

_WORTH = 2.0  # a link may cost this many times the extent of the smaller piece
_ENOUGH = 0.5  # of `min_cable`: two pieces that are less together are specks

_Option = tuple[float, Pair, Link | None]  # price, who, and the link once it has been looked for


def links(
    found: Foreground, traced: Skeleton, lines: Lines, image: Read, cfg: TraceConfig, starts: Sequence[int] = ()
) -> list[Join]:
    """What joins components along what the image shows, cheap links first, without a cycle.

    A link may cost so much of the extent of the smaller piece it joins; what is joined is larger, and may leap farther.
    Specks are not looked at: what is shorter than `min_branch`, and two pieces that are too small together, unless one
    is at a given root (`starts`, voxels).
    """
    net = wires(found, traced, [])
    extent, sets = _extent(found, net), DisjointSet(range(found.components))
    sight = Sight(found, lines, image, cfg, extent >= cfg.min_branch)
    seeds = found.component[list(starts)]
    extent[seeds] = np.maximum(extent[seeds], cfg.min_cable)
    chosen: list[Join] = []
    for todo in _apart(sight.near(net.voxels[net.degree <= 1]), found.components):
        while todo:
            heapq.heapify(todo)
            waiting, before = [], len(chosen)
            while todo:
                option = price, pair, link = heapq.heappop(todo)
                a, b = sets[pair[0]], sets[pair[1]]
                if a == b:
                    continue
                small, large = sorted((extent[a], extent[b]))
                if price > _WORTH * small or small + large < _ENOUGH * cfg.min_cable:
                    waiting.append(option)
                elif link is None:  # so far the price is the least it can be
                    if (link := sight.between(pair)) is not None:
                        heapq.heappush(todo, (link.price, pair, link))
                else:
                    chosen.append(link.join)
                    sets.merge(a, b)
                    extent[sets[a]] = extent[a] + extent[b]
            todo = waiting if len(chosen) > before else []
    return chosen


def _apart(near: dict[Pair, float], components: int) -> Iterator[list[_Option]]:
    """The options in groups that have no component in common, so that what is read lies together."""
    pairs = np.array(list(near), dtype=np.int64).reshape(-1, 2)
    graph = csr_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(components, components))
    _, group = connected_components(graph, directed=False)
    found: dict[int, list[_Option]] = {}
    for pair, gap in near.items():
        found.setdefault(int(group[pair[0]]), []).append((gap * CHEAPEST, pair, None))
    yield from (found[number] for number in sorted(found))


def _extent(found: Foreground, net: Wires) -> Floats:
    """[C] cable of each component, and the diameter of its thickest place: a bouton has no cable."""
    of = found.component[net.voxels]
    thickest = np.zeros(found.components)
    np.maximum.at(thickest, found.component, found.thickness)
    return np.bincount(of[net.edges[:, 0]], weights=net.lengths, minlength=found.components) + 2 * thickest
