"""Tell the cable of a rooted neuron from that of its neighbors, which a mask joins to it where they touch or cross.

Each section of the centerlines gets a label, own or not, so that the sum of three kinds of evidence is largest:

    hub         log-odds that cable beyond a hub is that of the neuron by which the hub is reached (contact_evidence);
                a line that crosses, or a trunk, has log-odds of its own, and the stronger ones count
    brightness  a section is as bright for its thickness as the own cable, or as the other cable
    re-entry    own cable is seldom reached by way of a neighbor

A hub whose evidence speaks for one neuron is never a contact, however dim the cable beyond it is. Brightness is divided
by the radius, since blur takes light from thin neurites. That of one neuron varies along its cable, over about
`_CORRELATION` voxels, so a long piece says more than a short one. Both levels are estimated from the sections that
carry the label, in turn with the labels. On a forest the best labels are found from the tips to the root, in time
linear in the nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from hpc_neuro.core.geometry import VoxelSize
from hpc_neuro.tracing.contact_evidence import Group, Hub, RootedSections
from hpc_neuro.tracing.crowd_evidence import CrowdEvidence
from hpc_neuro.tracing.crowd_labels import (
    LEAST_OWN,
    CrowdDecision,
    CrowdLabels,
    decide_by_exits,
    decide_crowd,
    label_crowd,
)
from hpc_neuro.tracing.graph import CenterlineGraph
from hpc_neuro.tracing.probability import Bools, Floats, ReadBox
from hpc_neuro.tracing.voxel_graph import VoxelGraph

_PRIOR = 1.5
"""Log-odds that cable beyond a hub is own, added to those of the evidence: most neurons have few neighbors."""
_RE_ENTRY = 0.3
"""Probability that cable of another neuron, reached by way of a neighbor, is own."""
_CORRELATION = 30.0
"""[voxel] Length over which the brightness of a neurite is correlated."""
_OWN_SPREAD = 0.5
"""[nat] Standard deviation of the brightness of sections of the own neuron, for their thickness."""
_OTHER_SPREAD = 0.4
"""[nat] Standard deviation of the levels of several neighbors, in addition."""
_STEP = 0.7
"""[nat] How much dimmer neighbors are expected to be before there is evidence of them."""
_LEAST_STEP = 0.15
"""[nat] Neighbors that are less dimmer than this are not told by their brightness."""
_TRUST = 60.0
"""[voxel] Cable that the expected levels count for, beside the sections that carry a label."""
_FIRST = 60.0
"""[voxel] Cable next to the root that gives the first level of the own neuron."""
_MOST_AGAINST, _MOST_FOR = 8.0, 1.5
"""Largest evidence of a correlation length of a section, against and for own cable."""
_ROUNDS = 6
"""Rounds of labels and levels."""
_LARGEST_ODDS = 12.0
"""Largest log-odds of one hub."""
_SURE = 0.9
"""Probability above which cable that is kept in a crowd needs no look."""
_FORBIDDEN = -1e6
"""Log-probability of a change of the neuron where the hub itself speaks against it."""


@dataclass(frozen=True)
class Contact:
    """A place where a neighbor was cut off, or may still hang on."""

    position: tuple[float, float, float]
    """z y x in voxels."""
    certainty: float
    """Probability that the decision is right, from 0.5 to 1."""
    cable_um: float
    """Cable that was cut off, or kept."""
    is_cut: bool = True


@dataclass(frozen=True)
class Neighbors:
    """What to keep of a graph, and why."""

    keep: Bools
    """[N] the voxels of the graph."""
    contacts: list[Contact]
    crowd: CrowdDecision | None
    """Whether the volume is a crowd; None where that was not asked."""


@dataclass(frozen=True)
class _Cut:
    """A group of arms whose cable is not own, at a hub that is reached by own cable."""

    hub: Hub
    group: Group
    gain: float
    """By how much the evidence would be less if the group were own."""


def find_neighbors(
    lines: CenterlineGraph,
    graph: VoxelGraph,
    roots: Sequence[int],
    voxel_size: VoxelSize,
    image: ReadBox | None = None,
    crowd: bool | None = False,
) -> Neighbors:
    """Which voxels of the graph to keep for the trees of `roots` (nodes), and where neighbors were cut off.

    No two roots lie in one piece. Without an image, brightness is no evidence. Pieces without a root are kept. In a
    `crowd` most of what hangs together is other neurons', and the rule is stricter; None: decided from the volume.
    """
    parts = RootedSections(lines, graph, roots, image)
    is_own, cuts, kept = None, list[_Cut](), list[_Cut]()
    decision = decide_by_exits(parts) if crowd is None else None
    if crowd is not False and decision is None:
        evidence = CrowdEvidence(parts, graph, image)
        labels = label_crowd(evidence)
        decision = decide_crowd(evidence, labels, crowd)
        if decision.is_crowd:
            is_own, cuts, kept = _choose_crowd_labels(evidence, labels)
    if is_own is None:
        is_own, cuts = _label_sections(parts, _measure_sections(parts))

    unit = np.asarray(voxel_size) / graph.spacing
    contacts = _describe_cuts(parts, is_own, cuts, unit, graph.spacing)
    contacts += _describe_cuts(parts, ~is_own, kept, unit, graph.spacing, is_cut=False)
    if not cuts:
        return Neighbors(np.ones(len(graph.voxels), dtype=bool), contacts, decision)
    return Neighbors(_keep_voxels(lines, graph, _keep_nodes(parts, is_own), roots), contacts, decision)


def _choose_crowd_labels(evidence: CrowdEvidence, labels: CrowdLabels) -> tuple[Bools, list[_Cut], list[_Cut]]:
    """[S] whether a section is own, the cuts, and where own cable goes on that may be a neighbor's."""
    is_own = labels.own >= LEAST_OWN
    cuts, kept = list[_Cut](), list[_Cut]()
    for crowd_hub in evidence.hubs:
        hub = crowd_hub.hub
        if not is_own[hub.entry.section]:
            continue
        for group in hub.groups:
            own = float(np.clip(labels.own[group.sections[0]], 1e-6, 1 - 1e-6))
            gain = float(np.log(own / (1 - own)))
            if not is_own[group.sections[0]]:
                cuts.append(_Cut(hub, group, max(-gain, 0.0)))
            elif own < _SURE:
                kept.append(_Cut(hub, group, max(gain, 0.0)))
    return is_own, cuts, kept


