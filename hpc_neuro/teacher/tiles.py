"""Square images as one array in a file, and the sources that draw training crops from them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpc_neuro.core import files
from hpc_neuro.teacher.augment import vary_photographs, vary_slices
from hpc_neuro.teacher.objective import Objective


@dataclass(frozen=True)
class Tiles:
    """Square images by item: two of a photograph, one of a window of a slice; some items are never trained on."""

    array: npt.NDArray[np.uint8]
    """[items * per_item, channels, side, side]."""
    per_item: int
    held: list[int]
    """Items that are never trained on."""
    train: list[int]
    resident: Tensor | None = None
    """The array on a GPU."""

    def on(self, device: torch.device) -> Tiles:
        """The same with its images on `device` where that is a GPU with room for them: none is copied twice then."""
        if device.type != "cuda" or 4 * self.array.nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        return replace(self, resident=torch.from_numpy(np.array(self.array)).to(device))

    def take(self, picks: list[int], device: torch.device) -> Tensor:
        """Images by number -> float [n, channels, side, side] in 0..1 on `device`."""
        if self.resident is not None and self.resident.device == device:
            return self.resident[torch.tensor(picks, device=device)].float() / 255
        return torch.from_numpy(self.array[picks]).to(device).float() / 255

    def show(self, items: list[int], size: int) -> Tensor:
        """First images of some items, gray -> float [n, 3, size, size] in -1..1."""
        images = torch.from_numpy(self.array[[self.per_item * item for item in items]]).float() / 255
        gray = torch.nn.functional.interpolate(images, (size, size), mode="area").mean(1, keepdim=True)
        return gray.expand(-1, 3, -1, -1) * 2 - 1


@dataclass(frozen=True)
class Source:
    """Where the crops of a training step come from, and how many of them."""

    tiles: Tiles
    count: int
    """Crops of a step."""
    is_photographs: bool

    def draw(
        self, step: int, seed: int, crop: int, objective: Objective, draws: torch.Generator, device: torch.device
    ) -> Tensor:
        """Crops of step number `step`, [count, 3, crop, crop] in -1..1; every item once per epoch."""
        items, per_item = self.tiles.train, self.tiles.per_item
        parts = torch.randint(per_item, (self.count,), generator=draws).tolist()
        places = (divmod(position, len(items)) for position in range(step * self.count, (step + 1) * self.count))
        picks = [
            per_item * items[_shuffle(len(items), seed, epoch)[at]] + part
            for (epoch, at), part in zip(places, parts, strict=True)
        ]
        images = self.tiles.take(picks, device)
        if self.is_photographs:
            return objective.tone_photographs(vary_photographs(images, crop, draws), draws)
        return vary_slices(images, crop, draws)


@functools.lru_cache(maxsize=8)
def _shuffle(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return order


def open_or_make(path: Path, content: object, make: Callable[[Path], None]) -> npt.NDArray[np.uint8]:
    """The array in `path`, mapped into memory; `make` writes it to a file of another name on first use.

    content: what the array holds, in plain data; an array of other content is made again.
    """
    # The manifest vouches for the array, so that it goes first and comes last.
    manifest = path.with_suffix(".json")
    if not (manifest.exists() and files.read_json(manifest, "delete it to make it again") == content):
        manifest.unlink(missing_ok=True)
        with files.atomic(path) as part:
            make(part)
        files.write_json(manifest, content)
    array: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return array
