"""A wide domain of synthetic stacks: what a student must have seen to be used on stacks that nobody labeled.

A scene is drawn in two steps. The neurites are rendered without noise by the package's microscope. Everything else of a
real stack is added here: bright somas, tissue, vessels, nuclei, uneven light, scan lines, photons and the camera.
Ranges are wide on purpose (domain randomization, Tobin et al. 2017); each is a constant below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, fine_voxel
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data import swc
from hpc_neuro.data.rasterize import paint_tree
from hpc_neuro.data.synthetic import Microscope, TreeForm, grow_random_tree, render_stack
from hpc_neuro.data.synthetic.microscope import find_bright_objects

Image = NDArray[np.float32]

_ANISOTROPY = (1.0, 6.0)
"""Length of a voxel along z over that in the plane, log-uniform."""
_RADIUS = (0.6, 4.0)
"""[fine voxel] Radius of a trunk, log-uniform."""
_TREES = (1, 6)
"""Neurons of a scene."""
_LEAST_NODES = 10
"""Nodes of a tree, at least; a shorter one left the volume at once."""
_DIMMEST = 0.25
"""Brightness of the dimmest neuron of a scene as a share of the brightest, at least."""
_GOLD_SHARE = 0.35
"""Share of scenes whose neurites are cut from reconstructions of real neurons, where such files are given."""
_SOMA_SHARE = 0.3
"""Share of scenes with somas."""
_SOMA_RADIUS = (4.0, 16.0)
"""[fine voxel] Radius of a soma."""
_SOMA_BRIGHTNESS = (1.0, 8.0)
"""[median brightness of the neurites] Brightness of a soma, log-uniform."""
_BLACK_SHARE = 0.4
"""Share of scenes whose background is exactly zero, as in many published stacks."""
_TISSUE = (0.01, 0.4)
"""[median brightness of the neurites] Mean brightness of tissue, log-uniform."""
_PHOTONS = (3.0, 300.0)
"""Photons of a neurite of median brightness, log-uniform."""
_READ_NOISE = (0.003, 0.7)
"""[median brightness of the neurites] Standard deviation of the camera's noise, log-uniform."""
_NOISY_SHARE = 0.25
"""Share of scenes whose noise is about as strong as the neurites are bright, and whose background is not black."""
_STRONG_NOISE = (0.4, 1.3)
"""[median brightness of the neurites] Standard deviation of the noise of those scenes, log-uniform."""
_VESSEL_SHARE, _NUCLEI_SHARE, _SPECK_SHARE, _STRIPE_SHARE, _SHIFT_SHARE = 0.15, 0.2, 0.4, 0.15, 0.1
"""Shares of scenes with large vessels or fibers, nuclei, bright specks, scan lines, and slices out of place."""
_GAP = 6.0
"""[voxel] Longest stretch without light that still belongs to the neurite, on each side."""


@dataclass(frozen=True)
class Scene:
    """One synthetic stack and all its neurites."""

    image: Array
    """[Z, Y, X] uint8 or uint16."""
    tree: Tree
    """All neurons, in voxels; radii in fine voxels, as wide as the blurred neurites look."""
    voxel_size: VoxelSize
    """[um]"""
    facts: dict[str, Any]
    """What was drawn, for the card."""


