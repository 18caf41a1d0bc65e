"""A finished probability becomes trees: SWC in micrometers and in voxels, and an entry in predictions.json.

Each step leaves a file in OUT/strands, with which the next start resumes:

    skeletonize (per block) -> Z_Y_X.npz    trace (per volume) -> forest.npz    flip_tta.py (per block) -> view_*.npz
                                                                     finish (per volume) -> swc, proofread, entry

A volume of more than one super-block is traced in parts (see super_blocks.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, morphology, run_folder, schema, stop_signals
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.infer import proofread
from hpc_neuro.infer.block_pipeline import VolumeRun
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.volumes import InputVolume
from hpc_neuro.tracing import (
    BlockSkeleton,
    Contact,
    TracedVolume,
    add_halo,
    list_trace_blocks,
    measure_confidence,
    skeletonize_block,
    trace_volume,
)
from hpc_neuro.tracing.super_blocks import PieceGroups, SuperBlockLines

log = logging.getLogger(__name__)
PredictionEntry = dict[str, Any]
"""What predictions.json says of one volume."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class VolumeTrees:
    """The trees of one volume, on their way from its probability to their files."""

    cfg: InferConfig
    volume: VolumeRun

    @property
    def key(self) -> str:
        """All that the trees depend on, hashed."""
        cfg, source = self.cfg, self.volume.source
        facts = (
            f"{self.volume.markers.key} {cfg.trees} {schema.dump(cfg.trace)} {source.roots} {source.voxel_size} "
            f"{cfg.flips}"
        )
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def scratch(self) -> Path:
        """Folder of the files that wait for the next step; they belong to the same probability and settings."""
        return self.cfg.out / "strands" / self.volume.source.id / self.key[:16]

    def read_entry(self) -> PredictionEntry | None:
        """The entry that an earlier run, or a share of this one, left of the same probability and settings."""
        record = read_entry_record(self.cfg.out, self.volume.source.id)
        if record is None:
            return None

        # A file that is missing is written again, with all others.
        is_whole = all((self.cfg.out / file).exists() for file in record.files)
        return record.entry if record.key == self.key and is_whole else None

    def list_blocks_to_skeletonize(self) -> list[Box]:
        """The blocks whose skeleton is missing before the volume can be traced; a block without a shard has none."""
        if not self.needs_tracing():
            return []
        source, cfg = self.volume.source, self.cfg.trace

        return [
            box
            for box in list_trace_blocks(source.shape, cfg)
            if not self._skeleton_path(box).exists()
            and ome_zarr.has_shards(self.volume.folder, add_halo(box, source.shape, source.voxel_size, cfg))
        ]

    def skeletonize(self, box: Box) -> None:
        """Skeletonize one block and keep the result until the volume is traced."""
        source = self.volume.source
        read = open_probability(self.volume.folder)
        skeleton = skeletonize_block(read, source.shape, box, source.voxel_size, self.cfg.trace)
        if skeleton is not None:
            save_arrays(self._skeleton_path(box), skeleton)

    def needs_tracing(self) -> bool:
        """Whether the trees of the volume are still to be found."""
        return self.cfg.trees and self.read_entry() is None and not self.has_forest()

    def has_forest(self) -> bool:
        """Whether the trees of the volume are found and wait to be written."""
        return self._forest_path.exists()

    def trace(self) -> None:
        """Find the trees of the volume and keep them until they are written. InputError for a root off the trees."""
        source = self.volume.source
        traced = trace_volume(
            self._load_skeletons(),
            open_probability(self.volume.folder),
            source.shape,
            source.voxel_size,
            roots=source.roots,
            cfg=self.cfg.trace,
            # Besides the probability, tracing may read the image for long.
            image=stop_signals.stop_on_request(source.read),
        )
        self.keep_forest(traced)

    def keep_forest(self, traced: TracedVolume) -> None:
        """Keep the trees of the volume until they are written."""
        source = self.volume.source

        # Kept for the later steps: a kill in one of them does not cost the tracing. With the forest, which comes last,
        # the volume counts as traced.
        files.write_json(self._contacts_path, [asdict(contact) for contact in traced.contacts])
        save_arrays(self._forest_path, morphology.concatenate_trees(traced.trees))

        log.info("%s: %d trees, %d nodes", source.id, len(traced.trees), sum(map(len, traced.trees)))
        if traced.contacts:
            cable = sum(contact.cable_um for contact in traced.contacts)
            log.info(
                "%s: %.0f um of neighbors cut off at %d contacts (trace.contacts=no keeps them)",
                source.id,
                cable,
                len(traced.contacts),
            )

    def load_forest(self) -> Tree:
        """What `trace` found, in voxels."""
        with np.load(self._forest_path) as arrays:
            return Tree(**arrays)

    def finish(self, load_views: Callable[[Tree], Floats]) -> PredictionEntry:
        """Write the trees; the volume's entry in predictions.json, whose paths are relative to `out`.

        `load_views` gives the confidence in mirrored views. Nothing is written again that was before.
        """
        entry = self.read_entry()
        # A run that was killed late may have written all files already.
        if entry is None:
            entry = self._write_files(load_views)

        # The scratch of earlier settings goes too.
        shutil.rmtree(self.scratch.parent, ignore_errors=True)

        # Scratch of other volumes may still be there.
        with contextlib.suppress(OSError):
            (self.cfg.out / "strands").rmdir()
        return entry

    def _write_files(self, load_views: Callable[[Tree], Floats]) -> PredictionEntry:
        out, name = self.cfg.out, self.volume.source.id
        entry = describe_volume(self.volume)

        # Trees are numbered, so fewer new ones would leave the last old ones behind.
        _remove_old_trees(out, name)

        # From here to the record below, what lies at these paths is ours and half written.
        files.write_json(entry_path(out, name), {"key": "", "entry": {}, "files": {}, "writing": True})

        if self.cfg.trees:
            entry |= self._write_trees(load_views)

        # Taken from the disk, so that any later change of a file is noticed.
        checksums = {path.relative_to(out).as_posix(): files.sha256(path) for path in list_tree_files(out, name)}

        if entry["swc"]:
            entry["sha256"] = {kind: checksums[entry[kind]] for kind in ("swc", "swc_voxel")}

        # The record comes last: with it the volume counts as done.
        files.write_json(entry_path(out, name), {"key": self.key, "entry": entry, "files": checksums})
        return entry

    def _write_trees(self, load_views: Callable[[Tree], Floats]) -> PredictionEntry:
        """Write SWC files and what to proofread; what the entry says of them."""
        source, out, cfg = self.volume.source, self.cfg.out, self.cfg.trace
        forest = self.load_forest()

        # A volume may hold no neurite, and a tree of no nodes is no SWC.
        if not len(forest):
            return {"trees": 0}

        plain = measure_confidence(forest, open_probability(self.volume.folder), source.shape)
        confidence = proofread.NodeConfidence(plain, load_views(forest), cfg.floor, cfg.threshold)

        places, scores = proofread.write_tables(
            out,
            source.id,
            forest,
            confidence,
            source.shape,
            source.voxel_size,
            self.volume.tiling.write,
            read_contacts(self._contacts_path),
        )

        # SWC files are passed on without their folder, so each says where it comes from.
        comments = [f"traced by hpc_neuro {run_folder.code_version()} from {source.image}"]
        _write_swc(out / "swc", source.id, forest, source, comments)

        # A single tree would only repeat the file of all.
        if len(forest.roots) > 1:
            for number, tree in enumerate(morphology.split_components(forest), start=1):
                _write_swc(out / "swc" / source.id, f"{number:04d}", tree, source, comments)

        return {
            "trees": len(forest.roots),
            "proofread": {"places": len(places), "sure_share": _mean_score(scores)},
            "confidence": f"proofread/{source.id}.confidence.csv",
            "swc": f"swc/{source.id}.swc",
            "swc_voxel": f"swc/{source.id}.voxel.swc",
        }

    def _load_skeletons(self) -> list[BlockSkeleton]:
        """The skeletons of all blocks of the volume, in the blocks' order."""
        # In the order of blocks, not of ending, so that the trees are the same in every run.
        boxes = list_trace_blocks(self.volume.source.shape, self.cfg.trace)
        return [skeleton for box in boxes if (skeleton := self.load_skeleton(box)) is not None]

    def load_skeleton(self, box: Box) -> BlockSkeleton | None:
        """The skeleton of a block; None for a block without neurite, which leaves no file."""
        path = self._skeleton_path(box)
        if not path.exists():
            return None
        with np.load(path) as arrays:
            return BlockSkeleton(**arrays)

    def _skeleton_path(self, box: Box) -> Path:
        return self.scratch / f"{'_'.join(map(str, box.start))}.npz"

    @property
    def _forest_path(self) -> Path:
        return self.scratch / "forest.npz"

    @property
    def _contacts_path(self) -> Path:
        return self.scratch / "contacts.json"


