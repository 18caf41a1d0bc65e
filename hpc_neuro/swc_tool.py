"""`hpc-neuro swc check|fix|convert|transform FILE... [key=value ...]`: check, repair, convert and move SWC trees."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from hpc_neuro.core import morphology, yaml_text
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.files import format_count
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.core.yaml_text import YamlError
from hpc_neuro.data import swc
from hpc_neuro.data.swc.header import Unit
from hpc_neuro.data.swc.repair import Roots

HELP = """usage: hpc-neuro swc check|fix|convert|transform FILE... [key=value ...]

check      list by line what breaks the SWC convention or what other readers refuse
             strict=false   leave out what any reader takes: order, line ends, types, several roots
fix        write FILE.fixed.swc, one tree that NeuroM, MorphIO, navis and swcgeom open without warnings; list changes
             roots=join     what to do with several roots: join | keep | largest | split (one file per tree)
convert    write FILE.um.swc or FILE.voxel.swc
             to=um          um | voxel
             voxel_size=    [um] along z,y,x; read from the header where it is stated there
transform  write FILE.moved.swc: flip, then scale, then shift
             flip=          axes to mirror, such as y or zy; needs shape=
             shape=         [voxel] of the image along z,y,x
             scale=1,1,1    factors along z,y,x
             shift=0,0,0    added along z,y,x, in the tree's unit
