"""Teacher features on disk: one HDF5 shard per slab of slices, a manifest written last, and the reader training uses.

A shard holds `features` [S, L, h, w, D]: S slices orthogonal to the view's axis, L teacher layers, an h x w token map,
D channels. A token is a cell of voxels; cells of any size are brought to the student's token grid by area weights, so a
grid that is the student's own passes through unchanged.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_neuro import files
from hpc_neuro.geometry import Box, Shape
from hpc_neuro.schema import ConfigError, InputError

MANIFEST = "manifest.json"
PLANE = {"z": (0, 1, 2), "y": (1, 0, 2), "x": (2, 0, 1)}
"""View -> array axes of (slices, token rows, token columns)."""
_OPEN_FILES = 64
_SPARE = 1 << 16
_NO_DIGEST = np.bytes_(64 * b"0")


class CacheMismatch(ConfigError):
    """The cache holds other features than the config asks for."""


@dataclass(frozen=True)
class Unit:
    """One shard: slices `first`, `first + stride`, ... of one view of one volume, `count` of them."""

    volume: str
    view: str
    first: int  # [voxel] index of the first slice
    stride: int  # [voxel] between slices; a slice stands for the `stride` voxels around it
    count: int
    rows: int  # token rows of a slice
    columns: int
    cell: tuple[float, float]  # [voxel] height and width of one token

    @property
    def name(self) -> str:
        """File name inside the cache folder."""
        return f"{self.volume}.{self.view}.{self.first:06d}.h5"


class ShardWriter:
    """Fills one shard tile by tile; `finish()` makes it whole.

    The disk space of the whole shard is taken before the first write, for HDF5 ends the process with a segmentation
    fault when a write finds the disk full: the constructor raises OSError (ENOSPC, EDQUOT) instead.
    """

    def __init__(self, path: Path, unit: Unit, layers: int, dim: int, key: str) -> None:
        shape = (unit.count, layers, unit.rows, unit.columns, dim)
        chunk = (1, layers, min(8, unit.rows), min(8, unit.columns), dim)
        chunks = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
        files.reserve(path.parent, _SPARE + 40 * layers * dim + 16 * chunks)  # what HDF5 writes besides the features
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._file = h5py.File(path, "w", libver="latest")
        try:
            self._data = self._file.create_dataset(
                "features", shape, np.float16, chunks=chunk, track_times=False, fill_time="never", dcpl=how
            )
            blank = np.zeros((layers, dim))  # attributes, too, get their place now and their values on closing
            self._file.attrs.update(key=key, sha256=_NO_DIGEST, sum=blank, squares=blank)
            self._file.flush()
            # the blocks of this very file, so that no other writer can take them
            os.posix_fallocate(self._file.id.get_vfd_handle(), 0, path.stat().st_size)
        except BaseException:
            self.close()
            raise

    def write(self, slices: slice, rows: slice, columns: slice, values: NDArray[np.float16]) -> None:
        """Put values [s, L, r, c, D] in their place."""
        self._data[slices, :, rows, columns] = values

    def finish(self) -> None:
        """Sum up the channels for normalisation, checksum the data, close the file."""
        total, squares, digest = 0.0, 0.0, hashlib.sha256()
        for values in _by_slice(self._data):
            digest.update(values.tobytes())
            flat = values.astype(np.float64)
            total = total + flat.sum(axis=(1, 2))  # [L, D]
            squares = squares + (flat**2).sum(axis=(1, 2))
        for name, value in {"sha256": digest.hexdigest().encode(), "sum": total, "squares": squares}.items():
            self._file.attrs.modify(name, value)
        self._file.close()

    def close(self) -> None:
        """Close the file as it is; does nothing after `finish()`."""
        self._file.close()


def shard_record(path: Path, unit: Unit) -> dict[str, Any]:
    """What the manifest keeps of a finished shard; `sum` and `squares` [L, D] are for the normalisation."""
    with h5py.File(path, "r", locking=False) as file:
        attrs = {k: file.attrs[k] for k in ("sum", "squares")}
        digest = file.attrs["sha256"].decode()
    return {"unit": asdict(unit), "bytes": path.stat().st_size, "sha256": digest, **attrs}


def shard_key(path: Path) -> str | None:
    """The key a shard was made under, None when there is no readable shard."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return str(file.attrs["key"])
    except (OSError, KeyError):
        return None


