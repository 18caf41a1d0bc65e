"""A microscope for trees: labelled neurites, blur, photons, background, and other objects of a real stack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, fine_voxel, to_um
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data.rasterize import paint_tree
from hpc_neuro.data.synthetic.trees import TreeForm, grow_random_tree

Image = NDArray[np.float32]

GLOW_LENGTH = 10.0
"""[um] Distance along a branch over which the brightness is correlated."""

MIN_OBJECT = 30
"""[voxel] Smaller bright objects are removed with a clean background."""


@dataclass(frozen=True, kw_only=True)
class Microscope:
    """What turns a tree into a stack. Intensities are shares of the full scale unless a unit is given."""

    psf: tuple[float, float] = (1.25, 0.19)
    """[um] Standard deviation of the blur along z, and in the plane."""
    halo: float = 0.12
    """Share of the light that the blur spreads three times as far."""
    brightness: float = 0.6
    """Median brightness of the centerline; values above 1 saturate."""
    unevenness: float = 0.45
    """Standard deviation of the logarithm of the brightness along the tree."""
    bouton_every: float = 12.0
    """[um] Mean distance between swellings; branch tips swell more often."""
    bouton_swelling: float = 2.2
    """Largest radius of a swelling over that of its neurite."""
    gap_every: float = 60.0
    """[um] Mean distance between breaks of the signal."""
    gap_length: float = 2.5
    """[um] Length of a break."""
    photons: float = 70.0
    """Photons in a voxel at full scale; fewer make more Poisson noise."""
    read_noise: float = 0.004
    """Standard deviation of the noise without light."""
    background: float = 0.008
    """Mean brightness of tissue between the neurites; uneven by about as much, and fainter with depth."""
    specks: float = 4.0
    """Bright specks per million voxels, as dust and debris leave them."""
    fragments: int = 1
    """Dim stretches of other neurites that are not in the tree."""
    bits: Literal[8, 16] = 8
    """Bits per voxel; 16 fills 12 of them, as most cameras do."""


def render_stack(
    tree: Tree,
    shape: Shape,
    voxel_size: VoxelSize,
    cfg: Microscope | None = None,
    seed: int = 0,
    *,
    clean_background: bool = False,
    labeling: Sequence[float] | None = None,
) -> Array:
    """[Z, Y, X] uint8 or uint16: the image of `tree` (voxels, radii in fine voxels).

    clean_background: everything away from bright signal is set to zero, as in many published stacks. labeling: the
    share of the brightness that each neuron of a forest has, in the order of the roots; by default 1. A function of its
    arguments. Memory: about 40 bytes per voxel, times the anisotropy.
    """
    cfg = cfg or Microscope()
    rng = np.random.default_rng(seed)
    shares = np.ones(len(tree.roots)) if labeling is None else np.asarray(labeling, dtype=np.float64)

    fragments = 0 if clean_background else cfg.fragments
    light = _render_light(tree, shape, voxel_size, cfg, rng, fragments, shares)
    light += _render_specks(shape, cfg, rng)
    light += _render_background(shape, cfg, rng)

    # Shot noise of the photons, then read noise of the camera.
    image = rng.poisson(np.maximum(light, 0) * cfg.photons) / cfg.photons + cfg.read_noise * rng.normal(size=shape)

    # Cameras are set so that tissue is nearly black.
    image -= 0.5 * cfg.background
    if clean_background:
        # Well above the tissue and its noise.
        threshold = 2.5 * cfg.background + 3 * cfg.read_noise + 0.02
        image = np.where(find_bright_objects(image, threshold), image, 0)

    full_scale = 254 if cfg.bits == 8 else 4095
    counts = np.clip(np.rint(image * full_scale), 0, full_scale)
    return counts.astype(np.uint8 if cfg.bits == 8 else np.uint16)


def _render_light(
    tree: Tree,
    shape: Shape,
    size: VoxelSize,
    cfg: Microscope,
    rng: np.random.Generator,
    fragments: int,
    shares: NDArray[np.float64],
) -> Image:
    """The neurites' light after the blur, painted with z as fine as the plane so that none slips between slices.

    `shares` are the brightness of each tree of a forest, as a share.
    """
    # A neurite thinner than a slice would fall between two of them.
    factor = max(1, round(size[0] / fine_voxel(size)))
    grid = (size[0] / factor, size[1], size[2])
    painted = _paint_living_tree(tree, shape, size, factor, cfg, rng, shares)
    for _ in range(fragments):
        # Fragments are dim, as neurites of weakly labelled neighbors are.
        dimming = np.float32(rng.uniform(0.1, 0.35))
        fragment = _paint_living_tree(_grow_fragment(shape, size, rng), shape, size, factor, cfg, rng, np.ones(1))
        np.maximum(painted, dimming * fragment, out=painted)

    sigma = [cfg.psf[0] / grid[0], cfg.psf[1] / grid[1], cfg.psf[1] / grid[2]]
    light = _merge_slices(ndimage.gaussian_filter(painted, sigma, mode="nearest", truncate=3.0), factor)
    if cfg.halo:
        # The halo is wide enough to be computed on the coarse grid.
        halo_sigma = [3 * cfg.psf[0] / size[0], 3 * sigma[1], 3 * sigma[2]]
        halo = ndimage.gaussian_filter(_merge_slices(painted, factor), halo_sigma, mode="nearest", truncate=2.0)
        light *= 1 - cfg.halo
        light += cfg.halo * halo

    # The blur dims thin neurites, so the brightness is set after it.
    centerline = np.clip(np.rint(tree.points), 0, np.asarray(shape) - 1).astype(np.int64)
    median = float(np.median(light[tuple(centerline.T)] / shares[morphology.label_components(tree)]))
    light *= cfg.brightness / max(median, 1e-6)
    return light


def _paint_living_tree(
    tree: Tree,
    shape: Shape,
    size: VoxelSize,
    factor: int,
    cfg: Microscope,
    rng: np.random.Generator,
    shares: NDArray[np.float64],
) -> Image:
    """[Z * factor, Y, X] a tree with uneven brightness and swellings, before the blur."""
    grid = (size[0] / factor, size[1], size[2])
    fine, grid_fine = fine_voxel(size), fine_voxel(grid)

    # Nodes every two fine voxels, so that brightness and radius can vary along an edge.
    um = replace(tree, points=to_um(tree.points, size), radii=tree.radii * fine)
    um = morphology.resample_tree(um, 2 * fine)
    swelling, glow = _vary_along_branches(um, cfg, rng)
    glow *= shares[morphology.label_components(um)]

    # The first fine slice lies before the center of the first coarse one.
    points = um.points / np.asarray(grid) + [(factor - 1) / 2, 0, 0]
    voxels = replace(um, points=points, radii=um.radii * swelling / grid_fine)
    return paint_tree(voxels, glow, Box.whole((shape[0] * factor, shape[1], shape[2])), grid)


def _merge_slices(fine: Image, factor: int) -> Image:
    """The mean over each `factor` slices: what one optical section collects."""
    merged: Image = fine.reshape(-1, factor, *fine.shape[1:]).mean(axis=1)
    return merged


def _vary_along_branches(
    um: Tree, cfg: Microscope, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per node, the swelling of the radius and the brightness: both vary along the branches, not from node to node."""
    steps = morphology.edge_lengths(um)
    glow = _draw_glow(um, steps, cfg, rng)

    swelling = np.ones(len(um))
    tips = morphology.tips(um)

    boutons = np.flatnonzero(rng.random(len(um)) < steps / cfg.bouton_every)
    boutons = np.concatenate([boutons, tips[rng.random(len(tips)) < 0.5]])
    for node in boutons.tolist():
        bump = _make_bump(um, node, rng.uniform(0.6, 1.5))
        swelling = np.maximum(swelling, 1 + rng.uniform(0, cfg.bouton_swelling - 1) * bump)
        glow *= 1 + rng.uniform(0, 0.8) * bump

    # The length of a gap is its full width at half maximum.
    gap_sigma = max(cfg.gap_length, 1e-6) / 2.4
    for node in np.flatnonzero(rng.random(len(um)) < steps / cfg.gap_every).tolist():
        glow *= 1 - rng.uniform(0.5, 0.95) * _make_bump(um, node, gap_sigma)

    return swelling, glow