def draw_scene(seed: int, number: int, shape: Shape, gold: Sequence[Path] = ()) -> Scene:
    """Scene `number` of a domain; a function of its arguments. `gold`: SWC files in voxels, for real shapes."""
    rng = np.random.default_rng([seed, number])
    anisotropy = _draw_log_uniform(rng, _ANISOTROPY)
    size: VoxelSize = (0.33 * anisotropy, 0.33, 0.33)
    radius = _draw_log_uniform(rng, _RADIUS)

    # Neurites, their light, and the width that they seem to have.
    trees = _draw_trees(rng, shape, size, radius, gold)
    tree = morphology.concatenate_trees(trees)
    blur = rng.uniform(0.5, 1.3), rng.uniform(0.5, 1.6)  # [fine voxel] in the plane, [voxel] along z
    shares = np.exp(rng.uniform(math.log(_DIMMEST), 0, len(trees)))
    light = _render_neurites(rng, tree, shape, size, blur, shares / shares.max())

    soma_count = 0
    if rng.random() < _SOMA_SHARE:
        light, tree, soma_count = _add_somas(rng, light, tree, size)

    facts = {
        "anisotropy": round(anisotropy, 2),
        "radius": round(radius, 2),
        "neurons": len(trees),
        "somas": soma_count,
    }
    image, visible = _photograph(rng, light, size, facts)
    apparent = replace(tree, radii=np.sqrt(tree.radii**2 + (0.8 * blur[0]) ** 2))
    return Scene(image, _drop_invisible(apparent, light, visible), size, facts)


# --- Neurites ---


def _draw_trees(
    rng: np.random.Generator, shape: Shape, size: VoxelSize, radius: float, gold: Sequence[Path]
) -> list[Tree]:
    """The neurons of a scene, in voxels with radii in fine voxels."""
    if gold and rng.random() < _GOLD_SHARE:
        trees = [_cut_gold_tree(rng, shape, radius, gold) for _ in range(int(rng.integers(1, 4)))]
        trees = [tree for tree in trees if len(tree) >= _LEAST_NODES]
        if trees:
            return trees

    fine = fine_voxel(size)
    count = min(int(rng.geometric(0.5)), _TREES[1])
    trees = []
    for _ in range(max(count, _TREES[0])):
        trunk = radius * fine * rng.uniform(0.7, 1.3)
        form = TreeForm(
            trunk_radius=trunk,
            tip_radius=trunk * rng.uniform(0.25, 0.7),
            winding=_draw_log_uniform(rng, (0.05, 0.5)),
            branch_every=_draw_log_uniform(rng, (5.0, 40.0)),
            branch_length=_draw_log_uniform(rng, (8.0, 40.0)),
            orders=int(rng.integers(0, 4)),
            soma=0.0,
            flatness=rng.uniform(0.3, 1.0),
        )
        trees.append(grow_random_tree(int(rng.integers(1 << 31)), shape, size, form))

    trees = [tree for tree in trees if len(tree) >= _LEAST_NODES]
    return trees or _draw_trees(rng, shape, size, radius, ())


