"""Whole-volume prediction by fixed, overlapping windows blended with a Gaussian.

Attention sees one window, so a voxel's probability depends on where the windows lie. They lie on a fixed lattice that
starts at the array's first voxel: window k begins at k * step, and the last one may reach over the end, where the image
is mirrored. A block of a volume whose start is a multiple of `step` and which is read with `halo` voxels of context is
cut by the same lattice, and predicts the same numbers as the whole volume.

    |<-------- window -------->|
    |<-- step -->|<-------- window -------->|
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import StudentOutput

# Share of the window, as nnU-Net and MONAI have it.
_SIGMA = 0.125
# Share of the center's weight, so that a corner seen by one window only is still divided by something.
_FLOOR = 1e-3


@dataclass
class BatchSize:
    """Windows per forward; halved for good when the device's memory does not suffice."""

    windows: int


def step(window: Shape, overlap: float, patch: Shape) -> Shape:
    """Voxels between windows: `window * (1 - overlap)` rounded to whole patches, at least one patch."""
    z, y, x = (max(round(w * (1 - overlap) / p), 1) * p for w, p in zip(window, patch, strict=True))
    return z, y, x


def halo(window: Shape, overlap: float, patch: Shape) -> Shape:
    """Context with which a block (start a multiple of `step`) must be read to predict as the whole volume does.

    A multiple of `step` itself, so that the read box starts on the lattice too.
    """
    pairs = zip(window, step(window, overlap, patch), strict=True)
    z, y, x = (max(math.ceil(w / s) - 1, 1) * s for w, s in pairs)
    return z, y, x


@torch.inference_mode()
def predict(
    student: nn.Module,
    image: NDArray[np.floating] | Tensor,
    window: Shape,
    overlap: float = 0.5,
    batch: int | BatchSize = 1,
    device: torch.device | str = "cpu",
    seen: Callable[[int], None] | None = None,
    flip: Sequence[int] = (),
    where: NDArray[np.bool_] | None = None,
    skip_black: bool = False,
) -> NDArray[np.float32]:
    """Probability of neurite, float32 [Z, Y, X], of a normalized image [Z, Y, X] of any size.

    `student` lies on `device`, has `.patch` and gives a Prediction. `batch` windows run at once; when the device's
    memory is too small the batch is halved and the windows run again; a BatchSize keeps the smaller number for the next
    call. `seen` is told after each forward how many windows it was. `flip`: axes (0 to 2) along which every window is
    mirrored in its place for the student, and its probability mirrored back. `where` [Z, Y, X]: only windows that hold
    a true voxel are looked at; the probability of those voxels is as without it, others' is not to be used.
    `skip_black`: a window of zeros is not run, and counts as probability 0.

    Raises InputError for a window that is no multiple of the patch, an overlap outside [0, 1), an image that is not
    3D, and a window too large for the memory.
    """
    patch: Shape = student.patch  # type: ignore[assignment]
    if any(w % p or w == 0 for w, p in zip(window, patch, strict=True)):
        raise InputError(f"window {window} must be a multiple of the student's patch {patch}; round it")

    size = batch if isinstance(batch, BatchSize) else BatchSize(batch)
    if not 0 <= overlap < 1 or size.windows < 1:
        raise InputError(f"overlap {overlap} must be in [0, 1) and batch {size.windows} at least 1")

    array = np.asarray(image.cpu() if isinstance(image, Tensor) else image, dtype=np.float32)
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"the image is {array.shape}, want a volume [Z, Y, X] with voxels in it")

    student.eval()
    steps = step(window, overlap, patch)

    # The last windows reach over the end. A mirrored image keeps its texture there, where zeros would make an edge.
    starts = [_starts(n, w, s) for n, w, s in zip(array.shape, window, steps, strict=True)]
    reach = [s[-1] + w for s, w in zip(starts, window, strict=True)]
    padded = np.pad(array, [(0, r - n) for r, n in zip(reach, array.shape, strict=True)], mode="reflect")

    # A window's middle has context on all sides, so that it counts more than the rim.
    profiles = [_gaussian(w) for w in window]
    weight = torch.from_numpy(np.einsum("z,y,x->zyx", *profiles)).to(device)
    total = torch.zeros(padded.shape)

    lattice = [Box.at((z, y, x), window) for z, y, x in itertools.product(*starts)]
    boxes = _choose_windows(lattice, padded, where, skip_black)
    if seen is not None and where is None and len(boxes) < len(lattice):
        seen(len(lattice) - len(boxes))

    # Axes are counted from the end, because images have a batch and a channel axis and probabilities have none.
    mirrored = [axis - 3 for axis in flip]

    for box, probability in _run(student, torch.from_numpy(padded), boxes, size, torch.device(device), seen, mirrored):
        part = total[box.slices]
        if probability.device == total.device:
            # In place, without a temporary of the window's size.
            part.addcmul_(probability, weight)
        else:
            part += (probability * weight).cpu()

    probability_sum = total.numpy()
    for axis, (profile, first) in enumerate(zip(profiles, starts, strict=True)):
        # the windows form a lattice, so their summed weight factorizes
        summed = np.zeros(reach[axis], dtype=np.float32)
        for start in first:
            summed[start : start + len(profile)] += profile
        probability_sum /= summed.reshape([-1 if a == axis else 1 for a in range(3)])

    # Rounding of the sums leaves values just outside [0, 1].
    z, y, x = np.shape(image)
    return np.ascontiguousarray(np.clip(probability_sum[:z, :y, :x], 0, 1))


