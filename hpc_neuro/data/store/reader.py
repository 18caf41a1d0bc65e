"""Read a training store: its index, and boxes of its volumes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.hardware_faults import find_hardware_fault
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array, Contrast
from hpc_neuro.data.intensity import normalize

FORMAT = 1
"""Raised when files of an older version can no longer be read, or would hold other targets."""

SPLITS = ("train", "val", "test")
"""The splits a volume may belong to."""

INDEX = "dataset.json"
"""File name of the index over all volumes."""

REMAKE = "make the store with `hpc-neuro prepare`"
"""What to do about a store that cannot be read."""


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_dtype(text: str) -> str:
    """Raise ValueError for a name that numpy does not know, or of values that are no numbers."""
    try:
        is_numeric = np.dtype(text).kind in "biuf"
    except TypeError:
        is_numeric = False
    if not is_numeric:
        raise ValueError(f"{text} is no type of numbers")
    return text


PointKind = Literal["skeleton", "branch", "tip"]


@dataclass(frozen=True)
class VolumeRecord:
    """One volume in the index, and the header of its file."""

    id: str
    shape: Shape
    voxel_size: VoxelSize  # um, z y x
    dtype: np.dtype[Any]
    low: float
    high: float
    root: tuple[float, float, float] | None  # z y x voxel
    split: str
    digest: str  # of the image's content, the tree and the settings of the targets
    sources: Mapping[str, str]  # "image" and "swc" or "labels": SHA-256
    contrast: Contrast = "range"  # how `normalized_image` is made

    @property
    def has_tree(self) -> bool:
        """Whether the neurites are known from a tree; else from labels."""
        return "labels" not in self.sources


@with_config(ConfigDict(extra="allow"))
class _VolumeForm(TypedDict):
    """What dataset.json holds of one volume."""

    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    voxel_size_um: Annotated[list[_Positive], Field(min_length=3, max_length=3)]
    dtype: Annotated[str, AfterValidator(_check_dtype)]
    low: float
    high: float
    root_voxel: Annotated[list[float], Field(min_length=3, max_length=3)] | None
    split: Literal["train", "val", "test"]
    digest: str
    sha256: dict[str, str]
    contrast: NotRequired[Contrast]


@with_config(ConfigDict(extra="allow"))
class _IndexForm(TypedDict):
    """What dataset.json holds."""

    volumes: dict[str, _VolumeForm]


def read_index(folder: Path) -> dict[str, Any]:
    """The content of `folder`/dataset.json. Raises InputError when it is missing, damaged or of another format."""
    path = folder / INDEX
    index = files.read_json(path, REMAKE)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{path} is not a store of format {FORMAT}; {REMAKE}")
    run_folder.require_unchanged(path)
    return dict(files.check_form(index, _IndexForm, str(path), REMAKE))


class Store:
    """A finished store, read by id. Each process opens its own handles on first use; pickling leaves them behind."""

    def __init__(self, path: Path) -> None:
        """Read `path`/dataset.json. InputError when it or a volume's file is missing or of another format."""
        self.path = Path(path)
        index = read_index(self.path)

        # The ids become names of files here and in every folder that is made of the store.
        files.require_plain_names(index.get("volumes"), self.path / INDEX, REMAKE)

        # The index alone describes the volumes, so a store opens without touching their files.
        self._volumes = {id_: _volume_from_index(self, id_, entry) for id_, entry in index["volumes"].items()}

        missing = [id_ for id_ in self._volumes if not self.file(id_).exists()]
        if missing:
            raise InputError(f"{self.path} lacks the files of {', '.join(missing)}; {REMAKE}")
        self._forget_handles()

    @property
    def ids(self) -> tuple[str, ...]:
        """All volumes, in the order in which they were prepared."""
        return tuple(self._volumes)

    def split(self, name: str) -> tuple[str, ...]:
        """The ids of "train", "val" or "test"; InputError for any other name."""
        if name not in SPLITS:
            raise InputError(f"{name!r} is not a split; {', '.join(SPLITS)} are")

        # The order of the index is the order of training data: it must not depend on a set.
        return tuple(id_ for id_, volume in self._volumes.items() if volume.split == name)

    def __getitem__(self, id_: str) -> StoredVolume:
        if id_ not in self._volumes:
            raise InputError(f"{self.path} holds no volume {id_!r}; it holds {', '.join(self._volumes)}")
        return self._volumes[id_]

    def __iter__(self) -> Iterator[StoredVolume]:
        return iter(self._volumes.values())

    def __len__(self) -> int:
        return len(self._volumes)

    def file(self, id_: str) -> Path:
        """The HDF5 file of a volume."""
        return self.path / f"{id_}.h5"

    def open_handle(self, id_: str) -> Any:
        """This process's open HDF5 file of a volume."""
        # After a fork the parent's handles must not be used.
        if self._pid != os.getpid():
            self._forget_handles()

        if id_ not in self._handles:
            # A file that was prepared again differs from what the index says of it.
            handle = open_file(self.file(id_))
            if handle.attrs.get("digest") != self[id_].digest:
                handle.close()
                raise InputError(f"{self.file(id_)} is not the file that {INDEX} describes; {REMAKE} again")
            self._handles[id_] = handle
        return self._handles[id_]

    @contextlib.contextmanager
    def explain_damage(self, id_: str) -> Iterator[None]:
        """Turn the error of HDF5 for a volume's file that does not have its checksums into an InputError."""
        try:
            yield
        except (OSError, KeyError, RuntimeError) as error:
            # A disk that fails is another matter than a file that is damaged on a sound one.
            if find_hardware_fault(error):
                raise
            raise InputError(
                f"{self.file(id_)} is damaged ({' '.join(str(error).split())}); remove it and give the same "
                "`hpc-neuro prepare` again, which writes just that"
            ) from error

    def close(self) -> None:
        """Close this process's handles; the store stays usable."""
        # Handles of a parent process belong to the parent.
        if self._pid == os.getpid():
            for handle in self._handles.values():
                handle.close()
        self._forget_handles()

    def _forget_handles(self) -> None:
        self._pid = os.getpid()
        self._handles: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A pid that no process has: the receiver opens its own handles.
        return self.__dict__ | {"_handles": {}, "_pid": -1}


