"""Evidence at the hubs of centerlines: does the cable beyond a hub belong to the neuron by which the hub is reached?

The centerlines are taken apart into sections and the hubs where these meet: forks, crossings, bridges. From the root
outwards, a hub is reached by one arm, its entry, and left by the others. Two arms in one line are left together. A
linear function of the features below gives the log-odds that an arm that is left belongs to the neuron of the entry.
Its weights were fitted to synthetic crowds and real neurons without neighbors (tools.fit_contacts). Lines say more than
that, and have log-odds of their own:

    crossing   a line meets the line of the entry: the arms are long and straight, the brightness differs, the neck
               between is dark
    trunk      the entry ends on the side of a thicker line

Cable of one neuron runs straight on or branches off, gets thinner with the distance from the root, and its brightness
follows its thickness. A neighbor that is entered at a tip, or from the side, gets thicker.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpc_neuro.tracing.graph import CenterlineGraph
from hpc_neuro.tracing.probability import Bools, CellCache, Floats, Ints, ReadBox
from hpc_neuro.tracing.split_neurons import find_crossings, label_groups
from hpc_neuro.tracing.voxel_graph import VoxelGraph

_SHORTEST_SECTION = 6.0
"""[voxel] A shorter section between two hubs belongs to the hub: two neurites touch over some length."""
_NEAR = 24.0
"""[voxel] Stretch of an arm, beyond the radius of the hub, that gives its thickness."""
_FAR = 80.0
"""[voxel] The same, straight on through forks, that gives its brightness."""
_DIRECTION_LENGTH = 14.0
"""[voxel] Stretch of an arm that gives its direction."""
_NECK_LENGTH = 7.0
"""[voxel] Beyond the radius of the hub, how far a dark neck may lie."""
_STRAIGHT_ON = 0.6
"""[cosine] An arm goes on through a fork along a branch at most this far off its direction."""
_LOOK_AHEAD = 6
"""[node] Stretch of a branch that tells its direction at a fork on the way."""
_LOOK_BACK = 8
"""[node] The same of the arm that reaches the fork."""
_IN_LINE = 0.6
"""[cosine] Two arms that are left are one line when their directions are opposite to within this."""
_A_LINE = 0.5
"""[cosine] The same of the entry and the arm that goes on with it."""
_APART = 7.0
"""[voxel] Two arms that begin farther apart must also lie in line with the step between them."""
_APART_SLACK = 0.2
"""[cosine] The step is short, so its direction is uncertain by this."""
_KEPT_CELLS = 256
"""Cells of the image that stay in memory."""
_DARKEST = 0.01
"""[bright node] Smallest brightness, so that its logarithm is finite."""
_PATH_LENGTH = 8.0
"""[voxel] Length over which the thickness of the path from the root is averaged."""
_PATH_START = 10.0
"""[voxel] The first stretch of a path may be thin: a root lies at a tip as well."""
_ROUNDS = 6
"""Rounds in which the thickness of each node is averaged with its neighbors'."""
_BORDER = 3.0
"""[voxel] From the surface of a tip to the border of the volume, where the neurite goes on outside."""
_AT_BORDER = 1.5
"""Added to the logarithm of the thickness of a neurite that goes on outside, so that it is above 0."""
_BRIDGE_PROBABILITY = 0.15
"""The probability that stands for a bridge."""
_REACH = 28.0
"""[voxel] A line that is longer than this is no better a line."""
_CROSSING_BIAS = -1.5
"""Log-odds of a crossing of another neuron without further evidence."""
_CLEAN = 1.5
"""Weight of a crossing of long and straight arms, 0 to 1."""
_ONWARD = 0.7
"""[1 / 10 voxel] Weight of the length of the arms beyond the crossing."""
_STEP = 2.0
"""[1 / nat] Weight of a step of the brightness."""
_NECK = 2.4
"""[1 / nat] Weight of a dark neck."""
_TRUNK_BIAS = -3.0
"""Log-odds of another neuron's trunk without further evidence."""
_TRUNK_THICKER = 6.75
"""[1 / nat] Weight of its radius over that of the arm by which it is entered."""
_SHORT = 2.5
"""Log-odds by which a line that is entered from the side, and ends at once, is less likely a trunk."""
_BRIDGED = 1.0
"""Log-odds by which a crossing over a bridge is less likely a neighbor's."""
CLIP = 4.0
"""[standard deviation] Features farther from their mean say no more."""


