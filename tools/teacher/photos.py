"""Photographs as one uint8 array, and batches drawn from it as a pure function of (seed, step)."""

from __future__ import annotations

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hpc_neuro.core import files
from hpc_neuro.core.image_names import is_system_file
from tools.teacher.recipe import BadInput, Recipe

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Photos:
    """Two square tiles (first and last along the long side) per photograph, and which photographs are held out."""

    tiles: npt.NDArray[np.uint8]  # [2 * photographs, 3, side, side]
    held: list[int]  # photographs never trained on
    train: list[int]
    digest: str  # of their names and sizes
    resident: Tensor | None = None  # the tiles on a GPU

    def on(self, device: torch.device) -> Photos:
        """The same with its tiles on `device` where that is a GPU with room for them: none is copied twice then."""
        if device.type != "cuda" or 4 * self.tiles.nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        return replace(self, resident=torch.from_numpy(np.array(self.tiles)).to(device))

    def take(self, picks: list[int], device: torch.device) -> Tensor:
        """Tiles by number -> float [n, 3, side, side] in 0..1 on `device`."""
        if self.resident is not None and self.resident.device == device:
            return self.resident[torch.tensor(picks, device=device)].float() / 255
        return torch.from_numpy(self.tiles[picks]).to(device).float() / 255

    def square(self, photos: list[int]) -> Tensor:
        """First tiles of the photographs -> float [n, 3, side, side] in 0..1."""
        return torch.from_numpy(self.tiles[[2 * p for p in photos]]).float() / 255


def load(folder: Path, cache: Path, side: int, held: int) -> Photos:
    """Open the decoded photographs of `folder`, decoding them on first use into `cache` (196 kB a tile at side 256)."""
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not is_system_file(path)
    )
    if len(names) <= held:
        raise BadInput(f"{folder} holds {len(names)} photographs, fewer than the {held} to hold out and one more")
    array, manifest = cache / f"tiles{side}.npy", cache / f"tiles{side}.json"
    listed = [[name, (folder / name).stat().st_size] for name in names]
    wanted = {"folder": str(folder.resolve()), "side": side, "photos": listed}
    if not (manifest.exists() and files.read_json(manifest, "delete it to decode again") == wanted):
        manifest.unlink(missing_ok=True)  # it vouches for the array, so it goes first and comes last
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            pairs = pool.map(lambda name: _tiles(folder / name, side), names)
            tiles = np.stack([tile for pair in pairs for tile in pair])
        with files.atomic(array) as part, part.open("wb") as handle:
            np.save(handle, tiles)
        files.write_json(manifest, wanted)
    order = np.random.default_rng(0).permutation(len(names)).tolist()  # the same photographs whatever the run's seed
    digest = files.sha256_json(listed)
    return Photos(np.load(array, mmap_mode="r"), sorted(order[:held]), sorted(order[held:]), digest)


