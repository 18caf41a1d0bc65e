"""A finished probability becomes trees: SWC in micrometres and in voxels, and an entry in predictions.json."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro import files, morphology, runs, schema
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.geometry import Box
from hpc_neuro.infer import proofread
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.engine import Work
from hpc_neuro.infer.sources import Source
from hpc_neuro.morphology import Tree
from hpc_neuro.schema import InputError
from hpc_neuro.tracing import Strands, confidence, context, reduced, trace_blocks, trace_strands

log = logging.getLogger(__name__)
Entry = dict[str, Any]


def entry_path(out: Path, name: str) -> Path:
    """Where a volume's entry waits for the others."""
    return out / "entries" / f"{name}.json"


def held(cfg: InferConfig, work: Work) -> Entry | None:
    """A volume's entry from an earlier run, or a share of this one, of the same probability and settings."""
    path = entry_path(cfg.out, work.source.id)
    if not path.exists():
        return None
    found = files.read_json(path, f"remove {path}")
    trees = [found["entry"][name] for name in ("swc", "swc_voxel") if found["entry"][name]]
    whole = found["key"] == _key(cfg, work) and all((cfg.out / tree).exists() for tree in trees)
    return dict(found["entry"]) if whole else None


def to_reduce(cfg: InferConfig, work: Work) -> list[Box]:
    """The blocks whose strands are still to be found before a volume can be traced; one without a shard has none."""
    if not cfg.trees or held(cfg, work) is not None:
        return []
    spacing = cfg.trace.spacing(work.source.voxel_size)
    return [
        box
        for box in trace_blocks(work.source.shape, cfg.trace)
        if not _strands_path(cfg, work, box).exists()
        and ome_zarr.holds_any(work.folder, context(box, work.source.shape, spacing))
    ]


def reduce(cfg: InferConfig, work: Work, box: Box) -> None:
    """Find the strands of one block and keep them until the volume is traced."""
    source = work.source
    found = reduced(reader(work.folder), source.shape, box, cfg.trace.spacing(source.voxel_size), cfg.trace)
    if found is not None:
        with files.atomic(_strands_path(cfg, work, box)) as part, part.open("wb") as handle:
            np.savez(handle, **{field.name: getattr(found, field.name) for field in fields(found)})


def finished(cfg: InferConfig, work: Work) -> tuple[Entry, list[str]]:
    """A volume's entry in predictions.json (paths relative to `out`), and why there is no tree, if so.

    Every block of it has been reduced. Not traced again when it was before.
    """
    entry = held(cfg, work)
    if entry is not None:
        return entry, []
    entry = _entry(work)
    problems = _trace(cfg, work, entry) if cfg.trees else []
    if not problems:
        files.write_json(entry_path(cfg.out, work.source.id), {"key": _key(cfg, work), "entry": entry})
    shutil.rmtree(_strands_folder(cfg, work).parent, ignore_errors=True)
    with contextlib.suppress(OSError):  # others may still be there
        (cfg.out / "strands").rmdir()
    return entry, problems


def _key(cfg: InferConfig, work: Work) -> str:
    """All that the trees depend on, hashed."""
    source = work.source
    facts = f"{work.marks.key} {cfg.trees} {schema.dump(cfg.trace)} {source.roots} {source.voxel_size}"
    return hashlib.sha256(facts.encode()).hexdigest()


def _strands_folder(cfg: InferConfig, work: Work) -> Path:
    return cfg.out / "strands" / work.source.id / _key(cfg, work)[:16]


def _strands_path(cfg: InferConfig, work: Work, box: Box) -> Path:
    return _strands_folder(cfg, work) / f"{'_'.join(map(str, box.start))}.npz"


def _kept(cfg: InferConfig, work: Work) -> list[Strands]:
    """The strands of all blocks of a volume, in the blocks' order."""
    paths = (_strands_path(cfg, work, box) for box in trace_blocks(work.source.shape, cfg.trace))
    found = []
    for path in paths:
        if path.exists():
            with np.load(path) as arrays:
                found.append(Strands(**arrays))
    return found