# --- Brightness ---


@dataclass(frozen=True)
class _Brightness:
    """Length and brightness of the S sections; all of length 0 without an image."""

    length: Floats
    """[S] nodes that are reached from a root."""
    level: Floats
    """[S] mean logarithm of the brightness for the thickness."""
    first: float
    """The same of the cable next to the roots."""

    def weigh(self, is_own: Bools | None) -> Floats:
        """[S] log-odds that a section is own by its brightness, after the labels `is_own`; None: without labels."""
        own, other = self.first, self.first - _STEP
        if is_own is not None:
            own = self._mean(is_own, self.first)
            other = self._mean(~is_own, own - _STEP)

        # Two levels that hardly differ would tell apart by chance.
        if own - other < _LEAST_STEP:
            return np.zeros(len(self.level))

        spread = float(np.hypot(_OWN_SPREAD, _OTHER_SPREAD))
        odds = _log_density(self.level - own, _OWN_SPREAD) - _log_density(self.level - other, spread)
        return np.clip(odds, -_MOST_AGAINST, _MOST_FOR) * (self.length / _CORRELATION)

    def _mean(self, is_inside: Bools, expected: float) -> float:
        length = self.length * is_inside
        return float((length @ self.level + _TRUST * expected) / (length.sum() + _TRUST))


def _log_density(deviation: Floats, spread: float) -> Floats:
    """Logarithm of a Gaussian, without its constant."""
    return -0.5 * (deviation / spread) ** 2 - float(np.log(spread))


def _measure_sections(parts: RootedSections) -> _Brightness:
    is_measured = parts.is_reached & (parts.lines.voxels >= 0)
    if not parts.light.is_measured or not is_measured.any():
        return _Brightness(np.zeros(parts.sections), np.zeros(parts.sections), 0.0)

    inside = np.flatnonzero(is_measured & (parts.section >= 0))
    section = parts.section[inside]
    length = np.bincount(section, minlength=parts.sections)
    total = np.bincount(section, weights=parts.density[inside], minlength=parts.sections)

    nearest = inside[parts.path_length[inside] < _FIRST]
    first = float(np.median(parts.density[nearest if len(nearest) else inside])) if len(inside) else 0.0
    return _Brightness(length.astype(np.float64), total / np.maximum(length, 1), first)


# --- Labels ---


def _label_sections(parts: RootedSections, brightness: _Brightness) -> tuple[Bools, list[_Cut]]:
    """[S] whether a section is own, and the cuts; levels and labels are found in turn."""
    hubs = parts.order_hubs()
    odds = {id(group): _measure_odds(group) for hub in hubs for group in hub.groups}

    is_own, cuts = _choose_labels(parts, hubs, odds, brightness.weigh(None))
    for _ in range(_ROUNDS):
        before = is_own
        is_own, cuts = _choose_labels(parts, hubs, odds, brightness.weigh(is_own))
        if np.array_equal(before, is_own):
            break
    return is_own, cuts


def _measure_odds(group: Group) -> float:
    """Log-odds that a group belongs to the neuron of the entry; infinite where nothing speaks against it.

    The dim branch of a neuron is as dim as a neighbor, so brightness alone cuts nothing: where an arm looks like a
    branch, there is no contact.
    """
    odds = group.measure_odds()
    by_features = odds + _PRIOR if odds <= 0 else np.inf
    by_line = -group.line_odds if group.line_odds > 0 else np.inf
    return float(max(min(by_features, by_line), -_LARGEST_ODDS))


