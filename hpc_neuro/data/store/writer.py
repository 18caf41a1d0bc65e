"""Writing a store: one file per volume, then the index over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, morphology, run_folder
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, fine_voxel, tile_volume
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.intensity import ReadBox, iter_slabs
from hpc_neuro.data.rasterize import Drawing, centreline_voxels, draw, prepared
from hpc_neuro.data.store.layout import CHUNK, FORMAT, INDEX, SPLITS, VolumeRecord, open_file

_TARGET_BYTES = 1 + 1 + 2 + 3  # a voxel of mask, skeleton, distance, tangent
_SPARE = 8 << 20  # bytes that HDF5 holds back in its caches until it closes the file
_DRAW: Shape = (64, 256, 256)  # targets are drawn in boxes of this size: about 100 MB at work


def write_volume(
    path: Path,
    volume: VolumeRecord,
    read: ReadBox,
    tree: Tree,
    fitted: Tree,
    drawing: Drawing,
    unlabelled: Callable[[Box], NDArray[np.bool_]] | None = None,
) -> None:
    """Write one volume's file, whole or not at all; the same input gives the same bytes. Memory does not grow with it.

    `tree` is kept as given, `fitted` is drawn; both in voxels. `unlabelled` says which voxels of a box nobody labelled:
    outside the neurite they become 255. Raises InputError when the disk is full.
    """
    with (
        files.explain_full_disk(path.parent, path.name),
        files.atomic(path) as part,
        h5py.File(part, "w", libver="v110", locking=False) as file,
    ):
        _reserve(file, 200 * (len(tree) + len(fitted)))
        _write_header(file, volume, tree, fitted, drawing)
        _write_image(file, volume, read)
        _write_targets(file, volume, fitted, drawing, unlabelled)


def is_written(path: Path, digest: str) -> bool:
    """Whether `path` is a finished file of the volume with this digest."""
    if not path.exists():
        return False
    with open_file(path) as file:
        return bool(file.attrs.get("digest") == digest and file.attrs.get("format") == FORMAT)


def forecast_bytes(tree: Tree, shape: Shape, itemsize: int, voxel_size: VoxelSize, cap: float) -> int:
    """About the most bytes a volume's file takes: every chunk of the image, and the targets' chunks near the tree."""
    reach = cap * fine_voxel(voxel_size) / np.asarray(voxel_size)  # [3] voxels
    cable = morphology.resample_tree(tree, 8.0).points
    corners = np.asarray(list(itertools.product((-1, 0, 1), repeat=3)))
    near = np.clip(cable[:, None] + corners * reach, 0, np.asarray(shape) - 1).reshape(-1, 3)
    touched = len(np.unique((near // np.asarray(CHUNK)).astype(np.int64), axis=0))
    return _padded(shape) * itemsize + touched * int(np.prod(CHUNK)) * _TARGET_BYTES + len(cable) * 400 + (1 << 20)


def write_index(out: Path, volumes: list[VolumeRecord]) -> None:
    """Write dataset.json: each volume, the splits by neuron, totals."""
    body = {
        "format": FORMAT,
        "code": run_folder.code_version(),
        "volumes": {
            v.id: {
                "file": f"{v.id}.h5",
                "shape": list(v.shape),
                "voxel_size_um": list(v.voxel_size),
                "dtype": str(v.dtype),
                "low": v.low,
                "high": v.high,
                "root_voxel": None if v.root is None else list(v.root),
                "split": v.split,
                "digest": v.digest,
                "sha256": dict(v.sources),
            }
            for v in volumes
        },
        "splits": {s: [v.id for v in volumes if v.split == s] for s in SPLITS},
        "totals": {
            "volumes": len(volumes),
            "voxels": int(sum(np.prod(v.shape, dtype=np.int64) for v in volumes)),
            "bytes": sum((out / f"{v.id}.h5").stat().st_size for v in volumes),
        },
    }
    files.write_json(out / INDEX, body)


def _write_header(file: Any, volume: VolumeRecord, tree: Tree, fitted: Tree, drawing: Drawing) -> None:
    header = {
        "format": FORMAT,
        "id": volume.id,
        "digest": volume.digest,
        "code": run_folder.code_version(),
        "voxel_size_um": volume.voxel_size,
        "affine": np.diag([*volume.voxel_size, 1.0]),  # voxel z y x 1 -> um z y x 1
        "low": volume.low,
        "high": volume.high,
        **({} if volume.root is None else {"root_voxel": volume.root}),
        **{f"sha256_{name}": digest for name, digest in volume.sources.items()},
        **{f"drawing_{name}": value for name, value in asdict(drawing).items()},
    }
    for key, value in header.items():
        file.attrs[key] = value
    for name, each in (("tree", tree), ("fitted", fitted)):
        group = file.create_group(name)
        for part in ("points", "radii", "parents", "types"):
            group.create_dataset(part, data=getattr(each, part))
    whole = Box.whole(volume.shape)
    group = file.create_group("points")
    group.create_dataset("skeleton", data=centreline_voxels(fitted, whole).astype(np.int32))
    for name, nodes in (("branch", morphology.branch_points(fitted)), ("tip", morphology.tips(fitted))):
        voxels = np.rint(fitted.points[nodes]).astype(np.int32)
        inside = np.all((voxels >= 0) & (voxels < volume.shape), axis=1)
        group.create_dataset(name, data=np.unique(voxels[inside], axis=0).reshape(-1, 3))


def _write_image(file: Any, volume: VolumeRecord, read: ReadBox) -> None:
    """The image slab by slab; chunks of zeros stay unallocated."""
    image = file.create_dataset(
        "image", shape=volume.shape, dtype=volume.dtype, chunks=_chunks(volume.shape), fillvalue=0
    )
    for slab in iter_slabs(volume.shape, volume.dtype.itemsize, depth=CHUNK[0]):
        block = read(slab)
        _reserve(file, _padded(slab.shape) * volume.dtype.itemsize)
        for chunk in tile_volume(slab.shape, CHUNK):
            part = block[chunk.write.slices]
            if part.any():
                image[chunk.write.shift(slab.start).slices] = part


def _write_targets(
    file: Any,
    volume: VolumeRecord,
    fitted: Tree,
    drawing: Drawing,
    unlabelled: Callable[[Box], NDArray[np.bool_]] | None,
) -> None:
    """Mask, skeleton, distance and tangent, where the tree is; elsewhere the fill values say "nothing near"."""
    shape, chunks = volume.shape, _chunks(volume.shape)
    mask = file.create_dataset("mask", shape=shape, dtype="u1", chunks=chunks, fillvalue=0)
    skeleton = file.create_dataset("skeleton", shape=shape, dtype="u1", chunks=chunks, fillvalue=0)
    distance = file.create_dataset("distance", shape=shape, dtype="f2", chunks=chunks, fillvalue=drawing.cap)
    tangent = file.create_dataset("tangent", shape=(3, *shape), dtype="i1", chunks=(3, *chunks), fillvalue=0)
    ready = prepared(fitted, volume.voxel_size, drawing)
    for block in tile_volume(shape, _DRAW):
        blank = unlabelled(block.write) if unlabelled else None
        if not ready.meets(block.write) and (blank is None or not blank.any()):
            continue
        drawn = draw(ready, block.write)
        _reserve(file, _padded(block.write.shape) * _TARGET_BYTES)
        if blank is not None:
            drawn.mask[blank & (drawn.mask == 0)] = 255
        for chunk in tile_volume(block.write.shape, CHUNK):
            here, there = chunk.write.slices, chunk.write.shift(block.write.start).slices
            if (drawn.distance[here] < drawing.cap).any() or drawn.mask[here].any():
                mask[there], skeleton[there] = drawn.mask[here], drawn.skeleton[here]
                distance[there] = drawn.distance[here]
                tangent[(slice(None), *there)] = drawn.tangent[(slice(None), *here)]


def _reserve(file: Any, needed: int) -> None:
    """Make sure that the next write and the closing of the file fit on the disk."""
    files.reserve_space(Path(file.filename).parent, needed + _SPARE)


def _padded(shape: Shape) -> int:
    """Voxels of the whole chunks that a box takes."""
    return int(np.prod([-(-n // c) * c for n, c in zip(shape, CHUNK, strict=True)], dtype=np.int64))


def _chunks(shape: Shape) -> Shape:
    z, y, x = (max(1, min(n, c)) for n, c in zip(shape, CHUNK, strict=True))
    return z, y, x
