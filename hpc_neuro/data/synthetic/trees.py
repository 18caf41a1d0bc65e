"""Random neurons: persistent random walks that branch, taper, wind and stay in the volume."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Shape, VoxelSize, fine_voxel, to_voxels
from hpc_neuro.core.morphology import Tree

Vector = NDArray[np.float64]
"""[3] z y x."""

STEP = 0.7
"""[um] Distance between nodes."""

WALL = 2.5
"""[um] Distance from the border at which a neurite turns away."""

MIN_BRANCH = 2.5
"""[um] Shorter side branches would be spines."""

CLEARANCE = 1.5
"""[um] A branch ends where it would come this close to another."""

BRANCH_SPACING = 2.5
"""[um] Smallest distance of two branch points along a branch."""


@dataclass(frozen=True, kw_only=True)
class TreeForm:
    """Shape of random neurons; the defaults resemble Drosophila projection neurons."""

    trunk_radius: float = 0.75
    """[um] Radius where the trunk enters."""
    tip_radius: float = 0.25
    """[um] Radius that every branch tapers to."""
    winding: float = 0.14
    """[rad per sqrt(um)] How fast the direction of the trunk wanders; branches wander more with every order."""
    branch_every: float = 11.0
    """[um] Mean distance between branch points along a branch."""
    branch_length: float = 18.0
    """[um] Mean length of side branches; it falls with every order."""
    orders: int = 3
    """Highest order of side branches; 0: only the trunk."""
    cable: float = 600.0
    """[um] No new branch starts once the tree is this long."""
    soma: float = 0.2
    """Probability that the neuron starts at a soma inside the volume instead of at its border."""
    soma_radius: float = 3.0
    """[um] Radius of the soma."""
    flatness: float = 0.5
    """Wandering along z relative to the plane; stacks are cut along the plane in which neurons spread."""


def grow_random_tree(seed: int, shape: Shape, voxel_size: VoxelSize, cfg: TreeForm | None = None) -> Tree:
    """A neuron inside a volume of `shape` voxels, in voxels with radii in fine voxels; a function of its arguments.

    The trunk enters through a face of the volume (or starts at a soma of type 1) and heads for the far side. Branches
    leave it at random distances and angles of 45 to 90 degrees, thinner than what they leave, and end before they meet
    another.
    """
    extent = (np.asarray(shape) - 1) * np.asarray(voxel_size)  # [3] um
    neuron = _GrowingNeuron(np.random.default_rng(seed), extent, cfg or TreeForm())
    has_soma = neuron.grow()

    types = np.full(len(neuron.points), 3)
    if has_soma:
        types[0] = 1
    voxels = to_voxels(np.asarray(neuron.points), voxel_size)
    radii = np.asarray(neuron.radii) / fine_voxel(voxel_size)
    return morphology.build_tree(voxels, np.asarray(neuron.parents), radii, types)


@dataclass
class _Shoot:
    """A branch that has not grown yet."""

    node: int  # where it leaves the tree; -1 for the trunk
    position: Vector  # um
    heading: Vector  # unit vector
    length: float
    radius: float
    order: int


class _GrowingNeuron:
    """A tree in micrometers that grows branch by branch."""

    def __init__(self, rng: np.random.Generator, extent: Vector, cfg: TreeForm) -> None:
        self.points: list[Vector] = []
        self.radii: list[float] = []
        self.parents: list[int] = []
        self._rng = rng
        self._extent = extent
        self._cfg = cfg
        self._flattening = np.asarray([cfg.flatness, 1.0, 1.0])
        self._shoots: deque[_Shoot] = deque()
        self._cable = 0.0

        # Cell of CLEARANCE um -> number of the branch that runs through it.
        self._occupied: dict[tuple[int, ...], int] = {}

    def grow(self) -> bool:
        """Grow the trunk and its branches, breadth first; -> whether the neuron has a soma."""
        trunk, has_soma = self._start_trunk()
        self._add_node(trunk.position, self._cfg.soma_radius if has_soma else trunk.radius, parent=-1)
        trunk.node = 0
        self._shoots.append(trunk)

        # Breadth first: the branches of low order fill the space before their side branches.
        branch = 0
        while self._shoots:
            branch += 1
            self._grow_branch(self._shoots.popleft(), branch)
        return has_soma

    def _add_node(self, position: Vector, radius: float, parent: int) -> int:
        self.points.append(position)
        self.radii.append(radius)
        self.parents.append(parent)
        return len(self.points) - 1

    def _grow_branch(self, shoot: _Shoot, branch: int) -> None:
        """Grow one branch until its length, the border, or another branch; start side branches on the way."""
        cfg, rng = self._cfg, self._rng
        position, heading, node = shoot.position, shoot.heading, shoot.node
        steps = max(1, round(shoot.length / STEP))
        branch_distance = rng.exponential(cfg.branch_every)
        since_branch = 0.0

        for k in range(steps):
            heading = self._wander(heading, position, cfg.winding * (1 + 0.6 * shoot.order))
            position = position + STEP * heading

            # The first steps are next to the branch that this one leaves.
            has_left_parent = k * STEP > 2 * CLEARANCE
            if not self._occupy(position, branch, has_left_parent):
                break

            # Radii shrink from the shoot's to the tip's, with some variation.
            taper = shoot.radius + (cfg.tip_radius - shoot.radius) * (k + 1) / steps
            radius = max(cfg.tip_radius, taper) * float(np.exp(0.06 * rng.normal()))
            node = self._add_node(position, radius, node)
            self._cable += STEP
            since_branch += STEP

            # A side branch near the end would look like a fork.
            rest = (steps - 1 - k) * STEP
            may_branch = shoot.order < cfg.orders and self._cable < cfg.cable and rest > BRANCH_SPACING
            if may_branch and since_branch >= max(branch_distance, BRANCH_SPACING):
                self._shoots.append(self._start_side_branch(node, position, heading, radius, shoot.order + 1))
                branch_distance = rng.exponential(cfg.branch_every)
                since_branch = 0.0

    def _occupy(self, position: Vector, branch: int, avoid_others: bool) -> bool:
        """Claim the cell of a position for a branch; False outside the volume or in a cell of another branch."""
        # A grid of cells is a cheap stand-in for distances to all other nodes.
        cell = tuple(np.floor(position / CLEARANCE).astype(int).tolist())
        if np.any((position < 0) | (position > self._extent)):
            return False
        if avoid_others and self._occupied.get(cell, branch) != branch:
            return False
        self._occupied.setdefault(cell, branch)
        return True

    def _wander(self, heading: Vector, position: Vector, winding: float) -> Vector:
        """The direction of the next step: wandering, and pushed away from near walls; none blocks the way in."""
        # A small volume has a thinner border zone.
        wall = np.minimum(WALL, 0.2 * self._extent + 1e-9)
        push = np.clip(1 - position / wall, 0, 1) - np.clip(1 - (self._extent - position) / wall, 0, 1)
        wandering = winding * np.sqrt(STEP) * self._rng.normal(size=3) * self._flattening
        direction = heading + wandering + 0.15 * push
        unit: Vector = direction / max(1e-9, float(np.linalg.norm(direction)))
        return unit

    def _start_trunk(self) -> tuple[_Shoot, bool]:
        """The first branch, and whether it starts at a soma."""
        cfg, rng, extent = self._cfg, self._rng, self._extent
        has_soma = bool(rng.random() < cfg.soma)

        # The trunk heads for the middle of the volume.
        goal = extent * rng.uniform(0.3, 0.7, 3)

        if has_soma:
            margin = np.minimum(cfg.soma_radius + 1, 0.4 * extent)
            position = margin + (extent - 2 * margin) * rng.uniform(0, 1, 3)
        else:
            # Entry through a face across y or x: stacks are cut along the plane of the neuron.
            position = extent * rng.uniform(0.15, 0.85, 3)
            axis = int(rng.choice([1, 2]))
            position[axis] = 0.0 if rng.random() < 0.5 else extent[axis]

        heading = goal - position
        distance = float(np.linalg.norm(heading))
        if distance < 1e-6:
            heading, distance = np.asarray([0.0, 0.0, 1.0]), 1.0

        length = float(np.linalg.norm(extent)) * rng.uniform(0.8, 1.3)
        radius = cfg.trunk_radius * rng.uniform(0.8, 1.2)
        return _Shoot(-1, position, heading / distance, length, radius, 0), has_soma

    def _start_side_branch(self, node: int, position: Vector, heading: Vector, radius: float, order: int) -> _Shoot:
        cfg, rng = self._cfg, self._rng

        # A random direction perpendicular to the heading, flattened along z.
        across = np.cross(heading, rng.normal(size=3)) * self._flattening
        across /= max(1e-9, float(np.linalg.norm(across)))
        angle = rng.uniform(np.pi / 4, np.pi / 2)
        direction = np.cos(angle) * heading + np.sin(angle) * across

        # Gamma-distributed lengths: many short branches, few long ones.
        length = max(MIN_BRANCH, rng.gamma(1.3, cfg.branch_length / 1.3) * 0.75 ** (order - 1))
        thin_radius = max(cfg.tip_radius, radius * rng.uniform(0.5, 0.85))
        return _Shoot(node, position, direction / np.linalg.norm(direction), length, thin_radius, order)
