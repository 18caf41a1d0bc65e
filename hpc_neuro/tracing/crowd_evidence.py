"""Evidence at hubs in a crowd: one neuron among several, where most of what hangs together belongs to others.

As in contact_evidence a logistic regression gives the log-odds that arms by which a hub is left belong to the rooted
neuron, if the entry does. Here it is fitted to crowds alone, and thickness is that of the light (neurite_light), which
does not depend on the brightness. Brightness is left to the labels (crowd_labels), which know the levels of the whole
neuron; the step at the hub is measured for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_neuro.tracing.contact_evidence import Arm, Group, Hub, HubRegression, RootedSections, measure_straightness
from hpc_neuro.tracing.neurite_light import NeuriteLight, measure_neurite_light
from hpc_neuro.tracing.probability import Floats, Ints, ReadBox
from hpc_neuro.tracing.voxel_graph import VoxelGraph

_NEAR = 24.0
"""[voxel] Stretch of an arm, beyond the hub, that gives its width."""
_FAR = 60.0
"""[voxel] Stretch that gives its brightness, and at the end of which it may have got wider."""
_END = 12
"""[node] The end of that stretch."""
_LONGEST, _WIDEST = 60.0, 15.0
"""[voxel] An arm that is longer, or a hub that is wider, says no more."""
_SHARPEST = 0.03
"""[1 - cosine] Two arms that are straighter than this say no more."""
_LEAST_ODDS = -5.0
"""Log-odds of a line that is none."""

_WEIGHTS: dict[str, tuple[float, float, float]] = {
    "straight": (0.385, 0.593, 0.196),
    "entry_line": (0.523, 0.613, -0.043),
    "arm_line": (0.193, 0.657, 0.107),
    "bend": (1.074, 1.290, 0.469),
    "entry_bend": (1.472, 1.321, -0.104),
    "arm_bend": (0.698, 1.215, -0.466),
    "entry_has_no_better": (0.422, 0.494, 0.103),
    "arm_has_no_better": (0.577, 0.494, 0.142),
    "turn": (0.400, 0.591, -0.044),
    "width": (-0.182, 0.326, -0.124),
    "path_width": (0.424, 0.264, -0.289),
    "wider_beyond": (0.161, 0.402, 0.021),
    "wider_than_path": (0.164, 0.398, -0.068),
    "border_beyond": (1.022, 1.014, -0.121),
    "widening": (-0.045, 0.184, -0.286),
    "third_wider": (0.035, 0.364, 0.073),
    "third_wider_than_entry": (-0.133, 0.307, -0.324),
    "probability": (0.667, 0.357, 0.204),
    "neck": (-0.194, 0.295, 0.156),
    "is_fork": (0.436, 0.496, 0.104),
    "arms": (3.836, 1.208, -0.214),
    "is_bridged": (0.432, 0.495, 0.182),
    "length": (0.579, 0.356, 0.041),
    "extent": (0.199, 0.267, -0.098),
    "is_line": (0.238, 0.426, -0.103),
    "line": (-4.250, 1.653, -0.145),
}
_BIAS = 0.691
_REGRESSION = HubRegression(_WEIGHTS, _BIAS)

CROWD_FEATURES = _REGRESSION.features
"""The features of an arm that is left, see `_measure_features`."""


@dataclass(frozen=True)
class CrowdGroup:
    """What a group of arms says."""

    group: Group
    features: Floats
    """[arms, features]"""
    step: float
    """Logarithm of the brightness of the arms over that of the entry."""

    def measure_odds(self) -> float:
        """Log-odds that the arms belong to the neuron of the entry."""
        return _REGRESSION.measure_odds(self.features)


@dataclass(frozen=True)
class CrowdHub:
    """A hub as it is reached from the root."""

    hub: Hub
    groups: tuple[CrowdGroup, ...]


@dataclass(frozen=True)
class _ArmLight:
    """What the light says of an arm."""

    width: float
    """Mean over the near stretch."""
    glow: float
    """Median over the far stretch."""
    widening: float
    """Width at the end of the far stretch less that of the near one."""


class CrowdEvidence:
    """The hubs of rooted sections, and the light at their nodes."""

    def __init__(self, parts: RootedSections, graph: VoxelGraph, image: ReadBox | None) -> None:
        """Measure the light of an image that is read by box; without one, the width is that of the mask."""
        self.parts = parts
        self.light: NeuriteLight = measure_neurite_light(parts.lines, graph, parts.section, image)
        self._path, _ = parts.measure_paths(self.light.width)
        self._largest, self._border = parts.measure_beyond(self.light.width)
        self.hubs = [self._measure_hub(hub) for hub in parts.order_hubs()]

    def _measure_hub(self, hub: Hub) -> CrowdHub:
        arms = [hub.entry, *(arm for group in hub.groups for arm in group.arms)]
        straight = np.array([[-1.0 if a is b else measure_straightness(a, b) for b in arms] for a in arms])
        lights = [self._measure_arm(arm) for arm in arms]

        groups, number = list[CrowdGroup](), 1
        for group in hub.groups:
            numbers = range(number, number + len(group.arms))
            number += len(group.arms)
            rows = [self._measure_features(arms, straight, lights, group, i) for i in numbers]
            step = float(np.mean([lights[i].glow for i in numbers])) - lights[0].glow
            groups.append(CrowdGroup(group, np.stack(rows), step))
        return CrowdHub(hub, tuple(groups))

    def _measure_arm(self, arm: Arm) -> _ArmLight:
        radius = float(self.parts.lines.thickness[arm.hub_node])
        nodes, away = self.parts.follow_arm(arm.hub_node, arm.node, radius + _FAR)

        # The first radius lies inside the hub.
        far: Ints = nodes[away >= min(radius, away[-1] / 2)]
        near: Ints = nodes[(away >= min(radius, away[-1] / 2)) & (away <= radius + _NEAR)]
        width = float(self.light.width[near if len(near) else far].mean())
        widening = float(np.clip(self.light.width[nodes[-_END:]].mean() - width, -1, 1))
        return _ArmLight(width, float(np.median(self.light.glow[far])), widening)

    def _measure_features(
        self, arms: Sequence[Arm], straight: Floats, lights: Sequence[_ArmLight], group: Group, number: int
    ) -> Floats:
        """[features] of one of the arms by which a hub is left; arm 0 is the entry. See `CROWD_FEATURES`."""
        entry, arm, line = arms[0], arms[number], float(straight[0, number])
        others = [i for i in range(1, len(arms)) if i != number]
        entry_line = max((float(straight[0, i]) for i in others), default=-1.0)
        arm_line = max((float(straight[number, i]) for i in others), default=-1.0)
        third = max(others, key=lambda i: max(straight[0, i], straight[number, i]), default=None)

        width, third_width = lights[number].width, None if third is None else lights[third].width
        path = float(self._path[entry.node])
        path_nodes = self.parts.find_path_inside(entry.hub_node, arm.hub_node)
        return np.array([
            line,
            entry_line,
            arm_line,
            _measure_bend(line),
            _measure_bend(entry_line),
            _measure_bend(arm_line),
            entry_line <= line,
            arm_line <= line,
            -float(entry.direction @ arm.direction),
            width - lights[0].width,
            path,
            float(self._largest[arm.node]) - lights[0].width,
            float(self._largest[arm.node]) - path,
            self._border[arm.node],
            lights[number].widening,
            0.0 if third_width is None else third_width - width,
            0.0 if third_width is None else third_width - lights[0].width,
            self.parts.probability[path_nodes].min(),
            min(entry.neck - entry.brightness, arm.neck - arm.brightness),
            len(arms) == 3,
            min(len(arms), 6),
            self.parts.is_bridged(entry),
            min(arm.length, _LONGEST) / _LONGEST,
            min(float(np.linalg.norm(arm.foot - entry.foot)), _WIDEST) / _WIDEST,
            len(group.arms) > 1,
            max(group.line_odds, _LEAST_ODDS),
        ], dtype=np.float64)  # fmt: skip


def _measure_bend(straightness: float) -> float:
    """Minus the logarithm of how far two arms are off one line: the difference between 5 and 10 degrees matters."""
    return -float(np.log(max(1 + _SHARPEST - straightness, _SHARPEST)))
