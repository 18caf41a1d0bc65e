"""`trace` from config to trace.json: one stack after the other, each complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_neuro.core import files, morphology, run_folder, schema, stop_signals
from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from hpc_neuro.data.formats import Volume, describe_content
from hpc_neuro.data.intensity import ReadBox, limit_brightness
from hpc_neuro.models.student_folder import STUDENT_FILES, find_student, format_trained
from hpc_neuro.trace_stacks import page
from hpc_neuro.trace_stacks.calibration import estimate_right_share
from hpc_neuro.trace_stacks.config import INDEX, TraceStacksConfig
from hpc_neuro.trace_stacks.edits import Edits, collect_edits, list_changed_trees, list_edit_files
from hpc_neuro.trace_stacks.fit import StackFit, fit_stack
from hpc_neuro.trace_stacks.resampled import trace_on_grid
from hpc_neuro.trace_stacks.sanity import (
    describe_labels,
    describe_odd_width,
    list_label_values,
    list_warnings,
    measure_doubt,
)
from hpc_neuro.trace_stacks.stacks import Stack, choose_voxel_size, list_stacks
from hpc_neuro.trace_stacks.tracer import ImageTrace

if TYPE_CHECKING:
    from hpc_neuro.trace_stacks.predictor import StackPredictor

log = logging.getLogger(__name__)
_MAY_CHANGE = tuple(name for name in TraceStacksConfig.__dataclass_fields__ if name != "out")
"""Settings that may differ from an earlier run in the folder: each stack records those that its trees depend on."""
_METHOD = 3
"""Version of the method. Results of another version are traced again."""

Result = dict[str, Any]
"""What trace.json says of one stack."""


def forecast(cfg: TraceStacksConfig) -> list[str]:
    """Open every stack and describe it in a line. Raises InputError for one that cannot be opened, as for a model."""
    stacks = list_stacks(cfg)
    _require_separate_results(cfg, stacks)
    if cfg.has_student:
        find_student(cfg.model)

    lines = []
    for stack in stacks:
        volume = stack.open(cfg)
        size = choose_voxel_size(cfg, volume)
        roots = stack.read_roots(cfg, volume.shape)
        scale = "in voxels, for want of a voxel size" if size is None else f"voxel size {_format_size(size)} um"
        start = files.format_count(len(roots), "root") if roots else "no root"
        lines.append(f"{stack.id}: {stack.path}, {' x '.join(map(str, volume.shape))} voxels, {scale}, {start}")
    return [*lines, f"{files.format_count(len(lines), 'stack')} into {cfg.out}"]


@stop_signals.resumable("trace")
def run(cfg: TraceStacksConfig) -> int:
    """Trace every stack. A stack that fails is listed, and the others are traced: exit code 3.

    Raises InputError where the only stack cannot be traced.
    """
    stacks = list_stacks(cfg)
    _require_separate_results(cfg, stacks)
    # A mistake in a single command is an error at once, before a folder is made.
    if len(stacks) == 1:
        volume = stacks[0].open(cfg)
        stacks[0].read_roots(cfg, volume.shape)

    # Weights that cannot be used are reported before a folder is made, too.
    weights = _hash_weights(cfg)
    is_whole = (cfg.out / INDEX).exists() and all(_read_result(cfg, stack, weights) for stack in stacks)
    with run_folder.start("trace", cfg, cfg.out, {}, _MAY_CHANGE, whole=is_whole) as record:
        results, failures = dict[str, Result](), list[str]()
        predictor = None if is_whole else _load_predictor(cfg)
        for number, stack in enumerate(stacks, start=1):
            stop_signals.check()
            label = f"[{number}/{len(stacks)}] {stack.id}"
            try:
                result = _read_result(cfg, stack, weights)
                results[stack.id] = result or _trace_stack(cfg, stack, label, predictor, weights)
            except InputError as error:
                if len(stacks) == 1:
                    raise
                failures.append(f"{stack.path}: {error}")
                log.error("%s: failed: %s", label, error)

        if not record.complete:
            _write_index(cfg, results, failures)
            record.finish({"stacks": len(results)}, failures, outputs=[cfg.out / INDEX, cfg.out / page.PAGE])
        _log_results(cfg, results, failures)
    return EXIT_FAILURES if failures else EXIT_DONE


def _require_separate_results(cfg: TraceStacksConfig, stacks: list[Stack]) -> None:
    """InputError where results would lie inside an image folder, or would replace an image."""
    out = cfg.out.resolve()
    # What is not there fails where it is traced.
    for stack in (stack for stack in stacks if stack.path.exists()):
        image = stack.path.resolve()
        if image == out or image in out.parents:
            raise InputError(f"{cfg.out} lies in the image {stack.path}; give another place:  out=FOLDER")


def _trace_stack(
    cfg: TraceStacksConfig, stack: Stack, label: str, predictor: StackPredictor | None, weights: str
) -> Result:
    """Trace one stack and write its files; what trace.json says of it. `weights`: hash of those of the predictor."""
    started_at = time.monotonic()
    volume = stack.open(cfg)
    size = choose_voxel_size(cfg, volume)
    roots = stack.read_roots(cfg, volume.shape)
    edits = _collect_edits(cfg, stack.id, volume.shape, size)
    read = limit_brightness(volume.__getitem__, cfg.range)
    fit = _fit_stack(cfg, stack, predictor, read, volume.shape, size)
    grid = fit.grid
    key = _make_key(cfg, stack, weights)
    log.info("%s: %s voxels ...", label, " x ".join(map(str, volume.shape)))
    if size is None:
        log.warning(
            "%s: the file does not say its voxel size; traced in voxels, and no micrometers are written. Give "
            "voxel_size=z,y,x",
            stack.id,
        )

    traced = trace_on_grid(
        read,
        volume.shape,
        size,
        grid,
        foreground=fit.foreground,
        roots=roots,
        cfg=cfg.trace,
        search_somas=cfg.somas,
        predictor=predictor,
        edits=edits,
        label=label,
    )
    trace = traced.trace
    warnings = list_warnings(trace.figures, trace.foreground.is_inverted, predictor is not None)
    if values := list_label_values(volume.__getitem__, volume.shape, volume.dtype):
        warnings.insert(0, describe_labels(values))
    width = traced.measure_width()
    if odd := describe_odd_width(width, size):
        warnings.insert(0, odd)
    for warning in warnings:
        log.warning("%s: %s", stack.id, warning)
    if trace.crowd is not None:
        log.info("%s: %s", stack.id, trace.crowd.describe())

    # From here to the entry below the files are half written, and the entry of earlier ones is stale.
    _set_changed_files_aside(cfg.out, stack.id)
    _write_entry(cfg.out, stack.id, "", {}, {})
    paths = _write_trees(cfg, stack, trace.trees, size)
    state = cfg.out / "neuroglancer" / f"{stack.id}.json"
    files.write_json(state, page.build_neuroglancer_state(trace.trees, volume.shape, size))
    overlay = cfg.out / "overlay" / f"{stack.id}.png"
    with files.atomic(overlay) as part:
        picture = page.draw_overlay(trace.foreground, trace.probability, traced.grid_trees, traced.grid_size)
        part.write_bytes(picture)

    result = _describe(cfg, stack, volume, trace, size, roots, warnings)
    result["neurite_width_voxels"] = None if width is None else round(width, 2)
    if grid is not None:
        result["resampled_voxel_size"] = None if size is None else grid.new_voxel_size
        result["resampled_shape"] = grid.new_shape
    result["seconds"] = round(time.monotonic() - started_at, 1)
    # A later run compares with what was written here.
    if trace.trees:
        forest = morphology.concatenate_trees(trace.trees)
        swc.write(_traced_path(cfg.out, stack.id), forest, unit="voxel", voxel_size=size)
        paths.append(_traced_path(cfg.out, stack.id))
    checksums = {path.relative_to(cfg.out).as_posix(): files.sha256(path) for path in [*paths, overlay, state]}
    # The entry comes last: with it the stack counts as done.
    _write_entry(cfg.out, stack.id, key, checksums, result)
    log.info(
        "%s: %s, %s of cable, %.1f s",
        label,
        files.format_count(trace.figures.trees, "tree"),
        f"{result['cable']:.0f} {result['unit']}",
        result["seconds"],
    )
    return result


def _fit_stack(
    cfg: TraceStacksConfig,
    stack: Stack,
    predictor: StackPredictor | None,
    read: ReadBox,
    shape: Shape,
    size: VoxelSize | None,
) -> StackFit:
    """How the student sees a stack, and a line on it where that is not as it is. Raises InputError; see `fit_stack`."""
    if predictor is None or cfg.any_voxel_size:
        return StackFit()
    fit = fit_stack(read, shape, size, predictor, cfg.model, str(stack.path))
    trained = format_trained(predictor.meta)
    if fit.line:
        log.info("%s: %s", stack.id, fit.line)
    elif size is None and trained and not fit.is_by_width:
        log.warning(
            "%s: without a voxel size the stack cannot be resampled for the student, which was trained on voxels of %s "
            "um; it is predicted as it is",
            stack.id,
            trained,
        )
    return fit


def _describe(
    cfg: TraceStacksConfig,
    stack: Stack,
    volume: Volume,
    trace: ImageTrace,
    size: VoxelSize | None,
    roots: tuple[tuple[float, float, float], ...],
    warnings: list[str],
) -> Result:
    """What trace.json says of a stack; paths are relative to OUT."""
    unit = "voxels" if size is None else "um"
    scaled = [tree if size is None else morphology.scale_tree(tree, size) for tree in trace.trees]
    is_one = len(trace.trees) == 1
    thickest = "from its thickest end" if is_one else "from their thickest ends"
    start = f"from the given {'root' if is_one else 'roots'}" if roots else "from somas" if trace.somas else thickest
    has_trees = bool(trace.trees)
    return {
        "image": str(stack.path),
        "shape": volume.shape,
        "voxel_size": size,
        "model": str(cfg.model),
        "start": start,
        "roots": [tree.points[0].round(3).tolist() for tree in trace.trees],
        "somas": [asdict(soma) for soma in trace.somas],
        "unit": unit,
        "cable": round(sum(map(morphology.length, scaled)), 2),
        "figures": asdict(trace.figures),
        "level": {
            "inverted": trace.foreground.is_inverted,
            "otsu": round(trace.foreground.otsu, 4),
            "floor": round(trace.foreground.floor, 4),
            "noise": round(trace.foreground.noise_level, 4),
        },
        "doubt": measure_doubt(trace.figures),
        "expected_right": estimate_right_share(morphology.concatenate_trees(trace.trees), trace.confidence),
        "warnings": warnings,
        "crowd": None if trace.crowd is None else asdict(trace.crowd),
        # The cable behind a place is in the unit of the trees.
        "places": [
            {"kind": p.kind, "z": p.z, "y": p.y, "x": p.x, "doubt": p.doubt, "cable": p.cable_um, "tree": p.neuron}
            for p in trace.places
        ],
        "swc": f"swc/{stack.id}.swc" if has_trees and size is not None else None,
        "swc_voxel": f"swc/{stack.id}.voxel.swc" if has_trees else None,
        "overlay": f"overlay/{stack.id}.png",
        "neuroglancer": f"neuroglancer/{stack.id}.json",
    }


# --- The student ---


def _hash_weights(cfg: TraceStacksConfig) -> str:
    """Hash of the student's files, with its threshold; "" without a student. Raises InputError where there is none."""
    if not cfg.has_student:
        return ""
    folder = find_student(cfg.model)
    return " ".join(files.sha256(folder / name) for name in STUDENT_FILES)


