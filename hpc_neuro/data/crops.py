"""Choose training crops: every crop is a pure function of (seed, global sample index)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.data.config import CropConfig
from hpc_neuro.data.orientation import IDENTITY, Orientation

KINDS = ("skeleton", "branch", "tip", "uniform")
"""What a crop is centered on; "uniform" crops lie anywhere in the volume."""


@dataclass(frozen=True)
class VolumePoints:
    """The points of one volume that crops may be centered on."""

    id: str
    shape: Shape
    points: Mapping[str, NDArray[np.int32]]  # "skeleton", "branch", "tip" -> [N, 3] voxels, z y x


@dataclass(frozen=True)
class Crop:
    """One crop. The box may reach past a volume that is smaller than the crop."""

    volume: str
    box: Box
    distilled: bool  # on the token grid; only `orientation` changes its geometry
    orientation: Orientation = IDENTITY  # how the crop is mirrored and turned after reading


class CropSampler:
    """`sampler(index)` is the crop of a global sample index; the sampler has no state."""

    def __init__(
        self,
        cfg: CropConfig,
        volumes: Sequence[VolumePoints],
        seed: int,
        grid: Shape,
        distill_fraction: float = 0.0,
        orientations: Sequence[Orientation] = (IDENTITY,),
    ) -> None:
        """Weight volumes and kinds of points. Raises ConfigError without volumes.

        grid: the student's patch in voxels. distill_fraction: share of crops on that grid. orientations: those of the
        distilled crops, drawn equally often; quarter turns are left out when y and x of the crop or the patch differ.
        """
        if not volumes:
            raise ConfigError("the split has no volume to draw crops from; prepare the store with some in `train`")
        self.cfg = cfg
        self.volumes = tuple(volumes)
        self.seed = seed
        self.grid = grid
        self.distill_fraction = distill_fraction

        is_square = cfg.size[1] == cfg.size[2] and grid[1] == grid[2]
        self.orientations = tuple(o for o in orientations if is_square or not o.swap)

        # One draw in [0, 1) and a binary search pick a volume, and a kind within it.
        self._volume_shares = _cumulate_shares([_weigh_volume(v, cfg) for v in self.volumes])
        self._kind_shares = [_cumulate_shares(_weigh_kinds(v, cfg)) for v in self.volumes]

    def has_mirrored_crops(self, free: bool) -> bool:
        """Whether some crops are mirrored. free: whether crops that are not distilled are."""
        # The swap and each flip change the handedness, so an even number of them is a turn, not a mirror.
        mirrors = any((o.swap + sum(o.flips)) % 2 for o in self.orientations)
        return (free and self.distill_fraction < 1) or (mirrors and self.distill_fraction > 0)

    def is_distilled(self, index: int) -> bool:
        """Whether a sample is distilled. Needs no reading, so every rank can count the distilled samples of a step."""
        return bool(make_rng(self.seed, "distil", index).random() < self.distill_fraction)

    def __call__(self, index: int) -> Crop:
        """The crop of a global sample index."""
        rng = make_rng(self.seed, "crop", index)

        # The draws below must keep their order: it decides every crop of every run with this seed.
        number = int(np.searchsorted(self._volume_shares, rng.random(), side="right"))
        volume = self.volumes[number]
        kind = KINDS[int(np.searchsorted(self._kind_shares[number], rng.random(), side="right"))]
        if kind == "uniform":
            # Coordinates are voxel edges here, so that every part of the volume is as likely.
            center = rng.random(3) * np.asarray(volume.shape)
        else:
            points = volume.points[kind]
            center = points[rng.integers(len(points))] + 0.5

        # A point always in the middle would teach the model where to look.
        shift = (rng.random(3) - 0.5) * self.cfg.jitter * np.asarray(self.cfg.size)
        wanted_start = center - np.asarray(self.cfg.size) / 2 + shift
        padding_shares = rng.random(3)

        # Features exist on the token grid only, so a distilled crop starts on it.
        distilled = self.is_distilled(index)
        step = self.grid if distilled else (1, 1, 1)
        z, y, x = (
            _choose_start(*values)
            for values in zip(wanted_start, volume.shape, self.cfg.size, step, padding_shares, strict=True)
        )
        orientation = self._draw_orientation(index) if distilled else IDENTITY
        return Crop(volume.id, Box.at((z, y, x), self.cfg.size), distilled, orientation)

    def _draw_orientation(self, index: int) -> Orientation:
        # Its own stream: crops without orientations do not change when a cache gets more of them.
        count = len(self.orientations)
        number = int(make_rng(self.seed, "orient", index).integers(count)) if count > 1 else 0
        return self.orientations[number]


def make_rng(seed: int, stream: str, index: int) -> np.random.Generator:
    """The random numbers of one (seed, stream, index); counter-based (Philox, Salmon et al., SC 2011)."""
    # The name of the stream is the second half of the key.
    key = np.array([seed, int.from_bytes(stream.encode()[:8], "little")], dtype=np.uint64)

    # The index has a counter word of its own, so neighboring samples never share numbers.
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, index, 0], dtype=np.uint64)))


def draw_validation_boxes(
    volumes: Sequence[VolumePoints], cfg: CropConfig, grid: Shape, count: int, seed: int
) -> list[tuple[str, Box]]:
    """Draw `count` fixed crops for validation, the volumes in turn: half around the centerline, half anywhere."""
    validation = CropConfig(size=cfg.size, skeleton=0.5, branch=0.0, tip=0.0, uniform=0.5, jitter=cfg.jitter)

    # A sampler per volume: a small volume is validated as often as a large one.
    samplers = [CropSampler(validation, [volume], seed, grid) for volume in volumes]
    crops = [samplers[i % len(samplers)](i) for i in range(count)]
    return [(crop.volume, crop.box) for crop in crops]


def _weigh_volume(volume: VolumePoints, cfg: CropConfig) -> float:
    """How often a volume is drawn, relative to the others."""
    if cfg.volumes == "length":
        return float(len(volume.points["skeleton"]))
    if cfg.volumes == "size":
        return float(np.prod(np.asarray(volume.shape, dtype=np.float64)))
    return 1.0


def _weigh_kinds(volume: VolumePoints, cfg: CropConfig) -> list[float]:
    """Shares of KINDS in one volume; a kind that it lacks, such as branch points, leaves its share to others."""
    shares = {"skeleton": cfg.skeleton, "branch": cfg.branch, "tip": cfg.tip, "uniform": cfg.uniform}
    available = [shares[kind] if kind == "uniform" or len(volume.points.get(kind, ())) else 0.0 for kind in KINDS]
    return available if sum(available) > 0 else [0.0, 0.0, 0.0, 1.0]


def _choose_start(wanted: float, length: int, crop: int, step: int, padding_share: float) -> int:
    """First voxel of a crop along one axis.

    The crop lies inside the volume, on the grid when step > 1. An axis shorter than the crop is padded: by a random
    amount before its first voxel when step is 1, else only at its end.
    """
    if length <= crop:
        return 0 if step > 1 else -int(padding_share * (crop - length + 1))

    # On the grid the last crop may pad less than one token at the end.
    last = length - crop if step == 1 else -(-(length - crop) // step) * step
    return int(min(max(round(wanted / step) * step, 0), last))


def _cumulate_shares(weights: Sequence[float]) -> NDArray[np.float64]:
    """Cumulated shares whose last entry is exactly 1; equal shares when all weights are 0."""
    values = np.asarray(weights, dtype=np.float64)
    values = np.ones_like(values) if values.sum() <= 0 else values
    cumulated = np.cumsum(values / values.sum())

    # Rounding must neither make the last entry with a share unreachable nor let an entry without one be drawn.
    cumulated[np.flatnonzero(values)[-1] :] = 1.0
    return cumulated
