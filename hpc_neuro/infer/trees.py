"""A finished probability becomes trees: SWC in micrometres and in voxels, and an entry in predictions.json.

Each step leaves a file in OUT/strands, with which the next start goes on:

    reduce (per block) -> strands    trace (per volume) -> forest.npz    look again (per block, views.py) -> views
                                                                         finished (per volume) -> swc, proofread, entry
"""

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

from hpc_neuro.core import files, morphology, run_folder, schema
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.infer import proofread
from hpc_neuro.infer.block_pipeline import Work
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.volumes import Source
from hpc_neuro.tracing import (
    BlockSkeleton,
    add_halo,
    list_trace_blocks,
    measure_confidence,
    skeletonize_block,
    trace_block_skeletons,
)

log = logging.getLogger(__name__)
Entry = dict[str, Any]
Floats = NDArray[np.float64]


def entry_path(out: Path, name: str) -> Path:
    """Where a volume's entry waits for the others."""
    return out / "entries" / f"{name}.json"


def tree_files(out: Path, name: str) -> list[Path]:
    """The files of a volume's trees that are there: SWC of all and of each, and what to proofread."""
    own = [out / "swc" / f"{name}.{kind}" for kind in ("swc", "voxel.swc")]
    own += [out / "proofread" / f"{name}.{kind}" for kind in proofread.KINDS]
    return [p for p in own if p.exists()] + sorted((out / "swc" / name).glob("*"))


def held(cfg: InferConfig, work: Work) -> Entry | None:
    """A volume's entry from an earlier run, or a share of this one, of the same probability and settings."""
    path = entry_path(cfg.out, work.source.id)
    if not path.exists():
        return None
    found = files.read_json(path, f"remove {path}")
    whole = found["key"] == _key(cfg, work) and all((cfg.out / file).exists() for file in found["files"])
    return dict(found["entry"]) if whole else None


def to_reduce(cfg: InferConfig, work: Work) -> list[Box]:
    """The blocks whose strands are still to be found before a volume can be traced; one without a shard has none."""
    if not to_trace(cfg, work):
        return []
    source = work.source
    return [
        box
        for box in list_trace_blocks(source.shape, cfg.trace)
        if not _strands_path(cfg, work, box).exists()
        and ome_zarr.has_shards(work.folder, add_halo(box, source.shape, source.voxel_size, cfg.trace))
    ]


def reduce(cfg: InferConfig, work: Work, box: Box) -> None:
    """Find the strands of one block and keep them until the volume is traced."""
    source = work.source
    found = skeletonize_block(reader(work.folder), source.shape, box, source.voxel_size, cfg.trace)
    if found is not None:
        save(_strands_path(cfg, work, box), found)


def to_trace(cfg: InferConfig, work: Work) -> bool:
    """Whether the trees of a volume, all of whose blocks are reduced, are still to be found."""
    return cfg.trees and held(cfg, work) is None and not traced(cfg, work)


def traced(cfg: InferConfig, work: Work) -> bool:
    """Whether the trees of a volume are found and wait to be written."""
    return _forest_path(cfg, work).exists()


def trace(cfg: InferConfig, work: Work) -> None:
    """Find the trees of a volume and keep them until they are written. Raises InputError for a root off the trees."""
    source, begun = work.source, time.monotonic()
    kept, read = _kept(cfg, work), reader(work.folder)
    found = trace_block_skeletons(
        kept, read, source.shape, source.voxel_size, roots=source.roots, cfg=cfg.trace, image=source.read
    )
    save(_forest_path(cfg, work), morphology.concatenate_trees(found))
    seconds = time.monotonic() - begun
    log.info("%s: %d trees, %d nodes, traced in %.1f s", source.id, len(found), sum(map(len, found)), seconds)


def forest(cfg: InferConfig, work: Work) -> Tree:
    """What `trace` found, in voxels."""
    with np.load(_forest_path(cfg, work)) as arrays:
        return Tree(**arrays)


def finished(cfg: InferConfig, work: Work, views: Callable[[Tree], Floats]) -> Entry:
    """A volume's entry in predictions.json (paths relative to `out`), its trees written.

    `views` gives the confidence in mirrored views. Nothing is written again that was before.
    """
    entry = held(cfg, work)
    if entry is None:
        entry = untraced(work)
        _forget(cfg.out, work.source.id)
        # from here to the whole record below, what lies there is ours and half written
        files.write_json(entry_path(cfg.out, work.source.id), {"key": "", "entry": {}, "files": {}, "writing": True})
        if cfg.trees:
            _write_trees(cfg, work, entry, views)
        written = {p.relative_to(cfg.out).as_posix(): files.sha256(p) for p in tree_files(cfg.out, work.source.id)}
        if entry["swc"]:
            entry["sha256"] = {kind: written[entry[kind]] for kind in ("swc", "swc_voxel")}
        record = {"key": _key(cfg, work), "entry": entry, "files": written}
        files.write_json(entry_path(cfg.out, work.source.id), record)
    shutil.rmtree(scratch(cfg, work).parent, ignore_errors=True)
    with contextlib.suppress(OSError):  # others may still be there
        (cfg.out / "strands").rmdir()
    return entry


