"""The gate: whether the features of a 2D teacher are worth anything on some volumes, before a training uses them.

Tiles of z slices around neurites give three figures of a network, and the same figures of its untrained copy:

    probe     R^2 of a linear probe from one token's features to the share of neurite in the parts of the token. It is
              fitted on one part of the volume and scored on another, both ways.
    shift     Cosine of position-free features, f(slice) - f(black), of the same pixels in two tiles, on neurite tokens.
    position  Share of the features' variance that the place of the token in the tile explains alone.

They are measured on several samples of tiles, of the teacher and of several untrained copies. The means decide; the
standard error of the gain says how far to trust them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.store import StoredVolume
from hpc_neuro.models.linear_probe import score_penalties
from hpc_neuro.models.teacher import Teacher, make_untrained_copy
from hpc_neuro.precompute.config import COPIES, SAMPLES

MIN_GAIN = 0.03
"""Least R^2 of the probe above that of the untrained copy."""

MIN_SHIFT = 0.8
"""Least cosine of the same pixels in shifted tiles."""

TOKENS = 3136
"""Tokens of each part of a volume in a sample: 16 tiles of 14 x 14, or 4 of 28 x 28."""

SHIFT_EVERY = 4
"""One tile out of this many is compared with itself shifted."""

PENALTIES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Ridge penalties that are tried, as shares of the features' variance."""

SIDE = 224
"""[pixel] Side of a tile where the volume has room: the size that most teachers were trained at."""

MIN_TOKENS = 4
"""Least tokens along the side of a tile: two shifted parts of it have to share some."""

BATCH = 4
"""Tiles per forward."""

Encode = Callable[[Tensor], Tensor]
"""Gray tiles [n, S, S] in [0, 1] to token maps [n, h, w, D]."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of one volume: first those of one part, then as many of the other."""

    pixels: Tensor
    """[2n, S, S] in [0, 1]."""
    mask: Tensor
    """[2n, S, S] uint8, as in the store."""


@dataclass(frozen=True)
class Figures:
    """What the gate says of one network on one sample of tiles, or in the mean over the samples."""

    probe: float
    shift: float
    position: float


@dataclass(frozen=True)
class Judgment:
    """A teacher on one volume beside its untrained copies, and the probe from pooled pixels."""

    volume: str
    teachers: tuple[Figures, ...]
    """Of the teacher, by sample."""
    copies: tuple[tuple[Figures, ...], ...]
    """Of each untrained copy, by sample."""
    pixel_probes: tuple[float, ...]
    """R^2 of the probe from pooled pixels, by sample."""

    @property
    def teacher(self) -> Figures:
        """Means of the teacher."""
        return _average(self.teachers)

    @property
    def control(self) -> Figures:
        """Means of the untrained copies."""
        return _average([figures for copy in self.copies for figures in copy])

    @property
    def pixels(self) -> float:
        """Mean R^2 of the probe from pooled pixels."""
        return float(np.mean(self.pixel_probes))

    @property
    def gains(self) -> tuple[float, ...]:
        """R^2 of the probe above that of an untrained copy, for every copy and sample."""
        return tuple(
            own.probe - other.probe for copy in self.copies for own, other in zip(self.teachers, copy, strict=True)
        )

    @property
    def gain(self) -> float:
        """Mean of the gains."""
        return float(np.mean(self.gains))

    @property
    def gain_error(self) -> float:
        """Standard error of the gain, a mean over random samples and random copies; 0 for one of each."""
        gains = np.array(self.gains).reshape(len(self.copies), len(self.teachers))
        return float(np.hypot(_estimate_error(gains.mean(0)), _estimate_error(gains.mean(1))))

    @property
    def is_close(self) -> bool:
        """Whether the gain is within twice its error of the least one, so that other samples may decide otherwise."""
        return abs(self.gain - MIN_GAIN) < 2 * self.gain_error

    @property
    def passes(self) -> bool:
        """Whether the teacher knows more about neurites than its untrained copies, wherever a tile begins."""
        return self.gain >= MIN_GAIN and self.teacher.shift >= MIN_SHIFT


def _average(several: Sequence[Figures]) -> Figures:
    columns = zip(*((one.probe, one.shift, one.position) for one in several), strict=True)
    return Figures(*(float(np.mean(column)) for column in columns))