def _cut_gold_tree(rng: np.random.Generator, shape: Shape, radius: float, gold: Sequence[Path]) -> Tree:
    """The part of a reconstruction around one of its nodes, turned, mirrored and scaled at random."""
    tree = swc.read(gold[int(rng.integers(len(gold)))])
    middle = tree.points[int(rng.integers(len(tree)))]
    points = tree.points - middle

    # Mirrors, a turn in the plane, and the size: trees of large neurons shrink into the volume.
    points = points * rng.choice([-1.0, 1.0], 3) * np.exp(rng.uniform(-0.4, 0.7))
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.asarray([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points[:, 1:] = points[:, 1:] @ turn
    points += np.asarray(shape) * rng.uniform(0.3, 0.7, 3)

    # Reconstructions have coarse radii or none: one radius, thinner in the branches farther from the root.
    depth = np.zeros(len(tree))
    for node, parent in enumerate(tree.parents.tolist()):
        depth[node] = 0 if parent < 0 else depth[parent] + np.linalg.norm(points[node] - points[parent])
    radii = radius * np.maximum(np.exp(-depth / max(float(depth.max()), 1.0)), 0.4)

    moved = morphology.resample_tree(replace(tree, points=points, radii=radii, types=np.full(len(tree), 3)), 2.0)
    inside = np.all((moved.points >= 0) & (moved.points <= np.asarray(shape) - 1), axis=1)
    return _cut_out(moved, inside)


def _cut_out(tree: Tree, keep: NDArray[np.bool_]) -> Tree:
    """The nodes where `keep` is true; a node whose parent is dropped becomes a root."""
    parents = np.where((tree.parents >= 0) & keep[tree.parents], tree.parents, -1)
    return morphology.select_nodes(replace(tree, parents=parents), keep)


def _render_neurites(
    rng: np.random.Generator,
    tree: Tree,
    shape: Shape,
    size: VoxelSize,
    blur: tuple[float, float],
    shares: NDArray[np.float64],
) -> Image:
    """The light of the neurites, without noise: 1 is the median of a neuron of share 1."""
    microscope = Microscope(
        psf=(blur[1] * size[0], blur[0] * fine_voxel(size)),
        halo=rng.uniform(0, 0.4),
        brightness=0.15,
        unevenness=_draw_log_uniform(rng, (0.15, 0.8)),
        bouton_every=_draw_log_uniform(rng, (6.0, 60.0)),
        bouton_swelling=rng.uniform(1.2, 2.6),
        gap_every=_draw_log_uniform(rng, (20.0, 300.0)),
        gap_length=rng.uniform(0.5, 3.0),
        photons=1e7,
        read_noise=0.0,
        background=0.0,
        specks=0.0,
        fragments=0,
        bits=16,
    )

    # A forest has a share for each component; cuts at the border make more of them than there are neurons.
    components = morphology.label_components(tree)
    first = [int(np.flatnonzero(components == c)[0]) for c in range(int(components.max()) + 1)]
    labeling = [float(shares[index % len(shares)]) for index in range(len(first))]
    counts = render_stack(tree, shape, size, microscope, int(rng.integers(1 << 31)), labeling=labeling)
    return counts.astype(np.float32) / np.float32(4095 * microscope.brightness)


def _add_somas(rng: np.random.Generator, light: Image, tree: Tree, size: VoxelSize) -> tuple[Image, Tree, int]:
    """Bright cell bodies on one to three nodes of the trees; a soma is part of its neuron."""
    count = int(rng.integers(1, 4))
    radii = tree.radii.copy()
    glow = np.zeros(len(tree))
    for node in rng.choice(len(tree), count).tolist():
        radius = _draw_log_uniform(rng, _SOMA_RADIUS)
        # The radius shrinks within a soma's own length, so that processes leave it like funnels.
        distance = np.linalg.norm((tree.points - tree.points[node]) * np.asarray(size), axis=1) / fine_voxel(size)
        bulge = radius * np.sqrt(np.clip(1 - (distance / (0.6 * radius)) ** 2, 0, 1))

        is_nearer = bulge > radii
        radii[is_nearer] = bulge[is_nearer]
        glow[is_nearer] = _draw_log_uniform(rng, _SOMA_BRIGHTNESS)

    swollen = replace(tree, radii=radii)
    painted = paint_tree(swollen, glow, Box.whole((light.shape[0], light.shape[1], light.shape[2])), size)
    soft = ndimage.gaussian_filter(painted, [0.8, 1.0, 1.0])
    return np.maximum(light, soft), swollen, count


def _drop_invisible(tree: Tree, light: Image, visible: float) -> Tree:
    """The tree without stretches that nobody can see: farther than a gap from any node of enough light."""
    tree = morphology.resample_tree(tree, 2.0)
    around = ndimage.maximum_filter(light, 3)

    places = np.clip(np.rint(tree.points), 0, np.asarray(light.shape) - 1).astype(np.int64)
    is_bright = around[tuple(places.T)] >= visible
    if not is_bright.any():
        return morphology.empty_tree()

    # A short gap is followed by a person, and by the student.
    distance, _ = cKDTree(tree.points[is_bright]).query(tree.points)
    return _cut_out(tree, np.asarray(distance <= _GAP))


# --- Everything else of a stack ---


def _photograph(rng: np.random.Generator, light: Image, size: VoxelSize, facts: dict[str, Any]) -> tuple[Array, float]:
    """The stack that a microscope makes of the light, and the least light that shows in it.

    Notes in `facts` what the stack has.
    """
    shape: Shape = (light.shape[0], light.shape[1], light.shape[2])
    is_black = bool(rng.random() < _BLACK_SHARE)
    tissue = _draw_log_uniform(rng, _TISSUE)

    # Objects that are no neurites.
    image = light
    if rng.random() < _VESSEL_SHARE:
        image = np.maximum(image, _draw_vessels(rng, shape, size, tissue))
        facts["vessels"] = True
    if rng.random() < _NUCLEI_SHARE:
        image = image + _draw_nuclei(rng, shape, size)
        facts["nuclei"] = True
    if rng.random() < _SPECK_SHARE:
        image = image + _draw_specks(rng, shape)
    if not is_black:
        image = image + tissue * _draw_clouds(rng, shape)

    # Light is lost with depth and towards the corners.
    field = np.exp(rng.uniform(0, 0.5) * (_draw_field(rng, shape, 3) - 0.5))
    depth = np.exp(-rng.uniform(0, 1.2) * np.linspace(0, 1, shape[0]) * (rng.random() < 0.5))
    image = image * field * depth[:: rng.choice([-1, 1]), None, None].astype(np.float32)

    if rng.random() < _STRIPE_SHARE:
        image = image * (1 + rng.uniform(0.05, 0.3) * rng.normal(size=(shape[0], shape[1], 1)))
    if rng.random() < _SHIFT_SHARE:
        image = _shift_slices(rng, image)

    photons = _draw_log_uniform(rng, _PHOTONS)
    is_noisy = not is_black and bool(rng.random() < _NOISY_SHARE / (1 - _BLACK_SHARE))
    read_noise = _draw_log_uniform(rng, _STRONG_NOISE if is_noisy else _READ_NOISE)
    shot = rng.poisson(np.maximum(image, 0) * photons) / photons
    noisy: Image = (shot + read_noise * rng.normal(size=shape)).astype(np.float32)
    if rng.random() < 0.25:
        # Denoised or resampled stacks have smooth noise.
        noisy = ndimage.gaussian_filter(noisy, rng.uniform(0.3, 0.9))

    noise = math.sqrt(read_noise**2 + (0.0 if is_black else tissue) / photons)
    # The eye and the student average over some voxels.
    visible = 0.4 * noise + 0.02
    if is_black:
        visible = 3 * read_noise + rng.uniform(0.05, 0.2)
        noisy = np.where(find_bright_objects(noisy, visible), noisy, np.float32(0))

    facts |= {"black": is_black, "tissue": 0.0 if is_black else round(tissue, 3), "photons": round(photons, 1)}
    facts["noise"] = round(read_noise, 3)
    return _digitize(rng, noisy), visible


def _digitize(rng: np.random.Generator, image: Image) -> Array:
    """Gain, offset and saturation of a camera of 8 or 16 bits."""
    bits = 8 if rng.random() < 0.7 else 16
    full_scale = 255 if bits == 8 else 4095

    # Full scale lies between 1.2 and 6 times the brightness of a neurite: what is brighter saturates.
    gain = full_scale / _draw_log_uniform(rng, (1.2, 6.0))
    offset = 0.0 if rng.random() < 0.6 else rng.uniform(0, 0.1) * full_scale
    counts = np.clip(np.rint(image * gain + offset * (image != 0)), 0, full_scale)
    return np.asarray(counts, dtype=np.uint8 if bits == 8 else np.uint16)


def _draw_vessels(rng: np.random.Generator, shape: Shape, size: VoxelSize, tissue: float) -> Image:
    """Wide, soft tubes that are no neurites, as vessels and fibers in the background are."""
    fine = fine_voxel(size)
    image = np.zeros(shape, dtype=np.float32)

    for _ in range(int(rng.integers(1, 4))):
        radius = rng.uniform(6, 14) * fine
        form = TreeForm(trunk_radius=radius, tip_radius=0.7 * radius, winding=0.05, orders=1, soma=0.0)
        tree = grow_random_tree(int(rng.integers(1 << 31)), shape, size, form)
        tube = paint_tree(tree, np.ones(len(tree)), Box.whole(shape), size)
        np.maximum(image, rng.uniform(0.5, 2.0) * max(tissue, 0.1) * tube, out=image)
    return np.asarray(ndimage.gaussian_filter(image, [1.0, 2.5, 2.5]), dtype=np.float32)


def _draw_nuclei(rng: np.random.Generator, shape: Shape, size: VoxelSize) -> Image:
    """Round bodies without processes, some of them hollow."""
    image = np.zeros(shape, dtype=np.float32)
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij", sparse=True)
    stretch = np.asarray(size) / fine_voxel(size)

    is_hollow = rng.random() < 0.3
    brightness = _draw_log_uniform(rng, (0.1, 1.5))
    for _ in range(int(rng.integers(3, 40))):
        radius = _draw_log_uniform(rng, (2.0, 9.0))
        center = rng.uniform(0, 1, 3) * shape
        axes = np.maximum(radius * rng.uniform(0.7, 1.3, 3) / stretch, 0.7)
        window = tuple(slice(max(int(c - a - 2), 0), max(int(c + a + 3), 0)) for c, a in zip(center, axes, strict=True))
        parts = [
            ((axis_grid[tuple(w if k == i else slice(None) for k, w in enumerate(window))] - c) / a) ** 2
            for i, (axis_grid, c, a) in enumerate(zip(grid, center, axes, strict=True))
        ]

        distance = np.sqrt(parts[0] + parts[1] + parts[2])
        body = np.clip((1.1 - distance) * 4, 0, 1)
        if is_hollow:
            body *= np.clip((distance - 0.6) * 5, 0.15, 1)
        np.maximum(image[window], brightness * rng.uniform(0.5, 1.2) * body, out=image[window])
    return image


def _draw_specks(rng: np.random.Generator, shape: Shape) -> Image:
    """Dust and debris of one to three voxels."""
    specks = np.zeros(shape, dtype=np.float32)
    count = int(rng.poisson(_draw_log_uniform(rng, (2, 150)) * math.prod(shape) / 1e6))
    places = tuple(rng.integers(0, n, count) for n in shape)
    np.add.at(specks, places, rng.lognormal(1.5, 0.8, count).astype(np.float32))
    return np.asarray(ndimage.gaussian_filter(specks, rng.uniform(0.5, 1.2, 3)), dtype=np.float32)


def _draw_clouds(rng: np.random.Generator, shape: Shape) -> Image:
    """Tissue of mean 1: smooth and grainy structure of several sizes."""
    clouds = np.ones(shape, dtype=np.float32)
    for knots in (3, 8, 24):
        clouds += rng.uniform(0, 0.6) * _draw_field(rng, shape, knots)

    grain = ndimage.gaussian_filter(rng.normal(size=shape).astype(np.float32), rng.uniform(0.6, 2.0, 3))
    clouds += rng.uniform(0, 0.5) * grain / max(float(grain.std()), 1e-6)
    return np.maximum(clouds, 0)


def _draw_field(rng: np.random.Generator, shape: Shape, knots: int) -> Image:
    """A smooth random field, standard normal at its knots."""
    grid = tuple(max(2, min(knots, n // 2)) for n in shape)
    values = rng.normal(size=grid).astype(np.float32)
    return np.asarray(ndimage.zoom(values, [n / g for n, g in zip(shape, grid, strict=True)], order=1))


def _shift_slices(rng: np.random.Generator, image: Image) -> Image:
    """Slices out of place by up to two voxels, as a moving sample leaves them."""
    moved = image.copy()
    for z in np.flatnonzero(rng.random(len(image)) < 0.15).tolist():
        moved[z] = np.roll(image[z], rng.integers(-2, 3, 2).tolist(), axis=(0, 1))
    return moved


def _draw_log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1]))))