def _draw_glow(um: Tree, steps: NDArray[np.float64], cfg: Microscope, rng: np.random.Generator) -> NDArray[np.float64]:
    """[N] log-normal brightness: an Ornstein-Uhlenbeck walk from the root to the tips, plus grain."""
    walk = np.zeros(len(um))
    for i, parent in enumerate(um.parents.tolist()):
        correlation = math.exp(-steps[i] / GLOW_LENGTH) if parent >= 0 else 0.0
        inherited = correlation * walk[parent] if parent >= 0 else 0.0
        walk[i] = inherited + math.sqrt(1 - correlation * correlation) * rng.normal()

    # Label clusters in the membrane, about 1 um apart.
    grain = ndimage.gaussian_filter1d(rng.normal(size=len(um)), 1.0)
    glow: NDArray[np.float64] = np.exp(cfg.unevenness * (walk + 0.7 * grain / max(1e-6, float(grain.std()))))
    return glow


def _make_bump(um: Tree, node: int, sigma: float) -> NDArray[np.float64]:
    """[N] a Gaussian in space (`sigma` um) that is 1 at a node."""
    distance = np.linalg.norm(um.points - um.points[node], axis=1)
    bump: NDArray[np.float64] = np.exp(-0.5 * (distance / sigma) ** 2)
    return bump


