"""Cut contacts: cable that a mask joins to a rooted neuron though it belongs to a neighbor.

The centerlines are taken apart into sections and hubs (see split_neurons). At a hub, the two arms
that lie in one line are one neurite. Against the line or branch by which the hub is reached from the root, every other
line gets the log-odds that it is a neighbor's:

    crossing   a line meets a line: the arms are long and straight, the brightness differs, the neck between is dark
    entry      a line is met by a branch from the side, and is thicker than that branch: it is a trunk

A branch that leaves a line stays: near a contact, the tip of a dim neighbor and a thin side branch look alike.
All comparisons are made within `_REACH` of the hub, between medians on either side, so that a neurite that gets dimmer
or thinner little by little is never cut. What lies beyond a cut is a neighbor's altogether. The cuts with the largest
sum of log-odds are found from the tips to the root, in time linear in the nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hpc_neuro.core.geometry import VoxelSize
from hpc_neuro.tracing.graph import CenterlineGraph
from hpc_neuro.tracing.probability import Bools, CellCache, Floats, Ints, ReadBox
from hpc_neuro.tracing.split_neurons import Dissection, dissect, list_hubs
from hpc_neuro.tracing.voxel_graph import VoxelGraph

_REACH = 24.0
"""[voxel] Length over which arms are compared, beyond the radius of the hub."""
_DIRECTION_LENGTH = 14.0
"""[voxel] Stretch of an arm that gives its direction."""
_NECK_LENGTH = 7.0
"""[voxel] Beyond the radius of the hub, how far a dark neck may lie."""
_STRAIGHT_ON = 0.6
"""[cosine] An arm goes on through a fork along a branch at most this far off its direction."""
_LOOK_AHEAD = 6
"""[nodes] Stretch of a branch that tells its direction at a fork on the way."""
_LOOK_BACK = 8
"""[nodes] The same of the arm that reaches the fork."""
_IN_LINE = 0.5
"""[cosine] Two arms are in line when their directions are opposite to within this."""
_APART = 7.0
"""[voxel] Two arms that begin farther apart must also lie in line with the step between them."""
_APART_SLACK = 0.2
"""[cosine] The step is short, so its direction is uncertain by this."""
_KEPT_CELLS = 256
"""Cells of the image that stay in memory."""
_DARKEST = 0.01
"""[bright node] Smallest brightness, so that its logarithm is finite."""
_NO_SECTION = -1
"""Stands for the section that leads to a root."""
_CROSSING_BIAS = -1.5
"""Log-odds of a crossing without further evidence."""
_CLEAN = 1.5
"""Weight of a crossing of long and straight arms, 0 to 1."""
_ONWARD = 0.7
"""[1 / 10 voxel] Weight of the length of the arms beyond the crossing."""
_STEP = 2.0
"""[1 / nat] Weight of a step of the brightness."""
_NECK = 2.4
"""[1 / nat] Weight of a dark neck."""
_ENTRY_BIAS = -1.2
"""Log-odds of a line that is entered from the side, without further evidence."""
_ENTRY_THICKER = 2.7
"""[1 / nat] Weight of its radius over that of the branch by which it is entered."""
_SHORT = 1.0
"""Log-odds by which a line that is entered from the side, and ends at once, is less likely a trunk."""
_BRIDGED = 1.0
"""Log-odds by which a crossing over a bridge is less likely a neighbor's."""
_LEAST_CERTAINTY = 1.0
"""[lower threshold] Lowest probability at a hub, below which it holds a bridge."""
_CERTAIN = 6.0
"""Largest log-odds of one contact."""


@dataclass(frozen=True)
class Contact:
    """A place where a neighbor was cut off."""

    position: tuple[float, float, float]
    """z y x in voxels."""
    certainty: float
    """Probability that the cut is right, from 0.5 to 1."""
    cable_um: float
    """Cable that was cut off."""


@dataclass(frozen=True)
class _Arm:
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
    brightness: float
    """Median logarithm of the brightness."""
    thickness: float
    """Mean logarithm of the radius."""
    neck: float
    """Logarithm of the brightness at its darkest place near the hub."""


@dataclass(frozen=True)
class _Group:
    """Two arms in one line, or one arm without a partner."""

    arms: tuple[_Arm, ...]
    straightness: float
    """0 for one arm, to 1 for two arms in one line."""

    def mean(self, name: str) -> float:
        """The mean of a property over the arms."""
        return sum(float(getattr(arm, name)) for arm in self.arms) / len(self.arms)