def _load_predictor(cfg: TraceStacksConfig) -> StackPredictor | None:
    """The student, ready; None without one."""
    if not cfg.has_student:
        return None
    # Torch takes seconds to import, and a stack that is traced without a student does not need it.
    from hpc_neuro.trace_stacks.predictor import StackPredictor

    return StackPredictor(cfg.model, cfg.range)


# --- Files of a stack ---


def _write_trees(cfg: TraceStacksConfig, stack: Stack, trees: list[Tree], size: VoxelSize | None) -> list[Path]:
    """Write all trees of a stack in one file, and each in its own where there are several; the paths."""
    if not trees:
        return []
    finder = f"with the student {cfg.model}" if cfg.has_student else "without a network"
    comments = [f"traced by hpc_neuro {run_folder.code_version()} from {stack.path}, {finder}"]
    paths = _write_swc(cfg.out / "swc", stack.id, morphology.concatenate_trees(trees), size, comments)
    if len(trees) > 1:
        for number, tree in enumerate(trees, start=1):
            paths += _write_swc(cfg.out / "swc" / stack.id, f"{number:04d}", tree, size, comments)
    return paths


def _write_swc(folder: Path, name: str, tree: Tree, size: VoxelSize | None, comments: list[str]) -> list[Path]:
    """NAME.voxel.swc in voxels, and where the voxel size is known NAME.swc in micrometers."""
    paths = [folder / f"{name}.voxel.swc"]
    swc.write(paths[0], tree, unit="voxel", voxel_size=size, comments=comments)
    if size is not None:
        paths.append(folder / f"{name}.swc")
        swc.write(paths[1], morphology.scale_tree(tree, size), unit="um", voxel_size=size, comments=comments)
    return paths


