"""One transform for image, mask and centreline: batched, on the device, a function of (seed, global sample index)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hpc_neuro.core.constants import UNLABELLED
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.schema import config
from hpc_neuro.core.types import Batch, copy_to_device
from hpc_neuro.data.crops import make_rng
from hpc_neuro.data.orientation import parse_orientation

_FIELD = 4  # knots per axis of a smooth random field
_SPECKS = 12  # most specks in one crop


@config
class AugmentConfig:
    """How far training crops may stray from the stacks. Shares are probabilities per crop; 0 switches a thing off."""

    flip: bool = True
    """Mirror along each axis, by a coin each."""
    rotate90: bool = True
    """Quarter turns in the slice plane; crops whose y and x differ get half turns only."""
    distilled: tuple[str, ...] | None = None
    """Mirrors and turns of distilled crops, such as [flip_y, rot90], out of those that the cache holds (its
    augment_views); none: all it holds."""
    warp: float = Field(default=0.3, ge=0, le=1)
    """Share of crops turned, scaled and bent freely."""
    angle: float = Field(default=20.0, ge=0, le=180)
    """[degree] Most turning in the slice plane."""
    scale: float = Field(default=0.15, ge=0, lt=0.9)
    """Most relative change of size, each axis on its own."""
    bend: float = Field(default=4.0, ge=0)
    """[voxel] Standard deviation of the smooth displacement in the slice plane."""
    gamma: float = Field(default=0.6, ge=0)
    """Most change of gamma, as a logarithm: exp(0.6) = 1.8."""
    contrast: float = Field(default=0.3, ge=0, lt=1)
    """Most relative change of contrast."""
    uneven: float = Field(default=0.5, ge=0, le=1)
    """Share of crops whose signal fades and brightens smoothly from place to place."""
    fading: float = Field(default=0.6, ge=0)
    """Strength of that, as the standard deviation of the logarithm of the brightness; half of it darker on average."""
    background: float = Field(default=0.6, ge=0, le=1)
    """Share of crops that get a smooth background, as stacks have whose background was not masked away."""
    background_level: float = Field(default=0.1, ge=0, le=1)
    """Most background, as a share of the intensity range; small values are more frequent."""
    noise: float = Field(default=0.7, ge=0, le=1)
    """Share of crops with read noise (the same everywhere) and shot noise (variance grows with intensity)."""
    read_noise: float = Field(default=0.05, ge=0)
    """Largest standard deviation of the read noise, as a share of the intensity range."""
    shot_noise: float = Field(default=0.15, ge=0)
    """Largest standard deviation of the shot noise at full intensity."""
    blur: float = Field(default=0.3, ge=0, le=1)
    """Share of crops blurred or sharpened."""
    coarse: float = Field(default=0.1, ge=0, le=1)
    """Share of crops brought to half the resolution in the slice plane and back."""
    specks: float = Field(default=0.2, ge=0, le=1)
    """Share of crops with small bright debris that is not neurite."""
    missing: float = Field(default=0.1, ge=0, le=1)
    """Share of crops with a slice or two black."""
    stripes: float = Field(default=0.1, ge=0, le=1)
    """Share of crops with line-to-line brightness differences, as laser scanning makes them."""

    def __post_init__(self) -> None:
        for name in self.distilled or ():
            parse_orientation(name)


def augment(batch: Batch, cfg: AugmentConfig, seed: int) -> Batch:
    """A batch, its geometry changed together for image, mask and skeleton, then the image degraded.

    Samples that are distilled keep the geometry they were read in: a mirrored feature map is not the map of the
    mirrored image. What a sample becomes depends on (seed, its index) only, never on the rest of the batch. The image
    stays within [0, 1].
    """
    draws = [SampleStreams(seed, int(i)) for i in batch.index.tolist()]
    free = [i for i, fixed in enumerate(batch.distilled.tolist()) if not fixed]
    image, mask, skeleton = _turned(batch, cfg, draws, free)
    image, mask, skeleton = _warped(image, mask, skeleton, cfg, draws, free)
    return dataclasses.replace(batch, image=_degraded(image, cfg, draws), mask=mask, skeleton=skeleton)


class SampleStreams:
    """The random numbers of one sample: each purpose has a stream of its own, so that knobs do not move one another."""

    def __init__(self, seed: int, index: int) -> None:
        self.seed, self.index = seed, index
        self._of: dict[str, np.random.Generator] = {}

    def of(self, purpose: str) -> np.random.Generator:
        if purpose not in self._of:
            self._of[purpose] = make_rng(self.seed, purpose, self.index)
        return self._of[purpose]

    def chance(self, purpose: str, share: float) -> bool:
        return bool(self.of(purpose).random() < share)

    def between(self, purpose: str, low: float, high: float) -> float:
        return float(self.of(purpose).uniform(low, high))

    def normal(self, purpose: str, shape: Shape, device: torch.device) -> Tensor:
        """Standard normal noise [1, *shape] made on the device."""
        source = torch.Generator(device).manual_seed(int(self.of(purpose).integers(2**62)))
        return torch.randn((1, *shape), generator=source, device=device)

    def field(self, purpose: str, shape: Shape, device: torch.device, channels: int = 1) -> Tensor:
        """A smooth random field [channels, *shape], about standard normal at its knots."""
        knots = torch.from_numpy(self.of(purpose).standard_normal((1, channels, _FIELD, _FIELD, _FIELD), np.float32))
        return F.interpolate(copy_to_device(knots, device), size=shape, mode="trilinear", align_corners=True)[0]


def _turned(
    batch: Batch, cfg: AugmentConfig, draws: list[SampleStreams], free: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mirrored and turned by quarters: exact, no interpolation."""
    parts: list[list[Tensor]] = [[], [], []]
    square = batch.image.shape[-1] == batch.image.shape[-2]
    for i, draw in enumerate(draws):
        flips = [a for a in (1, 2, 3) if cfg.flip and draw.chance("flip", 0.5)] if i in free else []
        turns = int(draw.of("turn").integers(4)) if cfg.rotate90 and i in free else 0
        turns = turns if square else turns // 2 * 2
        for part, whole in zip(parts, (batch.image, batch.mask, batch.skeleton), strict=True):
            part.append(torch.rot90(whole[i].flip(flips), turns, (2, 3)))
    image, mask, skeleton = (torch.stack(part) for part in parts)
    return image, mask, skeleton


