"""Does a student trace an image of other voxels better where the image is resampled for it?

    python -m tools.bench.voxel_size STORE... [--model bundled] [--only ID ...] [--factors 1,2,2 2,2,2 0.5,0.5,0.5]

Every neuron is traced as it is, and copies of it with voxels of other sizes (factors z,y,x; coarser voxels are means):
as they are; resampled to the voxels of the neuron, with the probability back on the grid of the copy, where the trees
are found; and wholly on the resampled grid, as `trace` does. F1 of the cable at 4 voxels of the neuron. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.constants import TOLERANCE_VOX
from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.foreground import Foreground, measure_foreground
from hpc_neuro.data.intensity import ReadBox
from hpc_neuro.data.resample import Resampling
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.trace_stacks.config import NO_MODEL
from hpc_neuro.trace_stacks.predictor import StackPredictor
from hpc_neuro.trace_stacks.resampled import trace_on_grid

Row = dict[str, float]


def main() -> int:
    """Print a row for each neuron and copy."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("stores", type=Path, nargs="+")
    ask.add_argument("--model", default=NO_MODEL)
    ask.add_argument("--only", nargs="+", default=[])
    ask.add_argument("--factors", nargs="+", default=["2,2,2"], type=_parse_factor)
    args = ask.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    predictor = None if args.model == NO_MODEL else StackPredictor(Path(args.model))
    table: dict[str, dict[str, Row]] = {}
    for volume in (volume for path in args.stores for volume in Store(path)):
        if args.only and volume.id not in args.only:
            continue
        plain = _trace(volume.image, volume.shape, volume.voxel_size, None, volume.root, predictor)
        table[volume.id] = {"itself": {"f1": _score(plain, volume.tree())}}
        print(f"{volume.id:>10} itself {table[volume.id]['itself']['f1']:.3f}", flush=True)
        for factor in args.factors:
            name = ",".join(f"{f:g}" for f in factor)
            row = table[volume.id][name] = compare(volume, factor, predictor)
            print(f"{volume.id:>10} {name} {' '.join(f'{key} {f1:.3f}' for key, f1 in row.items())}", flush=True)
    print(json.dumps(table))
    return 0


def _parse_factor(text: str) -> Point:
    z, y, x = (float(part) for part in text.split(","))
    return z, y, x


def compare(volume: StoredVolume, factor: Point, predictor: StackPredictor | None) -> Row:
    """F1 of a copy whose voxels are `factor` times as large: as it is, and resampled in both ways."""
    grid = Resampling(volume.shape, volume.voxel_size, factor)
    copy = grid.read_new(volume.image)(Box.whole(grid.new_shape))
    root = None if volume.root is None else grid.move_root(volume.root)
    z, y, x = factor
    back = Resampling(grid.new_shape, grid.new_voxel_size, (1 / z, 1 / y, 1 / x))

    def read(box: Box) -> NDArray[np.float32]:
        return copy[box.slices]

    def trace_copy(to: Resampling | None, student: StackPredictor | None) -> float:
        tree = _trace(read, grid.new_shape, grid.new_voxel_size, to, root, student)
        return _score(grid.move_tree_back(tree), volume.tree())

    row = {"as_it_is": trace_copy(None, predictor), "resampled": trace_copy(back, predictor)}
    if predictor is not None:
        row["grid_of_the_copy"] = trace_copy(None, _ResampledPredictor(predictor, back))
    return row


class _ResampledPredictor(StackPredictor):
    """A student that sees an image on another grid; its probability is on the grid of the image."""

    def __init__(self, predictor: StackPredictor, grid: Resampling) -> None:
        self._predictor, self._grid = predictor, grid

    def predict(self, foreground: Foreground, label: str) -> NDArray[np.uint8]:
        """As of StackPredictor."""
        grid = self._grid
        seen = self._predictor.predict(measure_foreground(grid.read_new(foreground.read), grid.new_shape), label)
        return np.rint(grid.read_back(lambda box: seen[box.slices])(Box.whole(grid.shape))).astype(np.uint8)


def _trace(
    read: ReadBox,
    shape: Shape,
    size: VoxelSize,
    grid: Resampling | None,
    root: Point | None,
    predictor: StackPredictor | None,
) -> Tree:
    """The trees in voxels of the image that is read; an empty tree where tracing fails."""
    roots = [] if root is None else [root]
    try:
        traced = trace_on_grid(read, shape, size, grid, roots=roots, predictor=predictor)
    except InputError as error:
        logging.warning("%s; counts as a miss", error)
        return morphology.empty_tree()
    return morphology.concatenate_trees(traced.trace.trees)


def _score(tree: Tree, gold: Tree) -> float:
    return match_cable(tree, gold, TOLERANCE_VOX).f1 if len(tree) else 0.0


if __name__ == "__main__":
    raise SystemExit(main())