def _grow_fragment(shape: Shape, size: VoxelSize, rng: np.random.Generator) -> Tree:
    """A stretch of a thin neurite that passes through."""
    thin = TreeForm(trunk_radius=0.35, tip_radius=0.25, orders=0, soma=0.0)
    tree = grow_random_tree(int(rng.integers(1 << 31)), shape, size, thin)
    count = max(8, int(rng.integers(len(tree) + 1)))
    return Tree(tree.points[:count], tree.radii[:count], tree.parents[:count], tree.types[:count])


def _render_specks(shape: Shape, cfg: Microscope, rng: np.random.Generator) -> Image:
    """Dust and debris: points somewhat larger than a voxel, half of them alone, half in two clusters."""
    count = int(rng.poisson(cfg.specks * math.prod(shape) / 1e6))
    points = rng.uniform(0, 1, (count, 3)) * np.asarray(shape)

    centers = rng.uniform(0, 1, (2, 3)) * np.asarray(shape)
    is_clustered = rng.random(count) < 0.5
    spread = rng.normal(size=(count, 3)) * [2.0, 6.0, 6.0]
    points[is_clustered] = (centers[rng.integers(0, 2, count)] + spread)[is_clustered]

    specks = np.zeros(shape, dtype=np.float32)
    voxels = np.clip(points, 0, np.asarray(shape) - 1).astype(np.int64)
    np.add.at(specks, tuple(voxels.T), rng.lognormal(0.0, 0.8, count).astype(np.float32))
    blurred: Image = ndimage.gaussian_filter(specks, [0.7, 0.8, 0.8])
    return blurred * np.float32(2.0)


def _render_background(shape: Shape, cfg: Microscope, rng: np.random.Generator) -> Image:
    """Tissue: smooth clouds, in half of the stacks fainter with depth (z)."""
    # Noise on a coarse grid, enlarged, has structures of about 24 voxels.
    coarse = rng.normal(size=tuple(max(2, n // 24) for n in shape))
    zoom = [n / c for n, c in zip(shape, coarse.shape, strict=True)]
    clouds = ndimage.zoom(ndimage.gaussian_filter(coarse, 0.7), zoom, order=1)
    clouds = 1 + clouds[: shape[0], : shape[1], : shape[2]] / max(1e-6, float(clouds.std()))

    depth = np.linspace(1.3, 0.4, shape[0])[:, None, None] if rng.random() < 0.5 else np.ones((shape[0], 1, 1))
    tissue: Image = (cfg.background * np.maximum(clouds, 0) * depth).astype(np.float32)
    return tissue


def find_bright_objects(image: NDArray[np.floating], threshold: float) -> NDArray[np.bool_]:
    """[Z, Y, X] what a person who cleans a stack keeps: bright objects of some size and their surroundings."""
    smooth = ndimage.gaussian_filter(image, [0.7, 1.0, 1.0])
    labels, count = ndimage.label(smooth > threshold)
    is_kept = np.bincount(labels.ravel(), minlength=count + 1) >= MIN_OBJECT
    is_kept[0] = False
    kept: NDArray[np.bool_] = is_kept[labels]
    return kept
