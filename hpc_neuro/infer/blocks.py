"""Block by block: predict, write one shard, read it back, mark it done. A killed run goes on at the next block.

The windows lie on one lattice over the whole volume (see models.sliding_window), and a block is read with the context
of every window that touches it, so the blocks' borders do not show: the result is that of the whole volume at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro import files, runs
from hpc_neuro.data import ome_zarr
from hpc_neuro.geometry import Block, Box, Shape, blocks
from hpc_neuro.infer.sources import Source
from hpc_neuro.models import sliding_window
from hpc_neuro.types import Array

log = logging.getLogger(__name__)
MASK = "mask"
Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Plan:
    """How volumes are cut. All in voxels, z y x."""

    window: Shape
    overlap: float
    patch: Shape
    block: Shape  # as asked for
    chunk: Shape

    @property
    def write(self) -> Shape:
        """The block rounded up to whole window steps and whole chunks."""
        step = sliding_window.step(self.window, self.overlap, self.patch)
        unit = [math.lcm(s, c) for s, c in zip(step, self.chunk, strict=True)]
        z, y, x = (math.ceil(b / u) * u for b, u in zip(self.block, unit, strict=True))
        return z, y, x

    @property
    def halo(self) -> Shape:
        """Context read around a block."""
        return sliding_window.halo(self.window, self.overlap, self.patch)

    def blocks(self, shape: Shape) -> list[Block]:
        """The blocks of a volume."""
        return list(blocks(shape, self.write, self.halo))

    def windows(self, shape: Shape) -> int:
        """How often the student runs on a volume of this shape."""
        step = sliding_window.step(self.window, self.overlap, self.patch)
        counts = (
            math.prod(
                max(math.ceil((n - w) / s), 0) + 1 for n, w, s in zip(b.read.shape, self.window, step, strict=True)
            )
            for b in self.blocks(shape)
        )
        return sum(counts)


def predict_volume(
    source: Source, plan: Plan, predict: Predict, threshold: float, key: str, out: Path, tries: int
) -> list[str]:
    """Fill OUT/ID.ome.zarr, resuming what `key` began. Returns one line for each block that failed `tries` times."""
    folder, marks = out / f"{source.id}.ome.zarr", out / "blocks" / source.id
    if ome_zarr.record(folder) != {"key": key}:
        for mark in marks.glob("*.json"):  # they belong to other contents
            mark.unlink()
        ome_zarr.create(
            folder, "probability", source.shape, source.voxel_size, plan.write, plan.chunk, MASK, {"key": key}
        )
    image, mask = ome_zarr.open_level(folder), ome_zarr.open_level(folder, label=MASK)
    todo = [b for b in plan.blocks(source.shape) if not _mark(marks, b).exists()]
    failures = []
    for block in runs.progress(todo, f"{source.id}: blocks", unit="block"):
        for attempt in range(1, tries + 1):
            try:
                _one(source, block, predict, threshold, image, mask, _mark(marks, block))
                break
            except (OSError, ValueError, RuntimeError) as error:
                if getattr(error, "errno", None) in (28, 122):  # no space, quota: no other block will fare better
                    raise
                log.debug("%s", traceback.format_exc())
                log.warning("%s: block %s failed (try %d of %d): %s", source.id, block.index, attempt, tries, error)
                if attempt == tries:
                    failures.append(f"{source.id} block {block.index} at {block.write.start}: {error}")
    pyramid = marks / "pyramid.json"
    if not failures and not pyramid.exists():
        count = sum(1 for _ in ome_zarr.build_pyramid(folder, source.shape, source.voxel_size, plan.write, MASK))
        files.write_json(pyramid, {"blocks": count})
    return failures


def quantised(probability: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Probability [0, 1] as 0 to 255."""
    levels: NDArray[np.uint8] = np.rint(probability * 255).astype(np.uint8)
    return levels


def _one(source: Source, block: Block, predict: Predict, threshold: float, image: Any, mask: Any, mark: Path) -> None:
    inner = block.write.relative_to(block.read.start).slices
    values = quantised(predict(source.read(block.read))[inner])
    above = (values >= math.ceil(threshold * 255 - 1e-9)).astype(np.uint8)
    for array, content in ((image, values), (mask, above)):
        ome_zarr.write(array, block.write, content)
        if _digest(ome_zarr.read(array, block.write)) != _digest(content):
            raise OSError(f"the block at {block.write.start} reads back other than it was written; is the disk sound?")
    files.write_json(mark, {"start": block.write.start, "sha256": _digest(values), "foreground": int(above.sum())})


def foreground(out: Path, source: Source) -> int:
    """Voxels above the threshold in a finished volume, from the marks."""
    marks = (out / "blocks" / source.id).glob("[0-9]*.json")
    return sum(int(json.loads(m.read_text())["foreground"]) for m in marks)


def reader(out: Path, source: Source) -> Callable[[Box], NDArray[np.uint8]]:
    """Reads boxes of the finished probability, 0 to 255."""
    array = ome_zarr.open_level(out / f"{source.id}.ome.zarr")
    return lambda box: np.asarray(ome_zarr.read(array, box), dtype=np.uint8)


def _mark(folder: Path, block: Block) -> Path:
    return folder / f"{'_'.join(map(str, block.index))}.json"


def _digest(values: Array) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()
