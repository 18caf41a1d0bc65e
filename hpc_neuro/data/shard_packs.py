"""Shards of an image that lie together, put into one file: who reads many of them opens few files.

The tracing of a brain reads each shard many times, in halos and margins and for batches of trees. A pack is a copy of
the files of `PACK` shards along each axis, after an index:

    number of shards, then for each: z, y, x, first byte, bytes        little-endian int64
    the files of the shards, one after the other
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Shape
from hpc_neuro.data import ome_zarr

PACK: Shape = (8, 4, 4)
"""[shard] Of one pack along z, y, x."""
_OPEN_PACKS = 64
"""Packs that a reader keeps open."""
_COLUMNS = 5
_INDEX = np.dtype("<i8")


def find_pack(shard: Shape) -> Shape:
    """The place of the pack that a shard, given by its index, lies in."""
    z, y, x = (index // size for index, size in zip(shard, PACK, strict=True))
    return z, y, x


def name_pack(pack: Shape) -> str:
    """The file of a pack."""
    return f"pack_{'_'.join(map(str, pack))}.bin"


def group_shards(shards: Iterable[Shape]) -> dict[Shape, list[Shape]]:
    """Shards by the pack that they lie in; packs and shards are sorted."""
    packs = dict[Shape, list[Shape]]()
    for shard in sorted(shards):
        packs.setdefault(find_pack(shard), []).append(shard)
    return dict(sorted(packs.items()))


def write_pack(path: Path, image: Path, shards: Sequence[Shape]) -> None:
    """Copy the files of some shards of level 0 of an image into one file. Memory follows one shard."""
    index = np.zeros((len(shards), _COLUMNS), dtype=_INDEX)
    index[:, :3] = np.array(shards, dtype=_INDEX).reshape(-1, 3)
    offset = _INDEX.itemsize * (1 + index.size)

    with files.atomic(path) as part, part.open("wb") as handle:
        handle.seek(offset)
        for row, shard in zip(index, shards, strict=True):
            content = (image / ome_zarr.shard_path(shard)).read_bytes()
            row[3:] = offset, len(content)
            handle.write(content)
            offset += len(content)
        handle.seek(0)
        handle.write(np.array(len(shards), dtype=_INDEX).tobytes() + index.tobytes())


class PackReader:
    """Reads files of shards from the packs in a folder. A pack is opened once, and again only when many others were."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._packs = OrderedDict[Shape, _OpenPack]()

    def read(self, shard: Shape) -> bytes | None:
        """The file of a shard of a pack that was written; None where the shard had none."""
        place = find_pack(shard)
        pack = self._packs.pop(place, None) or _OpenPack(self._folder / name_pack(place))
        self._packs[place] = pack
        if len(self._packs) > _OPEN_PACKS:
            _, oldest = self._packs.popitem(last=False)
            oldest.close()
        return pack.read(shard)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pack in self._packs.values():
            pack.close()
        self._packs.clear()


class _OpenPack:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        count = int(np.frombuffer(self._read_exactly(0, _INDEX.itemsize), dtype=_INDEX)[0])
        content = self._read_exactly(_INDEX.itemsize, _INDEX.itemsize * _COLUMNS * count)
        self._places = dict(_parse_index(content))

    def read(self, shard: Shape) -> bytes | None:
        place = self._places.get(shard)
        return None if place is None else self._read_exactly(*place)

    def close(self) -> None:
        self._file.close()

    def _read_exactly(self, offset: int, size: int) -> bytes:
        content = os.pread(self._file.fileno(), size, offset)
        # One call of the kernel reads at most 2 GiB.
        while 0 < len(content) < size and (
            more := os.pread(self._file.fileno(), size - len(content), offset + len(content))
        ):
            content += more
        if len(content) < size:
            raise OSError(f"{self._path} ends after {offset + len(content)} bytes; remove it and start again")
        return content


def _parse_index(content: bytes) -> Iterator[tuple[Shape, tuple[int, int]]]:
    for z, y, x, offset, size in np.frombuffer(content, dtype=_INDEX).reshape(-1, _COLUMNS).tolist():
        yield (z, y, x), (offset, size)
