"""Augmentation: one transform for image, mask and centerline, in batches on the device.

What a sample becomes is a pure function of (seed, global sample index).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.types import Batch, copy_to_device
from hpc_neuro.data.config import AugmentConfig
from hpc_neuro.data.crops import make_rng

FIELD_KNOTS = 4
"""Knots per axis of a smooth random field."""

FADING = 0.6
"""Standard deviation of the logarithm of brightness in unevenly bright crops; half of a crop is darkened on average."""

BACKGROUND_LEVEL = 0.1
"""Largest smooth background, as a share of the intensity range; small values are drawn more often."""

READ_NOISE = 0.05
"""Largest standard deviation of the read noise, as a share of the intensity range."""

SHOT_NOISE = 0.15
"""Largest standard deviation of the shot noise at full intensity, as a share of the intensity range."""

STRIPE_CONTRAST = 0.3
"""Largest standard deviation of the brightness of scan lines, relative to the signal."""

MAX_SPECKS = 12
"""Largest number of bright specks in one crop."""


def augment(batch: Batch, cfg: AugmentConfig, seed: int) -> Batch:
    """Change the geometry of image, mask and skeleton together, then degrade the image.

    Distilled samples keep their geometry: a mirrored feature map is not the map of the mirrored image. A sample depends
    on (seed, its index) only, not on the rest of the batch. The image stays within [0, 1].
    """
    # Random numbers come from the sample's own index, so ranks and batch sizes do not matter.
    streams = [SampleStreams(seed, int(i)) for i in batch.index.tolist()]
    free = [i for i, is_distilled in enumerate(batch.distilled.tolist()) if not is_distilled]

    # Geometry first: the noise of a detector is not turned or stretched with the tissue.
    image, mask, skeleton = _flip_and_turn(batch, cfg, streams, free)
    image, mask, skeleton = _warp(image, mask, skeleton, cfg, streams, free)
    image = _degrade(image, cfg, streams)
    return dataclasses.replace(batch, image=image, mask=mask, skeleton=skeleton)


class SampleStreams:
    """The random numbers of one sample. Each purpose has its own stream, so settings do not influence one another."""

    def __init__(self, seed: int, index: int) -> None:
        self.seed = seed
        self.index = index
        self._streams: dict[str, np.random.Generator] = {}

    def stream(self, purpose: str) -> np.random.Generator:
        """The generator of one purpose, which keeps its state between calls."""
        # A stream starts at its first draw and goes on with every further one.
        if purpose not in self._streams:
            self._streams[purpose] = make_rng(self.seed, purpose, self.index)
        return self._streams[purpose]

    def chance(self, purpose: str, share: float) -> bool:
        """True with probability `share`."""
        return bool(self.stream(purpose).random() < share)

    def between(self, purpose: str, low: float, high: float) -> float:
        """A uniform number in [low, high)."""
        return float(self.stream(purpose).uniform(low, high))

    def normal(self, purpose: str, shape: Shape, device: torch.device) -> Tensor:
        """Standard normal noise [1, *shape], drawn on the device."""
        # Noise of a whole crop is drawn on the device; only its seed comes from the stream.
        generator = torch.Generator(device).manual_seed(int(self.stream(purpose).integers(2**62)))
        return torch.randn((1, *shape), generator=generator, device=device)

    def field(self, purpose: str, shape: Shape, device: torch.device, channels: int = 1) -> Tensor:
        """A smooth random field [channels, *shape], standard normal at its knots."""
        # A few knots, interpolated, make a field that varies over a quarter of the crop.
        knot_shape = (1, channels, FIELD_KNOTS, FIELD_KNOTS, FIELD_KNOTS)
        knots = torch.from_numpy(self.stream(purpose).standard_normal(knot_shape, np.float32))
        return F.interpolate(copy_to_device(knots, device), size=shape, mode="trilinear", align_corners=True)[0]


def _flip_and_turn(
    batch: Batch, cfg: AugmentConfig, streams: list[SampleStreams], free: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mirror and turn by quarters: exact, without interpolation. Only the samples in `free` change."""
    is_square = batch.image.shape[-1] == batch.image.shape[-2]
    images, masks, skeletons = [], [], []

    for i, draws in enumerate(streams):
        # Distilled samples keep their geometry: their features were computed for it.
        flips = [axis for axis in (1, 2, 3) if cfg.flip and draws.chance("flip", 0.5)] if i in free else []
        turns = int(draws.stream("turn").integers(4)) if cfg.flip and i in free else 0

        # A quarter turn of an oblong crop would have another shape than the rest of the batch.
        turns = turns if is_square else turns // 2 * 2

        images.append(torch.rot90(batch.image[i].flip(flips), turns, (2, 3)))
        masks.append(torch.rot90(batch.mask[i].flip(flips), turns, (2, 3)))
        skeletons.append(torch.rot90(batch.skeleton[i].flip(flips), turns, (2, 3)))

    return torch.stack(images), torch.stack(masks), torch.stack(skeletons)


