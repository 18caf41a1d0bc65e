"""Where to look: every training crop is a pure function of (seed, global sample index)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import ConfigError, config
from hpc_neuro.data.orientation import IDENTITY, Orientation

KINDS = ("skeleton", "branch", "tip", "uniform")


@config
class CropConfig:
    """How large crops are, and what stands in their middle."""

    size: tuple[int, int, int] = (32, 128, 128)
    """[voxel] Crop along z, y, x; multiples of the student's patch."""
    skeleton: float = Field(default=0.45, ge=0)
    """Share of crops around a random point of the centreline."""
    branch: float = Field(default=0.2, ge=0)
    """Share of crops around a branch point."""
    tip: float = Field(default=0.2, ge=0)
    """Share of crops around a tip."""
    uniform: float = Field(default=0.15, ge=0)
    """Share of crops anywhere in the volume: background and whatever else lies there."""
    jitter: float = Field(default=0.5, ge=0, le=1)
    """Share of the crop over which the chosen point may lie, around the middle; 0 puts it exactly there."""
    volumes: Literal["equal", "length", "size"] = "equal"
    """How often a volume is drawn: all alike, by length of its centreline, or by its number of voxels."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size is {list(self.size)}; give three positive numbers of voxels")
        if self.skeleton + self.branch + self.tip + self.uniform <= 0:
            raise ValueError("skeleton, branch, tip and uniform are all 0; give at least one of them a share")


@dataclass(frozen=True)
class VolumePoints:
    """What the sampler knows of one volume."""

    volume: str
    shape: Shape
    points: Mapping[str, NDArray[np.int32]]  # "skeleton", "branch", "tip" -> [N, 3] voxels, z y x


@dataclass(frozen=True)
class Draw:
    """One crop: the box may reach past the volume where that is smaller than the crop."""

    volume: str
    box: Box
    distilled: bool  # on the token grid, geometry stays as it is but for the orientation
    orientation: Orientation = IDENTITY  # how the crop is mirrored and turned after reading


class CropSampler:
    """`sampler(index)` is the crop of a global sample index; nothing is remembered between calls."""

    def __init__(
        self,
        cfg: CropConfig,
        places: Sequence[VolumePoints],
        seed: int,
        grid: Shape,
        distill_fraction: float = 0.0,
        orientations: Sequence[Orientation] = (IDENTITY,),
    ) -> None:
        """grid: the student's patch; distill_fraction: share of crops on it; orientations: of those crops.

        They are drawn equally often; quarter turns of crops or patches whose y and x differ are left out. Raises
        ConfigError without volumes.
        """
        if not places:
            raise ConfigError("the split has no volume to draw crops from; prepare the store with some in `train`")
        self.cfg, self.places, self.seed, self.grid, self.distill_fraction = (
            cfg,
            tuple(places),
            seed,
            grid,
            distill_fraction,
        )
        square = cfg.size[1] == cfg.size[2] and grid[1] == grid[2]
        self.orientations = tuple(o for o in orientations if square or not o.swap)
        weight = {"equal": lambda p: 1.0, "length": lambda p: float(len(p.points["skeleton"])), "size": _voxels}
        self._volumes = _cumulative([weight[cfg.volumes](p) for p in self.places])
        self._kinds = [_cumulative(_shares(cfg, p)) for p in self.places]

    def has_mirrored_crops(self, free: bool) -> bool:
        """Whether any crop is ever mirrored. free: whether those that are not distilled are."""
        # a swap and each flip change the handedness, so that two of them make a turn
        odd = any((o.swap + sum(o.flips)) % 2 for o in self.orientations)
        return (free and self.distill_fraction < 1) or (odd and self.distill_fraction > 0)

    def is_distilled(self, index: int) -> bool:
        """Whether a sample is distilled: known without reading anything, so that all ranks can count them."""
        return bool(make_rng(self.seed, "distil", index).random() < self.distill_fraction)

    def __call__(self, index: int) -> Draw:
        """The crop of a global sample index."""
        draw = make_rng(self.seed, "crop", index)
        which = int(np.searchsorted(self._volumes, draw.random(), side="right"))
        place = self.places[which]
        kind = KINDS[int(np.searchsorted(self._kinds[which], draw.random(), side="right"))]
        distilled = self.is_distilled(index)
        if kind == "uniform":
            middle = draw.random(3) * np.asarray(place.shape)
        else:
            points = place.points[kind]
            middle = points[draw.integers(len(points))] + 0.5
        shift = (draw.random(3) - 0.5) * self.cfg.jitter * np.asarray(self.cfg.size)
        start = middle - np.asarray(self.cfg.size) / 2 + shift
        spread = draw.random(3)
        step = self.grid if distilled else (1, 1, 1)
        first = [_start(*values) for values in zip(start, place.shape, self.cfg.size, step, spread, strict=True)]
        box = Box.at((first[0], first[1], first[2]), self.cfg.size)
        many = len(self.orientations) if distilled else 0
        turn = int(make_rng(self.seed, "orient", index).integers(many)) if many > 1 else 0
        return Draw(place.volume, box, distilled, self.orientations[turn] if distilled else IDENTITY)


def make_rng(seed: int, stream: str, index: int) -> np.random.Generator:
    """Counter-based random numbers of one (seed, stream, index): Philox, Salmon et al., SC 2011."""
    key = np.array([seed, int.from_bytes(stream.encode()[:8], "little")], dtype=np.uint64)
    # the index stands in a word of the counter of its own, so neighbouring samples never share numbers
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, index, 0], dtype=np.uint64)))


def draw_validation_boxes(
    places: Sequence[VolumePoints], cfg: CropConfig, grid: Shape, count: int, seed: int
) -> list[tuple[str, Box]]:
    """`count` fixed crops for validation, the volumes in turn: half around the centreline, half anywhere."""
    centred = CropConfig(size=cfg.size, skeleton=0.5, branch=0.0, tip=0.0, uniform=0.5, jitter=cfg.jitter)
    samplers = [CropSampler(centred, [place], seed, grid) for place in places]
    draws = [samplers[i % len(samplers)](i) for i in range(count)]
    return [(d.volume, d.box) for d in draws]


def _shares(cfg: CropConfig, place: VolumePoints) -> list[float]:
    """Shares of KINDS in one volume: what it lacks (branch points, say) leaves its share to the others."""
    given = [cfg.skeleton, cfg.branch, cfg.tip, cfg.uniform]
    shares = [s if k == "uniform" or len(place.points.get(k, ())) else 0.0 for k, s in zip(KINDS, given, strict=True)]
    return shares if sum(shares) > 0 else [0.0, 0.0, 0.0, 1.0]


def _start(start: float, length: int, crop: int, step: int, spread: float) -> int:
    """First voxel along one axis: inside the volume, on the grid when step > 1, random padding when it is too short."""
    if length <= crop:
        return 0 if step > 1 else -int(spread * (crop - length + 1))
    last = length - crop if step == 1 else -(-(length - crop) // step) * step  # may pad less than one token at the end
    return int(min(max(round(start / step) * step, 0), last))


def _voxels(place: VolumePoints) -> float:
    return float(np.prod(np.asarray(place.shape, dtype=np.float64)))


def _cumulative(weights: Sequence[Any]) -> NDArray[np.float64]:
    """Cumulated shares whose last entry is exactly 1; all equal when nothing has weight."""
    values = np.asarray(weights, dtype=np.float64)
    values = np.ones_like(values) if values.sum() <= 0 else values
    total = np.cumsum(values / values.sum())
    total[np.flatnonzero(values)[-1] :] = (
        1.0  # rounding must not make the last kind with a share unreachable, or a later one drawn
    )
    return total