def _tiles(path: Path, side: int) -> list[npt.NDArray[np.uint8]]:
    try:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
    except OSError as error:
        raise BadInput(f"{path} cannot be read as a picture ({error}); remove or replace it") from None
    scale = side / min(rgb.size)
    width, height = (max(side, round(n * scale)) for n in rgb.size)
    pixels = np.asarray(rgb.resize((width, height), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    return [pixels[:, :side, :side], pixels[:, -side:, -side:]]


@dataclass(frozen=True)
class Batch:
    """What one training step sees."""

    image: Tensor  # [B, 3, S, S] normalized to -1..1, noise added
    target: Tensor  # [B, 3, S, S] the same without noise: the encoder learns to see through it
    order: Tensor  # [B, N] tokens in random order
    y: Tensor  # [B, N] token coordinates in units of the encoder's own grid
    x: Tensor

    def split(self, size: int) -> list[Batch]:
        """Parts of `size` images, the last may be smaller."""
        columns = (torch.split(t, size) for t in (self.image, self.target, self.order, self.y, self.x))
        return [Batch(*part) for part in zip(*columns, strict=True)]


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return order


def batch(photos: Photos, step: int, recipe: Recipe, device: torch.device) -> Batch:
    """Batch number `step`: augmented crops; depends on nothing but the arguments."""
    size, crop, is_structure = recipe.batch, recipe.crop, recipe.objective == "structure"
    draws = torch.Generator().manual_seed((recipe.seed << 32) + step)
    count = len(photos.train)
    sides = torch.randint(2, (size,), generator=draws).tolist()
    places = (divmod(position, count) for position in range(step * size, (step + 1) * size))
    picks = [
        2 * photos.train[_shuffled(count, recipe.seed, epoch)[at]] + side
        for (epoch, at), side in zip(places, sides, strict=True)
    ]
    target = augment(photos.take(picks, device), crop, draws)
    if is_structure:
        target = darken_field(target, draws)

    noisy = uniform(draws, size, 0.0, 0.3).sub(0.1).clamp_min(0).view(-1, 1, 1, 1).to(device)  # a third stays clean
    grains = draws if device.type == "cpu" else torch.Generator(device).manual_seed((recipe.seed << 32) + step)
    grain = torch.randn(size, 1, crop, crop, generator=grains, device=device)
    image = target + noisy * grain
    if is_structure:
        image = image.clamp(-1, 1)  # slices of a store end at their black and white levels

    n = crop // recipe.patch
    order = torch.rand(size, n * n, generator=draws).argsort(1).to(device)
    y, x = rotary_coordinates(draws, size, n) if is_structure else coordinates(draws, size, n, 224 // recipe.patch)
    return Batch(image, target, order, y.to(device), x.to(device))


def uniform(draws: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """`count` numbers in low..high."""
    return torch.rand(count, generator=draws) * (high - low) + low


def coordinates(draws: torch.Generator, count: int, n: int, grid: int) -> tuple[Tensor, Tensor]:
    """Token coordinates y, x [count, n * n] of n x n tokens somewhere on the encoder's grid x grid table.

    timm squeezes its table onto any image, so the spacing of neighbors is grid / tokens: half of the crops keep the
    spacing 1, the others draw one between what a twice larger and what this small image would get.
    """
    widest = (grid - 1) / max(1, n - 1)
    spacing = torch.where(torch.rand(count, generator=draws) < 0.5, 1.0, uniform(draws, count, 0.5, widest))
    room = grid - 1 - spacing * (n - 1)  # [count]
    axis = torch.arange(n, dtype=torch.float32)
    rows = (uniform(draws, count, 0, 1) * room)[:, None] + spacing[:, None] * axis  # [count, n]
    columns = (uniform(draws, count, 0, 1) * room)[:, None] + spacing[:, None] * axis
    y = rows[:, :, None].expand(-1, -1, n).flatten(1)
    return y, columns[:, None, :].expand(-1, n, -1).flatten(1)


def rotary_coordinates(draws: torch.Generator, count: int, n: int) -> tuple[Tensor, Tensor]:
    """Coordinates y, x [count, n * n] of n x n tokens, in half sides of an image that is one to eight crops wide."""
    tokens = n * uniform(draws, count, 0.0, math.log(8)).exp()  # along the side of that image
    axis = 2 * (torch.arange(n) + 0.5 - n / 2) / tokens[:, None]  # [count, n]
    y = axis[:, :, None].expand(-1, -1, n).flatten(1)
    return y, axis[:, None, :].expand(-1, n, -1).flatten(1)


def augment(tiles: Tensor, crop: int, draws: torch.Generator) -> Tensor:
    """Crop, turn, gray, invert and re-tone tiles [B, 3, side, side] in 0..1 -> [B, 3, crop, crop] in -1..1.

    The teacher will look at gray microscopy slices: bright on dark or dark on bright, at any magnification.
    """
    count, device = len(tiles), tiles.device
    extent = uniform(draws, count, math.log(0.25), 0.0).exp()  # side of the crop, as a share of the tile
    shift = [uniform(draws, count, -1, 1) * (1 - extent) for _ in range(2)]
    turns = torch.randint(8, (count,), generator=draws)  # four quarter turns, mirrored or not
    cos, sin = (turns % 4 * (math.pi / 2)).cos(), (turns % 4 * (math.pi / 2)).sin()
    mirror = torch.where(turns < 4, 1.0, -1.0)
    rows = [cos * mirror * extent, -sin * extent, shift[0], sin * mirror * extent, cos * extent, shift[1]]
    affine = torch.stack(rows, -1).view(count, 2, 3).to(device)
    grid = F.affine_grid(affine, [count, 3, crop, crop], align_corners=False)
    image = F.grid_sample(tiles, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def draw(low: float, high: float) -> Tensor:
        return uniform(draws, count, low, high).view(-1, 1, 1, 1).to(device)

    weights = torch.rand(count, 3, 1, 1, generator=draws).add(0.1).to(device)  # random channel mix: more grays
    gray = (image * (weights / weights.sum(1, keepdim=True))).sum(1, keepdim=True)
    image = torch.where(draw(0, 1) < 0.8, gray, image)
    image = torch.where(draw(0, 1) < 0.5, 1 - image, image)
    image = image.clamp(1e-3, 1) ** draw(math.log(0.5), math.log(2.5)).exp()  # dark fields are common in microscopy
    image = (image - 0.5) * draw(0.4, 1.4) + 0.5 + draw(-0.15, 0.15)
    return image.clamp(0, 1) * 2 - 1


def darken_field(images: Tensor, draws: torch.Generator) -> Tensor:
    """Make images [B, 3, S, S] in -1..1 gray, and half of them bright structures on black, as fluorescence is.

    The black level is a quantile of the image, up to nine tenths; the white level lies among its brightest pixels.
    """
    count, device = len(images), images.device
    gray = (images.mean(1, keepdim=True) + 1) / 2
    is_dark = (uniform(draws, count, 0, 1) < 0.5).view(-1, 1, 1, 1).to(device)
    low, high = uniform(draws, count, 0.3, 0.9), uniform(draws, count, 0.97, 1.0)

    levels = gray.flatten(1).sort(1).values
    last = levels.shape[1] - 1
    black, white = (
        levels.gather(1, (share * last).long()[:, None].to(device)).view(-1, 1, 1, 1) for share in (low, high)
    )
    # The floor keeps the grain of a flat crop from becoming structure.
    dark = ((gray - black) / (white - black).clamp_min(0.1)).clamp(0, 1)
    return (torch.where(is_dark, dark, gray) * 2 - 1).expand(-1, 3, -1, -1)