def entry_path(out: Path, name: str) -> Path:
    """Where a volume's entry waits for those of the others."""
    return out / "entries" / f"{name}.json"


@dataclass(frozen=True)
class EntryRecord:
    """What entries/ID.json holds."""

    key: str
    """Hash of all that the trees depend on; "": the entry is stale, or its files are being written."""
    entry: PredictionEntry
    files: dict[str, str]
    """File of the trees, relative to `out` -> SHA-256."""
    writing: bool = False


def read_entry_record(out: Path, name: str) -> EntryRecord | None:
    """The record of a volume's entry; None when it is missing or torn."""
    with contextlib.suppress(InputError):
        path = entry_path(out, name)
        record = files.read_json(path, "", EntryRecord)
        # A repair moves and removes the files that a record names.
        for file in record.files:
            files.resolve_inside(out, file, path, "")
        return record
    return None


def list_tree_files(out: Path, name: str) -> list[Path]:
    """The files of a volume's trees that exist: SWC of all and of each, and what to proofread."""
    paths = [out / "swc" / f"{name}.{kind}" for kind in ("swc", "voxel.swc")]
    paths += [out / "proofread" / f"{name}.{kind}" for kind in proofread.FILE_KINDS]
    return [path for path in paths if path.exists()] + sorted((out / "swc" / name).glob("*"))


