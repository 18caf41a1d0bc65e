"""Do the warnings of `trace` tell bad trees from good ones?

    python -m tools.bench.trace_warnings STORE... [--model none] [--only ID ...] [--copies NAME ...] [--every N]

A folder of projections, ID.tif with the tree ID.swc of the stack, stands for a store. Every neuron is traced as it is
and from degraded copies: noise, blur, inverted, and voxels four times as large. A tree counts as bad where its F1 at 4
voxels (of the copy) is more than 0.05 below that of Otsu's mask of the same copy, or below 0.5. The area under the ROC
curve is that of the doubt, and of the number of warnings, 0.5 for figures that say nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import mannwhitneyu
from skimage.filters import threshold_otsu

from hpc_neuro.core import morphology
from hpc_neuro.core.constants import TOLERANCE_VOX
from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from hpc_neuro.data.store import INDEX, Store, StoredVolume
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.trace_stacks.config import NO_MODEL
from hpc_neuro.trace_stacks.fit import StackFit, fit_stack
from hpc_neuro.trace_stacks.predictor import StackPredictor
from hpc_neuro.trace_stacks.resampled import trace_on_grid
from hpc_neuro.trace_stacks.sanity import NO_TREE_DOUBT, list_warnings, measure_doubt
from hpc_neuro.trace_stacks.tracer import ImageTrace
from hpc_neuro.tracing import trace

_BAD = 0.5
"""F1 below which a tree is bad whatever Otsu's is."""
_MOST_MASK = 0.05
"""Share of a volume above which Otsu's mask counts as a miss."""
_COARSE = 4
"""Voxels of a degraded copy are so many times as large in the plane."""
Image = NDArray[np.float32]


def main() -> int:
    """Print a row for each copy, and the area under the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--model", default=NO_MODEL)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--every", type=int, default=1, help="only every N-th neuron")
    parser.add_argument("--copies", nargs="+", default=list(COPIES), choices=list(COPIES))
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    predictor = None if args.model == NO_MODEL else StackPredictor(Path(args.model))
    rows: list[dict[str, Any]] = []
    neurons = [neuron for path in args.stores for neuron in list_neurons(path)]
    for neuron in [n for n in neurons if not args.only or n.id in args.only][:: args.every]:
        for name in args.copies:
            degrade = COPIES[name]
            row = {"neuron": neuron.id, "copy": name, **_judge_copy(neuron, degrade, predictor)}
            rows.append(row)
            print(_format_row(row), flush=True)

    bad = np.asarray([row["bad"] for row in rows])
    doubt = measure_area(np.asarray([row["doubt"] for row in rows]), bad)
    count = measure_area(np.asarray([len(row["warnings"]) for row in rows]), bad)
    print(f"{bad.sum()} of {len(bad)} trees are bad; area under the curve {doubt:.3f}, of the warnings {count:.3f}")

    # JSON has no NaN, which the areas are where all trees are good, or all bad.
    areas = {"area": doubt, "area_of_warnings": count}
    print(json.dumps({**{key: area if np.isfinite(area) else None for key, area in areas.items()}, "rows": rows}))
    return 0


def _format_row(row: dict[str, Any]) -> str:
    return (
        f"{row['neuron']:>16.16} {row['copy']:>8} F1 {row['f1']:.3f} Otsu {row['otsu']:.3f} "
        f"{'bad' if row['bad'] else ''} doubt {row['doubt']:.2f} "
        f"{len(row['warnings'])} warnings: {'; '.join(warning[:60] for warning in row['warnings'])}"
    )


@dataclass(frozen=True)
class Neuron:
    """An image with its gold tree in voxels."""

    id: str
    read: Callable[[], Image]
    tree: Tree
    size: VoxelSize
    has_root: bool
    """Whether the tracer is given the root."""

    def list_roots(self, tree: Tree, shape: Shape) -> list[Point]:
        """The root that the tracer is given, inside a copy of this shape; `tree`: of the copy."""
        if not self.has_root:
            return []
        z, y, x = np.clip(tree.points[0], 0, np.asarray(shape) - 1).tolist()
        return [(z, y, x)]


def list_neurons(path: Path) -> list[Neuron]:
    """The neurons of a store, or of a folder of projections."""
    if (path / INDEX).exists():
        return [_open_stored(volume) for volume in Store(path)]
    return [_open_projection(image) for image in sorted(path.glob("*.tif")) if image.with_suffix(".swc").exists()]


def _open_stored(volume: StoredVolume) -> Neuron:
    def read() -> Image:
        return volume.image(Box.whole(volume.shape)).astype(np.float32)

    return Neuron(volume.id, read, volume.tree(), volume.voxel_size, volume.root is not None)


def _open_projection(image: Path) -> Neuron:
    """Voxels count as cubes; the tree is projected as its image was."""

    def read() -> Image:
        return np.asarray(tifffile.imread(image), dtype=np.float32)[None]

    tree = swc.read(image.with_suffix(".swc"))
    flat = replace(tree, points=tree.points * [0, 1, 1])
    return Neuron(image.stem, read, flat, (1.0, 1.0, 1.0), has_root=False)


def measure_area(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve, as Mann and Whitney's U; NaN where all are positive or none is."""
    if positive.all() or not positive.any():
        return float("nan")
    pairs = np.count_nonzero(positive) * np.count_nonzero(~positive)
    return float(mannwhitneyu(scores[positive], scores[~positive]).statistic / pairs)


