"""One shard: `features` [S, L, h, w, D], written tile by tile, with its checksum and its sums for normalization.

The checksum covers the features in the order in which they are written: every slice of the first tile, then of the
next. The writer reads nothing back, and memory holds one tile of a few slices however large a slice is.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_neuro.core import files
from hpc_neuro.data.feature_cache.encoding import RAW, FeatureCoding
from hpc_neuro.data.feature_cache.manifest import FORMAT, MANIFEST, ShardSpec, iter_tiles

TOKEN_CHUNK = 8
"""[token] Side of an HDF5 chunk in the token map; a chunk holds all layers and channels of one slice."""

SPARE_BYTES = 1 << 16
"""[bytes] Reserved for HDF5's own structures in a shard."""

_NO_DIGEST = np.bytes_(64 * b"0")


class ShardWriter:
    """Fills one shard tile by tile, each tile from its first slice to its last; `finish()` completes it.

    tile: side of a tile in tokens. HDF5 ends the process with a segmentation fault when a write finds the disk full, so
    the constructor takes the disk space of the whole shard and raises OSError (ENOSPC, EDQUOT) when it is not there.
    """

    def __init__(
        self,
        path: Path,
        shard: ShardSpec,
        layers: int,
        dim: int,
        key: str,
        tile: int,
        coding: FeatureCoding = RAW,
    ) -> None:
        self._coding = coding
        self._clipped = 0
        self._digest = hashlib.sha256()
        self._expected_pieces = _iter_pieces(shard.count, shard.rows, shard.columns, tile)
        self._sum = torch.zeros(layers, dim, dtype=torch.float64)
        self._squares = torch.zeros(layers, dim, dtype=torch.float64)

        # A crop reads a few slices and a window of tokens, with all layers and channels of each.
        width = coding.width(dim)
        shape = (shard.count, layers, shard.rows, shard.columns, width)
        chunk = (1, layers, min(TOKEN_CHUNK, shard.rows), min(TOKEN_CHUNK, shard.columns), width)
        chunk_count = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))

        # Index, header and sums; the features themselves are allocated below.
        files.reserve_space(path.parent, SPARE_BYTES + 40 * layers * dim + 16 * chunk_count)

        # All chunks get their place when the dataset is created, not when they are written.
        allocate_early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        allocate_early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._file = h5py.File(path, "w", libver="latest")
        try:
            self._data = self._file.create_dataset(
                "features",
                shape,
                coding.dtype,
                chunks=chunk,
                track_times=False,
                fill_time="never",
                dcpl=allocate_early,
                # Compared whenever a crop is read; `cache verify` compares all of the shard's.
                fletcher32=True,
            )

            # Attributes, too, take their space now; `finish` sets their values.
            zeros = np.zeros((layers, dim))
            self._file.attrs.update(key=key, tile=tile, sha256=_NO_DIGEST, sum=zeros, squares=zeros, clipped=0)
            self._file.flush()

            # Take the blocks of this file itself, so that no other writer can have them.
            os.posix_fallocate(self._file.id.get_vfd_handle(), 0, path.stat().st_size)
        except BaseException:
            self.close()
            raise

    def write(self, slices: slice, rows: slice, columns: slice, values: NDArray[np.floating[Any]]) -> None:
        """Encode and write features [s, L, r, c, D]. Raises ValueError when another piece is next."""
        # The checksum covers the features in this order, which `is_shard_sound` repeats.
        for i in range(slices.start, slices.stop):
            if (expected := next(self._expected_pieces, None)) != (i, rows, columns):
                raise ValueError(f"slice {i}, rows {rows}, columns {columns} were given, {expected} were to come")

        codes, clipped = self._coding.encode(torch.from_numpy(values).transpose(0, 1))  # [L, s, r, c, n]
        self._clipped += clipped
        codes = codes.transpose(0, 1).contiguous()  # [s, L, r, c, n]

        for slice_codes in codes:
            self._digest.update(slice_codes.numpy())

            # Statistics of what a reader will see, not of what the teacher gave.
            decoded = self._coding.decode(slice_codes).flatten(1, -2)  # [L, r*c, D]
            self._sum += decoded.sum(1, dtype=torch.float64)
            self._squares += decoded.square().sum(1, dtype=torch.float64)

        self._data[slices, :, rows, columns] = codes.numpy()

    def finish(self) -> None:
        """Write the sums of the decoded channels and the checksum, and close. ValueError when features are missing."""
        if (expected := next(self._expected_pieces, None)) is not None:
            raise ValueError(f"a shard is to be finished without slice, rows, columns {expected}")

        # `modify` writes in place: no new space is needed on a full disk.
        self._file.attrs.modify("sha256", self._digest.hexdigest().encode())
        self._file.attrs.modify("sum", self._sum.numpy())
        self._file.attrs.modify("squares", self._squares.numpy())
        self._file.attrs.modify("clipped", self._clipped)
        self._file.close()

    def close(self) -> None:
        """Close the file as it is; does nothing after `finish()`."""
        self._file.close()


