"""Join components of a broken mask along faint neurites that the image shows.

The smoothed image around two components is cut at a level above its local background and the noise of that. If the two
hang together above the level, the brightest path between them is a link. A mask has one threshold for the whole volume,
or that of a network that has never seen so faint a neurite; the level of a link follows its surroundings.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.tracing.centerlines import Centerlines
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.graph import (
    Bridges,
    CenterlineGraph,
    CenterlineIndex,
    DisjointSets,
    build_centerline_graph,
    mark_first,
    measure_lengths,
    no_bridges,
)
from hpc_neuro.tracing.probability import Bools, CellCache, Floats, Ints, ReadBox
from hpc_neuro.tracing.voxel_graph import VoxelGraph, find_cheapest_path, find_neighbor_pairs

_SIGNAL = 0.15
"""Brightness of a link above the local background, at least, as a share of the dimmer component's."""
_NOISE_LEVEL = 4.0
"""[standard deviation of the background] Brightness of a link and of the components it joins, at least."""
_CHEAPEST = 0.5
"""Cost of a link per length where the image between is as bright as the dimmer component; else up to 1."""
_WORTH = 2.0
"""[extent of the smaller component] Highest cost of a link."""
_ENOUGH = 0.5
"""[min_cable] Two components of less extent together are specks."""
_BLUR = 1.0
"""[voxel] Standard deviation of the Gaussian that smooths the image, against noise."""
_MARGIN = 8.0
"""[voxel] Surroundings of the two places that are looked at, plus `_BOW`."""
_BOW = 0.25
"""[distance of the two places] How far a path may bend aside."""
_FLANK = 2.0
"""[voxel] How far outside the radius of a centerline the foreground around it may reach."""
_FREE = 1e-6
"""Cost per length of a path within a component."""
_NEAREST = 8
"""Components with which an end is compared."""
_ENDS_AT_ONCE = 256
"""Ends whose surroundings are held in memory together."""
_KEPT_CELLS = 64
"""Cells of the image that stay in memory as they are stored."""
_KEPT_TILES = 1024
"""Tiles of the smoothed image and of the foreground that stay in memory."""
_TILE: Shape = (32, 32, 32)
"""[voxel] What is smoothed at once."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class ImageLink:
    """A possible bridge along the image."""

    cost: float
    """Its length, down to half of it the brighter its darkest place is."""
    end: int
    """Voxel at which it begins."""
    target: int
    """Voxel at which it arrives."""
    points: Floats
    """[k, 3] between the two, in the metric's unit."""


_Option = tuple[float, Pair, ImageLink | None]
"""Cost, the two components, and their link; before it is searched, the cost is the least it can be."""


def find_image_links(
    graph: VoxelGraph,
    centerlines: Centerlines,
    index: CenterlineIndex,
    image: ReadBox,
    cfg: TraceConfig,
    roots: Sequence[int] = (),
) -> Bridges:
    """The bridges that join components along what the image shows, cheap links first, without a cycle.

    The cost of a link is limited by the extent of the smaller component it joins. What is joined is larger and may
    leap farther. Specks are left out: components shorter than `min_branch`, and two that are too small together, unless
    one is at a given root (`roots`, voxels).
    """
    # Links are chosen between components, so no bridge is in place yet.
    lines = build_centerline_graph(graph, centerlines, no_bridges())
    extent = _measure_extent(graph, lines)
    finder = ImagePathFinder(graph, index, image, cfg, extent >= cfg.min_branch)

    # What lies at a root is no speck, however small it is.
    at_root = graph.component[list(roots)]
    extent[at_root] = np.maximum(extent[at_root], cfg.min_cable)

    gaps = finder.find_nearby(lines.voxels[lines.degree <= 1])

    # A group is finished before the next one begins, so that the tiles it reads stay in memory.
    sets = DisjointSets(graph.components)
    links: list[ImageLink] = []
    for options in _group_options(gaps, graph.components):
        links += _link_components(options, finder, sets, extent, _ENOUGH * cfg.min_cable)
    return _pack_links(links)