def _choose_labels(
    parts: RootedSections, hubs: Sequence[Hub], odds: dict[int, float], own_odds: Floats
) -> tuple[Bools, list[_Cut]]:
    """The labels with the largest sum of evidence, and the cuts: from the tips to the roots, and back."""
    # The best sum beyond a section, if it is another neuron's (column 0) or own (column 1).
    best = np.stack([np.zeros(parts.sections), own_odds], axis=1)
    choice: dict[tuple[int, int], tuple[bool, float]] = {}
    for hub in reversed(hubs):
        for group in hub.groups:
            beyond = best[group.sections].sum(axis=0)
            for entry, evidence in enumerate(_weigh_labels(odds[id(group)])):
                as_other, as_own = (float(v) for v in evidence + beyond)
                choice[id(group), entry] = as_own > as_other, abs(as_own - as_other)
                best[hub.entry.section, entry] += max(as_own, as_other)

    is_own, cuts = np.zeros(parts.sections, dtype=bool), list[_Cut]()
    is_own[parts.first] = True
    for hub in hubs:
        entry = int(is_own[hub.entry.section])
        for group in hub.groups:
            label, gain = choice[id(group), entry]
            is_own[group.sections] = label
            if entry and not label:
                cuts.append(_Cut(hub, group, gain))
    return is_own, cuts


def _weigh_labels(odds: float) -> tuple[Floats, Floats]:
    """[2] log-probability that a group is another neuron's or own: if its entry is another's, and if it is own.

    `odds` are those of `_measure_odds`.
    """
    if np.isinf(odds):
        return np.array([0.0, _FORBIDDEN]), np.array([_FORBIDDEN, 0.0])
    same = 1 / (1 + np.exp(-odds))
    other = 1 - same
    after_other = np.log([same + other * (1 - _RE_ENTRY), other * _RE_ENTRY])
    return after_other, np.log([other, same])


# --- What stays, and what is reported ---


def _keep_nodes(parts: RootedSections, is_own: Bools) -> Bools:
    """[K] the nodes of own sections, those that join them in hubs, and pieces without a root."""
    keep = ~parts.is_reached
    is_section = parts.section >= 0
    keep[is_section] |= is_own[parts.section[is_section]]

    for hub in parts.hubs:
        arms = [hub.entry, *(arm for group in hub.groups for arm in group.arms)]
        own = [arm.hub_node for arm in arms if is_own[arm.section]]
        for node in own:
            keep[parts.find_path_inside(own[0], node)] = True
    keep[parts.root_nodes] = True
    return keep


def _keep_voxels(lines: CenterlineGraph, graph: VoxelGraph, keep_node: Bools, roots: Sequence[int]) -> Bools:
    """[N] the voxels that are nearest to nodes to be kept."""
    on_voxel = np.flatnonzero(lines.voxels >= 0)
    _, nearest = cKDTree(lines.points[on_voxel]).query(graph.points)
    keep = keep_node[on_voxel[nearest]]

    # A voxel may have several nodes, one for each neuron of a crossing.
    keep[lines.voxels[on_voxel[keep_node[on_voxel]]]] = True
    keep[lines.voxels[list(roots)]] = True
    return np.asarray(keep)


def _describe_cuts(
    parts: RootedSections,
    is_own: Bools,
    cuts: Sequence[_Cut],
    unit: Floats,
    spacing: Floats,
    *,
    is_cut: bool = True,
) -> list[Contact]:
    """The contacts, with the cable beyond them as far as it is not `is_own`.

    `unit` [3] is the metric's unit in um, `spacing` [3] a voxel in that unit, along z, y, x.
    """
    lines, section = parts.lines, parts.section
    a, b = lines.edges.T
    length = np.linalg.norm((lines.points[a] - lines.points[b]) * unit, axis=1)
    place = np.where(section[a] >= 0, section[a], section[b])
    cable = np.bincount(place[place >= 0], weights=length[place >= 0], minlength=parts.sections)

    # A hub is reached once, so the sections beyond a cut are those of its hubs, and so on.
    beyond = defaultdict[int, list[int]](list)
    for hub in parts.hubs:
        beyond[hub.entry.section] += [section for group in hub.groups for section in group.sections]

    contacts = []
    for cut in cuts:
        pending, total = list(cut.group.sections), 0.0
        while pending:
            number = pending.pop()
            if not is_own[number]:
                total += float(cable[number])
                pending += beyond[number]

        feet = np.mean([arm.foot for arm in cut.group.arms], axis=0) / spacing
        z, y, x = (float(v) for v in feet)
        certainty = float(1 / (1 + np.exp(-min(cut.gain, _LARGEST_ODDS))))
        contacts.append(Contact((z, y, x), certainty, total, is_cut))
    return contacts
