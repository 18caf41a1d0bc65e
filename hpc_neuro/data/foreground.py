"""The foreground of an image without a network: bright against its surroundings, its noise, and its neighbors.

The image is smoothed, and the local background is subtracted. Padding, with which programs fill what they cut away or
never imaged, is no background. What is left, the signal, is foreground where it exceeds the largest of three levels:

    floor   one value for the volume: a share of Otsu's threshold (without somas), raised until few specks are left
    noise   a multiple of the local noise
    peak    a share of the brightest signal nearby, so that the blurred halo of a bright neurite is no neurite

`probability` is 0.5 at the level and grows in proportion to the signal, so that the hysteresis of the tracer applies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import (
    binary_dilation,
    binary_opening,
    distance_transform_edt,
    find_objects,
    gaussian_filter,
    maximum_filter,
    minimum_filter,
)

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data.intensity import iter_slabs
from hpc_neuro.data.padding import leave_padding_out

ReadBox = Callable[[Box], Array]
Floats = NDArray[np.float32]

HALF = 128
"""Byte of a probability from which a voxel is foreground."""
KEPT_VOXELS = 1 << 28
"""[voxel] The probability of a volume up to this size is kept in memory, one byte a voxel."""
SLAB_ITEMSIZE = 8
"""[bytes] What a voxel of a slab takes while it is smoothed; slabs are planned with it."""

_BLUR = (0.5, 0.7, 0.7)
"""[voxel] Standard deviations of the Gaussian against noise; less along z, where optics blur already."""
_BLUR_HALO: Shape = (2, 3, 3)
"""[voxel] Reach of the truncated Gaussian."""
_TILE: Shape = (8, 32, 32)
"""[voxel] Tiles whose median is the background, and whose spread is the noise."""
_LEAST_IMAGED = 0.05
"""Share of a tile beside padding from which its background is measured."""
_OPENING = 3
"""[tile] Bright regions narrower than this, such as somas, are no background."""
_HAZE_SHARE = 0.5
"""[Otsu's threshold] Narrow bright regions that exceed their surroundings by less are patchy tissue: background."""
_TILE_BLUR, _HAZE_BLUR = 1.0, 0.6
"""[tile] Standard deviations of the Gaussian that smooths tiles: without patches, and with them."""
_PEAK_TILE: Shape = (3, 4, 4)
"""[voxel] The brightest signal nearby is taken among 3 x 3 x 3 tiles of this size."""
_PEAK_SHARE = 0.45
"""[signal] Share of the brightest signal nearby that a voxel must reach."""
_NOISE_RATIO = 4.0
"""[standard deviation] Signal of a voxel above the noise, at least."""
_FLOOR_STEPS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.2, 6.0, 8.4)
"""[Otsu's threshold] Candidates for the floor. The least one whose mask is clean is taken."""
_MOST_STEP, _MOST_THICK_SHARE = 3.0, 0.5
"""Candidates above this step are below this share of Otsu's threshold with somas. They are for noise around somas."""
_SAME_SHARE = 1.05
"""[fewest specks] A floor with so many is as clean as the one with the fewest."""
_THICK_TILE: Shape = (1, 4, 4)
"""[voxel] Tiles of which thick regions are made, slice by slice."""
_THICK_TILES = 4
"""[tile] A region into which a square of so many tiles fits is thick: a soma, and no neurite."""
_LEAST_COMPACTNESS = 0.25
"""Share of the square around a thick region that its largest section fills, at least, if it is a soma."""
_THICK_RIM = (6, 1, 1)
"""[slice, tile, tile] What lies so near to a thick region belongs to it."""
_THICK_SHARE = 0.25
"""[Otsu's threshold] Signal of a thick region, at least."""
_SCALE_ROUNDS, _SAME_SCALE = 4, 0.8
"""Thick regions are left out anew until Otsu's threshold stays above this share of the one before."""
_LEAST_SCALE = 0.05
"""[Otsu's threshold with somas] Neurites are so bright beside their somas, at least."""
_SPECK_VOXELS = 12
"""[voxel] Smaller connected components of a mask are specks, as in `TraceConfig.min_voxels`."""
_SPECK_SHARE = 0.02
"""Share of the mask in specks up to which it is clean."""
_NOISE_SHARE = 0.25
"""Share of the mask in specks from which they are noise, and not a broken neurite."""
_MASK_SHARE = 0.055
"""Share of the volume that a clean mask fills at most."""
_DARK_RATIO = 2.0
"""An image is dark on bright where its dark tail is this much longer than its bright one."""
_TAIL = 0.001
"""Share of the voxels beyond which the tails of an image are measured."""
_BINS = 4096
"""Bins of the histogram of the signal."""
_SPREAD_TO_DEVIATION = 1.4826
"""Standard deviation of a Gaussian per median absolute deviation."""
_MEASURED_VOXELS = 1 << 26
"""[voxel] Of larger volumes a sample of about this size is measured."""
_MASK_SLAB = 64
"""[slice] Of a mask, what is measured at once."""