def _warped(
    image: Tensor, mask: Tensor, skeleton: Tensor, cfg: AugmentConfig, draws: list[SampleStreams], free: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Turned, scaled and bent; what comes from outside the crop repeats its border and is unlabelled."""
    chosen = [i for i in free if draws[i].chance("warp", cfg.warp)]
    if not chosen:
        return image, mask, skeleton
    shape = (image.shape[2], image.shape[3], image.shape[4])
    picked = copy_to_device(torch.tensor(chosen), image.device)
    theta = copy_to_device(torch.tensor([_affine(draws[i], cfg, shape) for i in chosen]), image.device)  # [b, 3, 4]
    grid = F.affine_grid(
        theta, [len(chosen), 1, *shape], align_corners=False
    )  # [b, Z, Y, X, 3], last is x y z in [-1, 1]
    if cfg.bend > 0:
        moved = torch.stack(
            [draws[i].field("bend", shape, image.device, channels=2) for i in chosen]
        )  # [b, 2, Z, Y, X]
        unit = copy_to_device(torch.tensor([2 * cfg.bend / shape[2], 2 * cfg.bend / shape[1]]), image.device)
        grid[..., :2] += moved.movedim(1, -1) * unit
    warped = F.grid_sample(
        image.index_select(0, picked), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    # one pass for both label maps; zeros come from outside, so the mask goes in raised by one
    labels = torch.cat([mask.index_select(0, picked).float() + 1, skeleton.index_select(0, picked).float()], 1)
    labels = F.grid_sample(labels, grid, mode="nearest", padding_mode="zeros", align_corners=False)  # [b, 2, Z, Y, X]
    inside = labels[:, :1] > 0
    labelled = torch.where(inside, labels[:, :1] - 1, float(UNLABELLED)).to(mask.dtype)
    return (
        image.index_copy(0, picked, warped),
        mask.index_copy(0, picked, labelled),
        skeleton.index_copy(0, picked, labels[:, 1:].to(skeleton.dtype)),
    )


def _affine(draw: SampleStreams, cfg: AugmentConfig, shape: Shape) -> list[list[float]]:
    """The 3x4 matrix [x y z order, unit cube] of a turn in the slice plane and a change of size."""
    turn = math.radians(draw.between("warp", -cfg.angle, cfg.angle))
    x, y, z = (1 / (1 + draw.between("warp", -cfg.scale, cfg.scale)) for _ in range(3))
    wide = shape[1] / shape[2]  # the unit cube is not a cube of voxels
    return [
        [x * math.cos(turn), -x * math.sin(turn) * wide, 0.0, 0.0],
        [y * math.sin(turn) / wide, y * math.cos(turn), 0.0, 0.0],
        [0.0, 0.0, z, 0.0],
    ]


def _degraded(image: Tensor, cfg: AugmentConfig, draws: list[SampleStreams]) -> Tensor:
    """What a microscope may do, in its order: signal, optics, background, detector."""
    shape, device = (image.shape[2], image.shape[3], image.shape[4]), image.device

    def some(purpose: str, share: float, change: Callable[[Tensor, list[SampleStreams]], Tensor]) -> None:
        """Apply `change` to [b, 1, Z, Y, X], the crops that the coin chose."""
        nonlocal image
        chosen = [i for i, draw in enumerate(draws) if draw.chance(purpose, share)]
        if len(chosen) == len(draws):
            image = change(image, draws)
        elif chosen:
            picked = copy_to_device(torch.tensor(chosen), device)
            image = image.index_copy(0, picked, change(image.index_select(0, picked), [draws[i] for i in chosen]))

    def each(some_draws: list[SampleStreams], value: Callable[[SampleStreams], float]) -> Tensor:
        return copy_to_device(torch.tensor([value(d) for d in some_draws]), device).view(
            -1, 1, 1, 1, 1
        )  # [b, 1, 1, 1, 1]

    def gamma(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        return x.clamp(min=1e-6) ** each(ds, lambda d: math.exp(d.between("gamma", -cfg.gamma, cfg.gamma)))

    def uneven(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        return x * torch.exp(cfg.fading * (torch.stack([d.field("uneven", shape, device) for d in ds]) - 0.5))

    def specks(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        return torch.maximum(x, copy_to_device(torch.stack([_specks(d, shape) for d in ds]), device))

    def blur(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        smooth = F.avg_pool3d(x, 3, 1, 1, count_include_pad=False)
        return x + each(ds, lambda d: d.between("blur", -0.5, 1.0)) * (smooth - x)  # below 0 sharpens

    def coarse(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        return F.interpolate(F.avg_pool3d(x, (1, 2, 2), ceil_mode=True), size=shape, mode="trilinear")

    def background(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        level = each(ds, lambda d: cfg.background_level * d.between("back", 0, 1) ** 2)
        field = 1 + 0.5 * torch.stack([d.field("back", shape, device) for d in ds])
        return x + (1 - x) * (level * field).clamp(0, 1)

    def noise(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        read = each(ds, lambda d: cfg.read_noise * d.between("noise", 0, 1) ** 2)
        shot = each(ds, lambda d: cfg.shot_noise * d.between("noise", 0, 1) ** 2)
        sigma = torch.sqrt(read**2 + shot**2 * x.clamp(min=0))
        return torch.addcmul(x, torch.stack([d.normal("noise", shape, device) for d in ds]), sigma)

    def stripes(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        lines = torch.stack([d.normal("stripes", (shape[0], shape[1], 1), device) for d in ds])  # [b, 1, Z, Y, 1]
        return x * (1 + each(ds, lambda d: d.between("stripes", 0, 0.3)) * lines)

    def missing(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        kept = torch.ones(len(ds), 1, shape[0], 1, 1)
        for i, d in enumerate(ds):
            kept[i, 0, d.of("missing").integers(shape[0], size=2)] = 0
        return x * copy_to_device(kept, device)

    def contrast(x: Tensor, ds: list[SampleStreams]) -> Tensor:
        return x * each(ds, lambda d: 1 + d.between("contrast", -cfg.contrast, cfg.contrast))

    some("gamma", 1.0 if cfg.gamma else 0.0, gamma)
    some("uneven", cfg.uneven, uneven)
    some("specks", cfg.specks, specks)
    some("blur", cfg.blur, blur)
    some("coarse", cfg.coarse, coarse)
    some("back", cfg.background, background)
    some("contrast", 1.0 if cfg.contrast else 0.0, contrast)
    some("noise", cfg.noise, noise)
    some("stripes", cfg.stripes, stripes)
    some("missing", cfg.missing, missing)
    return image.clamp(0, 1)


def _specks(draw: SampleStreams, shape: Shape) -> Tensor:
    """[1, Z, Y, X]: zero but for a few Gaussian blobs of 1 to 3 voxels."""
    source, canvas = draw.of("specks"), np.zeros(shape, np.float32)
    for _ in range(int(source.integers(1, _SPECKS + 1))):
        middle, sigma = source.random(3) * shape, source.uniform(0.6, 2.0)
        low = np.maximum(middle - 3 * sigma, 0).astype(int)
        high = np.minimum(middle + 3 * sigma + 1, shape).astype(int)
        place = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        z, y, x = np.ogrid[place]
        distance = (z - middle[0]) ** 2 + (y - middle[1]) ** 2 + (x - middle[2]) ** 2
        blob = source.uniform(0.2, 1.0) * np.exp(-distance / (2 * sigma**2))
        part = canvas[place]
        np.maximum(part, blob, out=part)
    return torch.from_numpy(canvas)[None]
