"""One shard: `features` [S, L, h, w, D], written tile by tile, with its checksum and its sums for normalisation.

The checksum runs over the features in the order they are written, every slice of the first tile, then of the next:
nothing is read again for it, and memory holds one tile of some slices however large a slice is.
"""

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

from hpc_neuro.core import files
from hpc_neuro.data.feature_cache.encoding import RAW, Coding
from hpc_neuro.data.feature_cache.layout import FORMAT, MANIFEST, Unit, tiles

_SPARE = 1 << 16
_NO_DIGEST = np.bytes_(64 * b"0")


class ShardWriter:
    """Fills one shard tile by tile, each from its first slice to its last; `finish()` makes it whole.

    tile: side of a tile in tokens. The disk space of the whole shard is taken before the first write, for HDF5 ends the
    process with a segmentation fault when a write finds the disk full: the constructor raises OSError (ENOSPC, EDQUOT)
    instead.
    """

    def __init__(
        self, path: Path, unit: Unit, layers: int, dim: int, key: str, tile: int, coding: Coding = RAW
    ) -> None:
        self._coding, self._clipped, width = coding, 0, coding.width(dim)
        self._digest, self._due = hashlib.sha256(), _pieces(unit.count, unit.rows, unit.columns, tile)
        self._sum, self._squares = (torch.zeros(layers, dim, dtype=torch.float64) for _ in range(2))
        shape = (unit.count, layers, unit.rows, unit.columns, width)
        chunk = (1, layers, min(8, unit.rows), min(8, unit.columns), width)
        chunks = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
        files.reserve_space(
            path.parent, _SPARE + 40 * layers * dim + 16 * chunks
        )  # what HDF5 writes besides the features
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._file = h5py.File(path, "w", libver="latest")
        try:
            self._data = self._file.create_dataset(
                "features", shape, coding.dtype, chunks=chunk, track_times=False, fill_time="never", dcpl=how
            )
            blank = np.zeros((layers, dim))  # attributes, too, get their place now and their values on closing
            self._file.attrs.update(key=key, tile=tile, sha256=_NO_DIGEST, sum=blank, squares=blank, clipped=0)
            self._file.flush()
            # the blocks of this very file, so that no other writer can take them
            os.posix_fallocate(self._file.id.get_vfd_handle(), 0, path.stat().st_size)
        except BaseException:
            self.close()
            raise

    def write(self, slices: slice, rows: slice, columns: slice, values: NDArray[np.floating[Any]]) -> None:
        """Put features [s, L, r, c, D] in their place, encoded. Raises ValueError when it is not their turn."""
        for i in range(slices.start, slices.stop):
            if (due := next(self._due, None)) != (i, rows, columns):
                raise ValueError(f"slice {i}, rows {rows}, columns {columns} were given, {due} were to come")
        kept, clipped = self._coding.encode(torch.from_numpy(values).transpose(0, 1))  # [L, s, r, c, n]
        self._clipped += clipped
        ready = kept.transpose(0, 1).contiguous()  # [s, L, r, c, n]
        for one in ready:
            self._digest.update(one.numpy())
            flat = self._coding.decode(one).flatten(1, -2)  # [L, r*c, D]
            self._sum += flat.sum(1, dtype=torch.float64)
            self._squares += flat.square().sum(1, dtype=torch.float64)
        self._data[slices, :, rows, columns] = ready.numpy()

    def finish(self) -> None:
        """Note the sums of the decoded channels and the checksum, close the file. ValueError when features lack."""
        if (due := next(self._due, None)) is not None:
            raise ValueError(f"a shard is to be finished without slice, rows, columns {due}")
        ends = {"sha256": self._digest.hexdigest().encode(), "sum": self._sum.numpy(), "squares": self._squares.numpy()}
        for name, value in {**ends, "clipped": self._clipped}.items():
            self._file.attrs.modify(name, value)
        self._file.close()

    def close(self) -> None:
        """Close the file as it is; does nothing after `finish()`."""
        self._file.close()


def read_shard_record(path: Path, unit: Unit) -> dict[str, Any]:
    """What the manifest keeps of a finished shard; `sum` and `squares` [L, D] are for the normalisation.

    `clipped` counts the values that were too large for int8.
    """
    with h5py.File(path, "r", locking=False) as file:
        attrs = {k: file.attrs[k] for k in ("sum", "squares")}
        known = {"sha256": file.attrs["sha256"].decode(), "clipped": int(file.attrs["clipped"])}
    return {"unit": asdict(unit), "bytes": path.stat().st_size, **known, **attrs}


def read_shard_values(path: Path, place: tuple[slice, slice, slice], coding: Coding = RAW) -> Tensor:
    """Decoded features [s, L, r, c, D] float32 of some slices, token rows and columns of a shard."""
    slices, rows, columns = place
    with h5py.File(path, "r", locking=False) as file:
        kept = torch.from_numpy(file["features"][slices, :, rows, columns])
    return coding.decode(kept.transpose(0, 1)).transpose(0, 1)


def read_shard_key(path: Path) -> str | None:
    """The key a shard was made under, None when there is no readable shard."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return str(file.attrs["key"])
    except (OSError, KeyError):
        return None


def is_shard_sound(path: Path) -> bool:
    """Whether a shard's data still has the checksum taken when it was written."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            data, digest = file["features"], hashlib.sha256()
            count, _, rows, columns, _ = data.shape
            for i, r, c in _pieces(count, rows, columns, int(file.attrs["tile"])):
                digest.update(data[i, :, r, c].tobytes())
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
    files.write_json(folder / MANIFEST, {"format": FORMAT, **facts, "statistics": statistics, "shards": shards})


def _pieces(count: int, rows: int, columns: int, tile: int) -> Iterator[tuple[int, slice, slice]]:
    """(slice, token rows, token columns) in the order they are written."""
    return ((i, r, c) for r, c in tiles(rows, columns, tile) for i in range(count))
