"""A microscope for trees: labelled neurites, blur, photons, background, and what else lies in a real stack."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, fine_voxel, to_um
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import config
from hpc_neuro.core.types import Array
from hpc_neuro.data.rasterize import paint_tree
from hpc_neuro.data.synthetic.trees import TreeConfig, grow_random_tree

Image = NDArray[np.float32]


@config
class MicroscopeConfig:
    """What turns a tree into a stack; intensities are shares of the full scale unless they say otherwise."""

    psf: tuple[float, float] = (1.25, 0.19)
    """[um] Standard deviation of the blur along z, and in the plane."""
    halo: float = Field(default=0.12, ge=0, lt=1)
    """Share of the light that the blur spreads three times as far."""
    brightness: float = Field(default=0.6, gt=0)
    """Median brightness of the centreline; what exceeds 1 saturates."""
    unevenness: float = Field(default=0.45, ge=0)
    """Standard deviation of the logarithm of the brightness along the tree."""
    bouton_every: float = Field(default=12.0, gt=0)
    """[um] Mean distance between swellings; branch tips swell more often."""
    bouton_swelling: float = Field(default=2.2, ge=1)
    """Radius of a swelling over that of its neurite, at most."""
    gap_every: float = Field(default=60.0, gt=0)
    """[um] Mean distance between places where the signal is broken."""
    gap_length: float = Field(default=2.5, ge=0)
    """[um] Length of such a place."""
    photons: float = Field(default=70.0, gt=0)
    """Photons in a voxel at full scale; fewer make more Poisson noise."""
    read_noise: float = Field(default=0.004, ge=0)
    """Standard deviation of the noise that is there without light."""
    background: float = Field(default=0.008, ge=0)
    """Mean brightness of tissue between the neurites; uneven by about as much, and fainter with depth."""
    specks: float = Field(default=4.0, ge=0)
    """Bright specks per million voxels, as dust and debris leave them."""
    fragments: int = Field(default=1, ge=0)
    """Dim stretches of other neurites that the truth leaves out."""
    bits: Literal[8, 16] = 8
    """Bits per voxel; 16 fills 12 of them, as most cameras do."""


def render(
    tree: Tree,
    shape: Shape,
    voxel_size: VoxelSize,
    cfg: MicroscopeConfig | None = None,
    seed: int = 0,
    *,
    clean_background: bool = False,
) -> Array:
    """[Z, Y, X] uint8 or uint16: what the microscope sees of `tree` (voxels, radii in fine voxels).

    `clean_background`: everything away from bright signal is set to zero, as many published stacks are.
    A function of its arguments. Memory: about 40 bytes per voxel, times the anisotropy.
    """
    cfg = cfg or MicroscopeConfig()
    rng = np.random.default_rng(seed)
    light = _light(tree, shape, voxel_size, cfg, rng, 0 if clean_background else cfg.fragments)
    light += _specks(shape, cfg, rng)
    light += _background(shape, cfg, rng)
    seen = rng.poisson(np.maximum(light, 0) * cfg.photons) / cfg.photons + cfg.read_noise * rng.normal(size=shape)
    seen -= 0.5 * cfg.background  # cameras are set so that tissue is nearly black
    if clean_background:
        seen = np.where(_near_signal(seen, cfg), seen, 0)
    full = 254 if cfg.bits == 8 else 4095
    image = np.clip(np.rint(seen * full), 0, full)
    return image.astype(np.uint8 if cfg.bits == 8 else np.uint16)


def _light(
    tree: Tree, shape: Shape, size: VoxelSize, cfg: MicroscopeConfig, rng: np.random.Generator, fragments: int
) -> Image:
    """The neurites' light after the blur, painted with z as fine as the plane so that none slips between slices."""
    times = max(1, round(size[0] / fine_voxel(size)))
    grid = (size[0] / times, size[1], size[2])
    drawn = _painted(tree, shape, size, times, cfg, rng)
    for _ in range(fragments):
        dim = np.float32(rng.uniform(0.1, 0.35))
        np.maximum(drawn, dim * _painted(_fragment(shape, size, rng), shape, size, times, cfg, rng), out=drawn)
    sharp = [cfg.psf[0] / grid[0], cfg.psf[1] / grid[1], cfg.psf[1] / grid[2]]
    light = _merged(ndimage.gaussian_filter(drawn, sharp, mode="nearest", truncate=3.0), times)
    if cfg.halo:  # wide enough to be computed on the coarse grid
        wide = [3 * cfg.psf[0] / size[0], 3 * sharp[1], 3 * sharp[2]]
        light *= 1 - cfg.halo
        light += cfg.halo * ndimage.gaussian_filter(_merged(drawn, times), wide, mode="nearest", truncate=2.0)
    here = np.clip(np.rint(tree.points), 0, np.asarray(shape) - 1).astype(np.int64)
    median = float(np.median(light[tuple(here.T)]))  # the blur dims thin neurites: set the level after it
    light *= cfg.brightness / max(median, 1e-6)
    return light


def _painted(
    tree: Tree, shape: Shape, size: VoxelSize, times: int, cfg: MicroscopeConfig, rng: np.random.Generator
) -> Image:
    """[Z * times, Y, X] a living tree before the blur."""
    grid = (size[0] / times, size[1], size[2])
    fine, unit = fine_voxel(size), fine_voxel(grid)
    um = morphology.resample_tree(replace(tree, points=to_um(tree.points, size), radii=tree.radii * fine), 2 * fine)
    swelling, glow = _life(um, cfg, rng)
    points = um.points / np.asarray(grid) + [(times - 1) / 2, 0, 0]  # the first fine slice lies before the coarse one
    voxels = replace(um, points=points, radii=um.radii * swelling / unit)
    return paint_tree(voxels, glow, Box.whole((shape[0] * times, shape[1], shape[2])), grid)


