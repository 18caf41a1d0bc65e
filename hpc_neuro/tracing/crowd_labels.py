"""Probability that each section of a crowd belongs to the rooted neuron.

The sections form a tree, so the probabilities are exact (sum-product from the tips to the root and back). They rest on
the evidence of each hub (crowd_evidence), the step of the brightness there, and the mean brightness of each section. By
how much the neighbors are dimmer is not known: each of `_STEPS` is tried, and they are weighted by how well they
explain the sections. The level of the own neuron starts at the cable next to the root and is that of the sections that
are own, in turn with the probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_neuro.core.files import format_count
from hpc_neuro.tracing.contact_evidence import RootedSections
from hpc_neuro.tracing.crowd_evidence import CrowdEvidence
from hpc_neuro.tracing.probability import Bools, Floats

_STEPS = (0.0, 0.25, 0.5, 0.9, 1.3, 1.6)
"""[nat] By how much neighbors may be dimmer; with 0, brightness says nothing."""
_RE_ENTRY = 0.03
"""Probability that cable reached by way of a neighbor is own."""
_CORRELATION = 30.0
"""[voxel] Length over which the brightness of a neurite is correlated."""
_SPREAD = 0.45
"""[nat] Standard deviation of the brightness over such a length."""
_SECTION_SPREAD = 0.12
"""[nat] Standard deviation between sections of one neuron, however long."""
_NEIGHBOR_SPREAD = 0.2
"""[nat] Standard deviation of the levels of several neighbors, in addition."""
_HUB_SPREAD = 0.45
"""[nat] Standard deviation of the step of the brightness at a hub within one neuron."""
_MOST_BY_STEP = 3.0
"""Largest log-odds of such a step."""
_TRUST, _FIRST = 60.0, 60.0
"""[voxel] Cable next to the root that gives the first level, and cable that this level counts for later."""
_ROUNDS, _SAME_LEVEL = 3, 0.02
"""Rounds of levels and probabilities, and the change [nat] after which they end."""
_LARGEST_ODDS = 9.0
"""Largest log-odds of one hub."""
LEAST_OWN = 0.4
"""Probability from which a section of a crowd is kept: cable that is missing costs more than cable to be deleted."""
_BESIDE_ROOT = 15.0
"""[voxel] The neurite of the root may leave the volume beside it."""
_CROWD_EXITS = 2.5
"""Expected exits of other neurons from which a volume may be a crowd: 1.8 at most in lone synthetic neurons."""
_CROWD_SHARE = 0.2
"""Share of the cable that must be others' as well: a small crop of a lone neuron has many exits."""
_CROWD_GAIN = 15.0
"""[nat] Log-likelihood that a step of the brightness must gain: 13.2 at most in crops of dense, lone real neurons."""
_MANY_EXITS, _MOST_EXITS = 10.0, 0.8
"""Expected exits of other neurons, and their share of all, from which brightness need not speak for a crowd."""
_IMPOSSIBLE = -1e9
"""Log-probability that cable at the root is a neighbor's."""


@dataclass(frozen=True)
class CrowdLabels:
    """Whose the S sections are."""

    own: Floats
    """[S] probability that a section belongs to the rooted neuron."""
    step: float
    """[nat] The likeliest of `_STEPS`."""
    gain: float
    """[nat] By how much that step explains the sections better than none."""


def label_crowd(evidence: CrowdEvidence) -> CrowdLabels:
    """Probability of each section, over all steps of the brightness that neighbors may have."""
    sections = _measure_sections(evidence)
    odds = [[group.measure_odds() for group in hub.groups] for hub in evidence.hubs]
    steps = _STEPS if evidence.light.is_measured else _STEPS[:1]
    trials = [_label_with_step(evidence, sections, odds, step) for step in steps]

    likelihood = np.array([logarithm for _, logarithm in trials])
    weight = np.exp(likelihood - likelihood.max())
    own = np.tensordot(weight / weight.sum(), np.stack([own for own, _ in trials]), axes=1)
    # The first step is 0.
    return CrowdLabels(own, steps[int(weight.argmax())], float(likelihood.max() - likelihood[0]))