@dataclass(frozen=True)
class _Hub:
    """A hub as it is reached from the root."""

    entry: int
    """Section by which it is reached; `_NO_SECTION` at the root."""
    continuing: tuple[int, ...]
    """Sections that go on with the entry whatever else is cut."""
    branches: tuple[tuple[_Group, float], ...]
    """The other groups, with the log-odds that they are a neighbor's."""


def cut_contacts(
    lines: CenterlineGraph,
    graph: VoxelGraph,
    roots: Sequence[int],
    voxel_size: VoxelSize,
    floor: float,
    threshold: float,
    image: ReadBox | None = None,
) -> tuple[CenterlineGraph, list[Contact]]:
    """Remove the edges at which neighbors are attached to the pieces of `roots` (nodes); return graph and contacts.

    No two roots lie in one piece. Without an image, brightness is no evidence.
    """
    parts = dissect(lines, graph, roots, floor, threshold)
    light = _measure_light(lines, graph, image)

    hubs = _order_hubs(_measure_hubs(parts, _find_parents(parts, roots), light, floor))
    cuts = _choose_cuts(hubs, parts.sections)
    if not cuts:
        return lines, []

    # The graph is a forest, so removing an edge disconnects all that lies beyond it from the root.
    is_cut = _mark_edges(lines, [arm for group, _ in cuts for arm in group.arms])
    lines = replace(lines, edges=lines.edges[~is_cut])
    return lines, _describe_cuts(lines, graph, cuts, voxel_size)


def _describe_cuts(
    lines: CenterlineGraph, graph: VoxelGraph, cuts: Sequence[tuple[_Group, float]], voxel_size: VoxelSize
) -> list[Contact]:
    points = lines.points * (np.asarray(voxel_size) / graph.spacing)
    a, b = lines.edges.T
    _, label = lines.label_pieces()
    cable = np.bincount(label[a], weights=np.linalg.norm(points[a] - points[b], axis=1), minlength=len(lines))

    contacts = []
    for group, odds in cuts:
        z, y, x = (float(v) for v in np.mean([arm.foot for arm in group.arms], axis=0) / graph.spacing)
        pieces = np.unique([label[arm.node] for arm in group.arms])
        contacts.append(Contact((z, y, x), float(1 / (1 + np.exp(-odds))), float(cable[pieces].sum())))
    return contacts


def _find_parents(parts: Dissection, roots: Sequence[int]) -> list[int]:
    """The node by which each node is reached from its root; -1 at a root, -2 in a piece without one."""
    parents = [-2] * len(parts.graph)
    stack = list(roots)
    for root in roots:
        parents[root] = -1

    while stack:
        node = stack.pop()
        for other in parts.neighbors[node]:
            if parents[other] == -2:
                parents[other] = node
                stack.append(other)
    return parents


def _mark_edges(lines: CenterlineGraph, arms: Sequence[_Arm]) -> Bools:
    """[E] whether an edge joins an arm to its hub."""
    ends = np.sort(np.array([(arm.hub_node, arm.node) for arm in arms]), axis=1)
    keys, edges = ends @ [len(lines), 1], np.sort(lines.edges, axis=1) @ [len(lines), 1]
    return np.isin(edges, keys)


# --- Light ---


@dataclass(frozen=True)
class _Light:
    """Logarithm of the brightness above the local background at each node; 0 everywhere without an image."""

    smooth: Floats
    """[K] mean over the 27 voxels around a node."""
    fine: Floats
    """[K] mean over a node's voxel and its six neighbors."""


def _measure_light(lines: CenterlineGraph, graph: VoxelGraph, image: ReadBox | None) -> _Light:
    if image is None or not len(lines):
        return _Light(np.zeros(len(lines)), np.zeros(len(lines)))

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
    return _Light(np.log(np.maximum(smooth, darkest)), np.log(np.maximum(fine, darkest)))


# --- Arms ---


def _measure_hubs(parts: Dissection, parents: Sequence[int], light: _Light, floor: float) -> list[_Hub]:
    """The hubs of the pieces with a root."""
    hubs = []
    for nodes in list_hubs(parts):
        if parents[nodes[0]] == -2:
            continue

        arms = [
            _measure_arm(parts, light, node, other)
            for node in nodes
            for other in parts.neighbors[node]
            if not parts.is_hub[other]
        ]
        entry = next((arm.section for arm in arms if parents[arm.hub_node] == arm.node), _NO_SECTION)
        is_bridged = bool(parts.certainty[nodes].min() < _LEAST_CERTAINTY * floor)
        hubs.append(_compare_groups(_group_arms(arms), entry, is_bridged))
    return hubs


