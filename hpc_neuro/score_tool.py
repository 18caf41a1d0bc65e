"""`hpc-neuro score PRED.swc GOLD.swc [tolerance=4] [json=yes]`: how well a traced tree agrees with a gold tree."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_neuro.core import morphology, yaml_text
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, TOLERANCE_VOX
from hpc_neuro.core.files import format_count
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import swc
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.metrics.tree import distances

_MAX_PIECES = 100_000_000
"""Pieces into which the cable of a tree is cut at most: 100 m in um."""

HELP = """usage: hpc-neuro score PRED.swc GOLD.swc [tolerance=4] [json=yes]

Prints one JSON object with the agreement of two trees, which must be in the same unit:
  f1, precision, recall   by cable length: cable agrees where it lies within the tolerance of the other tree
  esa, dsa, pds           distances of Vaa3D (Peng et al. 2010), lower is better
  tolerance=4             in the unit of the trees (voxels, as a rule)
  json=no                 lines for people instead"""


def score(predicted: Tree | Path | str, gold: Tree | Path | str, tolerance: float = TOLERANCE_VOX) -> dict[str, float]:
    """Agreement of two trees, each a tree or the path of an SWC file, in one unit.

    Returns `f1`, `precision` and `recall` of the cable at `tolerance` (see `metrics.cable.match_cable`), and the
    distances `esa`, `dsa` and `pds` (see `metrics.tree.distances`); all in the unit of the trees.
    Raises InputError for unreadable files, or files in different units; ValueError unless `tolerance` is positive.
    """
    # A tree in voxels and one in micrometers would be scored without a warning, and wrongly.
    units = {path: swc.require_header(path).unit for path in (predicted, gold) if not isinstance(path, Tree)}
    if len(set(units.values()) - {None}) > 1:
        stated = " and ".join(f"{path} is in {unit}" for path, unit in units.items())
        raise InputError(f"{stated}; bring one into the unit of the other with `hpc-neuro swc convert`")

    trees = [tree if isinstance(tree, Tree) else swc.read(tree) for tree in (predicted, gold)]

    # As in `evaluate`: pieces of 1 voxel, or of a quarter of a tolerance in micrometers.
    step = min(1.0, tolerance / 4) if "um" in units.values() else 1.0
    for name, tree in zip((predicted, gold), trees, strict=True):
        length = morphology.length(tree)
        if not length / step <= _MAX_PIECES:
            path = "a tree" if isinstance(name, Tree) else name
            raise InputError(
                f"{path} has {length:.3g} of cable in its unit, more than any neuron has in voxels or um; correct its "
                "coordinates, or convert a tree in nm with `hpc-neuro swc convert`"
            )
    match = match_cable(trees[0], trees[1], tolerance, step)
    return {
        "f1": match.f1,
        "precision": match.precision,
        "recall": match.recall,
        **distances(trees[0], trees[1]),
    }


def main(argv: Sequence[str]) -> int:
    """Print the scores of two SWC files. Raises ConfigError for wrong arguments, InputError for unreadable files."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return EXIT_DONE if argv else EXIT_BAD_INPUT

    # A file may have `=` in its name.
    paths = [argument for argument in argv if "=" not in argument or Path(argument).exists()]
    pairs = [argument.split("=", 1) for argument in argv if argument not in paths]
    options, keys = dict(pairs), [key for key, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"score got {repeated[0]}= twice; give it once")
    unknown = sorted(set(options) - {"tolerance", "json"})
    if unknown:
        raise ConfigError(f"score does not know {unknown[0]}=; its keys are tolerance= and json=")
    if len(paths) != 2:
        raise ConfigError(
            f"score got {format_count(len(paths), 'file')}, expected two:  hpc-neuro score PRED.swc GOLD.swc"
        )
    if options.get("json", "yes") not in ("yes", "no"):
        raise ConfigError(f"json={options['json']} is not yes or no")

    units = {path: swc.require_header(path).unit for path in paths}
    _note_unknown_units(units)
    if "tolerance" not in options and "nm" in units.values():
        raise ConfigError("the trees are in nm, and the default tolerance of 4 is for voxels; give tolerance= in nm")
    # Programs call this verb: one line of JSON by default, and nothing else on standard output.
    scores = score(paths[0], paths[1], _parse_tolerance(options.get("tolerance", str(TOLERANCE_VOX))))
    if options.get("json", "yes") == "yes":
        sys.stdout.write(json.dumps(scores, allow_nan=False) + "\n")
    else:
        sys.stdout.writelines(f"{name:<10} {value:.4f}\n" for name, value in scores.items())
    return EXIT_DONE


def _note_unknown_units(units: Mapping[str, str | None]) -> None:
    """Say on standard error that a file without a unit is compared with one that states it."""
    stated = [f"{path} is in {'voxels' if unit == 'voxel' else unit}" for path, unit in units.items() if unit]
    silent = [path for path, unit in units.items() if unit is None]
    if stated and silent:
        sys.stderr.write(
            f"score: {stated[0]}, and {silent[0]} does not state its unit; they are compared as they are\n"
        )


def _parse_tolerance(text: str) -> float:
    try:
        tolerance = yaml_text.parse_decimal(text)
    except ValueError:
        tolerance = 0.0
    if tolerance <= 0:
        raise ConfigError(f"tolerance={text} is not a number above 0")
    return tolerance
