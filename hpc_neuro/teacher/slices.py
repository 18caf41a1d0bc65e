"""Volumes without labels, and the windows of their slices along z that a teacher goes on learning from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.stop_signals import until_stopped
from hpc_neuro.core.types import Contrast
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.formats import describe_content, open_volume
from hpc_neuro.data.image_list import expand_images
from hpc_neuro.data.intensity import ReadBox, compute_intensity_range, normalize
from hpc_neuro.data.store import INDEX, Store
from hpc_neuro.teacher.config import TeacherContinueConfig
from hpc_neuro.teacher.tiles import Tiles, open_or_make

HELD_SLICES = 10
"""The last slice out of this many is held out; a volume of fewer slices holds none out."""

BRIGHT = 0.5
"""Brightness of a pixel that a window may be placed around."""

MAX_WHOLE = 1 << 27
"""[voxel] A volume up to this size is read once; of a larger one, each window is read by itself."""

SEARCH = 4
"""[window] Side of the part of a slice in which a bright voxel is looked for."""

ReadBrightness = Callable[[Box], npt.NDArray[np.float32]]
"""Reads one box as brightness [Z, Y, X] in 0..1, as networks see it."""


@dataclass(frozen=True)
class UnlabeledVolume:
    """A volume without labels, or whose labels are not looked at."""

    name: str
    """Path, or store and id."""
    shape: Shape
    digest: str
    store: Path | None
    """The store that it lies in; None: it is a file."""
    id: str
    open: Callable[[], ReadBrightness]
    """Measures the brightness of the volume. Raises InputError for an image without contrast."""


@dataclass(frozen=True)
class CutWindows:
    """Windows of all volumes, and what became of each volume."""

    tiles: Tiles
    volumes: tuple[str, ...]
    """Names of the volumes that gave windows."""
    failures: tuple[str, ...]
    """A sentence on each volume that was left out."""


def list_volumes(cfg: TeacherContinueConfig) -> list[UnlabeledVolume]:
    """Every volume that `cfg` names, opened but not read. Raises InputError."""
    volumes: dict[str, UnlabeledVolume] = {}
    for named in cfg.volumes:
        for volume in _list_stored(named, cfg) if (named / INDEX).is_file() else _list_files(named, cfg):
            volumes.setdefault(volume.name, volume)
    if not volumes:
        raise InputError(
            f"{', '.join(map(str, cfg.volumes))} holds no volume of the splits {', '.join(cfg.splits)}; "
            "give others with splits=[train,val,test]"
        )
    return list(volumes.values())


def _list_stored(folder: Path, cfg: TeacherContinueConfig) -> list[UnlabeledVolume]:
    store = Store(folder)
    stored = [volume for volume in store if volume.split in cfg.splits]
    return [
        UnlabeledVolume(
            f"{folder}/{volume.id}",
            volume.shape,
            volume.digest,
            folder,
            volume.id,
            lambda volume=volume: volume.normalized_image,  # type: ignore[misc]
        )
        for volume in stored
    ]


def _list_files(named: Path, cfg: TeacherContinueConfig) -> list[UnlabeledVolume]:
    listed = []
    for path in expand_images(named):
        image = open_volume(path, channel=cfg.channel, axes=cfg.axes)

        def measure(read: ReadBox = image.__getitem__, shape: Shape = image.shape) -> ReadBrightness:
            return _measure_brightness(read, shape, cfg.contrast)

        digest = files.sha256_json([describe_content(path), cfg.channel, cfg.axes, cfg.contrast])
        listed.append(UnlabeledVolume(str(path), image.shape, digest, None, path.name, measure))
    return listed


def _measure_brightness(read: ReadBox, shape: Shape, contrast: Contrast) -> ReadBrightness:
    """How a student of this contrast sees an image. Raises InputError for an image without contrast."""
    low, high = compute_intensity_range(read, shape)
    if contrast == "local":
        return measure_foreground(read, shape).local_contrast
    return lambda box: normalize(read(box), low, high)


def cut_windows(
    volumes: Sequence[UnlabeledVolume], count: int, side: int, least: int, seed: int, cache: Path
) -> CutWindows:
    """Windows [n, 1, side, side] of all volumes, as many from each, cut on first use.

    least: [pixel] least side of a slice. Volumes without contrast, with slices that are smaller, or with voxels that
    cannot be read are left out. InputError where none can be used.
    """
    content = {"side": side, "windows": count, "seed": seed, "volumes": [volume.digest for volume in volumes]}
    share = max(1, count // len(volumes))
    usable: list[int] = []
    failures: list[str] = []

    def write_windows(part: Path) -> None:
        windows = []
        for number, volume in enumerate(
            until_stopped(run_folder.track_progress(volumes, "cut windows", unit="volume"))
        ):
            try:
                windows.append(_cut_volume(volume, share, side, least, np.random.default_rng([seed, number])))
                usable.append(number)
            except InputError as error:
                failures.append(f"{volume.name}: {error}")
        if not windows:
            raise InputError("no volume can be used:\n" + "\n".join(failures))
        with part.open("wb") as handle:
            np.save(handle, np.concatenate(windows))
        files.write_json(cache / "left_out.json", {"usable": usable, "failures": failures})

    array = open_or_make(cache / f"windows{side}.npy", content, write_windows)
    outcome = files.read_json(cache / "left_out.json", f"remove {cache} and give the same command again")

    # The held-out windows of a volume come last.
    held_out: list[int] = []
    for place, number in enumerate(outcome["usable"]):
        first = place * share
        held_out += range(first + share - count_held(volumes[number].shape, share), first + share)
    train = sorted(set(range(len(array))) - set(held_out))
    names = tuple(volumes[number].name for number in outcome["usable"])
    return CutWindows(Tiles(array, 1, held_out, train), names, tuple(outcome["failures"]))


def count_held(shape: Shape, windows: int) -> int:
    """How many of the windows of a volume are cut from its last slices, and held out."""
    return windows // HELD_SLICES if shape[0] >= HELD_SLICES else 0


def _cut_volume(
    volume: UnlabeledVolume, count: int, side: int, least: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """[count, 1, side, side]; the windows of the last slices come last. Raises InputError."""
    depth, height, width = volume.shape
    if min(height, width) < least:
        raise InputError(
            f"its slices are {height} x {width} pixels, want at least {least} x {least}; leave it out, or give a "
            "smaller task.crop"
        )
    read_slice = _open_slices(volume)

    last = count_held(volume.shape, count)
    first_held = depth - depth // HELD_SLICES if last else depth
    slices = [*rng.integers(0, first_held, count - last)]
    if last:
        slices += [*rng.integers(first_held, depth, last)]
    windows = [_cut_window(read_slice, int(z), (height, width), side, rng) for z in until_stopped(slices)]
    return np.stack(windows)[:, None]


def _open_slices(volume: UnlabeledVolume) -> Callable[[Box], npt.NDArray[np.uint8]]:
    """Reads a box of one slice as [Y, X]; a volume that fits is read now, once. Raises InputError."""
    depth, height, width = volume.shape
    read = volume.open()
    if depth * height * width > MAX_WHOLE:
        return lambda box: _to_bytes(read(box)[0])

    whole = np.stack([_to_bytes(read(Box.at((z, 0, 0), (1, height, width)))[0]) for z in until_stopped(range(depth))])
    return lambda box: whole[box.slices][0]


def _cut_window(
    read: Callable[[Box], npt.NDArray[np.uint8]], z: int, sides: tuple[int, int], side: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """[side, side] from a random place of a slice; half of the windows hold a bright voxel where there is one near."""
    reach = [min(SEARCH * side, length) for length in sides]
    y, x = (int(rng.integers(0, length - part + 1)) for length, part in zip(sides, reach, strict=True))
    region = read(Box.at((z, y, x), (1, reach[0], reach[1])))

    size = [min(side, part) for part in reach]
    room = [part - own for part, own in zip(reach, size, strict=True)]
    start = [int(rng.integers(0, rest + 1)) for rest in room]
    bright = np.flatnonzero(region >= 255 * BRIGHT) if rng.random() < 0.5 else np.empty(0, dtype=np.int64)
    if len(bright):
        place = np.unravel_index(int(rng.choice(bright)), region.shape)
        shifts = [int(at) - int(rng.integers(0, own)) for at, own in zip(place, size, strict=True)]
        start = [min(max(shift, 0), rest) for shift, rest in zip(shifts, room, strict=True)]
    window = region[start[0] : start[0] + size[0], start[1] : start[1] + size[1]]

    # A slice that is smaller than a window is mirrored at its edges, which keeps the size of a voxel.
    return np.pad(window, [(0, side - own) for own in size], mode="reflect")


def _to_bytes(brightness: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    return np.rint(brightness * 255).astype(np.uint8)
