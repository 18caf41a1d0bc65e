"""Write a training store: one file per volume, then the index over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, morphology, run_folder
from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, fine_voxel, tile_volume
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.intensity import ReadBox, iter_slabs, limit_brightness
from hpc_neuro.data.rasterize import (
    DrawSettings,
    Targets,
    draw_targets,
    list_centerline_voxels,
    prepare_tree,
)
from hpc_neuro.data.store.reader import FORMAT, INDEX, SPLITS, VolumeRecord, open_file

CHUNK: Shape = (32, 64, 64)
"""[voxel] HDF5 chunk along z, y, x."""

DRAW_BOX: Shape = (64, 256, 256)
"""[voxel] Targets are drawn in boxes of this size, which take about 100 MB."""

TARGET_BYTES = 1 + 1 + 2 + 3
"""[bytes] One voxel of mask, skeleton, distance and tangent."""

_NO_DISTANCE = np.inf
"""Distance to the centerline in a volume of labels, where it is unknown."""

SPARE_BYTES = 8 << 20
"""[bytes] What HDF5 may hold in its caches until it closes the file."""

MaskBox = Callable[[Box], NDArray[np.bool_]]
"""Box of a volume -> [Z, Y, X] which of its voxels are unlabelled."""


def write_volume(
    path: Path,
    volume: VolumeRecord,
    read: ReadBox,
    tree: Tree,
    fitted: Tree,
    drawing: DrawSettings,
    unlabelled: MaskBox | None = None,
    limits: tuple[float, float] | None = None,
    confirm: Callable[[], None] = lambda: None,
) -> None:
    """Write one volume's file, whole or not at all; the same input gives the same bytes. Streams the image.

    limits: brightness between which local contrast is measured; None: all.
    confirm: called when all is read, before the file appears; raises for an input that changed meanwhile.

    `tree` is stored as given and `fitted` is drawn; both are in voxels. Voxels of `unlabelled` outside the neurite
    become 255. Raises InputError when the disk is full.
    """
    with files.explain_full_disk(path.parent, path.name), files.atomic(path) as part:
        with h5py.File(part, "w", libver="v110", locking=False) as file:
            # HDF5 ends the process with a segmentation fault when a write finds the disk full.
            _reserve(file, 200 * (len(tree) + len(fitted)))
            _write_attributes(file, volume, drawing)
            _write_trees(file, tree, fitted)
            _write_points(file, volume, fitted)
            _write_images(file, volume, read, limits)
            _write_targets(file, volume, fitted, drawing, unlabelled)
        confirm()


@dataclass(frozen=True)
class StoredLabels:
    """What is known of a volume without a tree, read by box."""

    mask: Callable[[Box], NDArray[np.uint8]]
    """[Z, Y, X] 1 on neurite, 255 where unlabelled, 0 elsewhere."""
    skeleton: Callable[[Box], NDArray[np.uint8]]
    """[Z, Y, X] 1 on centerlines, 0 elsewhere."""


def write_labelled_volume(
    path: Path,
    volume: VolumeRecord,
    read: ReadBox,
    labels: StoredLabels,
    limits: tuple[float, float] | None = None,
    confirm: Callable[[], None] = lambda: None,
) -> None:
    """Write the file of a volume whose neurites are known from labels; its trees are empty. As `write_volume`.

    Crops are centered on the centerlines of the labelled neurites. Distance and tangent stay unknown.
    """
    tree = morphology.empty_tree()
    with files.explain_full_disk(path.parent, path.name), files.atomic(path) as part:
        with h5py.File(part, "w", libver="v110", locking=False) as file:
            _reserve(file, 0)
            _write_attributes(file, volume, None)
            _write_trees(file, tree, tree)
            _write_images(file, volume, read, limits)
            points = _write_labels(file, volume.shape, labels)
            group = file.create_group("points")
            for name, values in (("skeleton", points), ("branch", points[:0]), ("tip", points[:0])):
                _create_list(group, name, values)
        confirm()


def _write_labels(file: Any, shape: Shape, labels: StoredLabels) -> NDArray[np.int32]:
    """Write mask and skeleton; [N, 3] the voxels of the centerlines."""
    _create_targets(file, shape, _NO_DISTANCE)
    points = []
    for block in tile_volume(shape, DRAW_BOX):
        box = block.write
        mask = labels.mask(box)
        if not mask.any():
            continue
        skeleton = labels.skeleton(box)
        points.append(np.argwhere(skeleton).astype(np.int32) + np.asarray(box.start, dtype=np.int32))
        _reserve(file, _count_chunk_voxels(box.shape) * TARGET_BYTES)
        for chunk in tile_volume(box.shape, CHUNK):
            source, destination = chunk.write.slices, chunk.write.shift(box.start).slices
            if mask[source].any():
                file["mask"][destination] = mask[source]
                file["skeleton"][destination] = skeleton[source]
    return np.concatenate([np.zeros((0, 3), dtype=np.int32), *points])


def is_written(path: Path, digest: str) -> bool:
    """Whether `path` is a finished file of the volume with this digest."""
    if not path.exists():
        return False

    # The part file was renamed when it was complete, so a header means that the data is there. A file that cannot be
    # read, such as one that was cut short, is not written.
    try:
        with open_file(path) as file:
            return bool(file.attrs.get("digest") == digest and file.attrs.get("format") == FORMAT)
    except (InputError, OSError, KeyError):
        return False


def forecast_bytes(tree: Tree, shape: Shape, itemsize: int, voxel_size: VoxelSize, cap: float | None) -> int:
    """About the most bytes of a volume's file: every chunk of the image, and the targets' chunks near the tree.

    cap: [fine voxel] distance to the tree up to which there are targets; None: the targets are labels, everywhere.
    """
    image_bytes = _count_chunk_voxels(shape) * itemsize
    if cap is None:
        return image_bytes + 2 * _count_chunk_voxels(shape) + (1 << 20)

    # Targets are written in the chunks within `cap` of the tree: count the chunks of points around its cable.
    reach = cap * fine_voxel(voxel_size) / np.asarray(voxel_size)  # [3] voxels
    cable = morphology.resample_tree(tree, 8.0).points
    corners = np.asarray(list(itertools.product((-1, 0, 1), repeat=3)))
    near = np.clip(cable[:, None] + corners * reach, 0, np.asarray(shape) - 1).reshape(-1, 3)
    chunks = len(np.unique((near // np.asarray(CHUNK)).astype(np.int64), axis=0))
    target_bytes = chunks * int(np.prod(CHUNK)) * TARGET_BYTES

    tree_bytes = len(cable) * 400
    return image_bytes + target_bytes + tree_bytes + (1 << 20)


def write_index(out: Path, volumes: list[VolumeRecord]) -> None:
    """Write dataset.json: each volume, the splits, totals."""
    # The digests tie each entry to its file; `Store` compares them.
    index = {
        "format": FORMAT,
        "code": run_folder.code_version(),
        "volumes": {v.id: _index_entry(v) for v in volumes},
        "splits": {split: [v.id for v in volumes if v.split == split] for split in SPLITS},
        "totals": {
            "volumes": len(volumes),
            "voxels": int(sum(np.prod(v.shape, dtype=np.int64) for v in volumes)),
            "bytes": sum((out / f"{v.id}.h5").stat().st_size for v in volumes),
        },
    }
    files.write_json(out / INDEX, index)


def _index_entry(volume: VolumeRecord) -> dict[str, Any]:
    return {
        "file": f"{volume.id}.h5",
        "shape": list(volume.shape),
        "voxel_size_um": list(volume.voxel_size),
        "dtype": str(volume.dtype),
        "low": volume.low,
        "high": volume.high,
        "root_voxel": None if volume.root is None else list(volume.root),
        "split": volume.split,
        "digest": volume.digest,
        "sha256": dict(volume.sources),
        "contrast": volume.contrast,
    }


def _write_attributes(file: Any, volume: VolumeRecord, drawing: DrawSettings | None) -> None:
    attributes = {
        "format": FORMAT,
        "id": volume.id,
        "digest": volume.digest,
        "code": run_folder.code_version(),
        "voxel_size_um": volume.voxel_size,
        # Maps voxel z y x 1 to um z y x 1.
        "affine": np.diag([*volume.voxel_size, 1.0]),
        "low": volume.low,
        "high": volume.high,
        **({} if volume.root is None else {"root_voxel": volume.root}),
        **{f"sha256_{name}": digest for name, digest in volume.sources.items()},
        **({} if drawing is None else {f"drawing_{name}": value for name, value in asdict(drawing).items()}),
    }

    for name, value in attributes.items():
        file.attrs[name] = value


def _write_trees(file: Any, tree: Tree, fitted: Tree) -> None:
    for name, written_tree in (("tree", tree), ("fitted", fitted)):
        group = file.create_group(name)
        for part in ("points", "radii", "parents", "types"):
            _create_list(group, part, getattr(written_tree, part))


def _write_points(file: Any, volume: VolumeRecord, fitted: Tree) -> None:
    """The voxels that crops may be centered on."""
    group = file.create_group("points")

    # The fitted tree: crops should be centered on the signal, not beside it.
    centerline = list_centerline_voxels(fitted, Box.whole(volume.shape))
    _create_list(group, "skeleton", centerline.astype(np.int32))

    for name, nodes in (("branch", morphology.branch_points(fitted)), ("tip", morphology.tips(fitted))):
        # Nodes outside the image were not drawn, and several may share a voxel.
        voxels = np.rint(fitted.points[nodes]).astype(np.int32)
        inside = np.all((voxels >= 0) & (voxels < volume.shape), axis=1)
        _create_list(group, name, np.unique(voxels[inside], axis=0).reshape(-1, 3))


def _write_images(file: Any, volume: VolumeRecord, read: ReadBox, limits: tuple[float, float] | None) -> None:
    """Write the image, and its local contrast where that is what networks see."""
    _write_image(file, "image", volume.shape, volume.dtype, read)
    if volume.contrast == "local":
        local = measure_foreground(limit_brightness(read, limits), volume.shape).probability
        _write_image(file, "local", volume.shape, np.dtype("u1"), local)


def _write_image(file: Any, name: str, shape: Shape, dtype: np.dtype[Any], read: ReadBox) -> None:
    """Write an image slab by slab; chunks of zeros stay unallocated."""
    image = _create_dataset(file, name, shape, dtype, fill=0)

    for slab in iter_slabs(shape, dtype.itemsize, depth=CHUNK[0]):
        # Slabs begin at chunk borders, so that no chunk is written twice.
        values = read(slab)

        _reserve(file, _count_chunk_voxels(slab.shape) * dtype.itemsize)
        for chunk in tile_volume(slab.shape, CHUNK):
            chunk_values = values[chunk.write.slices]
            if chunk_values.any():
                image[chunk.write.shift(slab.start).slices] = chunk_values


def _write_targets(
    file: Any, volume: VolumeRecord, fitted: Tree, drawing: DrawSettings, unlabelled: MaskBox | None
) -> None:
    """Write mask, skeleton, distance and tangent near the tree. Elsewhere the fill values mean "no neurite near"."""
    shape = volume.shape
    _create_targets(file, shape, drawing.cap)
    prepared = prepare_tree(fitted, volume.voxel_size, drawing)

    for block in tile_volume(shape, DRAW_BOX):
        box = block.write
        without_label = unlabelled(box) if unlabelled else None
        has_unlabelled = without_label is not None and bool(without_label.any())
        if not prepared.meets(box) and not has_unlabelled:
            continue

        targets = draw_targets(prepared, box)
        if without_label is not None:
            targets.mask[without_label & (targets.mask == 0)] = UNLABELED
        _reserve(file, _count_chunk_voxels(box.shape) * TARGET_BYTES)
        _write_target_chunks(file, targets, box, drawing.cap)


def _create_targets(file: Any, shape: Shape, cap: float) -> None:
    """Create the datasets of the targets. `cap`: distance where no neurite is near."""
    _create_dataset(file, "mask", shape, np.dtype("u1"), fill=0)
    _create_dataset(file, "skeleton", shape, np.dtype("u1"), fill=0)
    _create_dataset(file, "distance", shape, np.dtype("f2"), fill=cap)
    _create_dataset(file, "tangent", shape, np.dtype("i1"), fill=0, channels=(3,))


def _write_target_chunks(file: Any, targets: Targets, box: Box, cap: float) -> None:
    """Write those chunks of a box that differ from the fill values."""
    for chunk in tile_volume(box.shape, CHUNK):
        source = chunk.write.slices
        destination = chunk.write.shift(box.start).slices

        # Most chunks of a large volume are far from the tree and stay unallocated.
        if (targets.distance[source] < cap).any() or targets.mask[source].any():
            file["mask"][destination] = targets.mask[source]
            file["skeleton"][destination] = targets.skeleton[source]
            file["distance"][destination] = targets.distance[source]
            file["tangent"][(slice(None), *destination)] = targets.tangent[(slice(None), *source)]


def _create_dataset(
    file: Any, name: str, shape: Shape, dtype: np.dtype[Any], fill: float, channels: tuple[int, ...] = ()
) -> Any:
    # A volume smaller than a chunk has smaller chunks.
    chunk = tuple(max(1, min(n, c)) for n, c in zip(shape, CHUNK, strict=True))
    return file.create_dataset(
        name, shape=(*channels, *shape), dtype=dtype, chunks=(*channels, *chunk), fillvalue=fill, fletcher32=True
    )


def _create_list(group: Any, name: str, values: NDArray[Any]) -> None:
    """A small array with its checksum; HDF5 keeps none of an empty one."""
    group.create_dataset(name, data=values, fletcher32=len(values) > 0)


def _reserve(file: Any, needed: int) -> None:
    """Make sure that the next write and the closing of the file fit on the disk."""
    files.reserve_space(Path(file.filename).parent, needed + SPARE_BYTES)


def _count_chunk_voxels(shape: Shape) -> int:
    """Voxels of the whole chunks that a box takes."""
    return int(np.prod([-(-n // c) * c for n, c in zip(shape, CHUNK, strict=True)], dtype=np.int64))
