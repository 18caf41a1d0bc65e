"""Where the volumes come from: a store, or files of any format; each is normalised by one range for all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import Volume, open_volume
from hpc_neuro.data.intensity import compute_intensity_range, normalize
from hpc_neuro.data.store import Store
from hpc_neuro.infer.config import InferConfig, VolumeConfig

_FOLDERS = ("blocks", "entries", "failed", "proofread", "shares", "strands", "swc")  # of results, in `out`
_DESCRIBING = ("zarr.json", ".zarray", ".zattrs", ".zgroup", "attributes.json")
T = TypeVar("T")
Share = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """One volume to look at."""

    id: str
    image: str  # where it came from
    shape: Shape
    voxel_size: VoxelSize
    roots: tuple[tuple[float, float, float], ...]  # [voxel] z y x, one for each neuron; none: every piece is one
    digest: str  # of what the result depends on
    read: Callable[[Box], NDArray[np.float32]]
    """Normalised voxels of a box inside the volume, float32 [Z, Y, X]."""
    file: Path | None = None
    """The image file, when it is one that is in no store ..."""
    content: str = ""
    """... and the SHA-256 of its bytes."""
    part: Share | None = None
    """Only this share of its blocks is asked for."""
    overview: Callable[[Box], float] | None = None
    """Brightest normalised voxel of a coarser level inside a box (of this level's voxels)."""
    range: tuple[float, float] = (0.0, 1.0)
    """The brightness that becomes 0 and 1."""


@dataclass(frozen=True)
class Known:
    """What one rank found out by reading all of a file."""

    range: tuple[float, float]
    content: str


def sources(cfg: InferConfig, known: Mapping[str, Known] | None = None) -> Iterator[Source]:
    """All volumes of this share, opened lazily. Raises InputError for what cannot be read or has no voxel size.

    `known` by id spares the reading of whole files.
    """
    if cfg.store is not None:
        store = Store(cfg.store)
        if not store.split(cfg.split):
            raise InputError(f"{cfg.store} has no volume in the split {cfg.split}; choose another with split=NAME")
        for name, part in _share(store.split(cfg.split), cfg.share):
            v = store[name]
            image = f"{cfg.store}:{name}"
            roots = () if v.root is None else (v.root,)
            yield Source(name, image, v.shape, v.voxel_size, roots, v.digest, v.normalized_image, part=part)
    _apart(cfg)
    for item, part in _share(cfg.inputs, cfg.share):
        yield _from_file(item, part, (known or {}).get(item.name))


def _apart(cfg: InferConfig) -> None:
    """InputError where results would be written over an image, into it, or around it."""
    names = [f"{item.name}.ome.zarr" for item in cfg.inputs]
    written = [(cfg.out / name).resolve() for name in (*names, *_FOLDERS)]
    for item in cfg.inputs:
        image = item.image.resolve()
        if clash := [w for w in written if w == image or w in image.parents or image in w.parents]:
            raise InputError(f"{item.image} and results ({clash[0]}) would lie in one another; choose another `out`")


def known(found: list[Source]) -> dict[str, Known]:
    """What other ranks need not read again."""
    return {v.id: Known(v.range, v.content) for v in found if v.content}


def _share(items: tuple[T, ...], share: Share | None) -> Iterator[tuple[T, Share | None]]:
    """The items of a share, each with the share of its own blocks where there are more shares than items."""
    if not items:
        return
    if share is None or share[1] <= len(items):
        yield from ((item, None) for item in run_folder.take_share(items, share))
        return
    run_folder.take_share(items, share)  # refuses an index that does not exist
    index, count = share
    which = index % len(items)
    sharers = len(range(which, count, len(items)))
    yield items[which], (index // len(items), sharers) if sharers > 1 else None


def opened(item: VolumeConfig, dataset: str | None) -> Volume:
    """An image that is in no store, or one of its other arrays."""
    return open_volume(item.image, channel=item.channel, axes=item.axes, dataset=dataset)


def _from_file(item: VolumeConfig, part: Share | None, known: Known | None) -> Source:
    volume = opened(item, item.dataset)
    size = item.voxel_size or volume.voxel_size
    if size is None:
        raise InputError(
            f"{item.image} does not say its voxel size, and trees are written in micrometres; give voxel_size=[z, y, x]"
        )
    roots = item.roots if item.root is None else (item.root,)
    for root in roots:
        if any(not -0.5 <= r < n for r, n in zip(root, volume.shape, strict=True)):
            raise InputError(f"the root {root} lies outside {item.image}, whose shape is {volume.shape} (z y x)")
    if item.range is not None and not item.range[0] < item.range[1]:
        raise InputError(f"{item.image}: range {list(item.range)} must rise; give [darkest, brightest]")
    if known is None:
        low, high = item.range or compute_intensity_range(lambda box: volume[box], volume.shape)
        content = files.sha256(item.image) if item.image.is_file() else _folder(item.image)
    else:
        (low, high), content = known.range, known.content
    overview = None if item.overview is None else _overview(item, volume, low, high)
    facts = f"{content} {item.channel} {item.axes} {item.dataset} {low} {high}"
    return Source(
        id=item.name,
        image=str(item.image),
        shape=volume.shape,
        voxel_size=size,
        roots=roots,
        digest=hashlib.sha256(facts.encode()).hexdigest(),
        read=lambda box: normalize(volume[box], low, high),
        file=item.image if item.image.is_file() else None,
        content=content,
        part=part,
        overview=overview,
        range=(low, high),
    )


def _folder(image: Path) -> str:
    """A folder's place and, of the files that describe its arrays, names, sizes and times: written anew, it differs.

    Its chunks may be millions, so that one replaced in place is not seen.
    """
    told = [p for name in _DESCRIBING for depth in (name, f"*/{name}") for p in image.glob(depth)]
    facts = [(p.relative_to(image).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(told)]
    return f"{image.resolve()} {facts}"


def _overview(item: VolumeConfig, fine: Volume, low: float, high: float) -> Callable[[Box], float]:
    """Looks at a coarser level of the same image, read by box."""
    coarse = opened(item, item.overview)
    factor = [a / b for a, b in zip(fine.shape, coarse.shape, strict=True)]
    if any(f < 1 for f in factor):
        raise InputError(
            f"{item.image}: overview {item.overview} is {coarse.shape} voxels and the image {fine.shape}; it must be a "
            "coarser level of it"
        )

    def brightest(box: Box) -> float:
        start = [int(a / f) for a, f in zip(box.start, factor, strict=True)]
        stop = [int(np.ceil(b / f)) for b, f in zip(box.stop, factor, strict=True)]
        # one voxel more to each side, for levels that are not cut at the same places
        grown = Box((start[0] - 1, start[1] - 1, start[2] - 1), (stop[0] + 1, stop[1] + 1, stop[2] + 1))
        return float(normalize(coarse[grown.clip(Box.whole(coarse.shape))], low, high).max())

    return brightest