def _starts(size: int, window: int, step: int) -> list[int]:
    """First voxels of the windows along one axis: as few as cover it."""
    return [k * step for k in range(max(math.ceil((size - window) / step), 0) + 1)]


def _choose_windows(
    boxes: list[Box], image: NDArray[np.float32], where: NDArray[np.bool_] | None, skip_black: bool
) -> list[Box]:
    """The windows that are run; see `predict`."""
    # All windows over a wanted voxel stay, so that its probability does not change.
    if where is not None:
        boxes = [box for box in boxes if where[box.slices].any()]

    # Most windows of a sparse stack are black. Whether one is depends on its own voxels alone, so that a block still
    # predicts what the whole volume does.
    return [box for box in boxes if image[box.slices].any()] if skip_black else boxes


def _gaussian(size: int) -> NDArray[np.float32]:
    distance = (np.arange(size) - (size - 1) / 2) / (_SIGMA * size)
    profile: NDArray[np.float32] = np.maximum(np.exp(-0.5 * distance**2), _FLOOR).astype(np.float32)
    return profile


def _run(
    student: nn.Module,
    image: Tensor,
    boxes: list[Box],
    batch: BatchSize,
    device: torch.device,
    seen: Callable[[int], None] | None,
    mirrored: list[int],
) -> Iterator[tuple[Box, Tensor]]:
    """Each box with its probability [z, y, x] on `device`, float32."""
    done = 0
    while done < len(boxes):
        chunk = boxes[done : done + batch.windows]
        images = torch.stack([image[b.slices] for b in chunk])[:, None]

        try:
            prediction: StudentOutput = student(_flip(images.to(device), mirrored))
            probability = _flip(prediction.logits[:, 0].float().sigmoid(), mirrored)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # RuntimeError stands for any fault. Only a lack of memory is mended by a smaller batch.
            if not _out_of_memory(error):
                raise

            if batch.windows == 1:
                raise InputError(
                    f"one window of {chunk[0].shape} voxels does not fit in the memory of {device}; "
                    "use a smaller window"
                ) from None

            # What did not fit once would not fit the next time. The batch stays small.
            batch.windows = max(batch.windows // 2, 1)

            # Cached blocks have the sizes of the larger batch and would be in the way of the smaller one.
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue

        # Only windows that succeeded are counted, so that the others run again.
        yield from zip(chunk, probability, strict=True)
        done += len(chunk)
        if seen is not None:
            seen(len(chunk))


def _flip(x: Tensor, axes: list[int]) -> Tensor:
    # `flip` copies, even along no axis.
    return x.flip(axes) if axes else x


def _out_of_memory(error: BaseException) -> bool:
    """Whether a failed step ran out of memory; on the CPU torch says so only in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