def _estimate_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of some values; 0 for one."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def judge_teacher(
    teacher: Teacher,
    volume: StoredVolume,
    layer: int = -1,
    seed: int = 0,
    samples: int = SAMPLES,
    copies: int = COPIES,
) -> Judgment:
    """Measure a teacher and its untrained copies on one volume. layer: the block; negative ones count from the end.

    Samples of tiles and copies have the seeds `seed`, `seed + 1` ... InputError for a volume that is too small, or has
    no neurite in one of the two parts.
    """
    patch = teacher.patch
    tiles = [sample_tiles(volume, patch, seed + number) for number in range(samples)]
    trained = measure(_make_encoder(teacher, layer), patch, tiles)
    untrained = [
        measure(_make_encoder(make_untrained_copy(teacher, seed + number), layer), patch, tiles)
        for number in range(copies)
    ]

    parts = _count_parts(patch)
    pooled = [_split_tokens(_pool(sample.pixels, patch // parts), parts) for sample in tiles]
    return Judgment(volume.id, trained, tuple(untrained), _probe_neurites(pooled, patch, tiles))


def sample_tiles(volume: StoredVolume, patch: int, seed: int = 0) -> Tiles:
    """About TOKENS tokens of each of two parts of the volume, in tiles around random points of the centerline.

    The slices are cut across the in-plane axis along which the neuron is longer, so that no pixel is in both parts.
    InputError for a volume that is too small, or has no neurite in one part.
    """
    points = volume.points("skeleton")
    if not len(points):
        raise InputError(f"volume {volume.id} has no neurite; name other volumes with volumes=[...]")

    axis = 1 + int(np.argmax(np.ptp(points[:, 1:], axis=0)))
    side = min(SIDE, volume.shape[axis] // 2, *volume.shape[1:]) // patch * patch
    if side < MIN_TOKENS * patch:
        raise InputError(
            f"volume {volume.id} is {volume.shape} voxels, but half of a slice has to hold {MIN_TOKENS} x {MIN_TOKENS} "
            f"tokens of {patch} pixels; name larger volumes with volumes=[...]"
        )

    # Both sides of the cut have room for a tile and, where they can, equal shares of the neuron.
    cut = int(np.clip(np.median(points[:, axis]), side, volume.shape[axis] - side))
    is_second = points[:, axis] >= cut
    if is_second.all() or not is_second.any():
        raise InputError(
            f"volume {volume.id} has neurites in one part of its slices only, so that a probe cannot be fitted on one "
            "part and scored on another; name other volumes with volumes=[...]"
        )

    # The last corner of a tile before the cut, and the first one behind it.
    ends = [n - side for n in volume.shape[1:]]
    first_ends, second_starts = list(ends), [0, 0]
    first_ends[axis - 1], second_starts[axis - 1] = cut - side, cut

    count = max(1, TOKENS // (side // patch) ** 2)
    rng = np.random.default_rng(seed)
    corners = np.concatenate(
        [
            _draw_corners(rng, points[~is_second], count, side, [0, 0], first_ends),
            _draw_corners(rng, points[is_second], count, side, second_starts, ends),
        ]
    )
    boxes = [Box.at((z, y, x), (1, side, side)) for z, y, x in corners.tolist()]
    pixels = torch.from_numpy(np.concatenate([volume.normalized_image(box) for box in boxes]))
    mask = torch.from_numpy(np.concatenate([volume.mask(box) for box in boxes]))
    return Tiles(pixels, mask)


def _draw_corners(
    rng: np.random.Generator, points: NDArray[np.int64], count: int, side: int, starts: list[int], ends: list[int]
) -> NDArray[np.int64]:
    """[count, 3] first voxels of tiles around some of `points`, between `starts` and `ends` in y and x."""
    centers = points[rng.choice(len(points), count, replace=len(points) < count)]

    # With a neurite in the middle of every tile, position would tell about neurites.
    corners = centers.copy()
    corners[:, 1:] = np.clip(centers[:, 1:] - rng.integers(0, side, (count, 2)), starts, ends)
    return corners


def measure(encode: Encode, patch: int, tiles: Sequence[Tiles]) -> tuple[Figures, ...]:
    """The figures of a network whose tokens are `patch` pixels wide, by sample of tiles."""
    features = [_encode_all(encode, sample.pixels) for sample in tiles]
    probes = _probe_neurites(features, patch, tiles)
    return tuple(
        Figures(probe, _compare_shifted(encode, patch, sample), _explain_by_position(maps))
        for probe, sample, maps in zip(probes, tiles, features, strict=True)
    )


def _make_encoder(teacher: Teacher, layer: int) -> Encode:
    """The teacher's token maps of one block, on the CPU in float32."""
    device = next(teacher.backbone.parameters()).device
    return lambda tiles: teacher.features(tiles.to(device), [layer % teacher.depth])[0].float().cpu()


def _encode_all(encode: Encode, pixels: Tensor) -> Tensor:
    return torch.cat([encode(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)])


def _probe_neurites(features: Sequence[Tensor], patch: int, tiles: Sequence[Tiles]) -> tuple[float, ...]:
    """R^2 of the share of neurite in the parts of each token, by sample, from features [2n, h, w, D] of each sample.

    Fitted on the first part of all samples and scored on the second part of each, and the reverse; means of both ways.
    """
    sides = [_list_labeled(features, patch, tiles, part) for part in (0, 1)]
    curves = []
    for number in range(len(tiles)):
        both_ways = []
        for fitted, scored in (sides, sides[::-1]):
            seen, wanted = (torch.cat(column)[:, None] for column in zip(*fitted, strict=True))
            unseen, truth = (column[:, None] for column in scored[number])
            scores = score_penalties(
                seen, {"share": wanted}, unseen, {"share": truth}, PENALTIES, weigh_by_variance=True, bounds=(0.0, 1.0)
            )
            both_ways.append(scores["share"])
        curves.append(np.mean(both_ways, axis=0))
    return choose_penalties(np.stack(curves))


def _list_labeled(
    features: Sequence[Tensor], patch: int, tiles: Sequence[Tiles], part: int
) -> list[tuple[Tensor, Tensor]]:
    """For each sample, features [N, D] and shares of neurite [N, T] of the labeled tokens of one part of the volume."""
    count = _count_parts(patch)
    listed = []
    for values, sample in zip(features, tiles, strict=True):
        half = len(values) // 2
        side = slice(part * half, (part + 1) * half)
        share = _split_tokens(_pool((sample.mask[side] == 1).float(), patch // count), count)
        is_labeled = _pool((sample.mask[side] == UNLABELED).float(), patch) == 0
        listed.append((values[side][is_labeled], share[is_labeled]))
    return listed


def choose_penalties(curves: NDArray[np.float64]) -> tuple[float, ...]:
    """R^2 of each sample at the penalty that is best for the other samples, or for itself where there are no others.

    curves: R^2 [samples, penalties]. A penalty that a sample chose for itself would flatter it.
    """
    others = curves.sum(0) - curves if len(curves) > 1 else curves
    return tuple(curves[np.arange(len(curves)), others.argmax(1)].tolist())


def _compare_shifted(encode: Encode, patch: int, tiles: Tiles) -> float:
    """Mean cosine of position-free features of the neurite tokens that two shifted parts of each tile share."""
    side = tiles.pixels.shape[1]
    shift = max(1, side // patch // 4)
    inner = side - shift * patch

    # Token (i + shift) of the first part and token i of the second one see the same pixels.
    shared = tiles.mask[:, shift * patch : inner, shift * patch : inner]
    has_neurite = _pool((shared == 1).float(), patch) > 0
    chosen = _choose_compared(has_neurite.flatten(1).any(1))
    if not len(chosen):
        return 0.0

    black = encode(torch.zeros(1, inner, inner))
    pixels = tiles.pixels[chosen]
    first = _encode_all(encode, pixels[:, :inner, :inner]) - black
    second = _encode_all(encode, pixels[:, -inner:, -inner:]) - black
    cosines = F.cosine_similarity(first[:, shift:, shift:], second[:, :-shift, :-shift], dim=-1)
    return float(cosines[has_neurite[chosen]].mean())


def _choose_compared(has_neurite: Tensor) -> Tensor:
    """Numbers of the tiles to compare with themselves shifted, from [tiles] whether their shared part has a neurite."""
    numbers = torch.arange(len(has_neurite))
    chosen = numbers[::SHIFT_EVERY]
    if has_neurite[chosen].any():
        return chosen

    # A sample whose chosen tiles show no neurite says nothing of the teacher; others of its tiles do.
    return numbers[has_neurite][: len(chosen)]


def _explain_by_position(features: Tensor) -> float:
    """Adjusted R^2 of features [n, h, w, D] by the mean of their place over the tiles; 0 where nothing varies."""
    count, rows, columns, _ = features.shape
    values = features.double()

    # Means over n tiles follow the tiles a little, so that the degrees of freedom are counted.
    within = float((values - values.mean(0)).square().sum()) / ((count - 1) * rows * columns)
    total = float((values - values.mean((0, 1, 2))).square().sum()) / (count * rows * columns - 1)
    return max(0.0, 1 - within / total) if total > 0 else 0.0


def _count_parts(patch: int) -> int:
    """Parts of a token along each side: 4 where the patch allows it."""
    return next(parts for parts in (4, 2, 1) if patch % parts == 0)


def _pool(images: Tensor, size: int) -> Tensor:
    """Means of images [n, S, S] over squares of `size` pixels -> [n, S / size, S / size]."""
    return F.avg_pool2d(images[:, None], size)[:, 0]


def _split_tokens(values: Tensor, parts: int) -> Tensor:
    """Values [n, h * parts, w * parts] by token: [n, h, w, parts * parts]."""
    count, height, width = values.shape
    grid = values.reshape(count, height // parts, parts, width // parts, parts)
    return grid.transpose(2, 3).flatten(3)
