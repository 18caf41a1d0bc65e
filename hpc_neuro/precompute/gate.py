"""The gate: whether the features of a 2D teacher are worth anything on some volumes, before a training uses them.

Tiles of z slices around neurites give three figures of a network, and the same figures of its untrained copy:

    probe     R^2 of a linear probe from one token's features to the share of neurite in the parts of the token. It is
              fitted on one part of the volume and scored on another, both ways.
    shift     Cosine of position-free features, f(slice) - f(black), of the same pixels in two tiles, on neurite tokens.
    position  Share of the features' variance that the place of the token in the tile explains alone.

They are measured on several samples of tiles, each beside an untrained copy of its own. The means decide; the spread of
the samples says how far to trust them.
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
from hpc_neuro.precompute.config import SAMPLES

MIN_GAIN = 0.03
"""Least R^2 of the probe above that of the untrained copy."""

MIN_SHIFT = 0.8
"""Least cosine of the same pixels in shifted tiles."""

TOKENS = 4704
"""Tokens of each part of a volume in a sample: 24 tiles of 14 x 14, or 6 of 28 x 28."""

SHIFT_EVERY = 4
"""One tile out of this many is compared with itself shifted."""

PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
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
class Measurement:
    """What one network shows on one sample of tiles."""

    probes: tuple[float, ...]
    """R^2 of the probe by penalty, in the order of PENALTIES."""
    shift: float
    position: float


@dataclass(frozen=True)
class Figures:
    """What the gate says of one network on one sample of tiles, or in the mean over the samples."""

    probe: float
    shift: float
    position: float


@dataclass(frozen=True)
class Judgment:
    """A teacher on one volume beside its untrained copies, and the probe from pooled pixels; one entry a sample."""

    volume: str
    teachers: tuple[Figures, ...]
    copies: tuple[Figures, ...]
    pixel_probes: tuple[float, ...]

    @property
    def teacher(self) -> Figures:
        """Means of the teacher."""
        return _average(self.teachers)

    @property
    def untrained(self) -> Figures:
        """Means of the untrained copies."""
        return _average(self.copies)

    @property
    def pixels(self) -> float:
        """Mean R^2 of the probe from pooled pixels."""
        return float(np.mean(self.pixel_probes))

    @property
    def gains(self) -> tuple[float, ...]:
        """R^2 of the probe above the untrained copy's, by sample."""
        return tuple(own.probe - copy.probe for own, copy in zip(self.teachers, self.copies, strict=True))

    @property
    def gain(self) -> float:
        """Mean of the gains."""
        return float(np.mean(self.gains))

    @property
    def spread(self) -> float:
        """Standard deviation of the gains over the samples; 0 for one sample."""
        return float(np.std(self.gains, ddof=1)) if len(self.gains) > 1 else 0.0

    @property
    def passes(self) -> bool:
        """Whether the teacher knows more about neurites than its untrained copies, wherever a tile begins."""
        return self.gain >= MIN_GAIN and self.teacher.shift >= MIN_SHIFT


def _average(samples: Sequence[Figures]) -> Figures:
    columns = zip(*((one.probe, one.shift, one.position) for one in samples), strict=True)
    return Figures(*(float(np.mean(column)) for column in columns))