def read_shard_record(path: Path, shard: ShardSpec) -> dict[str, Any]:
    """What the manifest keeps of a finished shard; `sum` and `squares` [L, D] are for the normalization.

    `clipped` counts the values that were too large for int8.
    """
    with h5py.File(path, "r", locking=False) as file:
        return {
            "unit": shard.to_json(),
            "bytes": path.stat().st_size,
            "sha256": file.attrs["sha256"].decode(),
            "clipped": int(file.attrs["clipped"]),
            "sum": file.attrs["sum"],
            "squares": file.attrs["squares"],
        }


def read_shard_values(path: Path, window: tuple[slice, slice, slice], coding: FeatureCoding = RAW) -> Tensor:
    """Decoded features [s, L, r, c, D] float32 of some slices, token rows and columns of a shard."""
    slices, rows, columns = window
    with h5py.File(path, "r", locking=False) as file:
        codes = torch.from_numpy(file["features"][slices, :, rows, columns])
    return coding.decode(codes.transpose(0, 1)).transpose(0, 1)


def read_shard_key(path: Path) -> str | None:
    """The key under which a shard was built; None when there is no readable shard."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return str(file.attrs["key"])
    except (OSError, KeyError):
        return None


def is_shard_sound(path: Path) -> bool:
    """Whether a shard's data still has the checksum that was taken when it was written."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            data = file["features"]
            digest = hashlib.sha256()
            count, _, rows, columns, _ = data.shape
            for i, row_slice, column_slice in _iter_pieces(count, rows, columns, int(file.attrs["tile"])):
                digest.update(data[i, :, row_slice, column_slice].tobytes())
            return bool(digest.hexdigest().encode() == file.attrs["sha256"])
    except (OSError, KeyError):
        return False


def write_manifest(folder: Path, facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Write the manifest, last of all: mean and std of each view, layer and channel, and the list of shards.

    The statistics are those of the slices as they lie in the volume: mirrored ones have nearly the same.
    """
    shards = [ShardSpec.from_json(record["unit"]) for record in records]
    statistics = {view: _compute_statistics(view, shards, records) for view in facts["views"]}

    entries = []
    for shard, record in zip(shards, records, strict=True):
        # The sums have become mean and std.
        listed = {key: record[key] for key in ("unit", "bytes", "sha256", "clipped")}
        entries.append({"file": shard.name, **listed})
    files.write_json(folder / MANIFEST, {"format": FORMAT, **facts, "statistics": statistics, "shards": entries})


def _compute_statistics(view: str, shards: Sequence[ShardSpec], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and std [L][D] over all tokens of a view."""
    own = [i for i, shard in enumerate(shards) if shard.view == view and not shard.layout]
    tokens = sum(shards[i].tokens for i in own)
    mean = np.sum([records[i]["sum"] for i in own], axis=0) / tokens
    variance = np.sum([records[i]["squares"] for i in own], axis=0) / tokens - mean**2

    # A channel that never changes would be divided by zero.
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 1e-12)).tolist()}


def _iter_pieces(count: int, rows: int, columns: int, tile: int) -> Iterator[tuple[int, slice, slice]]:
    """(slice, token rows, token columns) in the order in which they are written."""
    for row_slice, column_slice in iter_tiles(rows, columns, tile):
        for i in range(count):
            yield i, row_slice, column_slice