@dataclass(frozen=True)
class Foreground:
    """The foreground of one image, read by box. Made by `measure_foreground`."""

    read: ReadBox
    """Reads the image."""
    shape: Shape
    top: float | None
    """Brightness that becomes 0 where the image is dark on bright; None: bright on dark."""
    padding: float | None
    """What `read` gives for voxels that were never imaged; None without such voxels."""
    background: Floats
    """[tiles along z, y, x] brightness of the background."""
    noise: Floats
    """[tiles along z, y, x] standard deviation of the background."""
    otsu: float = 0.0
    """Otsu's threshold of the signal beside somas and other thick regions."""
    floor: float = 0.0
    """[signal] Least level of the volume."""
    speck_share: float = 0.0
    """Share of the mask at the floor that lies in specks."""
    mask_share: float = 0.0
    """Share of the volume that exceeds floor and noise."""
    brightness: float = 0.0
    """Median signal of the voxels above floor and noise; 0 without any."""

    whole_signal: Floats | None = None
    """The signal of the whole volume where it is small enough to be kept."""
    whole_probability: NDArray[np.uint8] | None = None
    """`probability` of the whole volume, see `keep_probability`."""

    @property
    def is_inverted(self) -> bool:
        """Whether the image is dark on bright."""
        return self.top is not None

    @property
    def is_noise(self) -> bool:
        """Whether so much of the mask lies in specks that it is noise at every level."""
        return self.speck_share > _NOISE_SHARE

    @property
    def noise_level(self) -> float:
        """Median of the local noise."""
        return float(np.median(self.noise))

    def read_image(self, box: Box) -> Floats:
        """[Z, Y, X] the image as it is, bright on dark."""
        return _brighten(self.read(box), self.top, self.padding)

    def signal(self, box: Box) -> Floats:
        """[Z, Y, X] the smoothed image above the local background; negative below it."""
        if self.whole_signal is not None:
            return self.whole_signal[box.slices]

        smooth = _smooth(self.read_image, box, self.shape)
        smooth -= _interpolate(self.background, _TILE, box)
        return smooth

    def probability(self, box: Box) -> NDArray[np.uint8]:
        """[Z, Y, X] `HALF` at the level, in proportion to the signal, at most 255."""
        if self.whole_probability is not None:
            return self.whole_probability[box.slices]

        # Tiles are counted from the volume's origin, so that the result does not depend on the box.
        around = _align(box.grow((2 * _PEAK_TILE[0], 2 * _PEAK_TILE[1], 2 * _PEAK_TILE[2])), _PEAK_TILE, self.shape)
        signal = self.signal(around)
        own = box.relative_to(around.start)
        if signal.max(initial=0) < 0.5 * self.floor:
            return np.zeros(box.shape, dtype=np.uint8)

        peaks = maximum_filter(_tile_maxima(signal, _PEAK_TILE), 3, mode="nearest")
        level = np.maximum(_PEAK_SHARE * _interpolate(peaks, _PEAK_TILE, own), self.floor)
        if self.noise.any():
            level = np.maximum(level, _NOISE_RATIO * _interpolate(self.noise, _TILE, box))
        scaled = signal[own.slices] * (127.5 / level) + 0.5
        return np.asarray(np.clip(scaled, 0, 255), dtype=np.uint8)

    def keep_probability(self) -> Foreground:
        """The same foreground; its `probability` is computed once, now, where a volume is of at most `KEPT_VOXELS`."""
        if math.prod(self.shape) > KEPT_VOXELS:
            return self

        whole: NDArray[np.uint8] = np.empty(self.shape, dtype=np.uint8)
        for box in iter_slabs(self.shape, SLAB_ITEMSIZE):
            whole[box.slices] = self.probability(box)
        return replace(self, whole_probability=whole)

    def local_contrast(self, box: Box) -> Floats:
        """[Z, Y, X] `probability` in [0, 1]: what a student of local contrast sees."""
        return self.probability(box).astype(np.float32) / np.float32(255)