class HubRegression:
    """A logistic regression on the features of the arms by which a hub is left."""

    def __init__(self, weights: Mapping[str, tuple[float, float, float]], bias: float) -> None:
        """weights: mean, standard deviation and weight of each feature, in standard deviations. bias: log-odds of an
        arm whose features have their means."""
        self.features = tuple(weights)
        self._center, self._scale, self._weight = np.array(list(weights.values())).T
        self._bias = bias

    def measure_odds(self, features: Floats) -> float:
        """Log-odds that arms [arms, features] belong to the neuron of the entry: the mean over the arms."""
        values = np.clip((features - self._center) / self._scale, -CLIP, CLIP)
        return float((values @ self._weight).mean() + self._bias)


_WEIGHTS: dict[str, tuple[float, float, float]] = {
    "straight": (0.381, 0.597, 0.308),
    "entry_line": (0.423, 0.664, -0.230),
    "arm_line": (0.137, 0.668, -0.405),
    "entry_has_no_better": (0.458, 0.498, 0.511),
    "arm_has_no_better": (0.595, 0.491, 0.358),
    "brightness": (-0.257, 0.544, 0.352),
    "thickness": (-0.002, 0.340, -0.266),
    "thicker_beyond": (0.230, 0.484, -0.277),
    "thicker_than_path": (0.600, 0.469, -0.200),
    "border_beyond": (0.587, 0.653, -0.359),
    "probability": (0.557, 0.365, 0.612),
    "turn": (0.401, 0.594, -0.231),
    "third_thicker": (0.035, 0.407, -0.297),
    "is_fork": (0.483, 0.500, 0.219),
    "neck": (-0.200, 0.320, 0.182),
    "is_bridged": (0.561, 0.496, 0.217),
}
_BIAS = 1.810
_REGRESSION = HubRegression(_WEIGHTS, _BIAS)

FEATURES = _REGRESSION.features
"""The features of an arm that is left, see `_measure_features`."""


@dataclass(frozen=True)
class Light:
    """Logarithm of the brightness above the local background at each node; 0 everywhere without an image."""

    smooth: Floats
    """[K] mean over the 27 voxels around a node."""
    fine: Floats
    """[K] mean over a node's voxel and its six neighbors."""
    is_measured: bool
    """Whether there is an image."""


@dataclass(frozen=True)
class Arm:
    """The first stretch of a section, seen from a hub."""

    hub_node: int
    node: int
    """First node beyond the hub."""
    section: int
    foot: Floats
    """[3] where it leaves the hub."""
    direction: Floats
    """[3] unit vector away from the hub."""
    length: float
    """How far it was followed, straight on through forks."""
    brightness: float
    """Median logarithm of the brightness over the near stretch."""
    density: float
    """Median logarithm of the brightness for the thickness over the far stretch."""
    thickness: float
    """Mean logarithm of the radius."""
    neck: float
    """Logarithm of the brightness at its darkest place near the hub."""


@dataclass(frozen=True)
class Group:
    """Arms by which a hub is left together: two in one line, or one."""

    arms: tuple[Arm, ...]
    features: Floats
    """[arms, features]"""
    line_odds: float
    """Log-odds that a line is another neuron's; no evidence where it is negative, or of a single arm."""

    @property
    def sections(self) -> list[int]:
        """The sections that begin with the arms."""
        return [arm.section for arm in self.arms]

    def measure_odds(self) -> float:
        """Log-odds that the arms belong to the neuron of the entry."""
        return _REGRESSION.measure_odds(self.features)


@dataclass(frozen=True)
class Hub:
    """A hub as it is reached from the root."""

    entry: Arm
    groups: tuple[Group, ...]


def measure_light(lines: CenterlineGraph, graph: VoxelGraph, image: ReadBox | None) -> Light:
    """The brightness at the nodes of a graph, in an image that is read by box."""
    if image is None or not len(lines):
        return Light(np.zeros(len(lines)), np.zeros(len(lines)), False)

    cells = CellCache(image, graph.shape, _KEPT_CELLS)
    last = np.array(graph.shape) - 1
    voxels = np.clip(np.rint(lines.points / graph.spacing).astype(np.int64), 0, last)

    smooth, fine = np.zeros(len(lines)), np.zeros(len(lines))
    for step in itertools.product((-1, 0, 1), repeat=3):
        values = cells.sample(np.clip(voxels + np.array(step), 0, last)).astype(np.float64)
        smooth += values / 27
        if np.abs(step).sum() <= 1:
            fine += values / 7

    # Neurites fill little of a cell, so its median is background.
    background = cells.sample_medians(voxels)
    smooth, fine = smooth - background, fine - background
    darkest = max(_DARKEST * float(np.percentile(smooth, 90)), 1e-12)
    return Light(np.log(np.maximum(smooth, darkest)), np.log(np.maximum(fine, darkest)), True)


