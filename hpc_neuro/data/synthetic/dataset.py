"""A folder of synthetic neurons as a lab would hold its own data: ID.tif, ID.swc and meta.json."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile
from pydantic import Field

from hpc_neuro.core import files, morphology
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError, config
from hpc_neuro.data import swc
from hpc_neuro.data.synthetic.microscope import MicroscopeConfig, render
from hpc_neuro.data.synthetic.trees import TreeConfig, grow_random_tree


@config
class SyntheticConfig:
    """Synthetic neurons, each with a stack of its own."""

    volumes: int = Field(default=4, ge=1, le=9999)
    """How many."""
    shape: Shape = (48, 192, 192)
    """[voxel] z, y, x of each stack."""
    voxel_size: VoxelSize = (1.0, 0.33, 0.33)
    """[um] z, y, x."""
    seed: int = 0
    """Decides everything; another seed gives other neurons."""
    variety: float = Field(default=1.0, ge=0, le=3)
    """How much the volumes differ in brightness, blur, noise and radii; 0: all alike."""
    clean_background: float = Field(default=0.4, ge=0, le=1)
    """Share of the volumes whose background is set to zero, as many published stacks are; the others stay noisy."""
    trees: tuple[Path, ...] = ()
    """SWC files (in voxels of `voxel_size`) to image instead of random trees, in turn; moved into the volume."""
    tree: TreeConfig = TreeConfig()
    """Shape of random neurons."""
    microscope: MicroscopeConfig = MicroscopeConfig()
    """The image."""

    def __post_init__(self) -> None:
        if min(self.shape) < 8:
            raise ValueError(f"shape {self.shape} is too small for a neuron; at least 8 voxels a side are wanted")
        if min(self.voxel_size) <= 0:
            raise ValueError(f"voxel_size {self.voxel_size} must be above 0 um")


def write_dataset(folder: Path, cfg: SyntheticConfig) -> None:
    """Write pairs and meta.json (roots and voxel sizes, x y z) into `folder`; the same config gives the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    files.require_space(folder, cfg.volumes * math.prod(cfg.shape) * cfg.microscope.bits // 8, "the synthetic stacks")
    meta = {}
    for number in range(cfg.volumes):
        id_ = f"syn_{number + 1:0{len(str(cfg.volumes))}d}"
        tree, microscope, clean = one(cfg, number)
        seed = int(np.random.SeedSequence([cfg.seed, number, 2]).generate_state(1)[0])
        image = render(tree, cfg.shape, cfg.voxel_size, microscope, seed, clean_background=clean)
        with files.atomic(folder / f"{id_}.tif") as part:
            tifffile.imwrite(part, image, compression="zlib", metadata={"axes": "ZYX"}, photometric="minisblack")
        swc.write(folder / f"{id_}.swc", tree, unit="voxel", voxel_size=cfg.voxel_size)
        root = tree.points[tree.roots[0]]
        meta[id_] = {
            "root_xyz": [round(float(v), 4) for v in root[::-1]],
            "voxel_size_um_xyz": list(cfg.voxel_size[::-1]),
        }
    files.write_json(folder / "meta.json", meta)


def one(cfg: SyntheticConfig, number: int) -> tuple[Tree, MicroscopeConfig, bool]:
    """The tree (voxels) of a volume, its microscope, and whether its background is clean."""
    rng = np.random.default_rng([cfg.seed, number])
    vary = {
        name: float(np.exp(cfg.variety * 0.25 * rng.normal()))
        for name in ("thick", "bright", "blur", "light", "tissue")
    }
    m = cfg.microscope
    blur = float(np.clip(vary["blur"], 0.7, 1.3))
    microscope = replace(
        m,
        brightness=m.brightness * vary["bright"] ** 1.5,
        psf=(m.psf[0] * blur, m.psf[1] * blur),
        photons=m.photons * vary["light"] ** 1.5,
        background=m.background * vary["tissue"] ** 2,
    )
    # a low-discrepancy walk over the volumes, so that few volumes hold both kinds
    clean = (0.5 + cfg.seed * math.sqrt(2) + number * (math.sqrt(5) - 1) / 2) % 1 < cfg.clean_background
    if cfg.trees:
        return (
            _placed(swc.read(cfg.trees[number % len(cfg.trees)]), cfg.shape, cfg.trees[number % len(cfg.trees)]),
            microscope,
            clean,
        )
    form = replace(
        cfg.tree, trunk_radius=cfg.tree.trunk_radius * vary["thick"], tip_radius=cfg.tree.tip_radius * vary["thick"]
    )
    seed = int(np.random.SeedSequence([cfg.seed, number, 1]).generate_state(1)[0])
    return grow_random_tree(seed, cfg.shape, cfg.voxel_size, form), microscope, clean


def _placed(tree: Tree, shape: Shape, path: Path) -> Tree:
    """The tree moved so that the middle of its bounding box is the volume's; the largest part inside is kept."""
    low, high = tree.points.min(axis=0), tree.points.max(axis=0)
    last = np.asarray(shape) - 1
    moved = replace(tree, points=tree.points + last / 2 - (low + high) / 2)
    inside = np.all((moved.points >= 0) & (moved.points <= last), axis=1)
    if inside.all():
        return moved
    top = np.arange(len(moved))  # the root of each node's part, where edges to nodes outside are cut
    for i, parent in enumerate(moved.parents):
        if parent >= 0 and inside[i] and inside[parent]:
            top[i] = top[parent]
    if inside.sum() < 2:
        raise InputError(f"{path} has no branch inside a volume of {shape} voxels; give a larger shape")
    tops, counts = np.unique(top[inside], return_counts=True)
    keep = inside & (top == tops[counts.argmax()])
    return morphology.select_nodes(moved, keep)
