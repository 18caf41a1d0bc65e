"""A folder of photographs, decoded once into square tiles."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.image_names import is_system_file
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.stop_signals import until_stopped
from hpc_neuro.teacher.tiles import Tiles, open_or_make

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
"""Endings of photographs."""
_MAX_ASPECT = 20
"""Longest side of a photograph over its shortest; a strip would be made as long as that before it is cut."""


@dataclass(frozen=True)
class PhotographFolder:
    """The photographs of a folder and its subfolders, by name."""

    folder: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """[bytes] Sizes of the files."""

    @property
    def digest(self) -> str:
        """Of names and sizes: reading all photographs takes minutes."""
        return files.sha256_json([self.names, self.sizes])

    def tile_bytes(self, side: int) -> int:
        """[bytes] What the decoded tiles take."""
        return len(self.names) * 2 * 3 * side * side


def list_photographs(folder: Path, held: int) -> PhotographFolder:
    """The photographs below a folder. Raises InputError for too few of them to hold out `held`."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of photographs as photos=FOLDER")

    try:
        names = sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and not is_system_file(path) and not path.is_dir()
        )
    except OSError as error:
        raise InputError(
            f"{folder} cannot be listed ({error}); give a folder of photographs as photos=FOLDER"
        ) from None
    endings = ", ".join(sorted(SUFFIXES))
    if not names:
        raise InputError(f"{folder} holds no photographs, which end in {endings}; give another photos=FOLDER")
    if len(names) <= held:
        raise InputError(
            f"{folder} holds {files.format_count(len(names), 'photograph')} ({endings}), but {held} are held out and "
            "at least one is trained on; give more, or a smaller held=N"
        )
    return PhotographFolder(folder, tuple(names), tuple(_measure_file(folder / name) for name in names))


def _measure_file(path: Path) -> int:
    """[bytes] Size of a photograph. Raises InputError for a link that leads nowhere, and for a FIFO or a device."""
    try:
        files.require_regular_file(path, "a photograph")
        return path.stat().st_size
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', error)}); remove or replace it") from None


def open_tiles(photographs: PhotographFolder, cache: Path, side: int, held: int) -> Tiles:
    """The decoded photographs: the first and the last square along the long side of each.

    They are decoded on first use. Raises InputError for a photograph that cannot be read.
    """
    content = {"side": side, "photographs": photographs.digest}

    def decode(part: Path) -> None:
        count = len(photographs.names)
        files.require_space(cache, photographs.tile_bytes(side), "the cache of decoded photographs")
        tiles = _create_array(part, (2 * count, 3, side, side))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            pairs = pool.map(lambda name: _decode(photographs.folder / name, side), photographs.names)
            try:
                tracked = run_folder.track_progress(pairs, "decode", total=count, unit="photograph")
                for number, pair in enumerate(until_stopped(tracked)):
                    tiles[2 * number : 2 * number + 2] = pair
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        tiles.flush()

    array = open_or_make(cache / f"photographs{side}.npy", content, decode)

    # The same photographs are held out whatever the seed of a run.
    order = np.random.default_rng(0).permutation(len(photographs.names)).tolist()
    return Tiles(array, 2, sorted(order[:held]), sorted(order[held:]))


def _create_array(path: Path, shape: tuple[int, ...]) -> np.memmap[tuple[int, ...], np.dtype[np.uint8]]:
    """A file of uint8 that is filled in place: the tiles of many photographs do not fit into memory."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


def _decode(path: Path, side: int) -> npt.NDArray[np.uint8]:
    """[2, 3, side, side]."""
    try:
        with Image.open(path) as picture:
            _require_photograph(path, picture)
            rgb = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture ({error}); remove or replace it") from None
    scale = side / min(rgb.size)
    width, height = (max(side, round(n * scale)) for n in rgb.size)
    pixels = np.asarray(rgb.resize((width, height), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    return np.stack([pixels[:, :side, :side], pixels[:, -side:, -side:]])


def _require_photograph(path: Path, picture: Image.Image) -> None:
    """Raise InputError for values beyond 8 bits, which would all become white, and for a strip of pixels."""
    if picture.mode[:1] in ("I", "F"):
        raise InputError(
            f"{path} has more than 8 bits per pixel and color (mode {picture.mode}); save it with 8 bits, or remove it"
        )
    if max(picture.size) > _MAX_ASPECT * min(picture.size):
        raise InputError(f"{path} is {picture.width} x {picture.height} pixels, a strip; cut it, or remove it")