def measure_foreground(read: ReadBox, shape: Shape) -> Foreground:
    """Measure background, noise and level of an image that is read by box.

    Of an image of more than `_MEASURED_VOXELS` voxels, evenly spaced slabs give the level. Raises InputError for an
    image that is constant.
    """
    read, padding = leave_padding_out(read, shape, _MEASURED_VOXELS)
    top = _find_top(read, shape, padding)

    def read_bright(box: Box) -> Floats:
        return _brighten(read(box), top, padding)

    # A small volume is smoothed once.
    is_small = math.prod(shape) <= _MEASURED_VOXELS
    smooth = _smooth(read_bright, Box.whole(shape), shape) if is_small else None
    darkest = 0.0 if padding is not None and top is not None else padding
    tiles, noise_tiles = _measure_background(smooth, read_bright, shape, darkest)
    is_haze = _find_haze(tiles, smooth, read_bright, shape)
    background, noise = _smooth_tiles(tiles, is_haze), _smooth_tiles(noise_tiles, is_haze)

    if smooth is not None:
        for box in iter_slabs(shape, SLAB_ITEMSIZE):
            smooth[box.slices] -= _interpolate(background, _TILE, box)
    draft = Foreground(read, shape, top, padding, background, noise, whole_signal=smooth)
    sample = _sample_signal(draft)

    whole_otsu = _compute_otsu(sample)
    sample, otsu = _leave_thick_out(sample, whole_otsu)
    floor, speck_share = _choose_floor(sample, otsu, _MOST_THICK_SHARE * whole_otsu)

    above = np.concatenate([part.signal[part.mask(floor)] for part in sample])
    voxels = sum(part.signal.size for part in sample)
    return replace(
        draft,
        otsu=otsu,
        floor=floor,
        speck_share=speck_share,
        mask_share=len(above) / voxels,
        brightness=float(np.median(above)) if len(above) else 0.0,
    )


def _brighten(voxels: Array, top: float | None, padding: float | None) -> Floats:
    """Voxels bright on dark: those of a dark image are taken from its brightest value, and padding is dark."""
    values = np.asarray(voxels, dtype=np.float32)
    if top is None:
        return values
    bright = np.float32(top) - values
    return bright if padding is None else np.where(values == padding, np.float32(0), bright)


# --- Measurements ---


@dataclass(frozen=True)
class _Part:
    """The signal of one slab, and the level of its noise (0 for none)."""

    signal: Floats
    noise_level: Floats | float
    thin: NDArray[np.bool_] | None = None
    """[Z, Y, X] where the slab is not thick; None where it has no thick regions."""

    def thin_signal(self) -> Floats:
        """[N] the signal beside thick regions."""
        return self.signal.ravel() if self.thin is None else self.signal[self.thin]

    def thin_mask(self, floor: float) -> NDArray[np.bool_]:
        """[Z, Y, X] `mask` beside thick regions."""
        return self.mask(floor) if self.thin is None else self.mask(floor) & self.thin

    def mask(self, floor: float) -> NDArray[np.bool_]:
        """[Z, Y, X] where the signal exceeds floor and noise."""
        return np.asarray(self.signal >= np.maximum(self.noise_level, np.float32(floor)))


def _find_top(read: ReadBox, shape: Shape, padding: float | None) -> float | None:
    """The brightest value of an image that is dark on bright; None for one that is bright on dark."""
    slabs = _choose_slabs(shape)
    values = np.concatenate([np.asarray(read(box))[:, ::4, ::4].astype(np.float32).ravel() for box in slabs])
    if padding is not None:
        values = values[values != padding]
    lowest, low, middle, high, highest = np.quantile(values, [0.0, _TAIL, 0.5, 1 - _TAIL, 1.0]).tolist()

    # A single bright voxel may lie between the sampled ones.
    if not highest > lowest and all(np.ptp(np.asarray(read(box))) == 0 for box in slabs):
        raise InputError(
            f"every voxel is {lowest:g}, an image with contrast is expected; check the file, its channel and the "
            "`range`, where one is given"
        )
    # Neurites that fill less than the tails lie beyond both.
    if low == high:
        low, high = lowest, highest
    return float(highest) if middle - low > _DARK_RATIO * (high - middle) else None