def save_arrays(path: Path, value: BlockSkeleton | Tree | SuperBlockLines | PieceGroups | None) -> None:
    """The arrays of a dataclass in one npz file, whole or not at all; None becomes a file without arrays."""
    arrays = {} if value is None else {field.name: getattr(value, field.name) for field in fields(value)}
    with files.atomic(path) as part, part.open("wb") as handle:
        np.savez(handle, **arrays)


def read_contacts(path: Path) -> list[Contact]:
    """Where tracing cut neighbors off."""
    records = files.read_json(path, f"remove {path.parent}")
    return [Contact(tuple(record["position"]), record["certainty"], record["cable_um"]) for record in records]


def open_probability(folder: Path) -> Callable[[Box], NDArray[np.uint8]]:
    """Reads boxes of a finished probability, 255 is 1. Raises Stopped on a request to stop."""
    array = ome_zarr.open_level(folder)
    return stop_signals.stop_on_request(lambda box: np.asarray(ome_zarr.read_box(array, box), dtype=np.uint8))


def describe_volume(volume: VolumeRun) -> PredictionEntry:
    """A volume's entry while it has no trees."""
    source = volume.source
    markers = list(volume.markers.read_all(volume.tiling.list_blocks(source.shape)))
    skipped = [marker.skipped for marker in markers if marker.skipped is not None]

    return {
        "image": source.image,
        "voxel_size": source.voxel_size,
        "roots": source.roots,
        "threshold": volume.threshold,
        "probability": volume.folder.name,
        "foreground_voxels": sum(marker.foreground for marker in markers),
        "blocks": {
            "all": len(markers),
            "skipped": len(skipped),
            # A black block proves nothing; only the others put the rule to the test.
            "skipped_above_black": sum(evidence.brightest > 0 for evidence in skipped),
            "proved": sum(marker.proof is not None for marker in markers),
        },
        "trees": 0,
        "swc": None,
        "swc_voxel": None,
    }


def set_aside(out: Path, file: Path, entry: Path | None = None) -> None:
    """Move a tree or table, if it exists, to where nothing is written or removed; the entry that names it is stale."""
    # Without a key the entry does not count, and the next run writes the files again.
    if entry is not None and (record := read_entry_record(out, entry.stem)) is not None:
        files.write_json(entry, {**asdict(record), "key": ""})

    if file.exists():
        log.info("%s is now %s", file, files.set_aside(out, file))


def _remove_old_trees(out: Path, name: str) -> None:
    """Remove the trees that other settings left: more trees, perhaps, than there are now. Files of people stay."""
    record = read_entry_record(out, name) or EntryRecord("", {}, {})

    for file in list_tree_files(out, name):
        checksum = record.files.get(file.relative_to(out).as_posix())

        # A file with the recorded bytes is ours; another may be the work of a person.
        if record.writing or checksum == files.sha256(file):
            file.unlink()
        else:
            set_aside(out, file)

    # There is no such folder where there was one tree, or none.
    with contextlib.suppress(OSError):
        (out / "swc" / name).rmdir()


def _mean_score(scores: list[proofread.NeuronScore]) -> float:
    """Share of all cable that is as sure as the threshold."""
    cable = sum(neuron.cable_um for neuron in scores)
    return round(sum(neuron.score * neuron.cable_um for neuron in scores) / max(cable, 1e-9), 4)


def _write_swc(folder: Path, name: str, tree: Tree, source: InputVolume, comments: list[str]) -> None:
    """NAME.swc in micrometers and NAME.voxel.swc in voxels."""
    um = morphology.scale_tree(tree, source.voxel_size)
    swc.write(folder / f"{name}.swc", um, unit="um", voxel_size=source.voxel_size, comments=comments)
    swc.write(folder / f"{name}.voxel.swc", tree, unit="voxel", voxel_size=source.voxel_size, comments=comments)