def _list_tree_files(out: Path, name: str) -> list[Path]:
    """The SWC files of a stack that exist."""
    paths = [out / "swc" / f"{name}.{kind}" for kind in ("swc", "voxel.swc")]
    return [path for path in paths if path.exists()] + sorted((out / "swc" / name).glob("*.swc"))


def _set_changed_files_aside(out: Path, name: str) -> None:
    """Remove the trees of an earlier run; a file that a person changed goes to OUT/set_aside."""
    entry = _read_entry(out, name)
    for file in _list_tree_files(out, name):
        checksum = entry.files.get(file.relative_to(out).as_posix()) if entry else None

        # An entry without a key was being written, so what lies there is half a result of ours.
        if checksum == files.sha256(file) or (entry is not None and not entry.key):
            file.unlink()
        else:
            log.info("%s was changed since it was traced, and is now %s", file, files.set_aside(out, file))


# --- Results of earlier runs ---


def _entry_path(out: Path, name: str) -> Path:
    return out / "entries" / f"{name}.json"


def _traced_path(out: Path, name: str) -> Path:
    """The tree of the last run, in voxels, which nobody edits."""
    return out / "entries" / f"{name}.swc"


def _collect_edits(cfg: TraceStacksConfig, name: str, shape: Shape, size: VoxelSize | None) -> Edits | None:
    """The corrected tree that the tracer goes on from; None without one."""
    if cfg.edits != "keep":
        return None
    entry = _read_entry(cfg.out, name)
    return collect_edits(cfg.out, name, shape, size, entry.files if entry else {}, _traced_path(cfg.out, name))