def _measure_arm(parts: Dissection, light: _Light, hub_node: int, first: int) -> _Arm:
    lines = parts.graph
    radius = float(lines.thickness[hub_node])
    nodes, away = _follow_arm(parts, hub_node, first, radius + _REACH)

    # The first radius lies inside the hub; it is used only where the arm has hardly any other node.
    is_outside = away >= radius
    outer = nodes[is_outside] if is_outside.sum() >= 3 else nodes
    outer_away = away[is_outside] if is_outside.sum() >= 3 else away

    points = lines.points[outer]
    stop = int(np.clip(np.searchsorted(outer_away, outer_away[0] + _DIRECTION_LENGTH), 2, len(outer)))
    out = points[min(stop, len(outer) - 1)] - points[0]
    if len(outer) == 1:
        out = lines.points[first] - lines.points[hub_node]

    brightness = float(np.median(light.smooth[outer]))

    # Single nodes are noisy, so two in a row make a neck.
    values = light.fine[nodes[away <= radius + _NECK_LENGTH]]
    if len(values) > 1:
        values = (values[1:] + values[:-1]) / 2
    neck = float(values.min()) if len(values) else brightness

    return _Arm(
        hub_node,
        first,
        int(parts.section[first]),
        lines.points[hub_node],
        out / max(float(np.linalg.norm(out)), 1e-9),
        float(away[-1]),
        brightness,
        float(np.log(lines.thickness[outer]).mean()),
        neck,
    )


def _follow_arm(parts: Dissection, hub_node: int, first: int, reach: float) -> tuple[Ints, Floats]:
    """The nodes of an arm up to a length of `reach`, and how far along each lies; straight on through forks."""
    points, neighbors = parts.graph.points, parts.neighbors
    before, here = hub_node, first
    nodes, away = [first], [float(np.linalg.norm(points[first] - points[hub_node]))]

    while away[-1] < reach:
        onward = [node for node in neighbors[here] if node != before]
        if len(onward) > 1:
            back = points[nodes[max(0, len(nodes) - _LOOK_BACK)] if len(nodes) > 1 else hub_node]
            onward = _choose_straight(parts, here, onward, points[here] - back)
        if not onward:
            break

        before, here = here, onward[0]
        nodes.append(here)
        away.append(away[-1] + float(np.linalg.norm(points[here] - points[before])))
    return np.array(nodes), np.array(away)


def _choose_straight(parts: Dissection, fork: int, onward: Sequence[int], heading: Floats) -> list[int]:
    """The branch that is closest to a heading; none where all turn away."""
    points, best = parts.graph.points, (_STRAIGHT_ON, -1)
    for first in onward:
        before, here = fork, first
        for _ in range(_LOOK_AHEAD):
            ahead = [node for node in parts.neighbors[here] if node != before]
            if len(ahead) != 1:
                break
            before, here = here, ahead[0]

        out = points[here] - points[fork]
        cosine = float(out @ heading / max(np.linalg.norm(out) * np.linalg.norm(heading), 1e-9))
        if cosine > best[0]:
            best = (cosine, first)
    return [best[1]] if best[1] >= 0 else []


def _group_arms(arms: Sequence[_Arm]) -> list[_Group]:
    """Pairs of arms in one line, the straightest first, then the arms without a partner."""
    pairs = [(_measure_straightness(arms[i], arms[j]), i, j) for i, j in itertools.combinations(range(len(arms)), 2)]
    groups, used = [], set[int]()

    # Equal pairs are ordered by arm, so that the result does not depend on rounding elsewhere.
    for straightness, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if straightness > _IN_LINE and not used & {i, j}:
            used |= {i, j}
            groups.append(_Group((arms[i], arms[j]), straightness))
    return groups + [_Group((arm,), 0.0) for i, arm in enumerate(arms) if i not in used]


def _measure_straightness(a: _Arm, b: _Arm) -> float:
    """1 for two arms in one line, -1 where both leave in one direction."""
    straightness = -float(a.direction @ b.direction)
    step = b.foot - a.foot
    apart = float(np.linalg.norm(step))

    # One arm from each of two parallel lines would point in opposite directions, too.
    if apart > _APART:
        along = min(float(step @ b.direction), -float(step @ a.direction)) / apart
        straightness = min(straightness, along + _APART_SLACK)
    return straightness