def judge_teacher(
    teacher: Teacher, volume: StoredVolume, layer: int = -1, seed: int = 0, samples: int = SAMPLES
) -> Judgment:
    """Measure a teacher and its untrained copies on one volume. layer: the block; negative ones count from the end.

    Sample i has the tiles and the untrained copy of seed `seed + i`. InputError for a volume that is too small, or has
    no neurite in one of the two parts.
    """
    trained, untrained, pixels = [], [], []
    for number in range(seed, seed + samples):
        tiles = sample_tiles(volume, teacher.patch, number)
        copy = make_untrained_copy(teacher, number)
        trained.append(measure(_make_encoder(teacher, layer), teacher.patch, tiles))
        untrained.append(measure(_make_encoder(copy, layer), teacher.patch, tiles))

        pooled = _pool(tiles.pixels, teacher.patch // _count_parts(teacher.patch))
        values = _split_tokens(pooled, _count_parts(teacher.patch))
        pixels.append(_probe_neurites(values, teacher.patch, tiles.mask))

    pixel_probes = choose_penalties(pixels)
    return Judgment(volume.id, settle(trained), settle(untrained), pixel_probes)


def settle(measurements: Sequence[Measurement]) -> tuple[Figures, ...]:
    """The figures of one network, sample by sample, once the penalty of every probe is chosen."""
    probes = choose_penalties([one.probes for one in measurements])
    return tuple(Figures(probe, one.shift, one.position) for probe, one in zip(probes, measurements, strict=True))


def choose_penalties(curves: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """R^2 of each sample at the penalty that is best for the other samples, or for itself where there are no others.

    curves: R^2 by penalty of each sample. A penalty that a sample chose for itself would flatter it.
    """
    scores = np.array(curves)  # [samples, penalties]
    others = scores.sum(0) - scores if len(scores) > 1 else scores
    return tuple(scores[np.arange(len(scores)), others.argmax(1)].tolist())


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


def measure(encode: Encode, patch: int, tiles: Tiles) -> Measurement:
    """What a network whose tokens are `patch` pixels wide shows on a sample of tiles."""
    features = _encode_all(encode, tiles.pixels)
    return Measurement(
        probes=_probe_neurites(features, patch, tiles.mask),
        shift=_compare_shifted(encode, patch, tiles),
        position=_explain_by_position(features),
    )


def _make_encoder(teacher: Teacher, layer: int) -> Encode:
    """The teacher's token maps of one block, on the CPU in float32."""
    device = next(teacher.backbone.parameters()).device
    return lambda tiles: teacher.features(tiles.to(device), [layer % teacher.depth])[0].float().cpu()


def _encode_all(encode: Encode, pixels: Tensor) -> Tensor:
    return torch.cat([encode(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)])


def _probe_neurites(features: Tensor, patch: int, mask: Tensor) -> tuple[float, ...]:
    """R^2 by penalty of the share of neurite in the parts of each token, from features [2n, h, w, D].

    Means of both ways: fitted on the tiles of the first part and scored on those of the second, and the reverse.
    """
    parts = _count_parts(patch)
    share = _split_tokens(_pool((mask == 1).float(), patch // parts), parts)  # [2n, h, w, T]
    is_labeled = _pool((mask == UNLABELED).float(), patch) == 0  # [2n, h, w]

    half = len(features) // 2
    sides = []
    for side in (slice(0, half), slice(half, None)):
        kept = is_labeled[side]
        sides.append((features[side][kept][:, None], share[side][kept][:, None]))

    both_ways = [
        score_penalties(seen, {"share": wanted}, unseen, {"share": truth}, PENALTIES, weigh_by_variance=True)["share"]
        for (seen, wanted), (unseen, truth) in (sides, sides[::-1])
    ]
    forward, backward = both_ways
    return tuple((first + second) / 2 for first, second in zip(forward, backward, strict=True))


def _compare_shifted(encode: Encode, patch: int, tiles: Tiles) -> float:
    """Mean cosine of position-free features of the neurite tokens that two shifted parts of each tile share."""
    side = tiles.pixels.shape[1]
    shift = max(1, side // patch // 4)
    inner = side - shift * patch

    black = encode(torch.zeros(1, inner, inner))
    pixels = tiles.pixels[::SHIFT_EVERY]
    first = _encode_all(encode, pixels[:, :inner, :inner]) - black
    second = _encode_all(encode, pixels[:, -inner:, -inner:]) - black

    # Token (i + shift) of the first part and token i of the second one see the same pixels.
    cosines = F.cosine_similarity(first[:, shift:, shift:], second[:, :-shift, :-shift], dim=-1)
    shared = tiles.mask[::SHIFT_EVERY, shift * patch : inner, shift * patch : inner]
    has_neurite = _pool((shared == 1).float(), patch) > 0
    return float(cosines[has_neurite].mean()) if has_neurite.any() else 0.0


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