def _merged(fine: Image, times: int) -> Image:
    """Mean over each `times` slices: what one optical section collects."""
    merged: Image = fine.reshape(-1, times, *fine.shape[1:]).mean(axis=1)
    return merged


def _life(um: Tree, cfg: MicroscopeConfig, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per node, the swelling of the radius and the brightness: both vary along the branches, not from node to node."""
    steps = morphology.edge_lengths(um)
    glow = np.zeros(len(um))
    for i, parent in enumerate(um.parents.tolist()):  # an Ornstein-Uhlenbeck walk of 10 um from the root to the tips
        keep = math.exp(-steps[i] / 10.0) if parent >= 0 else 0.0
        glow[i] = (keep * glow[parent] if parent >= 0 else 0.0) + math.sqrt(1 - keep * keep) * rng.normal()
    grain = ndimage.gaussian_filter1d(rng.normal(size=len(um)), 1.0)  # label clusters in the membrane, about 1 um apart
    glow = np.exp(cfg.unevenness * (glow + 0.7 * grain / max(1e-6, float(grain.std()))))
    swelling = np.ones(len(um))
    tips = morphology.tips(um)
    boutons = np.flatnonzero(rng.random(len(um)) < steps / cfg.bouton_every)
    boutons = np.concatenate([boutons, tips[rng.random(len(tips)) < 0.5]])
    for node in boutons.tolist():
        bump = _bump(um, node, rng.uniform(0.6, 1.5))
        swelling = np.maximum(swelling, 1 + rng.uniform(0, cfg.bouton_swelling - 1) * bump)
        glow *= 1 + rng.uniform(0, 0.8) * bump
    for node in np.flatnonzero(rng.random(len(um)) < steps / cfg.gap_every).tolist():
        glow *= 1 - rng.uniform(0.5, 0.95) * _bump(um, node, max(cfg.gap_length, 1e-6) / 2.4)  # half maximum
    return swelling, glow


def _bump(um: Tree, node: int, width: float) -> NDArray[np.float64]:
    """A Gaussian of 1 at a node, of standard deviation `width` um in space."""
    apart = np.linalg.norm(um.points - um.points[node], axis=1)
    bump: NDArray[np.float64] = np.exp(-0.5 * (apart / width) ** 2)
    return bump


def _fragment(shape: Shape, size: VoxelSize, rng: np.random.Generator) -> Tree:
    """A stretch of a thin neurite that passes through."""
    thin = TreeConfig(trunk_radius=0.35, tip_radius=0.25, orders=0, soma=0.0)
    tree = grow_random_tree(int(rng.integers(1 << 31)), shape, size, thin)
    keep = np.arange(len(tree)) < max(8, int(rng.integers(len(tree) + 1)))
    return Tree(tree.points[keep], tree.radii[keep], tree.parents[keep], tree.types[keep])


def _specks(shape: Shape, cfg: MicroscopeConfig, rng: np.random.Generator) -> Image:
    """Dust and debris: points somewhat larger than a voxel, half of them alone, half in clusters."""
    count = int(rng.poisson(cfg.specks * math.prod(shape) / 1e6))
    places = rng.uniform(0, 1, (count, 3)) * np.asarray(shape)
    centres = rng.uniform(0, 1, (2, 3)) * np.asarray(shape)
    clustered = rng.random(count) < 0.5
    spread = rng.normal(size=(count, 3)) * [2.0, 6.0, 6.0]
    places[clustered] = (centres[rng.integers(0, 2, count)] + spread)[clustered]
    points = np.zeros(shape, dtype=np.float32)
    voxels = np.clip(places, 0, np.asarray(shape) - 1).astype(np.int64)
    np.add.at(points, tuple(voxels.T), rng.lognormal(0.0, 0.8, count).astype(np.float32))
    blurred: Image = ndimage.gaussian_filter(points, [0.7, 0.8, 0.8])
    return blurred * np.float32(2.0)


def _background(shape: Shape, cfg: MicroscopeConfig, rng: np.random.Generator) -> Image:
    """Tissue: smooth clouds, brighter on one side, fainter with depth (z)."""
    coarse = rng.normal(size=tuple(max(2, n // 24) for n in shape))
    zoom = [n / c for n, c in zip(shape, coarse.shape, strict=True)]
    clouds = ndimage.zoom(ndimage.gaussian_filter(coarse, 0.7), zoom, order=1)
    clouds = 1 + clouds[: shape[0], : shape[1], : shape[2]] / max(1e-6, float(clouds.std()))
    depth = np.linspace(1.3, 0.4, shape[0])[:, None, None] if rng.random() < 0.5 else np.ones((shape[0], 1, 1))
    tissue: Image = (cfg.background * np.maximum(clouds, 0) * depth).astype(np.float32)
    return tissue


def _near_signal(seen: NDArray[np.floating], cfg: MicroscopeConfig) -> NDArray[np.bool_]:
    """What a person who cleans a stack leaves as it is: bright objects of some size and their surroundings."""
    smooth = ndimage.gaussian_filter(seen, [0.7, 1.0, 1.0])
    level = 2.5 * cfg.background + 3 * cfg.read_noise + 0.02
    label, count = ndimage.label(smooth > level)
    sizes = np.bincount(label.ravel(), minlength=count + 1)
    keep = sizes >= 30
    keep[0] = False
    kept: NDArray[np.bool_] = keep[label]
    return kept
