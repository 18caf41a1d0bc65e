"""One shard: `features` [S, L, h, w, D], written tile by tile, with its checksum and its sums for normalisation."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_neuro import files
from hpc_neuro.data.feature_cache.coding import RAW, Coding
from hpc_neuro.data.feature_cache.layout import MANIFEST, Unit

_SPARE = 1 << 16
_NO_DIGEST = np.bytes_(64 * b"0")


class ShardWriter:
    """Fills one shard tile by tile; `finish()` makes it whole.

    The disk space of the whole shard is taken before the first write, for HDF5 ends the process with a segmentation
    fault when a write finds the disk full: the constructor raises OSError (ENOSPC, EDQUOT) instead.
    """

    def __init__(self, path: Path, unit: Unit, layers: int, dim: int, key: str, coding: Coding = RAW) -> None:
        self._coding, self._clipped, width = coding, 0, coding.width(dim)
        shape = (unit.count, layers, unit.rows, unit.columns, width)
        chunk = (1, layers, min(8, unit.rows), min(8, unit.columns), width)
        chunks = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
        files.reserve(path.parent, _SPARE + 40 * layers * dim + 16 * chunks)  # what HDF5 writes besides the features
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._file = h5py.File(path, "w", libver="latest")
        try:
            self._data = self._file.create_dataset(
                "features", shape, coding.dtype, chunks=chunk, track_times=False, fill_time="never", dcpl=how
            )
            blank = np.zeros((layers, dim))  # attributes, too, get their place now and their values on closing
            self._file.attrs.update(key=key, sha256=_NO_DIGEST, sum=blank, squares=blank, clipped=0)
            self._file.flush()
            # the blocks of this very file, so that no other writer can take them
            os.posix_fallocate(self._file.id.get_vfd_handle(), 0, path.stat().st_size)
        except BaseException:
            self.close()
            raise

    def write(self, slices: slice, rows: slice, columns: slice, values: NDArray[np.floating[Any]]) -> None:
        """Put features [s, L, r, c, D] in their place, encoded."""
        kept, clipped = self._coding.encode(torch.from_numpy(values).transpose(0, 1))  # [L, s, r, c, n]
        self._clipped += clipped
        self._data[slices, :, rows, columns] = kept.transpose(0, 1).numpy()

    def finish(self) -> None:
        """Sum up the decoded channels for normalisation, checksum the data, close the file."""
        total = squares = torch.zeros(1, 1, dtype=torch.float64)
        digest = hashlib.sha256()
        for values in _by_slice(self._data):
            digest.update(values.tobytes())
            flat = self._coding.decode(torch.from_numpy(values)).flatten(1, -2).double()  # [L, h*w, D]
            total, squares = total + flat.sum(1), squares + flat.square().sum(1)
        ends = {"sha256": digest.hexdigest().encode(), "sum": total.numpy(), "squares": squares.numpy()}
        for name, value in {**ends, "clipped": self._clipped}.items():
            self._file.attrs.modify(name, value)
        self._file.close()

    def close(self) -> None:
        """Close the file as it is; does nothing after `finish()`."""
        self._file.close()


def shard_record(path: Path, unit: Unit) -> dict[str, Any]:
    """What the manifest keeps of a finished shard; `sum` and `squares` [L, D] are for the normalisation.

    `clipped` counts the values that were too large for int8.
    """
    with h5py.File(path, "r", locking=False) as file:
        attrs = {k: file.attrs[k] for k in ("sum", "squares")}
        known = {"sha256": file.attrs["sha256"].decode(), "clipped": int(file.attrs["clipped"])}
    return {"unit": asdict(unit), "bytes": path.stat().st_size, **known, **attrs}


def shard_values(path: Path, place: tuple[slice, slice, slice], coding: Coding = RAW) -> Tensor:
    """Decoded features [s, L, r, c, D] float32 of some slices, token rows and columns of a shard."""
    slices, rows, columns = place
    with h5py.File(path, "r", locking=False) as file:
        kept = torch.from_numpy(file["features"][slices, :, rows, columns])
    return coding.decode(kept.transpose(0, 1)).transpose(0, 1)


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
    """Write the manifest, last of all: per-view mean and std of each layer and channel, and the list of shards.

    The statistics are those of the slices as the volume stands: mirrored ones have nearly the same.
    """
    statistics: dict[str, dict[str, Any]] = {}
    for view in facts["views"]:
        mine = [r for r in records if r["unit"]["view"] == view and not r["unit"]["how"]]
        tokens = sum(Unit.read(r["unit"]).tokens for r in mine)
        mean = np.sum([r["sum"] for r in mine], axis=0) / tokens
        variance = np.sum([r["squares"] for r in mine], axis=0) / tokens - mean**2
        # a channel that never changes would be divided by zero
        statistics[view] = {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 1e-12)).tolist()}
    kept = ("unit", "bytes", "sha256", "clipped")
    shards = [{"file": Unit.read(r["unit"]).name, **{k: r[k] for k in kept}} for r in records]
    files.write_json(folder / MANIFEST, {**facts, "statistics": statistics, "shards": shards})


def _by_slice(data: Any) -> Iterator[NDArray[Any]]:
    for i in range(data.shape[0]):
        yield data[i]  # [L, h, w, D]