def _measure_extent(graph: VoxelGraph, lines: CenterlineGraph) -> Floats:
    """[C] cable of each component, plus the diameter of its thickest place: a bouton has no cable."""
    component = graph.component[lines.voxels]
    thickest = np.zeros(graph.components)
    np.maximum.at(thickest, graph.component, graph.thickness)

    cable = np.bincount(component[lines.edges[:, 0]], weights=lines.edge_lengths, minlength=graph.components)
    return cable + 2 * thickest


def _group_options(gaps: dict[Pair, float], components: int) -> Iterator[list[_Option]]:
    """The pairs as options, in groups that have no component in common, so that what is read lies together."""
    pairs = np.array(list(gaps), dtype=np.int64).reshape(-1, 2)
    graph = csr_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(components, components))
    _, label = connected_components(graph, directed=False)
    groups: dict[int, list[_Option]] = {}

    # The least cost is a lower bound, so a link is searched only when no cheaper option is left.
    for pair, gap in gaps.items():
        groups.setdefault(int(label[pair[0]]), []).append((gap * _CHEAPEST, pair, None))

    for number in sorted(groups):
        yield groups[number]


def _link_components(
    options: list[_Option], finder: ImagePathFinder, sets: DisjointSets, extent: Floats, enough: float
) -> list[ImageLink]:
    """Join components along the cheapest links of one group; `sets` and `extent` follow what is joined."""
    chosen: list[ImageLink] = []

    while options:
        heapq.heapify(options)
        postponed, count = [], len(chosen)
        while options:
            option = cost, pair, link = heapq.heappop(options)

            # The two of a pair may have been joined by way of others, and a second link would close a cycle.
            a, b = sets.find(pair[0]), sets.find(pair[1])
            if a == b:
                continue

            small, large = sorted((extent[a], extent[b]))
            if cost > _WORTH * small or small + large < enough:
                postponed.append(option)
            elif link is None:
                if (link := finder.find_link(pair)) is not None:
                    heapq.heappush(options, (link.cost, pair, link))
            else:
                chosen.append(link)
                sets.merge(a, b)
                extent[sets.find(a)] = small + large

        # What was too small before may have grown.
        options = postponed if len(chosen) > count else []
    return chosen


def _pack_links(links: Sequence[ImageLink]) -> Bridges:
    return Bridges(
        np.array([link.end for link in links], dtype=np.int64),
        np.array([link.target for link in links], dtype=np.int64),
        np.array([len(link.points) for link in links], dtype=np.int64),
        np.concatenate([np.zeros((0, 3)), *(link.points for link in links)]),
    )


@dataclass(frozen=True)
class _Scene:
    """A box around two places."""

    start: Ints
    """[3] its first voxel."""
    signal: Floats
    """[Z, Y, X] smoothed image above the background."""
    noise: float
    """Standard deviation of the background."""
    foreground: Ints
    """[F] ascending places of the foreground in the box: numbers of voxels in raster order."""
    patch: NDArray[np.unsignedinteger]
    """[F] number of the patch of foreground, connected in the box, to which each belongs."""
    component: NDArray[np.int32]
    """[F] component of each; -1 in specks, and in patches without a graph voxel in the box."""

    @property
    def shape(self) -> Shape:
        """Voxels along z, y, x."""
        z, y, x = self.signal.shape
        return z, y, x

    def mark_others(self, own: int, other: int) -> Bools:
        """[Z, Y, X] the foreground of all components but two."""
        is_other = (self.component >= 0) & (self.component != own) & (self.component != other)
        return _mark_places(self.foreground[is_other], self.shape)

    def list_patches(self, component: int) -> Ints:
        """[p] the first place of each patch of a component, ascending."""
        is_own = self.component == component
        places, patch = self.foreground[is_own], self.patch[is_own]

        # Numpy keeps the last of several values for one place, so the places are taken backwards.
        first = np.full(int(patch.max(initial=0)) + 1, -1, dtype=np.int64)
        first[patch[::-1]] = places[::-1]
        return np.sort(first[first >= 0])