_ROOT, _UNREACHED = -1, -2
"""Stand for the parent of a root, and of a node in a piece without a root."""


class RootedSections:
    """The sections of a graph and the hubs between them, from the roots outwards.

    `section` [K] is the number of each node's section, -1 at a hub; `density` [K] the logarithm of the brightness over
    the radius, 0 without an image; `path_length` [K] the length of the path from the root; `is_outgoing` [K]
    whether a neurite leaves the volume there; `probability` [K], a low one on bridges. `first` are the sections
    that begin at a root, `root_nodes` the nodes of the roots and of their hubs.
    """

    def __init__(self, lines: CenterlineGraph, graph: VoxelGraph, roots: Sequence[int], image: ReadBox | None) -> None:
        """Take a graph apart from its `roots`: nodes, at most one in a piece."""
        self.lines, self.neighbors = lines, lines.list_neighbors()
        self.is_hub, self.section = _find_hubs(lines, self.neighbors)
        self.light = measure_light(lines, graph, image)
        self._points, self._thickness = lines.points, np.log(lines.thickness)

        is_voxel = lines.voxels >= 0
        self.probability = np.where(is_voxel, graph.probability[lines.voxels], np.float32(_BRIDGE_PROBABILITY))
        self.density = self.light.smooth - self._thickness if self.light.is_measured else self.light.smooth
        self._parents, self._order = _find_parents(self.neighbors, roots)
        self._steps = np.linalg.norm(self._points - self._points[np.maximum(self._parents, 0)], axis=1)
        self.path_length = self._measure_path_lengths()
        to_border = np.minimum(self._points, (np.array(graph.shape) - 1) * graph.spacing - self._points).min(axis=1)
        self.is_outgoing = (lines.degree <= 1) & (to_border <= lines.thickness + _BORDER)
        self._path_thickness, self._least_thickness = self.measure_paths(self._thickness)
        self._largest_beyond, self._border_beyond = self.measure_beyond(self._thickness)
        self._walk_hubs(roots)

    @property
    def sections(self) -> int:
        """Number of sections, of all pieces."""
        return int(self.section.max(initial=-1)) + 1

    @property
    def is_reached(self) -> Bools:
        """[K] whether a node lies in a piece with a root."""
        return np.asarray(self._parents != _UNREACHED)

    def order_hubs(self) -> list[Hub]:
        """The hubs from the roots outwards."""
        by_entry = defaultdict[int, list[Hub]](list)
        for hub in self.hubs:
            by_entry[hub.entry.section].append(hub)

        order, pending = list[Hub](), list(self.first)
        while pending:
            for hub in by_entry.pop(pending.pop(), []):
                order.append(hub)
                pending += [section for group in hub.groups for section in group.sections]
        return order

    def _walk_hubs(self, roots: Sequence[int]) -> None:
        """Measure the hubs of the pieces with a root."""
        self.first = [int(self.section[root]) for root in roots if self.section[root] >= 0]
        self.root_nodes = list(roots)
        self.hubs = list[Hub]()

        for nodes in self._list_hubs():
            if self._parents[nodes[0]] == _UNREACHED:
                continue

            arms = self._list_arms(nodes)
            entry = next((arm for arm in arms if self._parents[arm.hub_node] == arm.node), None)
            if entry is None:
                self.first += [arm.section for arm in arms]
                self.root_nodes += nodes
            else:
                onward = [arm for arm in arms if arm is not entry]
                self.hubs.append(Hub(entry, self._group_arms(entry, onward)))

    def _measure_path_lengths(self) -> Floats:
        length = np.zeros(len(self._points))
        for node in self._order:
            if (parent := int(self._parents[node])) != _ROOT:
                length[node] = length[parent] + self._steps[node]
        return length

    def measure_paths(self, values: Floats) -> tuple[Floats, Floats]:
        """[K] values averaged along the path from the root to each node, and the least average on that path."""
        path, least = (np.zeros(len(self._points)) for _ in range(2))
        shares = np.exp(-self._steps / _PATH_LENGTH)
        for node in self._order:
            parent = int(self._parents[node])
            if parent == _ROOT:
                path[node] = least[node] = values[node]
                continue

            share = shares[node]
            path[node] = share * path[parent] + (1 - share) * values[node]
            least[node] = min(least[parent], path[node]) if self.path_length[node] > _PATH_START else path[node]
        return path, least

    def measure_beyond(self, thickness: Floats) -> tuple[Floats, Floats]:
        """[K] largest of some logarithms of thickness [K] beyond each node, and that of what goes on outside.

        What goes on outside the volume counts with `_AT_BORDER` added.
        """
        smooth, (a, b) = thickness.copy(), self.lines.edges.T
        for _ in range(_ROUNDS):
            total = smooth.copy()
            np.add.at(total, a, smooth[b])
            np.add.at(total, b, smooth[a])
            smooth = total / (1 + self.lines.degree)

        largest, border = smooth.copy(), np.where(self.is_outgoing, np.maximum(_AT_BORDER + smooth, 0), 0)

        # The order ends at the tips, so all nodes beyond a node come before it here.
        for node in reversed(self._order):
            parent = self._parents[node]
            if parent >= 0:
                largest[parent] = max(largest[parent], largest[node])
                border[parent] = max(border[parent], border[node])
        return largest, border

    def _list_hubs(self) -> list[list[int]]:
        """The nodes of each hub."""
        label = label_groups(self.lines, self.is_hub)
        order = np.argsort(label, kind="stable")
        order = order[label[order] >= 0]
        starts = np.flatnonzero(np.diff(label[order], prepend=-1))
        return [hub.tolist() for hub in np.split(order, starts[1:])] if len(order) else []

    # --- Arms ---

    def _list_arms(self, nodes: Sequence[int]) -> list[Arm]:
        """The arms of the hub of some nodes."""
        return [
            self._measure_arm(node, other) for node in nodes for other in self.neighbors[node] if not self.is_hub[other]
        ]

    def _measure_arm(self, hub_node: int, first: int) -> Arm:
        radius = float(self.lines.thickness[hub_node])
        nodes, away = self.follow_arm(hub_node, first, radius + _FAR)

        # The first radius lies inside the hub; it is used only where the arm has hardly any other node.
        near, far = away <= radius + _NEAR, away >= radius
        near_nodes, near_away = (values[near & far if (near & far).sum() >= 3 else near] for values in (nodes, away))
        far_nodes = nodes[far] if far.sum() >= 3 else nodes

        points = self._points[near_nodes]
        stop = int(np.clip(np.searchsorted(near_away, near_away[0] + _DIRECTION_LENGTH), 2, len(near_nodes)))
        out = points[min(stop, len(points) - 1)] - points[0]
        if len(points) == 1:
            out = self._points[first] - self._points[hub_node]

        # Single nodes are noisy, so two in a row make a neck.
        brightness = float(np.median(self.light.smooth[near_nodes]))
        values = _pair_means(self.light.fine[nodes[away <= radius + _NECK_LENGTH]])
        return Arm(
            hub_node,
            first,
            int(self.section[first]),
            self._points[hub_node],
            out / max(float(np.linalg.norm(out)), 1e-9),
            float(away[-1]),
            brightness,
            float(np.median(self.density[far_nodes])),
            float(self._thickness[near_nodes].mean()),
            float(values.min()) if len(values) else brightness,
        )

    def follow_arm(self, hub_node: int, first: int, reach: float) -> tuple[Ints, Floats]:
        """The nodes of an arm up to a length of `reach`, and how far along each lies; straight on through forks."""
        points = self._points
        before, here = hub_node, first
        nodes, away = [first], [float(np.linalg.norm(points[first] - points[hub_node]))]

        while away[-1] < reach:
            onward = [node for node in self.neighbors[here] if node != before]
            if len(onward) > 1:
                back = points[nodes[max(0, len(nodes) - _LOOK_BACK)] if len(nodes) > 1 else hub_node]
                onward = self._choose_straight(here, onward, points[here] - back)
            if not onward:
                break

            before, here = here, onward[0]
            nodes.append(here)
            away.append(away[-1] + float(np.linalg.norm(points[here] - points[before])))
        return np.array(nodes), np.array(away)

    def _choose_straight(self, fork: int, onward: Sequence[int], heading: Floats) -> list[int]:
        """The branch that is closest to a heading; none where all turn away."""
        best = (_STRAIGHT_ON, -1)
        for first in onward:
            before, here = fork, first
            for _ in range(_LOOK_AHEAD):
                ahead = [node for node in self.neighbors[here] if node != before]
                if len(ahead) != 1:
                    break
                before, here = here, ahead[0]

            out = self._points[here] - self._points[fork]
            cosine = float(out @ heading / max(np.linalg.norm(out) * np.linalg.norm(heading), 1e-9))
            if cosine > best[0]:
                best = (cosine, first)
        return [best[1]] if best[1] >= 0 else []

    def find_path_inside(self, start: int, stop: int) -> list[int]:
        """The path inside a hub from one node to another."""
        parent, stack = {start: start}, [start]
        while stack:
            node = stack.pop()
            for other in self.neighbors[node]:
                if self.is_hub[other] and other not in parent:
                    parent[other] = node
                    stack.append(other)

        path = [stop]
        while path[-1] != start:
            path.append(parent[path[-1]])
        return path

    # --- Groups and features ---

    def _group_arms(self, entry: Arm, arms: Sequence[Arm]) -> tuple[Group, ...]:
        """The arms by which a hub is left: those in one line together, the straightest first."""
        everything = [entry, *arms]
        straight = np.full((len(everything),) * 2, -1.0)
        for i, j in itertools.combinations(range(len(everything)), 2):
            straight[i, j] = straight[j, i] = measure_straightness(everything[i], everything[j])
        features = {i: self._measure_features(everything, straight, i) for i in range(1, len(everything))}

        # Equal pairs are ordered by arm, so that the result does not depend on rounding elsewhere.
        lines, used = list[tuple[int, int]](), set[int]()
        pairs = sorted((-straight[i, j], i, j) for i, j in itertools.combinations(range(1, len(everything)), 2))
        for negative, i, j in pairs:
            is_line = -negative > max(_IN_LINE, straight[0, i], straight[0, j])
            if is_line and not used & {i, j}:
                used |= {i, j}
                lines.append((i, j))
        singles = [i for i in range(1, len(everything)) if i not in used]

        partner = max(singles, key=lambda i: straight[0, i], default=0)
        own = (entry, everything[partner]) if partner and straight[0, partner] > _A_LINE else (entry,)
        own_straight = float(straight[0, partner]) if len(own) > 1 else 0.0
        is_bridged = self.is_bridged(entry)
        groups = [
            Group(
                (everything[i], everything[j]),
                np.stack([features[i], features[j]]),
                _measure_line(own, own_straight, (everything[i], everything[j]), float(straight[i, j]), is_bridged),
            )
            for i, j in lines
        ]
        return (*groups, *(Group((everything[i],), features[i][None], -np.inf) for i in singles))

    def _measure_features(self, arms: Sequence[Arm], straight: Floats, number: int) -> Floats:
        """[features] of one of the arms by which a hub is left; arm 0 is the entry. See `FEATURES`."""
        entry, arm, line = arms[0], arms[number], float(straight[0, number])
        others = [i for i in range(1, len(arms)) if i != number]
        entry_line = max((float(straight[0, i]) for i in others), default=-1.0)
        arm_line = max((float(straight[number, i]) for i in others), default=-1.0)
        third = max(others, key=lambda i: max(straight[0, i], straight[number, i]), default=None)

        path = self.find_path_inside(entry.hub_node, arm.hub_node)
        largest = float(self._largest_beyond[arm.node])
        return np.array([
            line,
            entry_line,
            arm_line,
            entry_line <= line,
            arm_line <= line,
            arm.density - entry.density,
            self._path_thickness[entry.node],
            largest - entry.thickness,
            largest - self._least_thickness[entry.node],
            self._border_beyond[arm.node],
            self.probability[path].min(),
            -float(entry.direction @ arm.direction),
            0.0 if third is None else arms[third].thickness - arm.thickness,
            len(arms) == 3,
            min(entry.neck - entry.brightness, arm.neck - arm.brightness),
            self.is_bridged(entry),
        ], dtype=np.float64)  # fmt: skip

    def is_bridged(self, entry: Arm) -> bool:
        """Whether the hub of an entry holds a bridge."""
        nodes, stack = {entry.hub_node}, [entry.hub_node]
        while stack:
            for other in self.neighbors[stack.pop()]:
                if self.is_hub[other] and other not in nodes:
                    nodes.add(other)
                    stack.append(other)
        return bool((self.lines.voxels[list(nodes)] < 0).any())


