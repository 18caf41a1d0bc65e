"""`hpc-neuro swc check|fix|convert|transform FILE... [key=value ...]`: look at, repair and move SWC trees."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args

import yaml

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import swc
from hpc_neuro.data.swc.repair import Roots
from hpc_neuro.data.swc.writer import Unit

DONE, UNREADABLE, FINDINGS = 0, 2, 3
HELP = """usage: hpc-neuro swc check|fix|convert|transform FILE... [key=value ...]

check      list by line what breaks the SWC convention or what other readers refuse
             strict=false   leave out what any reader takes: order, line ends, types, several roots
fix        write FILE.fixed.swc, one tree that NeuroM, MorphIO, navis and swcgeom open in silence; say what changed
             roots=join     what to do with several roots: join | keep | largest | split (one file per tree)
convert    write FILE.um.swc or FILE.voxel.swc
             to=um          um | voxel
             voxel_size=    [um] along z,y,x; read from the header where it is stated there
transform  write FILE.moved.swc: flip, then scale, then shift
             flip=          axes to mirror, such as y or zy; needs shape=
             shape=         [voxel] of the image along z,y,x
             scale=1,1,1    factors along z,y,x
             shift=0,0,0    added along z,y,x, in the tree's unit
All that write: out=FOLDER puts the results there instead of beside FILE; unit=um|voxel states the unit of a file that
does not state it (fix and transform; voxel if left out). FILE itself is never changed.
Exit code: 0 done (check: clean), 2 a file that cannot be read, 3 check found something."""

C = TypeVar("C", bound=str)
_UNITS: tuple[Unit, ...] = get_args(Unit)
_MILD = {"unsorted", "line ends", "BOM", "type", "type change", "several roots", "repeated line", "extra columns"}


def main(argv: Sequence[str]) -> int:
    """Run one `swc` command on its files; every file is tried, the worst exit code counts.

    Raises ConfigError for an unknown command or key.
    """
    words = [a for a in argv if "=" not in a or Path(a).exists()]
    if not words or {"-h", "--help"} & set(argv):
        _say(HELP)
        return DONE if argv else UNREADABLE
    command, names = words[0], words[1:]
    if command not in _COMMANDS:
        raise ConfigError(f"swc {command} is not one of: swc {', swc '.join(_COMMANDS)}")
    run, known = _COMMANDS[command]
    options = _options([a for a in argv if a not in words], known, command)
    if not names:
        raise ConfigError(f"swc {command} wants one SWC file or more:  hpc-neuro swc {command} FILE...")
    if "out" in options:
        _no_two_into_one(names, str(options["out"]))
    codes = []
    for name in names:
        try:
            codes.append(run(Path(name), options))
        except InputError as error:
            sys.stderr.write(f"hpc-neuro swc {command}: {error}\n")
            codes.append(UNREADABLE)
    return UNREADABLE if UNREADABLE in codes else max(codes)


def _no_two_into_one(names: Sequence[str], folder: str) -> None:
    """Raise ConfigError when two files of one name would be written over each other in `out`."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(Path(name).stem, name)
        if Path(other) != Path(name):
            raise ConfigError(
                f"{other} and {name} have the same name, and in out={folder} the result of one would replace the "
                "other's; give them in two calls with a folder each, or leave `out` away"
            )


def _check(path: Path, options: dict[str, object]) -> int:
    findings = swc.check(path)
    if options.get("strict", True) is False:
        findings = [f for f in findings if f.fatal or f.kind not in _MILD]
    for finding in findings:
        where = f"{path}:{finding.line}" if finding.line else str(path)
        _say(f"{where}: {finding.text}" + ("" if not finding.fatal else "  [not readable before `swc fix`]"))
    if not findings:
        tree = swc.read(path)
        _say(f"{path}: clean, {len(tree)} nodes, length {morphology.length(tree):.6g}")
    return FINDINGS if findings else DONE


def _fix(path: Path, options: dict[str, object]) -> int:
    among: tuple[Roots | Literal["split"], ...] = (*get_args(Roots), "split")
    roots = _choice("roots", options.get("roots", "join"), among)
    fixed = swc.fix(path, "keep" if roots == "split" else roots)
    trees = swc.split_by_length(fixed.tree) if roots == "split" else [fixed.tree]
    for change in fixed.changes:
        _say(f"{path}: {change}")
    for number, tree in enumerate(trees, start=1):
        target = _target(path, f"fixed.{number}" if len(trees) > 1 else "fixed", options)
        _write(path, target, tree, [f"repaired from {path.name}", *fixed.changes], options)
    if not fixed.changes:
        _say(f"{path}: nothing to repair")
    return DONE