def reader(folder: Path) -> Callable[[Box], NDArray[np.uint8]]:
    """Reads boxes of a finished probability, 255 is 1."""
    array = ome_zarr.open_level(folder)
    return lambda box: np.asarray(ome_zarr.read(array, box), dtype=np.uint8)


def _entry(work: Work) -> Entry:
    source, marks = work.source, list(work.marks.all(work.plan.blocks(work.source.shape)))
    skipped = [m for m in marks if m.skipped is not None]
    return {
        "image": source.image,
        "voxel_size": source.voxel_size,
        "roots": source.roots,
        "threshold": work.threshold,
        "probability": work.folder.name,
        "foreground_voxels": sum(m.foreground for m in marks),
        "blocks": {
            "all": len(marks),
            "skipped": len(skipped),
            "skipped_above_black": sum(m.skipped.brightest > 0 for m in skipped if m.skipped),
            "proved": sum(m.proof is not None for m in marks),
        },
        "trees": 0,
        "swc": None,
        "swc_voxel": None,
    }


def _trace(cfg: InferConfig, work: Work, entry: Entry) -> list[str]:
    source, begun = work.source, time.monotonic()
    try:
        read = reader(work.folder)
        found = trace_strands(
            _kept(cfg, work), read, source.shape, source.voxel_size, roots=source.roots, cfg=cfg.trace
        )
    except InputError as error:  # a root off the foreground; the other volumes still count
        return [f"{source.id}: not traced, {error}"]
    entry["trees"] = len(found)
    if found:
        tree = together(found)
        sure = confidence(tree, read, source.shape)
        floor, threshold = cfg.trace.floor, cfg.trace.threshold
        doubts, scores = proofread.write(
            cfg.out, source.id, tree, sure, floor, threshold, source.shape, source.voxel_size
        )
        entry["proofread"] = {"places": len(doubts), "sure_share": _mean(scores)}
        about = [f"traced by hpc_neuro {runs.code_version()} from {source.image}"]
        entry["swc"], entry["swc_voxel"] = f"swc/{source.id}.swc", f"swc/{source.id}.voxel.swc"
        _write(cfg.out / "swc", source.id, tree, source, about)
        entry["sha256"] = {name: files.sha256(cfg.out / entry[name]) for name in ("swc", "swc_voxel")}
        for number, tree in enumerate(found if len(found) > 1 else [], start=1):
            _write(cfg.out / "swc" / source.id, f"{number:04d}", tree, source, about)
    nodes = sum(map(len, found))
    log.info("%s: %d trees, %d nodes, traced in %.1f s", source.id, len(found), nodes, time.monotonic() - begun)
    return []


def _mean(scores: list[proofread.Neuron]) -> float:
    """Share of all cable that is as sure as the threshold."""
    return round(sum(n.score * n.cable_um for n in scores) / max(sum(n.cable_um for n in scores), 1e-9), 4)


def _write(folder: Path, name: str, tree: Tree, source: Source, about: list[str]) -> None:
    """NAME.swc in micrometres and NAME.voxel.swc in voxels."""
    um = morphology.scaled(tree, source.voxel_size)
    swc.write(folder / f"{name}.swc", um, unit="um", voxel_size=source.voxel_size, comments=about)
    swc.write(folder / f"{name}.voxel.swc", tree, unit="voxel", voxel_size=source.voxel_size, comments=about)


def together(trees: list[Tree]) -> Tree:
    """Several trees as one forest."""
    starts = np.cumsum([0, *map(len, trees)])
    parents = [np.where(t.parents >= 0, t.parents + s, -1) for t, s in zip(trees, starts, strict=False)]
    return Tree(
        np.concatenate([t.points for t in trees]),
        np.concatenate([t.radii for t in trees]),
        np.concatenate(parents).astype(np.int64),
        np.concatenate([t.types for t in trees]),
    )