def _measure_line(
    own: Sequence[Arm], own_straightness: float, line: Sequence[Arm], straightness: float, is_bridged: bool
) -> float:
    """Log-odds that a line is another neuron's; `own` is the entry with the arm in line with it, if there is one."""
    if len(own) < 2:
        thicker = _mean_thickness(line) - own[0].thickness
        # The two halves of a swelling are thick, and short.
        shortness = float(np.clip((16 - min(arm.length for arm in line)) / 6, 0, 1))
        return _TRUNK_BIAS + _TRUNK_THICKER * float(np.clip(thicker, -0.3, 1)) - _SHORT * shortness

    onward = min(arm.length for arm in line)
    shortest = min(onward, *(arm.length for arm in own))
    worst = min(straightness, own_straightness)

    # Two branches that leave a line at one place may face each other by chance, but seldom over a long way.
    clean = float(np.clip((worst - 0.7) / 0.15, 0, 1) * np.clip((shortest - 16) / 6, 0, 1))
    reach = (min(onward, _REACH) - 18) / 10

    # Thin branches are dimmer within one neuron as well, so only a large step counts.
    own_light, light = (sum(arm.brightness for arm in arms) / 2 for arms in (own, line))
    step = float(np.clip(abs(light - own_light) - 0.5, 0, 2))
    dip = float(np.clip(min(own_light, light) - max(arm.neck for arm in line) - 0.3, 0, 1.5))

    # Lines that a bridge joins do not touch, and what the tracer bridges is more often a break in a faint neurite.
    return _CROSSING_BIAS + _CLEAN * clean + _ONWARD * reach + _STEP * step + _NECK * dip - _BRIDGED * is_bridged