class ImagePathFinder:
    """Searches the image for paths between the `large` [C] components of a graph; the others are specks."""

    def __init__(
        self, graph: VoxelGraph, index: CenterlineIndex, image: ReadBox, cfg: TraceConfig, is_large: Bools
    ) -> None:
        self._graph, self._index, self._cfg, self._is_large = graph, index, cfg, is_large
        self._image = CellCache(image, graph.shape, _KEPT_CELLS)
        self._smoothed = CellCache(self._smooth_box, graph.shape, _KEPT_TILES, _TILE)
        self._foreground = CellCache(graph.sampler.read_foreground, graph.shape, _KEPT_TILES, _TILE)
        self._number = np.zeros(graph.components, dtype=np.int64)
        self._is_visible: dict[int, bool] = {}
        self._places: dict[Pair, tuple[int, int]] = {}

    def find_nearby(self, ends: Ints) -> dict[Pair, float]:
        """The (component, other component) with ends within reach, and the distance from surface to surface.

        Of the `ends` (voxels) of a component the one nearest to the other component counts. Each end is compared with
        the nearest components only, however many there are.
        """
        ends = ends[self._is_large[self._graph.component[ends]]]
        parts = [self._compare_ends(ends[i : i + _ENDS_AT_ONCE]) for i in range(0, len(ends), _ENDS_AT_ONCE)]
        if not parts:
            return {}

        own, other, end, target, gap = (np.concatenate(values) for values in zip(*parts, strict=True))

        # The first of equals wins.
        order = np.lexsort((gap, other, own))
        order = order[mark_first(own[order], other[order])]
        pairs = list(zip(own[order].tolist(), other[order].tolist(), strict=True))
        self._places = dict(zip(pairs, zip(end[order].tolist(), target[order].tolist(), strict=True), strict=True))
        return dict(zip(pairs, gap[order].tolist(), strict=True))

    def _compare_ends(self, ends: Ints) -> tuple[Ints, Ints, Ints, Ints, Floats]:
        """Own and other component, end, nearest voxel of the other, and gap, of each end and nearby component."""
        graph, reach = self._graph, self._cfg.signal_gap

        # The reach holds between surfaces, but the search is between centers.
        place, target = graph.surfaces.find_within(graph.points[ends], reach + graph.thickness[ends])
        is_other = graph.component[target] != graph.component[ends[place]]
        is_other &= self._is_large[graph.component[target]]
        target, place = target[is_other], place[is_other]

        away = measure_lengths(graph.points[target] - graph.points[ends[place]])
        away = away - graph.thickness[target] - graph.thickness[ends[place]]

        # The nearest voxel of each component; of equals, the first voxel, so that the choice does not depend on the
        # search.
        nearest = self._find_least(place, graph.component[target], away)
        nearest = nearest[np.maximum(away[nearest], 0.0) <= reach]
        nearest = nearest[np.lexsort((target[nearest], away[nearest], place[nearest]))]
        _, first = np.unique(place[nearest] * graph.components + graph.component[target[nearest]], return_index=True)
        nearest = nearest[np.sort(first)]

        # The nearest components of each end.
        rank = np.arange(len(nearest)) - np.searchsorted(place[nearest], place[nearest])
        nearest = nearest[rank < _NEAREST]

        end, target = ends[place[nearest]], target[nearest]
        return graph.component[end], graph.component[target], end, target, np.maximum(away[nearest], 0.0)

    def _find_least(self, place: Ints, component: Ints, away: Floats) -> Ints:
        """The pairs of a place [n] and a component [n] that are the least `away` [n] of their kind, equals included."""
        if not len(place):
            return place

        # Components get numbers without holes, without a sort: the last pair of each component stands for it.
        number = np.arange(len(component))
        self._number[component] = number
        distinct = component[self._number[component] == number]
        self._number[distinct] = np.arange(len(distinct))

        key = place * len(distinct) + self._number[component]
        least = np.full((int(place.max()) + 1) * len(distinct), np.inf)
        np.minimum.at(least, key, away)
        return np.flatnonzero(away == least[key])

    def find_link(self, pair: Pair) -> ImageLink | None:
        """The best link of two components that `find_nearby` named, None when the image shows none."""
        # A component that is noise would be joined along noise.
        if not all(self._check_visible(component) for component in pair):
            return None

        end, target = self._places[pair]
        return self._find_brightest(self._read_scene(end, target), *pair)

    def _check_visible(self, component: int) -> bool:
        """Whether a component stands out of the noise where its probability is highest; noise itself does not."""
        if component not in self._is_visible:
            # A component takes part in many pairs, so its brightness is measured once.
            voxels = self._graph.voxels_of_component(component)
            voxel = int(voxels[self._graph.probability[voxels].argmax()])

            scene = self._read_scene(voxel, voxel)
            places = scene.foreground[scene.component == component]
            # Where a super-block is cut, two components may share a patch of foreground, and one of them has none.
            brightness = _median(scene.signal.take(places)) if len(places) else -np.inf
            self._is_visible[component] = brightness > _NOISE_LEVEL * scene.noise
        return self._is_visible[component]

    def _read_scene(self, end: int, target: int) -> _Scene:
        graph = self._graph
        a, b = graph.voxels[end], graph.voxels[target]
        away = float(np.linalg.norm(graph.points[end] - graph.points[target]))

        # A longer link may bend farther aside, so the box grows with the distance.
        margin = np.ceil((_MARGIN + _BOW * away) / graph.spacing).astype(np.int64)
        z0, y0, x0 = np.maximum(np.minimum(a, b) - margin, 0).tolist()
        z1, y1, x1 = np.minimum(np.maximum(a, b) + margin + 1, graph.shape).tolist()
        box = Box((z0, y0, x0), (z1, y1, x1))

        smooth = self._smoothed.read_box(box).astype(np.float32, copy=False)
        inside = np.asarray(self._foreground.read_box(box), dtype=bool)
        values = smooth[~inside] if not inside.all() else smooth.ravel()

        # The median ignores the few bright voxels of faint neurites outside the mask.
        background = _median(values)
        # The median absolute deviation of a Gaussian is 1 / 1.4826 standard deviations.
        noise = 1.4826 * _median(np.abs(values.astype(np.float64) - background))

        label, patches = cc3d.connected_components(inside, connectivity=26, return_N=True)

        # The skeleton tells which component a patch belongs to. The full foreground is not stored by component.
        voxels = graph.voxels_in_box(box)
        voxels = voxels[self._is_large[graph.component[voxels]]]
        component_of_patch = np.full(patches + 1, -1, dtype=np.int32)
        component_of_patch[label[tuple((graph.voxels[voxels] - box.start).T)]] = graph.component[voxels]

        foreground = np.flatnonzero(inside)
        patch = label.take(foreground)
        signal = smooth.astype(np.float64) - background
        return _Scene(np.array(box.start), signal, noise, foreground, patch, component_of_patch.take(patch))

    def _smooth_box(self, box: Box) -> NDArray[np.float32]:
        """[Z, Y, X] the image in a box, smoothed; the volume is mirrored at its borders."""
        # A halo as wide as the truncated Gaussian makes the tiles fit together.
        halo = int(np.ceil(3 * _BLUR))
        around = box.grow((halo, halo, halo)).clip(Box.whole(self._graph.shape))
        blurred = gaussian_filter(self._image.read_box(around).astype(np.float32), _BLUR, truncate=3.0)
        return blurred[box.relative_to(around.start).slices]

    def _find_brightest(self, scene: _Scene, own: int, other: int) -> ImageLink | None:
        """The cheapest path between two components above the level, None where there is none or it is too long."""
        own_places, other_places = (scene.foreground[scene.component == component] for component in (own, other))
        if not (len(own_places) and len(other_places)):
            return None

        # The dimmer component sets the level: a link can hardly be brighter than what it joins.
        dimmer = min(_median(scene.signal.take(own_places)), _median(scene.signal.take(other_places)))
        level = max(_SIGNAL * dimmer, _NOISE_LEVEL * scene.noise)
        if dimmer <= level:
            return None

        path = self._search_path(scene, own, other, level, dimmer)
        if path is None:
            return None

        line = (path + scene.start) * self._graph.spacing
        length = float(np.linalg.norm(np.diff(line, axis=0), axis=1).sum())
        if length > self._cfg.signal_gap:
            return None

        # The darkest place decides, since a mean would hide a break.
        darkest = float(np.min(scene.signal[tuple(path[1:-1].T)], initial=dimmer))
        cost = length * (1 - (1 - _CHEAPEST) * min(darkest / dimmer, 1.0))
        return ImageLink(cost, self._center(own, line[0]), self._center(other, line[-1]), line[1:-1])

    def _search_path(self, scene: _Scene, own: int, other: int, level: float, dimmer: float) -> Ints | None:
        """[k, 3] the path of least cost from a voxel of one component to one of the other; None where there is none.

        It keeps one voxel away from third components: the light there is theirs.
        """
        own_places, other_places = (scene.foreground[scene.component == component] for component in (own, other))
        is_open = (scene.signal >= level) & ~_dilate(scene.mark_others(own, other))
        is_open.put(own_places, True)
        is_open.put(other_places, True)

        # Half of the pairs are not connected; labels tell so more quickly than a search.
        label, labels = cc3d.connected_components(is_open, connectivity=26, return_N=True)
        is_joint = _mark_labels(label.take(own_places), labels) & _mark_labels(label.take(other_places), labels)
        if not is_joint.any():
            return None

        # The square makes a detour along the neurite cheaper than a shortcut through the dark.
        is_joint_voxel = is_joint.take(label)
        places = np.flatnonzero(is_joint_voxel)
        cost: Floats = (dimmer / np.clip(scene.signal.take(places), level, dimmer)) ** 2

        # Paths within a component are almost free, so that the path leaves it at the best place.
        is_own, is_other = (_mark_places(part, scene.shape).take(places) for part in (own_places, other_places))
        cost[is_own | is_other] = _FREE

        # One voxel stands for each patch, as the way inside costs next to nothing.
        starts, goals = (
            np.searchsorted(places, first[is_joint_voxel.take(first)])
            for first in (scene.list_patches(own), scene.list_patches(other))
        )
        voxels = np.stack(np.unravel_index(places, scene.shape), axis=1).astype(np.int32)
        pairs, step = find_neighbor_pairs(voxels, scene.shape, self._graph.spacing)
        path = find_cheapest_path(pairs, step, cost, starts, goals)

        # Only the part between the two surfaces is new.
        path = path[np.flatnonzero(is_own[path])[-1] :]
        path = path[: np.flatnonzero(is_other[path])[0] + 1]
        return voxels[path].astype(np.int64)

    def _center(self, component: int, position: Floats) -> int:
        """The voxel of a component's centerlines that a position on its surface is nearest to.

        Where none is near, the nearest of its voxels: then a path to it is laid.
        """
        graph = self._graph
        (beside,) = self._index.find_beside(position[None], np.array([component]), _FLANK).tolist()
        if beside >= 0:
            return int(beside)

        own = graph.voxels_of_component(component)
        return int(own[np.linalg.norm(graph.points[own] - position, axis=1).argmin()])