All that write: out=FOLDER puts the results there instead of beside FILE; unit=um|voxel states the unit of a file
whose header does not state it (voxel if left out; of convert to=voxel, um). FILE itself is never changed.
Exit code: 0 done (check: clean), 2 a file that cannot be read, 3 check found something."""

Options = dict[str, Any]
"""Key -> value of the `key=value` arguments."""
C = TypeVar("C", bound=str)
_UNITS: tuple[Unit, ...] = ("um", "voxel")
_MILD = {"unsorted", "line ends", "BOM", "type", "type change", "several roots", "repeated line", "extra columns"}
"""Kinds of findings that strict=false leaves out."""
_LARGEST = 1e9
"""Largest number that is taken for a size, a scale or a shift."""
_TEXT_KEYS = ("flip", "out")
"""Keys whose values are text, even where YAML would read a number."""


def main(argv: Sequence[str]) -> int:
    """Run one `swc` command on its files. Every file is tried; the worst exit code counts.

    Raises ConfigError for an unknown command or key.
    """
    # A file may have `=` in its name.
    words = [argument for argument in argv if "=" not in argument or Path(argument).exists()]
    if not words or {"-h", "--help"} & set(argv):
        _print(HELP)
        return EXIT_DONE if argv else EXIT_BAD_INPUT

    command, *names = words
    if command not in _COMMANDS:
        raise ConfigError(f"swc {command} is not one of: swc {', swc '.join(_COMMANDS)}")
    # Keys differ between commands; one that belongs to another command is refused.
    run, keys = _COMMANDS[command]
    options = _parse_options([argument for argument in argv if argument not in words], keys, command)
    if not names:
        raise ConfigError(f"swc {command} expects one SWC file or more:  hpc-neuro swc {command} FILE...")
    if "out" in options:
        _refuse_same_names(names, options["out"])

    # One unreadable file must not keep the others from being processed.
    codes = []
    for name in names:
        try:
            codes.append(run(Path(name), options))
        except InputError as error:
            sys.stderr.write(f"hpc-neuro swc {command}: {error}\n")
            codes.append(EXIT_BAD_INPUT)
    return EXIT_BAD_INPUT if EXIT_BAD_INPUT in codes else max(codes)


# --- Commands ---


def _check(path: Path, options: Options) -> int:
    findings = swc.check(path)
    if _choose("strict", str(options.get("strict", True)).lower(), ("true", "false")) == "false":
        findings = [finding for finding in findings if finding.fatal or finding.kind not in _MILD]

    for finding in findings:
        place = f"{path}:{finding.line}" if finding.line else str(path)
        advice = f"  [{_explain_fatal(findings)}]" if finding.fatal else ""
        _print(f"{place}: {finding.text}{advice}")
    if findings:
        return EXIT_FAILURES

    tree = swc.read(path)
    _print(f"{path}: clean, {format_count(len(tree), 'node')}, length {morphology.length(tree):.6g}")
    return EXIT_DONE


def _explain_fatal(findings: Sequence[swc.SwcFinding]) -> str:
    return "not readable before `swc fix`" if swc.is_repairable(findings) else "not readable; export the tree again"


def _fix(path: Path, options: Options) -> int:
    choices: tuple[Roots | Literal["split"], ...] = (*get_args(Roots), "split")
    roots = _choose("roots", options.get("roots", "join"), choices)
    # Splitting needs all trees: joining or dropping them first would lose them.
    repair = swc.fix(path, "keep" if roots == "split" else roots)
    trees = swc.split_by_length(repair.tree) if roots == "split" else [repair.tree]

    for change in repair.changes:
        _print(f"{path}: {change}")
    # `changed:` keeps a change from being read as a statement of the file.
    comments = [f"repaired from {path.name}", *(f"changed: {change}" for change in repair.changes), *repair.comments]
    for number, tree in enumerate(trees, start=1):
        target = _target_path(path, f"fixed.{number}" if len(trees) > 1 else "fixed", options)
        _write(path, target, tree, comments, options)
    if not repair.changes:
        _print(f"{path}: nothing to repair")
    return EXIT_DONE


def _convert(path: Path, options: Options) -> int:
    to = _choose("to", options.get("to", "um"), _UNITS)
    header = swc.read_header(path) if "unit" in options else swc.require_header(path)
    unit = _choose_unit(path, header, options, "um" if to == "voxel" else "voxel")
    voxel_size = _parse_triple(options, "voxel_size", header.voxel_size)
    # Whoever states the unit that is wanted wants it written, and nothing scaled.
    is_labelled = header.unit is None and unit == to
    needs_size = (to == "voxel" or unit == "voxel") and not is_labelled
    if needs_size and (voxel_size is None or min(voxel_size) <= 0):
        raise InputError(f"{path} does not state its voxel size; give it in um as voxel_size=Z,Y,X, each above 0")

    target = _target_path(path, to, options)
    tree, comments = swc.read(path), [f"converted from {path.name}", *swc.read_comments(path)]
    if is_labelled:
        swc.write(target, tree, unit=unit, voxel_size=voxel_size, comments=comments)
    else:
        tree = swc.convert(tree, target, to=to, voxel_size=voxel_size, stated=unit, comments=comments)
    _print(f"{target}: {format_count(len(tree), 'node')} in {to}, length {morphology.length(tree):.6g}")
    if header.unit is None and "unit" not in options:
        assumed = "voxels" if unit == "voxel" else unit
        _print(
            f"{target}: {path.name} does not state its unit, and is taken to be in {assumed}; unit={to} if it is not"
        )
    return EXIT_DONE


def _transform(path: Path, options: Options) -> int:
    shape = _parse_triple(options, "shape", None)
    transform = swc.Transform(
        flip=str(options.get("flip", "")),
        shape=None if shape is None else _require_whole(shape),
        scale=_parse_triple(options, "scale", None) or (1.0, 1.0, 1.0),
        shift=_parse_triple(options, "shift", None) or (0.0, 0.0, 0.0),
    )

    # The header of the result records what was done to the file.
    tree = swc.transform(swc.read(path), transform)
    comments = [f"moved from {path.name}: {transform}", *swc.read_comments(path)]
    _write(path, _target_path(path, "moved", options), tree, comments, options, transform.scale)
    return EXIT_DONE


_COMMANDS: dict[str, tuple[Callable[[Path, Options], int], set[str]]] = {
    "check": (_check, {"strict"}),
    "fix": (_fix, {"roots", "out", "unit"}),
    "convert": (_convert, {"to", "voxel_size", "out", "unit"}),
    "transform": (_transform, {"flip", "shape", "scale", "shift", "out", "unit"}),
}
"""Command -> what it does with one file, and the keys that it takes."""


# --- Writing ---


def _write(
    path: Path,
    target: Path,
    tree: Tree,
    comments: list[str],
    options: Options,
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Write a tree made from the file `path`, with the unit and voxel size that hold for it now.

    scale: of the tree relative to the file, z y x. A tree in voxels then has voxels smaller by it; of one in um, the
    voxel size is no longer known.
    """
    # A unit is converted, never relabelled: coordinates would be wrong by the voxel size.
    header = swc.read_header(path) if "unit" in options else swc.require_header(path)
    unit = _choose_unit(path, header, options, "voxel")

    voxel_size = header.voxel_size
    if voxel_size and scale != (1.0, 1.0, 1.0):
        scaled = (voxel_size[0] / scale[0], voxel_size[1] / scale[1], voxel_size[2] / scale[2])
        voxel_size = scaled if unit == "voxel" else None

    swc.write(target, tree, unit=unit, voxel_size=voxel_size, comments=comments)
    # Printed after writing: the line confirms that the file exists.
    counts = f"{format_count(len(tree), 'node')}, {format_count(len(tree.roots), 'root')}"
    _print(f"{target}: {counts}, length {morphology.length(tree):.6g}")
    if not header.unit and "unit" not in options:
        _print(f"{target}: written as voxels, since {path.name} does not state its unit; unit=um states another")