def _mean_thickness(arms: Sequence[Arm]) -> float:
    return sum(arm.thickness for arm in arms) / len(arms)


def _pair_means(values: Floats) -> Floats:
    """The means of neighboring values; a single value as it is."""
    return (values[1:] + values[:-1]) / 2 if len(values) > 1 else values


def measure_straightness(a: Arm, b: Arm) -> float:
    """1 for two arms in one line, -1 where both leave in one direction."""
    straightness = -float(a.direction @ b.direction)
    step = b.foot - a.foot
    apart = float(np.linalg.norm(step))

    # One arm from each of two parallel lines would point in opposite directions, too.
    if apart > _APART:
        along = min(float(step @ b.direction), -float(step @ a.direction)) / apart
        straightness = min(straightness, along + _APART_SLACK)
    return straightness


def _find_parents(neighbors: Sequence[Sequence[int]], roots: Sequence[int]) -> tuple[Ints, list[int]]:
    """The node by which each node is reached from its root, and the nodes in an order from the roots outwards."""
    parents = np.full(len(neighbors), _UNREACHED)
    parents[list(roots)] = _ROOT

    order = list(roots)
    for node in order:
        for other in neighbors[node]:
            if parents[other] == _UNREACHED:
                parents[other] = node
                order.append(other)
    return parents, order


def _find_hubs(lines: CenterlineGraph, neighbors: Sequence[Sequence[int]]) -> tuple[Bools, Ints]:
    """[K] whether a node belongs to a hub, and [K] the section of each other node, -1 in hubs."""
    is_hub = (lines.degree >= 3) | (lines.voxels < 0)
    is_hub[find_crossings(lines, neighbors)] = True
    section = label_groups(lines, ~is_hub)

    # Where two neurites touch over some length, the mask shows one neurite between two forks.
    a, b = lines.edges.T
    sections = int(section.max(initial=-1)) + 1
    is_inner = (section[a] >= 0) & (section[a] == section[b])
    length = np.bincount(section[a[is_inner]], weights=lines.edge_lengths[is_inner], minlength=sections)
    is_door = is_hub[a] != is_hub[b]
    doors = np.bincount(section[np.where(is_hub[a], b, a)[is_door]], minlength=sections)

    # An edge leads to the hub at either end.
    is_short = (doors >= 2) & (length + 2 <= _SHORTEST_SECTION)
    is_hub |= (section >= 0) & is_short[section]
    return is_hub, label_groups(lines, ~is_hub)
