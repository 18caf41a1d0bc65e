"""The settings of training crops and their augmentation, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpc_neuro.core.schema import config
from hpc_neuro.data.orientation import parse_orientation


@config
class CropConfig:
    """The size of training crops, and what they are centered on."""

    size: tuple[int, int, int] = (32, 128, 128)
    """[voxel] Crop along z, y, x; multiples of the student's patch."""
    skeleton: float = Field(default=0.45, ge=0)
    """Share of crops around a random point of the centerline."""
    branch: float = Field(default=0.2, ge=0)
    """Share of crops around a branch point."""
    tip: float = Field(default=0.2, ge=0)
    """Share of crops around a tip."""
    uniform: float = Field(default=0.15, ge=0)
    """Share of crops anywhere in the volume: background and everything else in it."""
    jitter: float = Field(default=0.5, ge=0, le=1)
    """Share of the crop, around its middle, in which the chosen point may lie; 0 centers the crop on the point."""
    volumes: Literal["equal", "length", "size"] = "equal"
    """How often a volume is drawn: all equally, by length of its centerline, or by its number of voxels."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size is {list(self.size)}; give three positive numbers of voxels")
        if self.skeleton + self.branch + self.tip + self.uniform <= 0:
            raise ValueError("skeleton, branch, tip and uniform are all 0; give at least one of them a share")


@config
class AugmentConfig:
    """How far training crops may differ from the stacks. Shares are probabilities per crop; 0 switches a change off."""

    flip: bool = True
    """Mirror along each axis with probability 1/2, and turn by quarters in the slice plane; crops whose y and x differ
    get half turns only."""
    distilled: tuple[str, ...] | None = None
    """Mirrors and turns of distilled crops, such as [flip_y, rot90], out of those that the cache holds (its
    augment_views); none: all that it holds."""
    warp: float = Field(default=0.3, ge=0, le=1)
    """Share of crops turned, scaled and bent freely."""
    angle: float = Field(default=20.0, ge=0, le=180)
    """[degree] Largest turn in the slice plane."""
    scale: float = Field(default=0.15, ge=0, lt=0.9)
    """Largest relative change of size, drawn for each axis."""
    bend: float = Field(default=4.0, ge=0)
    """[voxel] Standard deviation of the smooth displacement in the slice plane."""
    gamma: float = Field(default=0.6, ge=0)
    """Largest change of gamma, as a logarithm: exp(0.6) = 1.8."""
    contrast: float = Field(default=0.3, ge=0, lt=1)
    """Largest relative change of contrast."""
    uneven: float = Field(default=0.5, ge=0, le=1)
    """Share of crops whose brightness varies smoothly from place to place."""
    background: float = Field(default=0.6, ge=0, le=1)
    """Share of crops that get a smooth background, as in stacks whose background was not masked away."""
    noise: float = Field(default=0.7, ge=0, le=1)
    """Share of crops with read noise (the same everywhere) and shot noise (variance grows with intensity)."""
    blur: float = Field(default=0.3, ge=0, le=1)
    """Share of crops blurred or sharpened."""
    coarse: float = Field(default=0.1, ge=0, le=1)
    """Share of crops brought to half the resolution in the slice plane and back."""
    specks: float = Field(default=0.2, ge=0, le=1)
    """Share of crops with small bright debris that is not neurite."""
    missing: float = Field(default=0.1, ge=0, le=1)
    """Share of crops with one or two black slices."""
    stripes: float = Field(default=0.1, ge=0, le=1)
    """Share of crops with brightness differences between lines, as laser scanning makes them."""

    def __post_init__(self) -> None:
        # A wrong name is reported with the config, not when the first crop is read.
        for name in self.distilled or ():
            parse_orientation(name)