Degrade = Callable[[Image, Tree, VoxelSize], tuple[Image, Tree, VoxelSize]]
"""Image, gold tree and voxel size -> those of the copy."""


def _keep_image(image: Image, tree: Tree, size: VoxelSize) -> tuple[Image, Tree, VoxelSize]:
    return image, tree, size


def _add_noise(image: Image, tree: Tree, size: VoxelSize) -> tuple[Image, Tree, VoxelSize]:
    """As strong as the neurites are bright."""
    noise = np.random.default_rng(0).normal(0, 1, image.shape).astype(np.float32)
    return image + np.float32(_measure_brightness(image, tree)) * noise, tree, size


def _blur_image(image: Image, tree: Tree, size: VoxelSize) -> tuple[Image, Tree, VoxelSize]:
    sigma = [2.0 if len(image) > 1 else 0.0, 5.0, 5.0]
    return np.asarray(ndimage.gaussian_filter(image, sigma), dtype=np.float32), tree, size


def _invert_image(image: Image, tree: Tree, size: VoxelSize) -> tuple[Image, Tree, VoxelSize]:
    return image.max() - image, tree, size


def _coarsen_image(image: Image, tree: Tree, size: VoxelSize) -> tuple[Image, Tree, VoxelSize]:
    z, y, x = (n // _COARSE * _COARSE if axis else n for axis, n in enumerate(image.shape))
    cells = image[:z, :y, :x].reshape(z, y // _COARSE, _COARSE, x // _COARSE, _COARSE).mean(axis=(2, 4))

    # The first coarse voxel is centered on the middle of its fine ones.
    shift = (_COARSE - 1) / 2
    points = (tree.points - [0, shift, shift]) / [1, _COARSE, _COARSE]
    coarse_size = (size[0], size[1] * _COARSE, size[2] * _COARSE)
    return cells, replace(tree, points=points), coarse_size


COPIES: dict[str, Degrade] = {
    "as it is": _keep_image,
    "noise": _add_noise,
    "blur": _blur_image,
    "inverted": _invert_image,
    "coarse": _coarsen_image,
}


def _measure_brightness(image: Image, tree: Tree) -> float:
    places = np.clip(np.rint(tree.points), 0, np.asarray(image.shape) - 1).astype(np.int64)
    return float(np.median(image[tuple(places.T)]))


def _judge_copy(neuron: Neuron, degrade: Degrade, predictor: StackPredictor | None) -> dict[str, Any]:
    image, tree, size = degrade(neuron.read(), neuron.tree, neuron.size)
    z, y, x = image.shape

    roots = neuron.list_roots(tree, (z, y, x))
    figures: dict[str, Any] = {}
    try:
        result = _trace_like_the_verb(image, size, roots, predictor)
        figures = asdict(result.figures)
        predicted, doubt = morphology.concatenate_trees(result.trees), measure_doubt(result.figures)
        warnings = list_warnings(result.figures, result.foreground.is_inverted, predictor is not None)
    except InputError as error:
        predicted, doubt, warnings = morphology.empty_tree(), NO_TREE_DOUBT, [str(error)]

    f1 = match_cable(predicted, tree, TOLERANCE_VOX).f1 if len(predicted) else 0.0
    otsu_f1 = _score_otsu(image, size, roots, tree)
    is_bad = bool(f1 < min(otsu_f1, 1.0) - 0.05 or f1 < _BAD)
    return {"f1": f1, "otsu": otsu_f1, "bad": is_bad, "doubt": doubt, "warnings": warnings, "figures": figures}


def _trace_like_the_verb(
    image: Image, size: VoxelSize, roots: list[Point], predictor: StackPredictor | None
) -> ImageTrace:
    """Trace an image, resampled for the student where its neurites are too thin or too wide. Raises InputError."""
    z, y, x = image.shape

    def read(box: Box) -> Image:
        return image[box.slices]

    fit = StackFit() if predictor is None else fit_stack(read, (z, y, x), size, predictor, Path("model"), "the copy")
    return trace_on_grid(
        read, (z, y, x), size, fit.grid, foreground=fit.foreground, roots=roots, predictor=predictor
    ).trace


def _score_otsu(image: Image, size: VoxelSize, roots: list[Point], gold: Tree) -> float:
    mask = image > threshold_otsu(image)
    # Such a mask is noise, and its forest takes hours.
    if mask.mean() > _MOST_MASK:
        return 0.0

    try:
        trees = trace(mask, size, roots=roots, image=image)
    except InputError:
        return 0.0

    forest = morphology.concatenate_trees(trees)
    return match_cable(forest, gold, TOLERANCE_VOX).f1 if len(forest) else 0.0


if __name__ == "__main__":
    raise SystemExit(main())
