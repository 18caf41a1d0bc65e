"""Where the volumes come from: a store, or files of any format. Each volume is normalized by one range."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import run_folder
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.image_names import find_clash
from hpc_neuro.core.image_settings import require_inside
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Contrast
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.formats import Volume, describe_content, open_volume
from hpc_neuro.data.intensity import compute_intensity_range, limit_brightness, normalize
from hpc_neuro.data.remote_path import parse_path
from hpc_neuro.data.resample import Resampling
from hpc_neuro.data.store import Store
from hpc_neuro.infer.config import InferConfig, VolumeConfig

T = TypeVar("T")
ChooseGrid = Callable[[Shape, VoxelSize, str], Resampling | None]
"""Shape, voxel size (um) and name of an image -> the grid that the student sees; None: that of the image."""
ShareOf = tuple[int, int]
"""(i, n): the i-th of n shares."""
_RESULT_FOLDERS = ("entries", "journal", "proofread", "shares", "strands", "swc")
"""Folders of results in `out`."""


@dataclass(frozen=True)
class InputVolume:
    """One volume to predict."""

    id: str
    image: str
    """Where it came from."""
    shape: Shape
    voxel_size: VoxelSize
    roots: tuple[tuple[float, float, float], ...]
    """[voxel] z y x, one for each neuron; (): every piece is a neuron."""
    digest: str
    """Hash of what the result depends on."""
    read: Callable[[Box], NDArray[np.float32]]
    """Normalized voxels of a box inside the volume, float32 [Z, Y, X]."""
    resampling: Resampling | None = None
    """The grid that the student sees; None: that of the volume."""
    read_resampled: Callable[[Box], NDArray[np.float32]] | None = None
    """Normalized voxels of a box of that grid."""
    file: Path | None = None
    """The image file, when it is a file that is in no store."""
    content: str = ""
    """SHA-256 of the bytes of `file`; of an image folder its place and metadata."""
    share: ShareOf | None = None
    """The share of its blocks that this run does; None: all."""
    overview: Callable[[Box], float] | None = None
    """Brightest normalized voxel of a coarser level inside a box (of this level's voxels)."""
    range: tuple[float, float] = (0.0, 1.0)
    """The brightness that becomes 0 and 1."""

    def show(self, box: Box) -> NDArray[np.float32]:
        """Normalized voxels of a box of the student's grid, float32 [Z, Y, X]."""
        return self.read(box) if self.read_resampled is None else self.read_resampled(box)

    def find_change(self) -> str:
        """A sentence when the image is not the one that was hashed before it was read; "" when it is."""
        # A store's volume has its own digest, which is compared when it is opened.
        path = parse_path(self.image)
        if not self.content or describe_content(path) == self.content:
            return ""
        return (
            f"{self.id}: {path} was changed while it was read, so that the result is of a mixture; wait until nothing "
            "writes to it, then give another `out`"
        )


@dataclass(frozen=True)
class Measurement:
    """What one rank found out by reading a whole file."""

    range: tuple[float, float]
    content: str


@dataclass(frozen=True)
class UnusableVolume:
    """A volume whose brightness cannot be measured: it is constant, damaged, or holds NaN."""

    id: str
    error: str
    """A sentence that names the file."""


def open_inputs(
    cfg: InferConfig,
    measurements: Mapping[str, Measurement | UnusableVolume] | None = None,
    contrast: Contrast = "range",
    choose_grid: ChooseGrid | None = None,
) -> Iterator[InputVolume | UnusableVolume]:
    """All volumes of this share, opened lazily. Raises InputError for what cannot be opened or has no voxel size.

    `measurements` by id spare the reading of whole files. `contrast`: that of the student's training. `choose_grid`:
    the grid that the student sees of a volume; None: always that of the volume.
    """
    choose_grid = choose_grid or _keep_grid
    if cfg.store is not None:
        yield from _open_store(cfg.store, cfg, contrast, choose_grid)

    # A mistake is reported before whole images are read.
    _require_separate_results(cfg)
    for item, share in _divide(cfg.inputs, cfg.share):
        yield _open_file(item, share, (measurements or {}).get(item.name), contrast, choose_grid)


def split_usable(volumes: Iterable[InputVolume | UnusableVolume]) -> tuple[list[InputVolume], list[str]]:
    """The volumes that can be predicted, and a sentence on each other one."""
    opened = list(volumes)
    usable = [volume for volume in opened if isinstance(volume, InputVolume)]
    return usable, [volume.error for volume in opened if isinstance(volume, UnusableVolume)]


def list_measurements(volumes: list[InputVolume | UnusableVolume]) -> dict[str, Measurement | UnusableVolume]:
    """What other ranks need not measure again, by id."""
    measurements: dict[str, Measurement | UnusableVolume] = {}
    for volume in volumes:
        if isinstance(volume, UnusableVolume):
            measurements[volume.id] = volume
        elif volume.content:
            measurements[volume.id] = Measurement(volume.range, volume.content)
    return measurements


def open_image(item: VolumeConfig, dataset: str | None) -> Volume:
    """An image that is in no store, or one of its other arrays."""
    return open_volume(item.image, channel=item.channel, axes=item.axes, dataset=dataset)


def _keep_grid(shape: Shape, voxel_size: VoxelSize, image: str) -> None:
    """The student sees every volume on its own grid."""


def _open_store(path: Path, cfg: InferConfig, contrast: Contrast, choose_grid: ChooseGrid) -> Iterator[InputVolume]:
    store = Store(path)
    names = store.split(cfg.split)
    if not names:
        raise InputError(f"{path} has no volume in the split {cfg.split}; choose another with split=NAME")

    if clash := find_clash(names):
        raise InputError(
            f"{path}: the volumes {clash[0]!a} and {clash[1]!a} {clash[2]}; rename one, and prepare them again in "
            "another folder"
        )

    # A store knows the brightness range of its volumes, so nothing is measured.
    for name, share in _divide(names, cfg.share):
        volume = store[name]
        if volume.contrast != contrast:
            raise InputError(
                f"{path}: {name} was prepared with contrast={volume.contrast}, and the student was trained with "
                f"{contrast}; prepare the store again in another folder, with contrast={contrast}"
            )
        grid = choose_grid(volume.shape, volume.voxel_size, f"{path}:{name}")
        yield InputVolume(
            id=name,
            image=f"{path}:{name}",
            shape=volume.shape,
            voxel_size=volume.voxel_size,
            roots=() if volume.root is None else (volume.root,),
            digest=volume.digest,
            read=volume.normalized_image,
            resampling=grid,
            # The store holds the contrast that was chosen for it, so that is what is resampled.
            read_resampled=None if grid is None else grid.read_new(volume.normalized_image),
            share=share,
        )


def _require_separate_results(cfg: InferConfig) -> None:
    """InputError where results would be written over an image, into it, or around it."""
    # A result inside an image folder, or around one, would damage the image.
    names = [f"{item.name}.ome.zarr" for item in cfg.inputs]
    results = [(cfg.out / name).resolve() for name in (*names, *_RESULT_FOLDERS)]

    for item in cfg.inputs:
        image = item.image.resolve()
        for result in results:
            if result == image or result in image.parents or image in result.parents:
                raise InputError(f"{item.image} and results ({result}) would lie in one another; choose another `out`")


def _divide(items: tuple[T, ...], share: ShareOf | None) -> Iterator[tuple[T, ShareOf | None]]:
    """The items of a share, each with the share of its own blocks where there are more shares than items."""
    if not items:
        return
    own = run_folder.take_share(items, share)

    # Whole volumes cost no gathering of blocks.
    if share is None or share[1] <= len(items):
        yield from ((item, None) for item in own)
        return

    # Shares go to the items in turn, so that no two items differ by more than one.
    index, count = share

    number = index % len(items)
    sharers = len(range(number, count, len(items)))
    yield items[number], (index // len(items), sharers) if sharers > 1 else None


def _open_file(
    item: VolumeConfig,
    share: ShareOf | None,
    measurement: Measurement | UnusableVolume | None,
    contrast: Contrast,
    choose_grid: ChooseGrid,
) -> InputVolume | UnusableVolume:
    volume = open_image(item, item.dataset)
    voxel_size = item.voxel_size or volume.voxel_size

    if voxel_size is None:
        raise InputError(
            f"{item.image} does not say its voxel size, and trees are written in micrometers; give voxel_size=z,y,x "
            "in um"
        )

    roots = item.roots if item.root is None else (item.root,)
    for root in roots:
        require_inside(root, volume.shape, item.image)

    grid = choose_grid(volume.shape, voxel_size, str(item.image))

    # Measuring reads every voxel, so no second rank does it.
    measurement = measurement or _measure(item, volume)
    if isinstance(measurement, UnusableVolume):
        return measurement
    low, high = measurement.range

    # All that changes a normalized voxel belongs here.
    facts = f"{measurement.content} {item.channel} {item.axes} {item.dataset} {low} {high}"
    if contrast == "local":
        facts += f" {contrast}" if item.range is None else f" {contrast} limited"

    return InputVolume(
        id=item.name,
        image=str(item.image),
        shape=volume.shape,
        voxel_size=voxel_size,
        roots=roots,
        digest=hashlib.sha256(facts.encode()).hexdigest(),
        read=_make_reader(item, volume, (low, high), contrast),
        resampling=grid,
        read_resampled=None if grid is None else _make_reader(item, volume, (low, high), contrast, grid),
        file=item.image if item.image.is_file() else None,
        content=measurement.content,
        share=share,
        # A coarser level is compared on the grid of the image.
        overview=None if item.overview is None or grid is not None else _open_overview(item, volume, low, high),
        range=(low, high),
    )


def _make_reader(
    item: VolumeConfig,
    volume: Volume,
    limits: tuple[float, float],
    contrast: Contrast,
    grid: Resampling | None = None,
) -> Callable[[Box], NDArray[np.float32]]:
    """Reads what the student sees of a box of the image, or of another grid."""
    read, shape = volume.__getitem__, volume.shape
    if grid is not None:
        read, shape = grid.read_new(read), grid.new_shape
    if contrast == "range":
        return lambda box: normalize(read(box), *limits)
    return measure_foreground(limit_brightness(read, item.range), shape).local_contrast


def _measure(item: VolumeConfig, volume: Volume) -> Measurement | UnusableVolume:
    # Hashed before it is read: what changes later is noticed at the end.
    content = describe_content(item.image)
    try:
        intensity_range = item.range or compute_intensity_range(lambda box: volume[box], volume.shape)
    except InputError as error:
        # What a reader refuses names the file already.
        prefix = "" if str(item.image) in str(error) else f"{item.image}: "
        return UnusableVolume(item.name, f"{prefix}{error}")

    return Measurement(intensity_range, content)


def _open_overview(item: VolumeConfig, fine: Volume, low: float, high: float) -> Callable[[Box], float]:
    """The brightest voxel of a box (in fine voxels) in a coarser level of the same image."""
    coarse = open_image(item, item.overview)
    factor = [size / coarse_size for size, coarse_size in zip(fine.shape, coarse.shape, strict=True)]

    if any(f < 1 for f in factor):
        raise InputError(
            f"{item.image}: overview {item.overview} is {coarse.shape} voxels and the image {fine.shape}; it must be a "
            "coarser level of it"
        )

    def read_maximum(box: Box) -> float:
        # Rounded outwards, so that no fine voxel is missed.
        z, y, x = (int(a / f) for a, f in zip(box.start, factor, strict=True))
        z_stop, y_stop, x_stop = (int(np.ceil(b / f)) for b, f in zip(box.stop, factor, strict=True))

        # One voxel more on each side, for levels whose voxels do not begin where those of the fine level do.
        coarse_box = Box((z, y, x), (z_stop, y_stop, x_stop)).grow((1, 1, 1))
        return float(normalize(coarse[coarse_box.clip(Box.whole(coarse.shape))], low, high).max())

    return read_maximum