def _convert(path: Path, options: dict[str, object]) -> int:
    to = _choice("to", options.get("to", "um"), _UNITS)
    header = swc.read_header(path)
    size = _three(options, "voxel_size") if "voxel_size" in options else header.voxel_size
    if size is None or min(size) <= 0:
        raise InputError(f"{path} does not state its voxel size; give it in um as voxel_size=Z,Y,X, each above 0")
    target = _target(path, to, options)
    tree = swc.convert(swc.read(path), target, to=to, voxel_size=size, stated=header.unit)
    _say(f"{target}: {len(tree)} nodes in {to}, length {morphology.length(tree):.6g}")
    return DONE


def _transform(path: Path, options: dict[str, object]) -> int:
    shape = _three(options, "shape") if "shape" in options else None
    move = swc.Transform(
        flip=str(options.get("flip", "")),
        shape=None if shape is None else (int(shape[0]), int(shape[1]), int(shape[2])),
        scale=_three(options, "scale") if "scale" in options else (1.0, 1.0, 1.0),
        shift=_three(options, "shift") if "shift" in options else (0.0, 0.0, 0.0),
    )
    tree = swc.transform(swc.read(path), move)
    _write(path, _target(path, "moved", options), tree, [f"moved from {path.name}: {move}"], options, move.scale)
    return DONE


_WRITES = {"out", "unit"}
_COMMANDS: dict[str, tuple[Callable[[Path, dict[str, object]], int], set[str]]] = {
    "check": (_check, {"strict"}),
    "fix": (_fix, {"roots", *_WRITES}),
    "convert": (_convert, {"to", "voxel_size", "out"}),
    "transform": (_transform, {"flip", "shape", "scale", "shift", *_WRITES}),
}


def _choice(key: str, given: object, among: tuple[C, ...]) -> C:
    """The one of several words that was given. Raises ConfigError for another."""
    for one in among:
        if one == str(given):
            return one
    raise ConfigError(f"{key}={given} is not one of {', '.join(among)}")


def _write(
    path: Path,
    target: Path,
    tree: Tree,
    comments: list[str],
    options: dict[str, object],
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """scale: of the tree against the file's; voxels shrink with it, and of um no voxel size is known any more."""
    header = swc.read_header(path)
    unit = _choice("unit", options.get("unit", header.unit or "voxel"), _UNITS)
    if header.unit and unit != header.unit:
        raise ConfigError(
            f"unit={unit}, but the header of {path} says {header.unit}; `hpc-neuro swc convert` converts units"
        )
    size = header.voxel_size
    if size and scale != (1.0, 1.0, 1.0):
        size = (size[0] / scale[0], size[1] / scale[1], size[2] / scale[2]) if unit == "voxel" else None
    swc.write(target, tree, unit=unit, voxel_size=size, comments=comments)
    _say(f"{target}: {len(tree)} nodes, {len(tree.roots)} root, length {morphology.length(tree):.6g}")


def _target(path: Path, mark: str, options: dict[str, object]) -> Path:
    folder = Path(str(options["out"])) if "out" in options else path.parent
    return folder / f"{path.stem}.{mark}.swc"


def _options(texts: list[str], known: set[str], command: str) -> dict[str, object]:
    options: dict[str, object] = {}
    faults = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            faults.append(f"  {text}: swc {command} knows {', '.join(f'{k}=' for k in sorted(known))}")
        try:
            options[key] = value if key in ("flip", "out") else yaml.safe_load(value)
        except yaml.YAMLError:
            faults.append(f"  {text}: {value} is not readable")
    if faults:
        raise ConfigError(f"swc {command} cannot be run so:\n" + "\n".join(faults))
    return options


def _three(options: dict[str, object], key: str) -> tuple[float, float, float]:
    """`1,0.33,0.33` or `[1, 0.33, 0.33]` as z y x."""
    value = options[key]
    parts = value if isinstance(value, list) else str(value).split(",")
    try:
        z, y, x = (float(str(p)) for p in parts)
    except ValueError:
        raise ConfigError(f"{key}={value} is not three numbers Z,Y,X") from None
    return z, y, x


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
