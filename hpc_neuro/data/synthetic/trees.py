"""Random neurons: persistent random walks that branch, taper, wind and stay in the volume."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Shape, VoxelSize, fine_voxel, to_voxels
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import config

_STEP = 0.7  # um between nodes
_WALL = 2.5  # um from the border at which a neurite turns away
_SHORTEST = 2.5  # um; shorter branches would be spines
_CLEARANCE = 1.5  # um; a branch ends where it would come this close to another
_SPACING = 2.5  # um that two branch points keep apart


@config
class TreeConfig:
    """Shape of random neurons; the defaults resemble Drosophila projection neurons."""

    trunk_radius: float = Field(default=0.75, gt=0)
    """[um] Radius where the trunk enters."""
    tip_radius: float = Field(default=0.25, gt=0)
    """[um] Radius that every branch tapers to."""
    winding: float = Field(default=0.14, ge=0)
    """[rad per sqrt(um)] How fast the direction wanders along the trunk; branches wander more with every order."""
    branch_every: float = Field(default=11.0, gt=0)
    """[um] Mean distance between branch points along a branch."""
    branch_length: float = Field(default=18.0, gt=0)
    """[um] Mean length of side branches; it falls with every order."""
    orders: int = Field(default=3, ge=0, le=8)
    """Branches of branches of branches: the highest order."""
    cable: float = Field(default=600.0, gt=0)
    """[um] No new branch starts once the tree is this long."""
    soma: float = Field(default=0.2, ge=0, le=1)
    """Probability that the neuron starts at a soma inside the volume instead of at its border."""
    soma_radius: float = Field(default=3.0, gt=0)
    """[um] Radius of the soma."""
    flatness: float = Field(default=0.5, gt=0, le=1)
    """How much of their wandering branches do along z; stacks are cut along the plane that neurons spread in."""


@dataclass
class _Shoot:
    """A branch that has yet to grow."""

    node: int  # where it leaves the tree; -1 for the trunk
    place: NDArray[np.float64]  # [3] um
    heading: NDArray[np.float64]  # [3]
    length: float
    radius: float
    order: int


def grow_random_tree(seed: int, shape: Shape, voxel_size: VoxelSize, cfg: TreeConfig | None = None) -> Tree:
    """A neuron inside a volume of `shape` voxels, in voxels with radii in fine voxels; a function of its arguments.

    The trunk enters through a face of the volume (or starts at a soma of type 1) and heads for the far side; branches
    leave it at random distances and angles of 45 to 90 degrees, thinner than what they leave,
    and end before they meet another.
    """
    cfg = cfg or TreeConfig()
    rng = np.random.default_rng(seed)
    extent = (np.asarray(shape) - 1) * np.asarray(voxel_size)  # [3] um
    flat = np.asarray([cfg.flatness, 1.0, 1.0])
    points: list[NDArray[np.float64]] = []
    radii: list[float] = []
    parents: list[int] = []
    trunk, soma = _trunk(rng, extent, cfg)
    pending = deque([trunk])
    cable = 0.0
    taken: dict[tuple[int, ...], int] = {}  # which branch runs through a cell of `_CLEARANCE` um
    branch = 0
    while pending:
        branch += 1
        shoot = pending.popleft()
        place, heading, node = shoot.place, shoot.heading, shoot.node
        if node < 0:
            points.append(place)
            radii.append(cfg.soma_radius if soma else shoot.radius)
            parents.append(-1)
            node = 0
        steps = max(1, round(shoot.length / _STEP))
        until = rng.exponential(cfg.branch_every)  # um to the next branch point
        since = 0.0
        for k in range(steps):
            heading = _turned(rng, heading, place, extent, cfg.winding * (1 + 0.6 * shoot.order), flat)
            place = place + _STEP * heading
            cell = tuple(np.floor(place / _CLEARANCE).astype(int).tolist())
            apart = k * _STEP > 2 * _CLEARANCE  # beyond the branch point itself
            if np.any((place < 0) | (place > extent)) or (apart and taken.get(cell, branch) != branch):
                break
            taken.setdefault(cell, branch)
            taper = shoot.radius + (cfg.tip_radius - shoot.radius) * (k + 1) / steps
            points.append(place)
            radii.append(max(cfg.tip_radius, taper) * float(np.exp(0.06 * rng.normal())))
            parents.append(node)
            node = len(points) - 1
            cable += _STEP
            since += _STEP
            left = (steps - 1 - k) * _STEP
            if since >= max(until, _SPACING) and left > _SPACING and shoot.order < cfg.orders and cable < cfg.cable:
                pending.append(_side_shoot(rng, node, place, heading, radii[-1], shoot.order + 1, cfg, flat))
                until, since = rng.exponential(cfg.branch_every), 0.0
    types = np.full(len(points), 3)
    if soma:
        types[0] = 1
    unit = fine_voxel(voxel_size)
    voxels = to_voxels(np.asarray(points), voxel_size)
    return morphology.build_tree(voxels, np.asarray(parents), np.asarray(radii) / unit, types)


def _trunk(rng: np.random.Generator, extent: NDArray[np.float64], cfg: TreeConfig) -> tuple[_Shoot, bool]:
    """The first branch, and whether it starts at a soma."""
    soma = bool(rng.random() < cfg.soma)
    middle = extent * rng.uniform(0.3, 0.7, 3)
    if soma:
        margin = np.minimum(cfg.soma_radius + 1, 0.4 * extent)
        place = margin + (extent - 2 * margin) * rng.uniform(0, 1, 3)
    else:
        place = extent * rng.uniform(0.15, 0.85, 3)
        axis = int(rng.choice([1, 2]))
        place[axis] = 0.0 if rng.random() < 0.5 else extent[axis]
    heading = middle - place
    away = float(np.linalg.norm(heading))
    if away < 1e-6:
        heading, away = np.asarray([0.0, 0.0, 1.0]), 1.0
    length = float(np.linalg.norm(extent)) * rng.uniform(0.8, 1.3)
    return _Shoot(-1, place, heading / away, length, cfg.trunk_radius * rng.uniform(0.8, 1.2), 0), soma


def _side_shoot(
    rng: np.random.Generator,
    node: int,
    place: NDArray[np.float64],
    heading: NDArray[np.float64],
    radius: float,
    order: int,
    cfg: TreeConfig,
    flat: NDArray[np.float64],
) -> _Shoot:
    across = np.cross(heading, rng.normal(size=3)) * flat
    across /= max(1e-9, float(np.linalg.norm(across)))
    angle = rng.uniform(np.pi / 4, np.pi / 2)
    turned = np.cos(angle) * heading + np.sin(angle) * across
    length = max(_SHORTEST, rng.gamma(1.3, cfg.branch_length / 1.3) * 0.75 ** (order - 1))
    thin = max(cfg.tip_radius, radius * rng.uniform(0.5, 0.85))
    return _Shoot(node, place, turned / np.linalg.norm(turned), length, thin, order)


def _turned(
    rng: np.random.Generator,
    heading: NDArray[np.float64],
    place: NDArray[np.float64],
    extent: NDArray[np.float64],
    winding: float,
    flat: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The direction of the next step: wandering, and pushed away from walls that are near (none blocks the way in)."""
    wall = np.minimum(_WALL, 0.2 * extent + 1e-9)
    push = np.clip(1 - place / wall, 0, 1) - np.clip(1 - (extent - place) / wall, 0, 1)
    turned = heading + winding * np.sqrt(_STEP) * rng.normal(size=3) * flat + 0.15 * push
    unit: NDArray[np.float64] = turned / max(1e-9, float(np.linalg.norm(turned)))
    return unit
