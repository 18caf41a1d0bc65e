"""Functions of the Python API that join several parts of the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize
from hpc_neuro.core.image_settings import require_voxel_size
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Contrast
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.formats import open_volume
from hpc_neuro.data.intensity import compute_intensity_range, limit_brightness, normalize, open_array
from hpc_neuro.trace_stacks.tracer import trace_image
from hpc_neuro.tracing import TraceConfig


def trace(
    image: NDArray[Any] | Path | str,
    voxel_size: VoxelSize | None = None,
    *,
    root: Point | None = None,
    roots: Sequence[Point] = (),
    channel: int | None = None,
    intensity_range: tuple[float, float] | None = None,
    cfg: TraceConfig | None = None,
) -> list[Tree]:
    """Trace an image without labels and without a network, as `hpc-neuro trace` does; trees in voxels, z y x.

    `image` is an array [Z, Y, X] or the path of any format that `open_volume` reads. `voxel_size` (um, z y x) None: as
    the file says, else voxels are taken for cubes. `intensity_range`: darker and brighter voxels count as its ends;
    None: all brightness counts. With `root` or `roots` (z y x voxels): one tree for each. Without: one for each soma,
    which has type 1, and for each other long piece from its thickest end.
    Raises InputError for an image that cannot be traced, and for a root outside it or off its foreground.
    """
    starts = [root] if root is not None else list(roots)
    if isinstance(image, np.ndarray):
        read = open_array(image)
        shape, size = _shape_of(image), voxel_size
    else:
        volume = open_volume(image, channel=channel)
        shape, size = volume.shape, voxel_size or volume.voxel_size
        read = volume.__getitem__
    if size is not None:
        require_voxel_size(size)
    return trace_image(limit_brightness(read, intensity_range), shape, size, roots=starts, cfg=cfg).trees


def predict(
    image: NDArray[Any] | Path | str,
    model: Path | str,
    *,
    channel: int | None = None,
    intensity_range: tuple[float, float] | None = None,
    weights: Literal["best", "last"] = "best",
    overlap: float = 0.25,
    batch: int = 4,
) -> NDArray[np.float32]:
    """Probability of neurite, float32 [Z, Y, X], from a student; the same as `hpc-neuro infer` writes by default.

    `image` is an array [Z, Y, X] or the path of any format that `open_volume` reads. `model` is `bundled`, the folder
    that `train` wrote, or one of its weights folders; `weights` chooses among those of a train folder.
    `intensity_range` is the brightness that becomes 0 and 1; None: measured. A student of local contrast does without.
    `overlap` is the share of a window that the next one covers again, and `batch` the number of windows at once.

    Image and probability are held in memory; `run_infer` goes through larger volumes block by block. The student runs
    on the GPU where torch sees one. `trace_probability` makes trees of the result.
    Raises InputError for an image or weights that cannot be used, ConfigError for weights without a window.
    """
    # Imported late, because it imports torch, which takes seconds.
    from hpc_neuro.core import distributed
    from hpc_neuro.infer.predictor import choose_window, predict_black
    from hpc_neuro.models import sliding_window
    from hpc_neuro.models.student import load_student
    from hpc_neuro.models.student_folder import find_student, read_contrast

    folder = find_student(Path(model), weights)
    student, meta = load_student(folder)
    window = choose_window(folder, meta, student.patch, None)
    array = _read_image(image, channel)
    normalized = _normalize(array, read_contrast(meta), intensity_range)

    # Most windows of a sparse stack are black, and most students find nothing there.
    device = distributed.device()
    student.to(device)
    skip_black = predict_black(student, window, device) < float(meta.get("threshold", 0.5))
    return sliding_window.predict(student, normalized, window, overlap, batch, device, skip_black=skip_black)


def _normalize(
    image: NDArray[Any], contrast: Contrast, intensity_range: tuple[float, float] | None
) -> NDArray[np.float32]:
    """[Z, Y, X] in [0, 1], as the student saw its training volumes."""
    shape = _shape_of(image)
    if contrast == "local":
        return measure_foreground(lambda box: image[box.slices], shape).local_contrast(Box.whole(shape))
    return normalize(image, *(intensity_range or compute_intensity_range(lambda box: image[box.slices], shape)))


def _read_image(image: NDArray[Any] | Path | str, channel: int | None) -> NDArray[Any]:
    """[Z, Y, X] voxels of an array, or of a file."""
    if isinstance(image, np.ndarray):
        open_array(image)(Box.whole(_shape_of(image)))
        return image
    volume = open_volume(image, channel=channel)
    return volume[Box.whole(volume.shape)]


def _shape_of(image: NDArray[Any]) -> Shape:
    z, y, x = image.shape
    return z, y, x
