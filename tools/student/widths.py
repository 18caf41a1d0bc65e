"""Record how wide the neurites are that the bundled student has learned, beside its weights.

    python -m tools.student.widths --folder hpc_neuro/assets/student [--gold FOLDER] [--scenes 64] [--of 400]
                                   [--store STORE ... [--only ID ...]]

Draws scenes of the training again, evenly spread over all (`--of`; --gold: SWC files that lend their shapes), measures
widths along their trees and along those of the real volumes in prepared stores, and writes the quartiles into
student.yaml and card.json. `python -m tools.student.train` does it while it trains.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core import files, schema
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.types import Array
from hpc_neuro.data.neurite_width import (
    NeuriteWidths,
    WidthQuartiles,
    list_widths,
    measure_widths,
    summarize_widths,
)
from hpc_neuro.data.store import Store
from hpc_neuro.models.config import SavedStudent
from tools.student.card import CARD
from tools.student.scenes import draw_visible, is_validation


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gold", type=Path)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--of", type=int, default=400)
    parser.add_argument("--store", type=Path, nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()

    gold = sorted(args.gold.glob("*.swc")) if args.gold else []
    numbers = [number for number in range(args.of) if not is_validation(number)]
    chosen = [numbers[i] for i in np.linspace(0, len(numbers) - 1, args.scenes).astype(int)]

    scenes = list(_measure_scenes(chosen, gold))
    real = list(_measure_stores(args.store, args.only))
    quartiles = summarize_widths([*scenes, *real])
    if quartiles is None:
        raise SystemExit("no width could be measured; give more scenes, or a store of volumes with trees")

    write_widths(args.folder, quartiles, {"scenes": len(scenes), "real": len(real)})
    for name, (depth, plane) in zip(("lower quartile", "median", "upper quartile"), quartiles, strict=True):
        print(f"{name}: {plane:.2f} voxels in the plane, {'unknown' if depth is None else f'{depth:.2f}'} along z")
    return 0


def _measure_scenes(numbers: Sequence[int], gold: Sequence[Path]) -> Iterator[NeuriteWidths]:
    for number in numbers:
        scene = draw_visible(0, number, tuple(gold))
        z, y, x = scene.image.shape
        yield measure_widths(scene.tree, functools.partial(_read_box, scene.image), (z, y, x))


def _read_box(image: Array, box: Box) -> Array:
    return image[box.slices]


def _measure_stores(stores: Sequence[Path], only: Sequence[str]) -> Iterator[NeuriteWidths]:
    for volume in (volume for path in stores for volume in Store(path)):
        if not only or volume.id in only:
            yield measure_widths(volume.fitted_tree(), volume.image, volume.shape)


def write_widths(folder: Path, quartiles: WidthQuartiles, counts: dict[str, int]) -> None:
    """Write the widths into student.yaml and card.json of `folder`; `counts`: the volumes that were measured."""
    saved = schema.load(SavedStudent, folder / "student.yaml")
    saved.extra["neurite_widths"] = list_widths(quartiles)
    with files.atomic(folder / "student.yaml") as part:
        part.write_text(schema.dump(saved), encoding="utf-8")

    card: dict[str, Any] = files.read_json(folder / CARD, "give the folder of the bundled student", dict)
    card["neurite_widths_voxels"] = list_widths(quartiles)
    card["neurite_widths_measured_in"] = counts
    files.write_json(folder / CARD, card)


if __name__ == "__main__":
    sys.exit(main())