# --- Evidence ---


def _compare_groups(groups: Sequence[_Group], entry: int, is_bridged: bool) -> _Hub:
    own = [group for group in groups if any(arm.section == entry for arm in group.arms)]

    # At the root, every arm belongs to the neuron.
    if not own:
        return _Hub(entry, tuple(arm.section for group in groups for arm in group.arms), ())

    continuing = tuple(arm.section for arm in own[0].arms if arm.section != entry)
    branches = tuple((group, _measure_odds(own[0], group, is_bridged)) for group in groups if group is not own[0])
    return _Hub(entry, continuing, branches)


def _measure_odds(own: _Group, other: _Group, is_bridged: bool) -> float:
    """Log-odds that a group is a neighbor's, given that the group with the entry is the neuron's own.

    The weights were fitted to synthetic crowds (tools.bench.contacts, seeds 0 to 19) with the condition that no real
    neuron loses cable.
    """
    # A branch that leaves a line, or another branch, gives no evidence: side branches are thinner and dimmer, too.
    if len(other.arms) < 2:
        return -_CERTAIN

    if len(own.arms) < 2:
        thicker = other.mean("thickness") - own.mean("thickness")
        # The two halves of a swelling are thick, and short.
        shortness = float(np.clip((16 - min(arm.length for arm in other.arms)) / 6, 0, 1))
        odds = _ENTRY_BIAS + _ENTRY_THICKER * float(np.clip(thicker, -0.3, 1)) - _SHORT * shortness
    else:
        # Lines that a bridge joins do not touch, and what the tracer bridges is more often a break in a faint neurite.
        odds = _measure_crossing(own, other) - _BRIDGED * is_bridged
    return float(np.clip(odds, -_CERTAIN, _CERTAIN))


def _measure_crossing(own: _Group, other: _Group) -> float:
    """Log-odds that a line which meets the own line is a neighbor's."""
    onward = min(arm.length for arm in other.arms)
    shortest = min(onward, min(arm.length for arm in own.arms))
    straightness = min(own.straightness, other.straightness)

    # Two branches that leave a line at one place may face each other by chance, but seldom over a long way.
    clean = np.clip((straightness - 0.7) / 0.15, 0, 1) * np.clip((shortest - 16) / 6, 0, 1)
    reach = (min(onward, _REACH + 4) - 18) / 10

    # Thin branches are dimmer within one neuron as well, so only a large step counts.
    step = float(np.clip(abs(other.mean("brightness") - own.mean("brightness")) - 0.5, 0, 2))

    dimmer = min(own.mean("brightness"), other.mean("brightness"))
    dip = float(np.clip(dimmer - max(arm.neck for arm in other.arms) - 0.3, 0, 1.5))
    return float(_CROSSING_BIAS + _CLEAN * clean + _ONWARD * reach + _STEP * step + _NECK * dip)


# --- Choice ---


def _order_hubs(hubs: Sequence[_Hub]) -> list[_Hub]:
    """The hubs from the roots outwards."""
    by_entry: dict[int, list[_Hub]] = {}
    for hub in hubs:
        by_entry.setdefault(hub.entry, []).append(hub)

    order: list[_Hub] = []
    pending = [_NO_SECTION]
    while pending:
        for hub in by_entry.get(pending.pop(), []):
            order.append(hub)
            pending += hub.continuing
            pending += [arm.section for group, _ in hub.branches for arm in group.arms]
    return order


def _choose_cuts(hubs: Sequence[_Hub], sections: int) -> list[tuple[_Group, float]]:
    """The groups to cut off, with their log-odds: those of the largest sum, none beyond another."""
    # What the cuts beyond a section are worth; once it is cut off, they are not made.
    worth = [0.0] * sections
    for hub in reversed(hubs):
        total = sum(worth[section] for section in hub.continuing)
        total += sum(max(odds, sum(worth[arm.section] for arm in group.arms)) for group, odds in hub.branches)
        if hub.entry >= 0:
            worth[hub.entry] = total

    cuts, is_beyond = [], [False] * sections
    for hub in hubs:
        beyond = hub.entry >= 0 and is_beyond[hub.entry]
        for section in hub.continuing:
            is_beyond[section] = beyond
        for group, odds in hub.branches:
            is_cut = not beyond and odds > sum(worth[arm.section] for arm in group.arms)
            if is_cut:
                cuts.append((group, odds))
            for arm in group.arms:
                is_beyond[arm.section] = beyond or is_cut
    return cuts