def shard_is_sound(path: Path) -> bool:
    """Whether a shard's data still has the checksum taken when it was written."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            digest = hashlib.sha256()
            for values in _by_slice(file["features"]):
                digest.update(values.tobytes())
            return bool(digest.hexdigest().encode() == file.attrs["sha256"])
    except (OSError, KeyError):
        return False


def write_manifest(folder: Path, facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Write the manifest, last of all: per-view mean and std of each layer and channel, and the list of shards."""
    statistics: dict[str, dict[str, Any]] = {}
    for view in facts["views"]:
        mine = [r for r in records if r["unit"]["view"] == view]
        tokens = sum(r["unit"]["count"] * r["unit"]["rows"] * r["unit"]["columns"] for r in mine)
        mean = sum(np.asarray(r["sum"]) for r in mine) / tokens
        variance = sum(np.asarray(r["squares"]) for r in mine) / tokens - mean**2
        # a channel that never changes would be divided by zero
        statistics[view] = {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 1e-12)).tolist()}
    shards = [{"file": Unit(**r["unit"]).name, **{k: r[k] for k in ("unit", "bytes", "sha256")}} for r in records]
    files.write_json(folder / MANIFEST, {**facts, "statistics": statistics, "shards": shards})


class FeatureCache:
    """Reads crops of features. Files are opened lazily per process and dropped on pickling; nothing is locked."""

    def __init__(self, path: Path) -> None:
        """Raises InputError when the cache is missing, unfinished, or a shard is gone or cut short."""
        self.path = Path(path)
        hint = "build the cache with `hpc-neuro precompute`; an interrupted build goes on with the same command"
        self.manifest: dict[str, Any] = files.read_json(self.path / MANIFEST, hint)
        self.layers: tuple[int, ...] = tuple(self.manifest["layers"])
        self.views: tuple[str, ...] = tuple(self.manifest["views"])
        self.dim = int(self.manifest["dim"])
        kinds = self.manifest["statistics"]
        self.mean = {v: torch.tensor(kinds[v]["mean"], dtype=torch.float32) for v in self.views}  # [L, D]
        self.std = {v: torch.tensor(kinds[v]["std"], dtype=torch.float32) for v in self.views}  # [L, D]
        self._units: dict[tuple[str, str], list[Unit]] = {}
        damaged = []
        for shard in self.manifest["shards"]:
            unit = Unit(**{**shard["unit"], "cell": tuple(shard["unit"]["cell"])})
            self._units.setdefault((unit.volume, unit.view), []).append(unit)
            file = self.path / shard["file"]
            if not file.exists() or file.stat().st_size != shard["bytes"]:
                damaged.append(shard["file"])
        if damaged:
            raise InputError(
                f"{self.path} lacks {len(damaged)} of its {len(self.manifest['shards'])} shards, or they were cut "
                f"short ({', '.join(damaged[:3])}); `hpc-neuro precompute` with the same config rebuilds just those"
            )
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[str, h5py.File] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def volumes(self) -> tuple[str, ...]:
        """Identifiers of the volumes held."""
        return tuple(dict.fromkeys(volume for volume, _ in self._units))

    def check(self, digests: Mapping[str, str], teacher: Mapping[str, Any], views: Sequence[str]) -> None:
        """Raise CacheMismatch unless the cache holds `views` of all the volumes, of this content, by this teacher.

        digests: volume -> content digest as the store gives it; teacher: Teacher.identity.
        """
        command = f"hpc-neuro precompute store=... out={self.path}"
        held = self.manifest["teacher"]
        if dict(held) != dict(teacher):
            raise CacheMismatch(
                f"{self.path} holds features of the teacher {held}, but the config asks for {dict(teacher)}; build "
                f"them in another folder with `{command}` and that teacher, or train with "
                f"teacher.model={held.get('name')}"
            )
        if lacking := [v for v in views if v not in self.views]:
            raise CacheMismatch(f"{self.path} has no view {', '.join(lacking)}; rebuild it with views={list(views)}")
        if absent := [v for v in digests if (v, self.views[0]) not in self._units]:
            raise CacheMismatch(
                f"{self.path} has no features of {', '.join(absent[:5])}; add their split to `splits` of "
                f"`{command}`, in another folder"
            )
        if changed := [v for v, digest in digests.items() if self.manifest["volumes"][v] != digest]:
            raise CacheMismatch(
                f"{self.path} was made from other images of {', '.join(changed[:5])} than the store holds now; "
                f"build it again in another folder with `{command}`"
            )

    def crop(self, volume: str, box: Box, patch: Shape) -> dict[str, Tensor]:
        """Features of a crop on the student's token grid: view -> [L, D, z, y, x] float16, grid = box.shape / patch.

        The box may reach past the volume's end; cells out there repeat the last one. Raises InputError when the box
        does not lie on the token grid, where resampling would blur the features.
        """
        if any(a % p or n % p for a, n, p in zip(box.start, box.shape, patch, strict=True)):
            raise InputError(f"the crop {box.start} to {box.stop} does not lie on the token grid of {patch} voxels")
        return {view: self._view(volume, view, box, patch) for view in self.views}

    def _view(self, volume: str, view: str, box: Box, patch: Shape) -> Tensor:
        units, (across, down, right) = self._units[volume, view], PLANE[view]
        stride, (height, width) = units[0].stride, units[0].cell
        last = units[-1]
        slices = (last.first - units[0].first) // stride + last.count
        rows, wr = _cells(box, patch, down, height, last.rows)
        columns, wc = _cells(box, patch, right, width, last.columns)
        picked, ws = _cells(box, patch, across, stride, slices)
        parts = []
        for unit in units:
            offset = (unit.first - units[0].first) // stride
            a, b = max(picked.start, offset) - offset, min(picked.stop, offset + unit.count) - offset
            if a < b:
                parts.append(self._file(unit)["features"][a:b, :, rows, columns])
        values = torch.from_numpy(np.concatenate(parts)).float()  # [s, L, r, c, D]
        grid = torch.einsum("slrcd,is,jr,kc->ldijk", values, ws, wr, wc)  # slices, rows, columns of the target
        order = [0, 1, *(2 + (across, down, right).index(axis) for axis in (0, 1, 2))]
        return grid.permute(order).half().contiguous()

    def _file(self, unit: Unit) -> h5py.File:
        if self._pid != os.getpid():
            self._forget()  # an HDF5 handle must not be shared over a fork
        file = self._open.pop(unit.name, None)
        if file is None:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            file = h5py.File(self.path / unit.name, "r", locking=False)
        self._open[unit.name] = file
        return file


def _cells(box: Box, patch: Shape, axis: int, cell: float, count: int) -> tuple[slice, Tensor]:
    """Source cells under a box along one axis, and area weights [targets, cells] that bring them to its tokens.

    Source cell i covers voxels [i * cell, (i + 1) * cell), i < count; target t covers patch[axis] voxels.
    """
    edges = np.arange(box.start[axis], box.stop[axis] + 1, patch[axis], dtype=np.float64)
    low = np.minimum(edges[:-1], (count - 0.5) * cell)  # a target wholly past the end takes the last cell
    high = np.maximum(np.minimum(edges[1:], count * cell), low + 1e-6 * cell)
    first = int(low[0] // cell)
    stop = min(count, max(first + 1, int(np.ceil(high[-1] / cell - 1e-9))))
    starts = np.arange(first, stop) * cell
    overlap = np.minimum(high[:, None], starts + cell) - np.maximum(low[:, None], starts)
    weights = np.clip(overlap, 0.0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    return slice(first, stop), torch.from_numpy(weights).float()


def _by_slice(data: Any) -> Iterator[NDArray[np.float16]]:
    for i in range(data.shape[0]):
        yield data[i]  # [L, h, w, D]
