"""Write a folder of synthetic neurons as a lab would hold its own data: ID.tif, ID.swc and meta.json."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from pydantic import Field

from hpc_neuro.core import files, morphology
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError, config
from hpc_neuro.data import swc
from hpc_neuro.data.synthetic.microscope import Microscope, render_stack
from hpc_neuro.data.synthetic.trees import TreeForm, grow_random_tree

CLEAN_SHARE = 0.4
"""Share of the volumes whose background is set to zero, as in many published stacks; the others stay noisy."""

VARIETY = 0.25
"""Standard deviation of the logarithm of brightness, blur, noise and radii between volumes."""


@config
class SyntheticConfig:
    """Synthetic neurons, each with a stack of its own."""

    volumes: int = Field(default=4, ge=1, le=9999)
    """Number of volumes."""
    shape: Shape = (48, 192, 192)
    """[voxel] z, y, x of each stack."""
    voxel_size: VoxelSize = (1.0, 0.33, 0.33)
    """[um] z, y, x."""
    seed: int = 0
    """Seed of all random numbers; another seed gives other neurons."""
    trees: tuple[Path, ...] = ()
    """SWC files (in the unit that their headers state, else in voxels of `voxel_size`) to image in turn instead of
    random trees; moved into the volume."""

    def __post_init__(self) -> None:
        if min(self.shape) < 8:
            raise ValueError(f"shape {self.shape} is too small for a neuron; at least 8 voxels a side are wanted")
        if min(self.voxel_size) <= 0:
            raise ValueError(f"voxel_size {self.voxel_size} must be above 0 um")


def write_dataset(folder: Path, cfg: SyntheticConfig) -> None:
    """Write pairs and meta.json (roots and voxel sizes, x y z) into `folder`; the same config gives the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    stack_bytes = math.prod(cfg.shape) * Microscope().bits // 8
    files.require_space(folder, cfg.volumes * stack_bytes, "the synthetic stacks")

    meta: dict[str, Any] = {}

    # Leading zeros, so that names sort by number.
    digits = len(str(cfg.volumes))
    for number in range(cfg.volumes):
        id_ = f"syn_{number + 1:0{digits}d}"
        meta[id_] = _write_volume(folder, id_, cfg, number)
    files.write_json(folder / "meta.json", meta)


def _write_volume(folder: Path, id_: str, cfg: SyntheticConfig, number: int) -> dict[str, Any]:
    """Write the stack and the tree of one volume; -> its entry in meta.json."""
    volume = _choose_volume(cfg, number)

    # Tree and image have seeds of their own: one may change without the other.
    seed = _derive_seed(cfg.seed, number, 2)
    image = render_stack(
        volume.tree, cfg.shape, cfg.voxel_size, volume.microscope, seed, clean_background=volume.is_clean
    )

    with files.atomic(folder / f"{id_}.tif") as part:
        tifffile.imwrite(part, image, compression="zlib", metadata={"axes": "ZYX"}, photometric="minisblack")
    swc.write(folder / f"{id_}.swc", volume.tree, unit="voxel", voxel_size=cfg.voxel_size)

    root = volume.tree.points[volume.tree.roots[0]]
    return {
        "root_xyz": [round(float(v), 4) for v in root[::-1]],
        "voxel_size_um_xyz": list(cfg.voxel_size[::-1]),
    }


class _SyntheticVolume(NamedTuple):
    tree: Tree  # voxels
    microscope: Microscope
    is_clean: bool  # whether the background is zero


def _choose_volume(cfg: SyntheticConfig, number: int) -> _SyntheticVolume:
    """The tree of a volume, its microscope, and whether its background is clean."""
    rng = np.random.default_rng([cfg.seed, number])
    thickness, brightness, blur, light, tissue = (float(np.exp(VARIETY * rng.normal())) for _ in range(5))

    microscope = Microscope()
    # A blur far from the default would no longer be that of a microscope.
    blur = float(np.clip(blur, 0.7, 1.3))
    microscope = replace(
        microscope,
        brightness=microscope.brightness * brightness**1.5,
        psf=(microscope.psf[0] * blur, microscope.psf[1] * blur),
        photons=microscope.photons * light**1.5,
        background=microscope.background * tissue**2,
    )

    # A low-discrepancy walk over the volumes, so that even a few volumes are of both kinds.
    golden_ratio = (math.sqrt(5) - 1) / 2
    is_clean = (0.5 + cfg.seed * math.sqrt(2) + number * golden_ratio) % 1 < CLEAN_SHARE

    if cfg.trees:
        path = cfg.trees[number % len(cfg.trees)]
        tree = _read_in_voxels(path, cfg.voxel_size)
        return _SyntheticVolume(_move_into_volume(tree, cfg.shape, path), microscope, is_clean)

    form = TreeForm()
    form = replace(form, trunk_radius=form.trunk_radius * thickness, tip_radius=form.tip_radius * thickness)
    tree = grow_random_tree(_derive_seed(cfg.seed, number, 1), cfg.shape, cfg.voxel_size, form)
    return _SyntheticVolume(tree, microscope, is_clean)


def _read_in_voxels(path: Path, voxel_size: VoxelSize) -> Tree:
    """The tree of an SWC file in voxels; a file that states no unit is in voxels already."""
    unit = swc.require_header(path).unit or "voxel"
    um = swc.unit_in_um(unit)
    tree = swc.read(path)
    return (
        tree
        if um is None
        else morphology.scale_tree(tree, (um / voxel_size[0], um / voxel_size[1], um / voxel_size[2]))
    )


def _derive_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _move_into_volume(tree: Tree, shape: Shape, path: Path) -> Tree:
    """Center the tree's bounding box in the volume, and keep the largest connected part that lies inside."""
    low, high = tree.points.min(axis=0), tree.points.max(axis=0)
    last_voxel = np.asarray(shape) - 1
    moved = replace(tree, points=tree.points + last_voxel / 2 - (low + high) / 2)
    inside = np.all((moved.points >= 0) & (moved.points <= last_voxel), axis=1)
    if inside.all():
        return moved
    if inside.sum() < 2:
        raise InputError(f"{path} has no branch inside a volume of {shape} voxels; give a larger shape")

    # Edges to nodes outside are cut; the top node of each part identifies it.
    top = np.arange(len(moved))
    for i, parent in enumerate(moved.parents):
        if parent >= 0 and inside[i] and inside[parent]:
            top[i] = top[parent]
    tops, counts = np.unique(top[inside], return_counts=True)
    largest = tops[counts.argmax()]
    return morphology.select_nodes(moved, inside & (top == largest))