def _median(values: NDArray[np.floating]) -> float:
    """The median of values without NaN, quicker than numpy's."""
    middle, is_even = len(values) // 2, len(values) % 2 == 0
    lowest = values.min()
    is_lowest = values == lowest
    count = int(np.count_nonzero(is_lowest))
    if count > middle:
        return float(lowest)

    # A partition is slow where many values are equal, as where a stack has no background.
    if count > len(values) // 8:
        values, middle = values[~is_lowest], middle - count

    values = np.partition(values, middle)
    upper = float(values[middle])
    return (float(values[:middle].max(initial=lowest)) + upper) / 2 if is_even else upper


def _dilate(mask: Bools) -> Bools:
    """[Z, Y, X] the mask and all its 26-neighbors."""
    # A border of one voxel keeps rows apart, so that all of them can be shifted at once.
    shape = [n + 2 for n in mask.shape]
    grown = np.zeros(shape, dtype=bool)
    inner = (slice(1, -1),) * 3
    grown[inner] = mask

    for shift in (1, shape[2], shape[1] * shape[2]):
        source, flat = grown.ravel(), grown.ravel().copy()
        flat[shift:] |= source[:-shift]
        flat[:-shift] |= source[shift:]
        grown = flat.reshape(shape)
    return grown[inner]


def _mark_labels(values: NDArray[np.unsignedinteger], count: int) -> Bools:
    """[count + 1] which of the numbers from 0 to `count` occur among some values."""
    occurs = np.zeros(count + 1, dtype=bool)
    occurs[values] = True
    return occurs


def _mark_places(places: Ints, shape: Shape) -> Bools:
    """[Z, Y, X] whether a voxel of a box is at one of some places."""
    mask = np.zeros(shape, dtype=bool)
    mask.put(places, True)
    return mask