@dataclass(frozen=True, kw_only=True)
class StoredVolume(VolumeRecord):
    """One volume of a store. A box must lie inside the volume (else InputError); the caller owns the arrays."""

    store: Store = field(repr=False, compare=False)

    def image(self, box: Box) -> Array:
        """[Z, Y, X] in the stack's own dtype."""
        return self._read("image", box)

    def normalized_image(self, box: Box) -> NDArray[np.float32]:
        """[Z, Y, X] float32 in [0, 1]: what networks see, by the volume's `contrast`."""
        if self.contrast == "local":
            return self._read("local", box).astype(np.float32) / np.float32(255)
        return normalize(self._read("image", box), self.low, self.high)

    def mask(self, box: Box) -> NDArray[np.uint8]:
        """[Z, Y, X] 1 on neurite, 255 where unlabelled, 0 elsewhere."""
        return cast(NDArray[np.uint8], self._read("mask", box))

    def skeleton(self, box: Box) -> NDArray[np.uint8]:
        """[Z, Y, X] 1 in the tube around the centerline."""
        return cast(NDArray[np.uint8], self._read("skeleton", box))

    def distance(self, box: Box) -> NDArray[np.float32]:
        """[Z, Y, X] float32, fine voxels to the centerline, at most the cap."""
        return self._read("distance", box).astype(np.float32)

    def tangent(self, box: Box) -> NDArray[np.float32]:
        """[3, Z, Y, X] float32, unit direction (z y x) of the nearest edge; zero beyond the cap."""
        return self._read("tangent", box).astype(np.float32) / np.float32(127)

    def tree(self) -> Tree:
        """The annotator's tree, in voxels."""
        return self._read_tree("tree")

    def fitted_tree(self) -> Tree:
        """The tree that mask, skeleton, distance and tangent were drawn from, in voxels (radii in fine voxels)."""
        return self._read_tree("fitted")

    def points(self, kind: PointKind) -> NDArray[np.int64]:
        """[N, 3] voxels z y x inside the volume: the centerline's, the branch points, or the tips."""
        with self.store.explain_damage(self.id):
            points: NDArray[np.int64] = self.store.open_handle(self.id)["points"][kind][()].astype(np.int64)
            return points

    def _read(self, name: str, box: Box) -> Array:
        # HDF5 would silently shorten the selection.
        if not Box.whole(self.shape).contains(box):
            raise InputError(f"box {box.start} to {box.stop} leaves volume {self.id}, which is {self.shape} voxels")

        # The leading ellipsis covers the channels of `tangent`.
        with self.store.explain_damage(self.id):
            array: Array = self.store.open_handle(self.id)[name][(..., *box.slices)]
            return array

    def _read_tree(self, name: str) -> Tree:
        with self.store.explain_damage(self.id):
            group = self.store.open_handle(self.id)[name]
            return Tree(*(group[part][()] for part in ("points", "radii", "parents", "types")))

    def verify(self) -> None:
        """Read every byte of the file against its checksums. Raises InputError for a damaged one."""
        with self.store.explain_damage(self.id):
            self.store.open_handle(self.id).visititems(_read_dataset)


def open_file(path: Path) -> Any:
    """Open an HDF5 file for reading, without locks: shared file systems refuse them or hang, and no process writes."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise InputError(f"{path} cannot be read as HDF5 ({error}); {REMAKE} again") from error


def _read_dataset(name: str, item: Any) -> None:
    """Read a dataset chunk by chunk; HDF5 compares the checksum of each."""
    if isinstance(item, h5py.Dataset):
        for chunk in item.iter_chunks() if item.chunks else [()]:
            item[chunk]


def _volume_from_index(store: Store, id_: str, entry: Mapping[str, Any]) -> StoredVolume:
    root = entry["root_voxel"]
    return StoredVolume(
        id=id_,
        shape=cast(Shape, tuple(entry["shape"])),
        voxel_size=cast(VoxelSize, tuple(entry["voxel_size_um"])),
        dtype=np.dtype(entry["dtype"]),
        low=entry["low"],
        high=entry["high"],
        root=None if root is None else cast(tuple[float, float, float], tuple(root)),
        split=entry["split"],
        digest=entry["digest"],
        sources=entry["sha256"],
        contrast=entry.get("contrast", "range"),
        store=store,
    )