@dataclass(frozen=True)
class _SectionLight:
    """Length and brightness of the S sections."""

    length: Floats
    """[S] nodes that are reached from a root."""
    level: Floats
    """[S] mean brightness."""
    first: float
    """The brightness next to the root."""

    def weigh(self, own: float, other: float | None) -> Floats:
        """[S, 2] log-density of the brightness of a section, if it is another neuron's and if it is own."""
        variance = _SPREAD**2 * _CORRELATION / np.maximum(self.length, 1) + _SECTION_SPREAD**2
        as_own = _log_density(self.level - own, variance)
        as_other = as_own if other is None else _log_density(self.level - other, variance + _NEIGHBOR_SPREAD**2)
        return np.where(self.length[:, None] > 0, np.stack([as_other, as_own], axis=1), 0.0)

    def estimate(self, own: Floats) -> float:
        """The level of the own neuron, from the probabilities [S]."""
        length = self.length * own
        return float((length @ self.level + _TRUST * self.first) / (length.sum() + _TRUST))


def _log_density(deviation: Floats, variance: Floats) -> Floats:
    """Logarithm of a Gaussian, without its constant."""
    return np.asarray(-0.5 * deviation**2 / variance - 0.5 * np.log(variance))


def _measure_sections(evidence: CrowdEvidence) -> _SectionLight:
    parts, glow = evidence.parts, evidence.light.glow
    inside = np.flatnonzero(parts.is_reached & (parts.lines.voxels >= 0) & (parts.section >= 0))
    section = parts.section[inside]
    length = np.bincount(section, minlength=parts.sections).astype(np.float64)
    total = np.bincount(section, weights=glow[inside], minlength=parts.sections)

    nearest = inside[parts.path_length[inside] < _FIRST]
    first = float(np.median(glow[nearest])) if len(nearest) else 0.0
    return _SectionLight(length, total / np.maximum(length, 1), first)


def _label_with_step(
    evidence: CrowdEvidence, sections: _SectionLight, odds: Sequence[Sequence[float]], step: float
) -> tuple[Floats, float]:
    """[S] probabilities where neighbors are dimmer by `step`, and the log-likelihood of that."""
    weighted = [
        [
            float(np.clip(value + _weigh_step(group.step, step), -_LARGEST_ODDS, _LARGEST_ODDS))
            for group, value in zip(hub.groups, values, strict=True)
        ]
        for hub, values in zip(evidence.hubs, odds, strict=True)
    ]

    level = sections.first
    for _ in range(_ROUNDS):
        own, likelihood = _sum_products(evidence, weighted, sections.weigh(level, level - step if step else None))
        before, level = level, sections.estimate(own)
        if not step or abs(level - before) < _SAME_LEVEL:
            break
    return own, likelihood


def _weigh_step(glow: float, step: float) -> float:
    """Log-odds of a step of the brightness at a hub: it is 0 within the neuron, and -`step` to a neighbor."""
    odds = ((glow + step) ** 2 - glow**2) / (2 * _HUB_SPREAD**2)
    return float(np.clip(odds, -_MOST_BY_STEP, _MOST_BY_STEP))


def _sum_products(evidence: CrowdEvidence, odds: Sequence[Sequence[float]], density: Floats) -> tuple[Floats, float]:
    """[S] the probability that a section is own, and the logarithm of the sum over all labels."""
    # Column 0 stands for another neuron's, and column 1 for own.
    after_other = np.log([1 - _RE_ENTRY, _RE_ENTRY])
    beyond = density.copy()
    tables: dict[tuple[int, int], tuple[Floats, Floats]] = {}
    for number, hub in reversed(list(enumerate(evidence.hubs))):
        for place, group in enumerate(hub.groups):
            after_own = -np.log1p(np.exp([odds[number][place], -odds[number][place]]))
            table = np.stack([after_other, after_own]) + beyond[group.group.sections].sum(axis=0)
            message = np.logaddexp(table[:, 0], table[:, 1])
            tables[number, place] = table, message
            beyond[hub.hub.entry.section] += message

    belief = np.zeros((len(density), 2))
    belief[evidence.parts.first, 0] = _IMPOSSIBLE
    for number, hub in enumerate(evidence.hubs):
        for place, group in enumerate(hub.groups):
            table, message = tables[number, place]
            joint = (belief[hub.hub.entry.section] - message)[:, None] + table
            label = np.logaddexp(joint[0], joint[1])
            belief[group.group.sections] = label - np.logaddexp(label[0], label[1])
    return np.exp(belief[:, 1]), float(beyond[evidence.parts.first, 1].sum())