@dataclass(frozen=True)
class _Entry:
    """What entries/ID.json holds."""

    key: str
    """Hash of all that the trees depend on; "": they are being written."""
    files: dict[str, str]
    """File, relative to `out` -> SHA-256."""
    result: Result
    digest: str
    """SHA-256 of all others."""


def _write_entry(out: Path, name: str, key: str, checksums: dict[str, str], result: Result) -> None:
    digest = files.sha256_json([key, checksums, result])
    entry = {"key": key, "files": checksums, "result": result, "digest": digest}
    files.write_json(_entry_path(out, name), entry)


def _read_entry(out: Path, name: str) -> _Entry | None:
    """The entry of a stack; None where there is none, or it is not as written: the stack is then traced again."""
    with contextlib.suppress(InputError):
        entry = files.read_json(_entry_path(out, name), "", _Entry)
        if entry.digest == files.sha256_json([entry.key, entry.files, entry.result]):
            return entry
    return None


def _make_key(cfg: TraceStacksConfig, stack: Stack, weights: str) -> str:
    """All that the trees of a stack depend on, hashed."""
    content = describe_content(stack.path)
    seed_file = stack.find_seed_file(cfg)
    settings = {k: v for k, v in schema.to_plain(cfg).items() if k not in ("stacks", "out", "seeds", "edits")}
    seeds = files.sha256(seed_file) if seed_file is not None and seed_file.is_file() else ""
    edits = [files.sha256(path) for path in list_edit_files(cfg.out, stack.id) if path.exists()]
    own = edits if cfg.edits == "keep" else []
    facts = json.dumps([_METHOD, content, seeds, weights, own, str(stack.path.resolve()), settings], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def _read_result(cfg: TraceStacksConfig, stack: Stack, weights: str) -> Result | None:
    """The result that an earlier run left of the same image and settings, whose files are all whole; None without."""
    entry = _read_entry(cfg.out, stack.id)
    # What cannot be opened fails where it is traced.
    if entry is None or not stack.path.exists():
        return None
    is_whole = all(_is_intact(cfg.out, file, checksum) for file, checksum in entry.files.items())
    if cfg.edits == "keep" and list_changed_trees(cfg.out, stack.id, entry.files):
        return None
    return entry.result if is_whole and entry.key == _make_key(cfg, stack, weights) else None


def _is_intact(out: Path, file: str, checksum: str) -> bool:
    """Whether a file is as it was written, or is a tree that a person may have corrected: one that can be read."""
    path = out / file
    if not path.is_file():
        return False
    if files.sha256(path) == checksum:
        return True
    if not file.startswith("swc/"):
        return False

    try:
        swc.read(path)
    except InputError:
        return False
    return True


def _write_index(cfg: TraceStacksConfig, results: dict[str, Result], failures: list[str]) -> None:
    """Write trace.json and trace.html."""
    settings = {k: v for k, v in schema.to_plain(cfg).items() if k != "stacks"}
    files.write_json(cfg.out / INDEX, {"settings": settings, "stacks": results, "failures": failures})
    page.write_page(cfg.out, results, failures)


def _log_results(cfg: TraceStacksConfig, results: dict[str, Result], failures: list[str]) -> None:
    """Say where the results are, and how to open them."""
    lines = []
    for name, result in results.items():
        entry = _read_entry(cfg.out, name)
        for path in list_changed_trees(cfg.out, name, entry.files if entry else {}):
            log.warning("%s: %s was changed since it was traced; edits=keep goes on from it", name, path)
        trees = [str(cfg.out / result[key]) for key in ("swc", "swc_voxel") if result[key]]
        lines.append(f"{name}: {', '.join([*trees, str(cfg.out / result['overlay'])])}")
    lines += [f"failed: {failure}" for failure in failures]
    lines.append(f"page: {(cfg.out / page.PAGE).resolve()}")
    first = next((result for result in results.values() if result["swc_voxel"]), None)
    log.info("%s", "\n".join([*lines, *page.list_advice(first, cfg.out)]))


def _format_size(size: VoxelSize) -> str:
    return " x ".join(f"{value:.4g}" for value in size)
