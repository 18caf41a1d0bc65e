"""OME-Zarr 0.5 images and label images, sharded, written block by block through tensorstore.

    ID.ome.zarr/            the image: levels 0, 1, ... (multiscale, uint8)
    ID.ome.zarr/labels/NAME a label image of the same levels

One block is one shard, so two writers never touch one file. Each level above 0 is computed from the one below it, shard
by shard.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore as ts
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Block, Box, Shape, VoxelSize, tile_volume
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data.pooling import halve

_COARSEST = 256
"""Voxels along the longest axis of the coarsest level, at most."""
_PART_ENDING = ".__lock"
"""Ending of the files that tensorstore writes and renames to shards."""


@dataclass(frozen=True)
class PyramidLevel:
    """One resolution of an image."""

    shape: Shape
    factor: Shape
    """How many voxels of level 0 one voxel spans along z, y, x."""


def plan_levels(shape: Shape, voxel_size: VoxelSize) -> list[PyramidLevel]:
    """A pyramid down to 256 voxels: each level halves the axes that are not yet coarser than the others."""
    pyramid = [PyramidLevel(shape, (1, 1, 1))]
    while max(pyramid[-1].shape) > _COARSEST:
        last = pyramid[-1]
        spacing = [v * f for v, f in zip(voxel_size, last.factor, strict=True)]
        # Halving only fine axes brings anisotropic voxels closer to cubes.
        steps = [2 if s < 2 * min(spacing) and n > 1 else 1 for s, n in zip(spacing, last.shape, strict=True)]
        # In a very long volume the fine axes may be down to one voxel before the long one is short enough.
        if max(steps) == 1:
            steps = [2 if n == max(last.shape) else 1 for n in last.shape]

        z, y, x = (f * step for f, step in zip(last.factor, steps, strict=True))
        dz, dy, dx = (math.ceil(n / step) for n, step in zip(last.shape, steps, strict=True))
        pyramid.append(PyramidLevel((dz, dy, dx), (z, y, x)))
    return pyramid


def create(
    folder: Path, name: str, shape: Shape, voxel_size: VoxelSize, shard: Shape, chunk: Shape, label: str, record: Any
) -> None:
    """Create an empty uint8 image `name` and its label image `label`; the folder appears whole or not at all.

    Of several processes that do so at once one wins, and a folder that exists already stays as it is. voxel_size in
    um. `record` (plain data) is kept in the group's attributes, to tell later what the folder belongs to.
    Raises InputError when `shard` is no multiple of `chunk`.
    """
    if any(s % c for s, c in zip(shard, chunk, strict=True)):
        raise InputError(f"the block {shard} is no multiple of the chunk {chunk}; choose a block that is")

    # Everything is written beside the target under a name of its own, and renamed at the end.
    pyramid = plan_levels(shape, voxel_size)
    staged = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
    with files.atomic(staged) as part:
        _write_group(part, {"ome": build_multiscales(name, pyramid, voxel_size), "hpc_neuro": record})
        _write_group(part / "labels", {"ome": {"version": "0.5", "labels": [label]}})
        label_ome = {**build_multiscales(label, pyramid, voxel_size), "image-label": {"source": {"image": "../../"}}}
        _write_group(part / "labels" / label, {"ome": label_ome})
        for base in (part, part / "labels" / label):
            for number, level in enumerate(pyramid):
                _create_array(base / str(number), level.shape, shard, chunk)

    # A rename cannot replace a folder that holds something: then another process was first.
    try:
        staged.rename(folder)
    except OSError:
        if not (folder / "zarr.json").exists():
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove an image; a kill in the middle leaves nothing that passes for one."""
    (folder / "zarr.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


@with_config(ConfigDict(extra="allow"))
class _GroupForm(TypedDict):
    """The part of a group's zarr.json that is read here."""

    attributes: dict[str, Any]


def read_record(folder: Path) -> Any:
    """The `record` that `create` was given; None when there is no such folder."""
    if not (folder / "zarr.json").exists():
        return None
    group = files.read_json(folder / "zarr.json", f"remove {folder}", _GroupForm)
    return group["attributes"].get("hpc_neuro")


def open_level(folder: Path, number: int = 0, label: str | None = None) -> Any:
    """A level for reading and writing by index, `array[slices].read().result()`, `array[slices].write(x).result()`."""
    base = folder / "labels" / label if label else folder
    return ts.open(_build_spec(base / str(number)), open=True).result()


class ShardReader:
    """Reads boxes of level 0 of a finished image. The files of shards are read whole and kept as they are, compressed.

    Small reads of one place are many, and each would open its shard again: an operation on the metadata server.
    """

    def __init__(
        self,
        folder: Path,
        keep_bytes: int,
        written: Collection[str] | None = None,
        read_shard: Callable[[Shape], bytes | None] | None = None,
    ) -> None:
        """keep_bytes: of the files that stay in memory. written: the shards that have a file; None: not known.

        read_shard: gives the file of the shard with an index, None where it has none; None: read from the image.
        """
        self._keep_bytes, self._written = keep_bytes, written
        self._read_shard = read_shard or functools.partial(_read_shard_file, folder)
        self._memory, self._array = _open_in_memory(folder / "0")
        self._shard = _read_shard_shape(self._array)
        self._sizes, self._total = OrderedDict[Shape, int](), 0
        self._lock = threading.Lock()

    def __call__(self, box: Box) -> Array:
        """The voxels of a box."""
        with self._lock:
            for index in _list_indices(box, self._shard):
                if self._written is not None and shard_path(index) not in self._written:
                    continue
                if index not in self._sizes:
                    self._sizes[index] = self._load(index)
                    self._total += self._sizes[index]
                self._sizes.move_to_end(index)
            values = read_box(self._array, box)

            # Those that were used last stay; a box may touch more than is kept.
            while self._total > self._keep_bytes:
                index, size = self._sizes.popitem(last=False)
                self._memory.write(_strip_level(shard_path(index)), None).result()
                self._total -= size
            return values

    def _load(self, index: Shape) -> int:
        """Read the file of a shard; its size, 0 where none is."""
        content = self._read_shard(index)
        if content is None:
            return 0
        self._memory.write(_strip_level(shard_path(index)), content).result()
        return len(content)


def _read_shard_file(folder: Path, index: Shape) -> bytes | None:
    try:
        return (folder / shard_path(index)).read_bytes()
    except FileNotFoundError:
        return None


class ShardWriter:
    """Writes shards of one level of an image, with three operations on the metadata server for each.

    They are a new file, its name, and one opening to read it back. tensorstore encodes the shard in memory; by itself
    it would also open the folder, to flush the new name, and the file once more for its checksum. A name that a power
    cut takes back is missed by the next start, which compares the sizes of all shards.
    """

    def __init__(self, folder: Path, number: int = 0, label: str | None = None) -> None:
        self._base = folder / (f"labels/{label}/{number}" if label else str(number))
        self._memory, self._array = _open_in_memory(self._base)
        self._shard = _read_shard_shape(self._array)

    def write(self, box: Box, values: Array) -> tuple[str, int]:
        """Write a box that is one whole shard (or what the volume's end leaves of it) and is not all zero.

        SHA-256 and size [bytes] of its file. Raises OSError when it reads back other than it was written.
        """
        key = _strip_level(shard_path(_divide(box.start, self._shard)))
        self._array[box.slices].write(np.ascontiguousarray(values)).result()
        content = self._memory.read(key).result().value
        try:
            # A disk that fails is noticed while the values can still be computed again, and so is a codec.
            is_sound = np.array_equal(read_box(self._array, box), values)
        finally:
            self._memory.write(key, None).result()

        path = self._base / key
        _put_file(path, content)
        if not is_sound or path.read_bytes() != content:
            raise OSError(f"the shard at {box.start} reads back other than it was written; is the disk sound? ({path})")
        return hashlib.sha256(content).hexdigest(), len(content)


def _put_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    part = path.with_name(f"{path.name}_{uuid.uuid4().hex[:16]}{_PART_ENDING}")
    try:
        handle = _create_file(part)
        try:
            files.write_all(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise


def _create_file(path: Path) -> int:
    """An open new file; its folder is made where it is missing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def _open_in_memory(level: Path) -> tuple[Any, Any]:
    """A store in memory without shards, and the array in it that has the metadata of a level."""
    context = ts.Context()
    memory = ts.KvStore.open({"driver": "memory"}, context=context).result()
    memory.write("zarr.json", (level / "zarr.json").read_bytes()).result()
    spec = {"driver": "zarr3", "kvstore": {"driver": "memory"}}
    return memory, ts.open(spec, context=context, open=True).result()


def _divide(corner: Shape, size: Shape) -> Shape:
    z, y, x = (c // s for c, s in zip(corner, size, strict=True))
    return z, y, x


def _read_shard_shape(array: Any) -> Shape:
    z, y, x = array.chunk_layout.write_chunk.shape
    return z, y, x


def _strip_level(path: str) -> str:
    return path.partition("/")[2]


def remove_shard(folder: Path, shard: str) -> None:
    """Remove the file of a shard, and what a killed writer of it left beside it."""
    path = folder / shard
    try:
        files_beside = list(path.parent.iterdir())
    except FileNotFoundError:
        return
    # tensorstore writes NAME_ID.__lock, which it renames.
    for file in files_beside:
        if file.name == path.name or (file.name.startswith(f"{path.name}_") and file.name.endswith(_PART_ENDING)):
            file.unlink(missing_ok=True)


def read_box(array: Any, box: Box) -> Array:
    """The voxels of a box of an open level."""
    values: Array = array[box.slices].read().result()
    return values


@dataclass(frozen=True)
class LevelShard:
    """One shard of one level above 0."""

    level: int
    label: str | None
    """Name of the label image; None for the image itself."""
    block: Block

    @property
    def path(self) -> str:
        """Its file below the image's folder."""
        return shard_path(self.block.index, self.level, self.label)


def shard_path(index: Shape, level: int = 0, label: str | None = None) -> str:
    """The file of a shard, relative to the image's folder; a shard of zeros has none."""
    base = f"labels/{label}/{level}" if label else str(level)
    return f"{base}/c/{'/'.join(map(str, index))}"


def plan_shards(shape: Shape, voxel_size: VoxelSize, shard: Shape, label: str) -> list[list[LevelShard]]:
    """The shards above level 0, level by level; those of one level do not depend on one another."""
    levels = []
    for number, level in list(enumerate(plan_levels(shape, voxel_size)))[1:]:
        blocks = list(tile_volume(level.shape, shard))
        levels.append([LevelShard(number, name, block) for name in (None, label) for block in blocks])
    return levels


def build_shard(folder: Path, shape: Shape, voxel_size: VoxelSize, shard: LevelShard) -> None:
    """Compute one shard from the level below it. The image is averaged, the label keeps any voxel.

    Memory: one block of the finer level (up to eight shards).
    """
    remove_shard(folder, shard.path)
    PyramidBuilder(folder, shape, voxel_size).build(shard)


class PyramidBuilder:
    """Computes shards of the levels above 0 of one image. Opens each level once."""

    def __init__(self, folder: Path, shape: Shape, voxel_size: VoxelSize) -> None:
        self._folder, self._levels = folder, plan_levels(shape, voxel_size)
        self._open = functools.cache(functools.partial(open_level, folder))
        self._open_writer = functools.cache(functools.partial(ShardWriter, folder))

    def build(self, shard: LevelShard) -> tuple[str, int]:
        """Write a shard that has no file yet; its SHA-256 and size [bytes], or "" and 0 where all is zero."""
        step, fine_box = locate_fine_box(self._levels, shard)
        source = self._open(shard.level - 1, shard.label)
        method: Literal["mean", "max"] = "max" if shard.label else "mean"
        values = halve(read_box(source, fine_box).astype(np.uint8, copy=False), step, method)

        # Where no file is, readers see zeros.
        if not values.any():
            return "", 0
        return self._open_writer(shard.level, shard.label).write(shard.block.write, values)


def locate_fine_box(levels: Sequence[PyramidLevel], shard: LevelShard) -> tuple[Shape, Box]:
    """How many voxels of the level below make one, along z, y, x; and the box there that a shard is computed from."""
    fine, coarse = levels[shard.level - 1], levels[shard.level]
    z, y, x = (c // f for c, f in zip(coarse.factor, fine.factor, strict=True))
    box = shard.block.write
    return (z, y, x), Box(_multiply(box.start, (z, y, x)), _multiply(box.stop, (z, y, x))).clip(Box.whole(fine.shape))


def list_shards_in(box: Box, shard: Shape, level: int = 0, label: str | None = None) -> Iterator[str]:
    """The paths of the shards of a level that a box touches. shard: [voxel] their shape."""
    for index in _list_indices(box, shard):
        yield shard_path(index, level, label)


def _list_indices(box: Box, shard: Shape) -> Iterator[Shape]:
    ranges = [range(a // n, -(-b // n)) for a, b, n in zip(box.start, box.stop, shard, strict=True)]
    yield from itertools.product(*ranges)


def has_shards(folder: Path, box: Box, number: int = 0, label: str | None = None) -> bool:
    """Whether any shard of a level has a file in `box`; where none has, all is zero."""
    shard = _read_shard_shape(open_level(folder, number, label))
    return any((folder / path).exists() for path in list_shards_in(box, shard, number, label))


def list_shards(folder: Path, number: int = 0) -> list[Shape]:
    """The indices of all shards of a level that have a file; the others are zeros."""
    top = folder / shard_path((0, 0, 0), number).partition("/0/0/0")[0]
    indices = list[Shape]()
    # One listing for each row of shards along x.
    for row in top.glob("*/*"):
        z, y = int(row.parent.name), int(row.name)
        indices += [(z, y, int(path.name)) for path in row.iterdir() if path.name.isdecimal()]
    return indices


def build_multiscales(name: str, pyramid: list[PyramidLevel], voxel_size: VoxelSize) -> dict[str, Any]:
    """OME-NGFF 0.5 `multiscales` metadata: a coarse voxel's center is the center of the voxels it stands for."""
    datasets = []
    for number, level in enumerate(pyramid):
        scale = [v * f for v, f in zip(voxel_size, level.factor, strict=True)]
        shift = [v * (f - 1) / 2 for v, f in zip(voxel_size, level.factor, strict=True)]
        transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
        datasets.append({"path": str(number), "coordinateTransformations": transforms})

    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}


def _multiply(corner: Shape, step: Shape) -> Shape:
    z, y, x = (c * s for c, s in zip(corner, step, strict=True))
    return z, y, x


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    files.write_json(folder / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def _create_array(folder: Path, shape: Shape, shard: Shape, chunk: Shape) -> None:
    """Write the metadata of an empty array; the index of each shard carries a checksum."""
    codec = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(chunk),
            "codecs": [
                {"name": "bytes"},
                {"name": "zstd", "configuration": {"level": 3, "checksum": False}},
            ],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
    }
    metadata = {
        "shape": list(shape),
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [codec],
        "dimension_names": ["z", "y", "x"],
    }

    ts.open({**_build_spec(folder), "metadata": metadata, "create": True}).result()


def _build_spec(folder: Path) -> dict[str, Any]:
    # No file locks: NFS and Lustre may refuse them, and of two writers of a shard the later one wins whole.
    kvstore = {"driver": "file", "path": f"{folder.resolve()}/", "file_io_locking": {"mode": "none"}}
    return {"driver": "zarr3", "kvstore": kvstore}