@dataclass(frozen=True)
class CrowdDecision:
    """Whether a volume is a crowd: several neurons, of which one is wanted."""

    is_crowd: bool
    exits: int
    """Neurites that leave the volume, away from the root."""
    other_exits: float
    """Expected number of those that are other neurons'; all of them where that was not measured."""
    other_share: float
    """Share of the cable that is more likely another neuron's."""
    gain: float
    """[nat] See CrowdLabels."""
    is_given: bool
    """Whether the user decided (trace.crowd)."""

    def describe(self) -> str:
        """Which rule was applied, and why."""
        reason = f"trace.crowd={str(self.is_crowd).lower()} was given" if self.is_given else self._explain()
        if self.is_crowd:
            advice = "trace.crowd=false keeps more"
            return f"taken for one neuron in a crowd, whose neighbors are cut off: {reason} ({advice})"
        return f"taken for a lone neuron, of which little is cut off: {reason} (trace.crowd=true cuts more)"

    def _explain(self) -> str:
        if self.exits < _CROWD_EXITS:
            return f"{format_count(self.exits, 'neurite')} {'leaves' if self.exits == 1 else 'leave'} the volume"
        tells = "tells" if self.gain >= _CROWD_GAIN else "does not tell"
        return (
            f"{self.other_exits:.1f} neurites of other neurons seem to leave the volume, with {self.other_share:.0%} "
            f"of the cable, and the brightness {tells} them apart"
        )


def decide_by_exits(parts: RootedSections) -> CrowdDecision | None:
    """The decision where too few neurites leave the volume for a crowd; None where the evidence must be measured."""
    exits = int(np.count_nonzero(_mark_exits(parts)))
    return CrowdDecision(False, exits, exits, 0.0, 0.0, is_given=False) if exits < _CROWD_EXITS else None


def decide_crowd(evidence: CrowdEvidence, labels: CrowdLabels, crowd: bool | None) -> CrowdDecision:
    """Decide from the volume, unless `crowd` says so already.

    Neighbors come in from outside, so a crowd has many neurites that leave the volume and do not look like the
    neuron's. What is uncertain about single contacts, as dim branches of the neuron, lies inside the volume. A crop of
    a dense neuron looks like a crowd by the shape of its hubs, and would lose half of its cable. So the brightness must
    speak for a crowd too, unless nearly all of very many exits are others'.
    """
    parts = evidence.parts
    is_exit = _mark_exits(parts)
    other_exits = float((1 - labels.own[parts.section[is_exit]]).sum())

    inside = parts.section[parts.is_reached & (parts.section >= 0)]
    other_share = float(np.mean(labels.own[inside] < LEAST_OWN)) if len(inside) else 0.0

    may_be_crowd = other_exits >= _CROWD_EXITS and other_share >= _CROWD_SHARE
    exits = int(np.count_nonzero(is_exit))
    are_most = other_exits >= max(_MANY_EXITS, _MOST_EXITS * exits)
    is_crowd = may_be_crowd and (labels.gain >= _CROWD_GAIN or are_most)
    return CrowdDecision(
        is_crowd if crowd is None else crowd,
        exits,
        other_exits,
        other_share,
        labels.gain,
        crowd is not None,
    )


def _mark_exits(parts: RootedSections) -> Bools:
    """[K] whether a neurite leaves the volume at a node, away from the root."""
    is_away = parts.path_length > _BESIDE_ROOT
    return np.asarray(parts.is_outgoing & parts.is_reached & (parts.section >= 0) & is_away)
