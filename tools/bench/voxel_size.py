"""Does a student trace an image of other voxels better where the image is resampled for it?

    python -m tools.bench.voxel_size STORE... [--model bundled] [--only ID ...] [--every N] [--factors 1,2,2 2,2,2]
                                     [--ways as_it_is by_width by_size grid_of_the_copy]

A folder of projections, ID.tif with the tree ID.swc of the stack, stands for a store. Every neuron, and copies of it
with voxels of other sizes (factors z,y,x; coarser voxels are means; the neuron itself is 1,1,1), are traced

    as_it_is          on their own grid
    by_width          on the grid on which their neurites are as wide as in the training, as `trace` does
    by_size           on the grid of the neuron, as `trace` does where the voxel sizes decide
    grid_of_the_copy  on their own grid, with the probability from that of the neuron

F1 of the cable at 4 voxels of the neuron; widths in voxels along z and in the plane. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.constants import TOLERANCE_VOX
from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.foreground import Foreground, measure_foreground
from hpc_neuro.data.resample import Resampling
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.models.student_folder import format_widths
from hpc_neuro.trace_stacks.config import NO_MODEL
from hpc_neuro.trace_stacks.fit import fit_stack
from hpc_neuro.trace_stacks.predictor import StackPredictor
from hpc_neuro.trace_stacks.resampled import trace_on_grid
from tools.bench.trace_warnings import Image, Neuron, list_neurons

WAYS = ("as_it_is", "by_width", "by_size", "grid_of_the_copy")
"""How a copy is traced; the last three need a student."""
Row = dict[str, Any]


def main() -> int:
    """Print a row for each neuron and copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--model", default=NO_MODEL)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--every", type=int, default=1, help="only every N-th neuron")
    parser.add_argument("--factors", nargs="+", default=["1,1,1", "2,2,2"], type=_parse_factor)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    predictor = None if args.model == NO_MODEL else StackPredictor(Path(args.model))
    table: dict[str, dict[str, Row]] = {}

    neurons = [neuron for path in args.stores for neuron in list_neurons(path)]
    for neuron in [n for n in neurons if not args.only or n.id in args.only][:: args.every]:
        for factor in args.factors:
            name = ",".join(f"{f:g}" for f in factor)
            row = table.setdefault(neuron.id, {})[name] = compare(_copy_neuron(neuron, factor), args.ways, predictor)
            cells = [
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            ]
            print(f"{neuron.id:>16.16} {name} {' '.join(cells)}", flush=True)
    print(json.dumps(table))
    return 0


def _parse_factor(text: str) -> Point:
    z, y, x = (float(part) for part in text.split(","))
    return z, y, x


@dataclass(frozen=True)
class _Copy:
    """A copy of a neuron on another grid."""

    image: Image
    size: VoxelSize
    roots: list[Point]
    grid: Resampling
    """From the neuron to the copy."""
    gold: Tree
    """In voxels of the neuron."""

    @property
    def shape(self) -> Shape:
        return self.grid.new_shape

    def read(self, box: Box) -> Image:
        return self.image[box.slices]


def _copy_neuron(neuron: Neuron, factor: Point) -> _Copy:

    image = neuron.read()
    z, y, x = image.shape
    # A projection has no voxels along z to join.
    grid = Resampling((z, y, x), neuron.size, factor if z > 1 else (1.0, *factor[1:]))
    copy = grid.read_new(lambda box: image[box.slices])(Box.whole(grid.new_shape))
    roots = [grid.move_root(root) for root in neuron.list_roots(neuron.tree, (z, y, x))]
    return _Copy(copy, grid.new_voxel_size, roots, grid, neuron.tree)


def compare(copy: _Copy, ways: tuple[str, ...], predictor: StackPredictor | None) -> Row:
    """F1 of a copy traced in several ways, its widths, and how it was resampled by them."""
    row: Row = {}
    if "as_it_is" in ways:
        row["as_it_is"] = _trace(copy, None, predictor)
    if predictor is None:
        return row

    z, y, x = copy.grid.factor
    back = Resampling(copy.shape, copy.size, (1 / z, 1 / y, 1 / x))
    if "by_width" in ways:
        row |= _trace_by_width(copy, predictor, row.get("as_it_is"))
    if (z, y, x) != (1, 1, 1):
        if "by_size" in ways:
            row["by_size"] = _trace(copy, back, predictor)
        if "grid_of_the_copy" in ways:
            row["grid_of_the_copy"] = _trace(copy, None, _ResampledPredictor(predictor, back))
    return row


def _trace_by_width(copy: _Copy, predictor: StackPredictor, as_it_is: float | None) -> Row:
    """F1, the widths and the zoom. A copy that stays on its grid has the F1 of the copy as it is, if that is known."""
    try:
        fit = fit_stack(copy.read, copy.shape, None, predictor, Path("bundled"), "the copy")
    except InputError as error:
        logging.warning("%s; counts as a miss", error)
        return {"by_width": 0.0}

    is_same = fit.grid is None and as_it_is is not None
    f1 = as_it_is if is_same and as_it_is is not None else _trace(copy, fit.grid, predictor)
    zoom = (1.0, 1.0, 1.0) if fit.grid is None else fit.grid.factor
    return {"by_width": f1, "widths": format_widths(fit.widths), "zoom": ",".join(f"{f:.2g}" for f in zoom)}


class _ResampledPredictor(StackPredictor):
    """A student that sees an image on another grid; its probability is on the grid of the image."""

    def __init__(self, predictor: StackPredictor, grid: Resampling) -> None:
        self._predictor, self._grid = predictor, grid

    def predict(self, foreground: Foreground, label: str) -> NDArray[np.uint8]:
        """As of StackPredictor."""
        grid = self._grid
        resampled = measure_foreground(grid.read_new(foreground.read), grid.new_shape)
        probability = self._predictor.predict(resampled, label)
        return np.rint(grid.read_back(lambda box: probability[box.slices])(Box.whole(grid.shape))).astype(np.uint8)


def _trace(copy: _Copy, grid: Resampling | None, predictor: StackPredictor | None) -> float:
    """F1 of the trees against those of the neuron; 0 where tracing fails."""
    try:
        traced = trace_on_grid(copy.read, copy.shape, copy.size, grid, roots=copy.roots, predictor=predictor)
    except InputError as error:
        logging.warning("%s; counts as a miss", error)
        return 0.0

    forest = morphology.concatenate_trees(traced.trace.trees)
    tree = copy.grid.move_tree_back(forest)
    return float(match_cable(tree, copy.gold, TOLERANCE_VOX).f1) if len(tree) else 0.0


if __name__ == "__main__":
    raise SystemExit(main())