def _warp(
    image: Tensor, mask: Tensor, skeleton: Tensor, cfg: AugmentConfig, streams: list[SampleStreams], free: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn, scale and bend a share of the samples in `free`.

    Voxels from outside the crop repeat its border in the image and are unlabelled in the mask.
    """
    picked = [i for i in free if streams[i].chance("warp", cfg.warp)]
    if not picked:
        return image, mask, skeleton

    shape = (image.shape[2], image.shape[3], image.shape[4])
    index = copy_to_device(torch.tensor(picked), image.device)
    grid = _warp_grid([streams[i] for i in picked], cfg, shape, image.device)  # [b, Z, Y, X, 3]

    # Linear for intensities; labels are sampled below, without mixing classes.
    warped = F.grid_sample(
        image.index_select(0, index), grid, mode="bilinear", padding_mode="border", align_corners=False
    )

    # Sample both label maps in one pass. Outside the crop it gives zeros, so the mask goes in raised by one.
    labels = torch.cat([mask.index_select(0, index).float() + 1, skeleton.index_select(0, index).float()], 1)
    labels = F.grid_sample(labels, grid, mode="nearest", padding_mode="zeros", align_corners=False)  # [b, 2, Z, Y, X]
    inside = labels[:, :1] > 0
    warped_mask = torch.where(inside, labels[:, :1] - 1, float(UNLABELED)).to(mask.dtype)
    warped_skeleton = labels[:, 1:].to(skeleton.dtype)

    return (
        image.index_copy(0, index, warped),
        mask.index_copy(0, index, warped_mask),
        skeleton.index_copy(0, index, warped_skeleton),
    )


def _warp_grid(streams: list[SampleStreams], cfg: AugmentConfig, shape: Shape, device: torch.device) -> Tensor:
    """[b, Z, Y, X, 3] sampling positions of `grid_sample`: x y z in [-1, 1]."""
    theta = copy_to_device(torch.tensor([_affine_matrix(draws, cfg, shape) for draws in streams]), device)  # [b, 3, 4]
    grid = F.affine_grid(theta, [len(streams), 1, *shape], align_corners=False)  # [b, Z, Y, X, 3]

    if cfg.bend > 0:
        # Only y and x move: neurites bend in the plane that is resolved well.
        shift = torch.stack([draws.field("bend", shape, device, channels=2) for draws in streams])  # [b, 2, Z, Y, X]
        voxels_to_grid = copy_to_device(torch.tensor([2 * cfg.bend / shape[2], 2 * cfg.bend / shape[1]]), device)
        grid[..., :2] += shift.movedim(1, -1) * voxels_to_grid
    return grid


def _affine_matrix(draws: SampleStreams, cfg: AugmentConfig, shape: Shape) -> list[list[float]]:
    """The 3x4 matrix [x y z order, unit cube] of a turn in the slice plane and a change of size."""
    # Positions are scaled by 1 / (1 + s), so that the image grows by 1 + s.
    turn = math.radians(draws.between("warp", -cfg.angle, cfg.angle))
    x, y, z = (1 / (1 + draws.between("warp", -cfg.scale, cfg.scale)) for _ in range(3))

    # The unit cube covers shape[1] by shape[2] voxels, so a turn in voxels is a shear in its coordinates.
    aspect = shape[1] / shape[2]
    return [
        [x * math.cos(turn), -x * math.sin(turn) * aspect, 0.0, 0.0],
        [y * math.sin(turn) / aspect, y * math.cos(turn), 0.0, 0.0],
        [0.0, 0.0, z, 0.0],
    ]


def _degrade(image: Tensor, cfg: AugmentConfig, streams: list[SampleStreams]) -> Tensor:
    """Degrade the image as a microscope does, in its order: signal, optics, background, detector."""
    for purpose, share, change in (
        ("gamma", 1.0 if cfg.gamma else 0.0, _change_gamma),
        ("uneven", cfg.uneven, _vary_brightness),
        ("specks", cfg.specks, _add_specks),
        ("blur", cfg.blur, _blur_or_sharpen),
        ("coarse", cfg.coarse, _halve_resolution),
        ("back", cfg.background, _add_background),
        ("contrast", 1.0 if cfg.contrast else 0.0, _change_contrast),
        ("noise", cfg.noise, _add_noise),
        ("stripes", cfg.stripes, _add_stripes),
        ("missing", cfg.missing, _blacken_slices),
    ):
        image = _change_share(image, streams, purpose, share, change, cfg)
    return image.clamp(0, 1)


Change = Callable[[Tensor, list[SampleStreams], AugmentConfig], Tensor]
"""(image [b, 1, Z, Y, X], the streams of its b crops, config) -> the changed image."""


def _change_share(
    image: Tensor, streams: list[SampleStreams], purpose: str, share: float, change: Change, cfg: AugmentConfig
) -> Tensor:
    """Apply `change` to a random share of the crops."""
    # The coin and the change itself draw from one stream, which no other change uses.
    picked = [i for i, draws in enumerate(streams) if draws.chance(purpose, share)]
    if len(picked) == len(streams):
        return change(image, streams, cfg)
    if not picked:
        return image

    index = copy_to_device(torch.tensor(picked), image.device)
    changed = change(image.index_select(0, index), [streams[i] for i in picked], cfg)
    return image.index_copy(0, index, changed)


def _per_crop(values: list[float], image: Tensor) -> Tensor:
    """[b, 1, 1, 1, 1] one number per crop, on the image's device."""
    return copy_to_device(torch.tensor(values), image.device).view(-1, 1, 1, 1, 1)


def _shape_of(image: Tensor) -> Shape:
    return image.shape[2], image.shape[3], image.shape[4]


def _change_gamma(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    # Values of exactly 0 are lifted a little, so that the power is well defined for every exponent.
    exponents = _per_crop([math.exp(draws.between("gamma", -cfg.gamma, cfg.gamma)) for draws in streams], image)
    return image.clamp(min=1e-6) ** exponents


def _vary_brightness(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    fields = torch.stack([draws.field("uneven", _shape_of(image), image.device) for draws in streams])
    return image * torch.exp(FADING * (fields - 0.5))


def _add_specks(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    specks = torch.stack([_draw_specks(draws, _shape_of(image)) for draws in streams])
    return torch.maximum(image, copy_to_device(specks, image.device))


def _blur_or_sharpen(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    smooth = F.avg_pool3d(image, 3, 1, 1, count_include_pad=False)
    # Amounts below 0 sharpen.
    return image + _per_crop([draws.between("blur", -0.5, 1.0) for draws in streams], image) * (smooth - image)


def _halve_resolution(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    return F.interpolate(F.avg_pool3d(image, (1, 2, 2), ceil_mode=True), size=_shape_of(image), mode="trilinear")


def _add_background(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    # The square makes faint backgrounds more frequent than bright ones.
    level = _per_crop([BACKGROUND_LEVEL * draws.between("back", 0, 1) ** 2 for draws in streams], image)
    fields = 1 + 0.5 * torch.stack([draws.field("back", _shape_of(image), image.device) for draws in streams])
    return image + (1 - image) * (level * fields).clamp(0, 1)


def _change_contrast(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    return image * _per_crop([1 + draws.between("contrast", -cfg.contrast, cfg.contrast) for draws in streams], image)


def _add_noise(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    read = _per_crop([READ_NOISE * draws.between("noise", 0, 1) ** 2 for draws in streams], image)
    shot = _per_crop([SHOT_NOISE * draws.between("noise", 0, 1) ** 2 for draws in streams], image)

    # Read noise has the same variance everywhere; that of shot noise grows with the signal.
    sigma = torch.sqrt(read**2 + shot**2 * image.clamp(min=0))
    return torch.addcmul(
        image, torch.stack([draws.normal("noise", _shape_of(image), image.device) for draws in streams]), sigma
    )


def _add_stripes(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    depth, rows, _ = _shape_of(image)
    # One random factor per scan line, the same along the whole line.
    lines = torch.stack([draws.normal("stripes", (depth, rows, 1), image.device) for draws in streams])
    return image * (1 + _per_crop([draws.between("stripes", 0, STRIPE_CONTRAST) for draws in streams], image) * lines)


def _blacken_slices(image: Tensor, streams: list[SampleStreams], cfg: AugmentConfig) -> Tensor:
    depth = image.shape[2]
    visible = torch.ones(len(streams), 1, depth, 1, 1)
    for i, draws in enumerate(streams):
        # Both draws may hit the same slice, so one or two slices are black.
        visible[i, 0, draws.stream("missing").integers(depth, size=2)] = 0
    return image * copy_to_device(visible, image.device)


def _draw_specks(draws: SampleStreams, shape: Shape) -> Tensor:
    """[1, Z, Y, X]: zero but for a few Gaussian blobs of 1 to 3 voxels."""
    rng = draws.stream("specks")
    canvas = np.zeros(shape, np.float32)

    for _ in range(int(rng.integers(1, MAX_SPECKS + 1))):
        center = rng.random(3) * shape
        sigma = rng.uniform(0.6, 2.0)

        # A blob is drawn in the voxels within 3 sigma of its center.
        low = np.maximum(center - 3 * sigma, 0).astype(int)
        high = np.minimum(center + 3 * sigma + 1, shape).astype(int)
        window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        z, y, x = np.ogrid[window]
        distance = (z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2
        blob = rng.uniform(0.2, 1.0) * np.exp(-distance / (2 * sigma**2))
        canvas_part = canvas[window]
        np.maximum(canvas_part, blob, out=canvas_part)

    return torch.from_numpy(canvas)[None]