def _choose_slabs(shape: Shape) -> list[Box]:
    """Slabs over the whole volume, or evenly spaced ones of a large volume."""
    slabs = list(iter_slabs(shape, SLAB_ITEMSIZE, depth=_TILE[0]))
    every = max(1, math.ceil(math.prod(shape) / _MEASURED_VOXELS))
    return slabs[every // 2 :: every] if every < len(slabs) else slabs[len(slabs) // 2 :][:1] if every > 1 else slabs


def _measure_background(
    smooth_image: Floats | None, read: Callable[[Box], Floats], shape: Shape, padding: float | None
) -> tuple[Floats, Floats]:
    """Brightness and noise of the background in every tile, of the smoothed image where it is at hand.

    Voxels of the value `padding` are left out; tiles with hardly any others are as the nearest tile that has.
    """
    z, y, x = (-(-n // t) for n, t in zip(shape, _TILE, strict=True))
    background, noise = np.zeros((z, y, x), dtype=np.float32), np.zeros((z, y, x), dtype=np.float32)

    for box in iter_slabs(shape, SLAB_ITEMSIZE, depth=_TILE[0]):
        smooth = _smooth(read, box, shape) if smooth_image is None else smooth_image[box.slices]
        is_image = None if padding is None else read(box) != padding
        first = [a // t for a, t in zip(box.start, _TILE, strict=True)]
        for index in np.ndindex(*(-(-n // t) for n, t in zip(smooth.shape, _TILE, strict=True))):
            # Every other row and column are enough for a median.
            part = tuple(slice(i * t, (i + 1) * t, step) for i, t, step in zip(index, _TILE, (1, 2, 2), strict=True))
            values = smooth[part].ravel()
            place = tuple(a + i for a, i in zip(first, index, strict=True))
            if is_image is not None:
                least = _LEAST_IMAGED * values.size
                values = values[is_image[part].ravel()]
                if values.size < least:
                    background[place] = noise[place] = np.nan
                    continue
            middle = np.partition(values, len(values) // 2)[len(values) // 2]
            spread = np.partition(np.abs(values - middle), len(values) // 2)[len(values) // 2]
            background[place], noise[place] = middle, _SPREAD_TO_DEVIATION * spread

    return _fill_tiles(background), _fill_tiles(noise)


def _fill_tiles(tiles: Floats) -> Floats:
    """Tiles of which NaN has the value of the nearest tile."""
    if not np.isnan(tiles).any():
        return tiles
    nearest = distance_transform_edt(np.isnan(tiles), return_distances=False, return_indices=True)
    return np.asarray(tiles[tuple(nearest)])


def _find_haze(
    tiles: Floats, smooth_image: Floats | None, read: Callable[[Box], Floats], shape: Shape
) -> NDArray[np.bool_]:
    """[tiles along z, y, x] where no bright region is narrow, or it is far dimmer than neurites: patchy tissue.

    What is as bright as neurites is a soma. Neurites stand out from the median of their tile, so Otsu's threshold above
    these medians tells how bright they are; somas have no part in it. In a projection dim neurites may fill a tile,
    and nothing is patchy.
    """
    if shape[0] < _TILE[0]:
        return np.zeros(tiles.shape, dtype=bool)

    parts = []
    for box in _choose_slabs(shape):
        smooth = _smooth(read, box, shape) if smooth_image is None else smooth_image[box.slices]
        parts.append(_Part(smooth - _interpolate(tiles, _TILE, box), 0.0))
    return np.asarray(tiles - _open_tiles(tiles) < _HAZE_SHARE * _compute_otsu(parts))


def _open_tiles(tiles: Floats) -> Floats:
    """Tiles without narrow bright regions. A soma may fill a tile, and would be its own background."""
    return np.asarray(maximum_filter(minimum_filter(tiles, _OPENING, mode="nearest"), _OPENING, mode="nearest"))


def _smooth_tiles(tiles: Floats, is_haze: NDArray[np.bool_]) -> Floats:
    """Tiles smoothed, without narrow bright regions but those of haze."""
    tiles = np.where(is_haze, tiles, _open_tiles(tiles))
    blur = _HAZE_BLUR if is_haze.any() else _TILE_BLUR
    return np.asarray(gaussian_filter(tiles, blur, mode="nearest"), dtype=np.float32)


def _sample_signal(draft: Foreground) -> list[_Part]:
    """The signal of the slabs that are measured."""
    parts = []
    for box in _choose_slabs(draft.shape):
        # Many images have a background of exactly 0, without noise.
        level = _NOISE_RATIO * _interpolate(draft.noise, _TILE, box) if draft.noise.any() else 0.0
        parts.append(_Part(draft.signal(box), level))
    return parts


def _leave_thick_out(sample: list[_Part], whole_otsu: float) -> tuple[list[_Part], float]:
    """The sample with its thick regions marked, and Otsu's threshold of the rest.

    A bright soma has most of the bright voxels, and would put the threshold above the dendrites.
    """
    otsu = whole_otsu
    minima = [-_tile_maxima(-part.signal, _THICK_TILE) for part in sample]
    for _ in range(_SCALE_ROUNDS):
        level = _THICK_SHARE * otsu
        parts = [
            replace(part, thin=_find_thin(tiles >= level, part.signal.shape))
            for part, tiles in zip(sample, minima, strict=True)
        ]
        if all(part.thin is None for part in parts):
            break
        thin_otsu = _compute_otsu(parts)
        # What is left is background then: all neurites are wide, and none of them is a soma.
        if thin_otsu < _LEAST_SCALE * whole_otsu:
            return sample, otsu
        before, otsu, sample = otsu, thin_otsu, parts
        if otsu > _SAME_SCALE * before:
            break
    return sample, otsu


def _find_thin(is_full: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """[Z, Y, X] what is beside the thick regions of full tiles, in a slab of `shape`; None without such regions."""
    is_thick = binary_opening(is_full, np.ones((1, _THICK_TILES, _THICK_TILES), dtype=bool))
    is_thick = _select_compact(is_thick)
    if not is_thick.any():
        return None

    # The blurred rim of a soma belongs to it, and so do its small sections above and below.
    is_thick = binary_dilation(is_thick, np.ones(tuple(2 * reach + 1 for reach in _THICK_RIM), dtype=bool))
    voxels = np.repeat(np.repeat(is_thick, _THICK_TILE[1], axis=1), _THICK_TILE[2], axis=2)
    return np.asarray(~voxels[:, : shape[1], : shape[2]])


def _select_compact(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[Z, Y, X] the components whose largest section fills much of the square around them; a wide neurite is long."""
    labels = cc3d.connected_components(mask, connectivity=26)
    is_compact = np.zeros(int(labels.max()) + 1, dtype=bool)
    for number, place in enumerate(find_objects(labels), start=1):
        sections = np.count_nonzero(labels[place] == number, axis=(1, 2))
        is_compact[number] = (
            sections.max() >= _LEAST_COMPACTNESS * max(side.stop - side.start for side in place[1:]) ** 2
        )
    return np.asarray(is_compact[labels])


def _compute_otsu(sample: list[_Part]) -> float:
    """Otsu's threshold of the thin signal: the greatest variance between the classes on both sides (Otsu 1979).

    What is below the background counts as background.
    """
    signals = [part.thin_signal() for part in sample]
    width = max(max(float(signal.max(initial=0)) for signal in signals), 1e-6) / _BINS
    counts = np.zeros(_BINS, dtype=np.int64)
    for signal in signals:
        bins = np.clip(signal / np.float32(width), 0, _BINS - 1).astype(np.int32)
        counts += np.bincount(bins, minlength=_BINS)

    centers = (np.arange(_BINS) + 0.5) * width
    below = np.cumsum(counts).astype(np.float64)
    sums = np.cumsum(counts * centers)
    above = below[-1] - below

    # The classes below the first and above the last voxel are empty.
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centers[int(np.argmax(np.nan_to_num(variance)))])


def _choose_floor(sample: list[_Part], otsu: float, most: float) -> tuple[float, float]:
    """The least floor whose mask is clean, else the least of those with the fewest specks; and its share of specks.

    Noise has more specks at a lower level, and a broken neurite fewer. Otsu's threshold itself may lie within the noise
    where neurites are few. `most` is the highest candidate beyond `_MOST_STEP`.
    """
    candidates = []
    for step in _FLOOR_STEPS:
        floor = step * otsu
        if step > _MOST_STEP and floor > most:
            break
        share, fill = _measure_specks(sample, floor)
        if fill == 0:
            break
        if fill > _MASK_SHARE:
            continue
        if share <= _SPECK_SHARE:
            return floor, share
        candidates.append((share, floor))

    # A mask that fills the volume at every level has no specks to compare.
    if not candidates:
        return otsu, 0.0

    # So many specks are noise at every level, and a low one would make a forest of it.
    fewest = min(share for share, _ in candidates)
    if fewest > _NOISE_SHARE:
        share, floor = candidates[-1]
    else:
        share, floor = next(c for c in candidates if c[0] <= _SAME_SHARE * fewest)
    return floor, share


def _measure_specks(sample: list[_Part], floor: float) -> tuple[float, float]:
    """Share of the mask at a floor that lies in specks, and the share of the sample that the mask fills."""
    specks = voxels = size = 0
    for part in sample:
        mask = part.thin_mask(floor)
        size += mask.size
        count = int(np.count_nonzero(mask))
        voxels += count

        # Labels of a full mask take long, and it is no candidate.
        if count <= _MASK_SHARE * mask.size:
            specks += _count_specks(mask)
    return specks / max(voxels, 1), voxels / size


def _count_specks(mask: NDArray[np.bool_]) -> int:
    """Voxels of a mask in connected components that are specks."""
    sizes = np.bincount(cc3d.connected_components(mask, connectivity=26)[mask])[1:]
    return int(sizes[sizes < _SPECK_VOXELS].sum())


def measure_mask(probability: NDArray[np.uint8]) -> tuple[float, float]:
    """Share of a volume that is at least `HALF`, and the share of that mask in specks."""
    voxels = specks = 0
    for z in range(0, len(probability), _MASK_SLAB):
        mask = probability[z : z + _MASK_SLAB] >= HALF
        voxels += int(np.count_nonzero(mask))
        specks += _count_specks(mask)
    return voxels / probability.size, specks / max(voxels, 1)


# --- Arrays on tiles ---


def _smooth(read: Callable[[Box], Floats], box: Box, shape: Shape) -> Floats:
    """[Z, Y, X] the smoothed image in a box; the volume is mirrored at its borders."""
    # A halo as wide as the truncated Gaussian makes boxes fit together.
    around = box.grow(_BLUR_HALO).clip(Box.whole(shape))
    smooth = gaussian_filter(read(around), _BLUR, truncate=3.0)
    return np.asarray(smooth[box.relative_to(around.start).slices])


def _align(box: Box, tile: Shape, shape: Shape) -> Box:
    """The box grown to whole tiles, inside the volume."""
    start = tuple(a // t * t for a, t in zip(box.start, tile, strict=True))
    stop = tuple(-(-b // t) * t for b, t in zip(box.stop, tile, strict=True))
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])).clip(Box.whole(shape))


def _tile_maxima(values: Floats, tile: Shape) -> Floats:
    """[tiles along z, y, x] maximum of each tile; the last ones of an axis may be smaller."""
    for axis, width in enumerate(tile):
        values = np.maximum.reduceat(values, np.arange(0, values.shape[axis], width), axis=axis)
    return values


def _interpolate(grid: Floats, tile: Shape, box: Box) -> Floats:
    """[Z, Y, X] linear interpolation between the centers of tiles, in a box of voxels."""
    for axis in range(3):
        # Beyond the first and the last center the value stays.
        places = (np.arange(box.start[axis], box.stop[axis]) + 0.5) / tile[axis] - 0.5
        places = np.clip(places, 0, grid.shape[axis] - 1)
        low = np.floor(places).astype(np.int64)
        high = np.minimum(low + 1, grid.shape[axis] - 1)
        weight = (places - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        grid = np.take(grid, low, axis) * (1 - weight) + np.take(grid, high, axis) * weight
    return grid