def _choose_unit(path: Path, header: swc.SwcHeader, options: Options, default: Unit) -> Unit:
    """The unit of a file: what its header states, else what the user states, else `default`. Raises ConfigError."""
    choices = _UNITS if header.unit in (None, *_UNITS) else (*_UNITS, str(header.unit))
    unit = _choose("unit", options.get("unit", header.unit or default), choices)
    if header.unit and unit != header.unit:
        raise ConfigError(
            f"unit={unit}, but the header of {path} says {header.unit}; `hpc-neuro swc convert` converts units"
        )
    return unit


def _target_path(path: Path, mark: str, options: Options) -> Path:
    """FILE.MARK.swc, beside FILE or in the folder `out`."""
    folder = Path(options["out"]) if "out" in options else path.parent
    return folder / f"{path.stem}.{mark}.swc"


def _refuse_same_names(names: Sequence[str], folder: str) -> None:
    """Raise ConfigError when two files of one name would be written over each other in `folder`."""
    paths: dict[str, str] = {}
    for name in names:
        other = paths.setdefault(Path(name).stem, name)
        if Path(other) != Path(name):
            raise ConfigError(
                f"{other} and {name} have the same name, and in out={folder} the result of one would replace the "
                "other's; give them in two calls with a folder each, or leave `out` away"
            )


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


# --- Options ---


def _parse_options(arguments: Sequence[str], keys: set[str], command: str) -> Options:
    """The `key=value` arguments of a command. Raises ConfigError that lists every faulty one."""
    options: Options = {}
    faults = []

    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in keys:
            faults.append(f"  {argument}: swc {command} knows {', '.join(f'{name}=' for name in sorted(keys))}")
        try:
            options[key] = value if key in _TEXT_KEYS else yaml_text.parse(value)
        except YamlError:
            faults.append(f"  {argument}: {value} is not readable")

    if faults:
        raise ConfigError(f"swc {command} cannot run:\n" + "\n".join(faults))
    return options


def _choose(key: str, value: object, choices: tuple[C, ...]) -> C:
    """The choice that `value` names. Raises ConfigError when there is none."""
    for choice in choices:
        if choice == str(value):
            return choice
    raise ConfigError(f"{key}={value} is not one of {', '.join(choices)}")


def _parse_triple(
    options: Options, key: str, default: tuple[float, float, float] | None
) -> tuple[float, float, float] | None:
    """`1,0.33,0.33` or `[1, 0.33, 0.33]` as z y x; `default` if the key is not given."""
    if key not in options:
        return default
    value = options[key]
    parts = value if isinstance(value, list) else str(value).split(",")
    try:
        z, y, x = (float(str(part)) for part in parts)
    except ValueError:
        raise ConfigError(f"{key}={value} is not three numbers Z,Y,X") from None
    # No tree is as large; squares of larger numbers would overflow.
    if not all(abs(number) <= _LARGEST for number in (z, y, x)):
        raise ConfigError(f"{key}={value} is not three numbers Z,Y,X of at most {_LARGEST:g}")
    return z, y, x


def _require_whole(shape: tuple[float, float, float]) -> Shape:
    """A shape in whole voxels. Raises ConfigError."""
    z, y, x = (int(size) for size in shape)
    if (z, y, x) != shape or min(z, y, x) < 1:
        raise ConfigError(f"shape={shape} is not three whole numbers Z,Y,X of at least 1")
    return z, y, x