def save(path: Path, value: BlockSkeleton | Tree) -> None:
    """The arrays of a dataclass in one npz file, whole or not at all."""
    with files.atomic(path) as part, part.open("wb") as handle:
        np.savez(handle, **{field.name: getattr(value, field.name) for field in fields(value)})


def scratch(cfg: InferConfig, work: Work) -> Path:
    """Where things wait that belong to the same probability and settings."""
    return cfg.out / "strands" / work.source.id / _key(cfg, work)[:16]


def _key(cfg: InferConfig, work: Work) -> str:
    """All that the trees depend on, hashed."""
    source = work.source
    facts = f"{work.marks.key} {cfg.trees} {schema.dump(cfg.trace)} {source.roots} {source.voxel_size} {cfg.flips}"
    return hashlib.sha256(facts.encode()).hexdigest()


def _strands_path(cfg: InferConfig, work: Work, box: Box) -> Path:
    return scratch(cfg, work) / f"{'_'.join(map(str, box.start))}.npz"


def _forest_path(cfg: InferConfig, work: Work) -> Path:
    return scratch(cfg, work) / "forest.npz"


def _kept(cfg: InferConfig, work: Work) -> list[BlockSkeleton]:
    """The strands of all blocks of a volume, in the blocks' order."""
    paths = (_strands_path(cfg, work, box) for box in list_trace_blocks(work.source.shape, cfg.trace))
    found = []
    for path in paths:
        if path.exists():
            with np.load(path) as arrays:
                found.append(BlockSkeleton(**arrays))
    return found


def reader(folder: Path) -> Callable[[Box], NDArray[np.uint8]]:
    """Reads boxes of a finished probability, 255 is 1."""
    array = ome_zarr.open_level(folder)
    return lambda box: np.asarray(ome_zarr.read_box(array, box), dtype=np.uint8)


def untraced(work: Work) -> Entry:
    """A volume's entry as long as it has no trees."""
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


def _write_trees(cfg: InferConfig, work: Work, entry: Entry, views: Callable[[Tree], Floats]) -> None:
    source, tree = work.source, forest(cfg, work)
    entry["trees"] = len(tree.roots)
    if not len(tree):
        return
    sure = measure_confidence(tree, reader(work.folder), source.shape)
    known = proofread.Sure(sure, views(tree), cfg.trace.floor, cfg.trace.threshold)
    doubts, scores = proofread.write(cfg.out, source.id, tree, known, source.shape, source.voxel_size, work.plan.write)
    entry["proofread"] = {"places": len(doubts), "sure_share": _mean(scores)}
    entry["confidence"] = f"proofread/{source.id}.confidence.csv"
    about = [f"traced by hpc_neuro {run_folder.code_version()} from {source.image}"]
    entry["swc"], entry["swc_voxel"] = f"swc/{source.id}.swc", f"swc/{source.id}.voxel.swc"
    _write(cfg.out / "swc", source.id, tree, source, about)
    for number, one in enumerate(morphology.split_components(tree) if len(tree.roots) > 1 else [], start=1):
        _write(cfg.out / "swc" / source.id, f"{number:04d}", one, source, about)


def _forget(out: Path, name: str) -> None:
    """Remove the trees that other settings left: more trees, perhaps, than there are now. Somebody's work stays."""
    path = entry_path(out, name)
    record = files.read_json(path, f"remove {path}") if path.exists() else {"files": {}}
    for file in tree_files(out, name):
        wanted = record["files"].get(file.relative_to(out).as_posix())
        if record.get("writing") or wanted == files.sha256(file):
            file.unlink()
        else:
            set_aside(out, file)
    with contextlib.suppress(OSError):
        (out / "swc" / name).rmdir()


def set_aside(out: Path, file: Path, entry: Path | None = None) -> None:
    """Move a tree or table, if it is there, to where nothing is made or removed; the entry that names it is stale."""
    if entry is not None:
        files.write_json(entry, {**files.read_json(entry, f"remove {entry}"), "key": ""})
    if not file.exists():
        return
    target, number = out / "set_aside" / file.relative_to(out), 1
    while target.exists():
        number += 1
        target = target.with_name(f"{file.stem}.{number}{file.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)
    log.info("%s is now %s", file, target)


def _mean(scores: list[proofread.Neuron]) -> float:
    """Share of all cable that is as sure as the threshold."""
    return round(sum(n.score * n.cable_um for n in scores) / max(sum(n.cable_um for n in scores), 1e-9), 4)


def _write(folder: Path, name: str, tree: Tree, source: Source, about: list[str]) -> None:
    """NAME.swc in micrometres and NAME.voxel.swc in voxels."""
    um = morphology.scale_tree(tree, source.voxel_size)
    swc.write(folder / f"{name}.swc", um, unit="um", voxel_size=source.voxel_size, comments=about)
    swc.write(folder / f"{name}.voxel.swc", tree, unit="voxel", voxel_size=source.voxel_size, comments=about)
