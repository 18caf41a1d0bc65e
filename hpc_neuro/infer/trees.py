"""A finished probability becomes trees: SWC in micrometers and in voxels, and an entry in predictions.json.

Each step leaves a file in OUT/strands, with which the next start resumes:

    skeletonize (per group) -> Z_Y_X.npz    trace (per volume) -> forest.npz    flip_tta.py (per block) -> view_*.npz
                                                                     finish (per volume) -> swc, proofread, entry

A volume of more than one super-block is traced in parts (see super_blocks.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, morphology, run_folder, schema, stop_signals
from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import ome_zarr, shard_packs, swc
from hpc_neuro.infer import proofread, skeleton_groups
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
from hpc_neuro.tracing.super_blocks import has_super_blocks

log = logging.getLogger(__name__)
PredictionEntry = dict[str, Any]
"""What predictions.json says of one volume."""
Floats = NDArray[np.float64]
_KEPT_BYTES = 1 << 28
"""[bytes] Of shards of the probability, compressed, that a process keeps while it traces."""
_SCRATCH_FORM = 3
"""Form of the files that wait for the next step; those of another form are not read."""
_GROUPS_IN_MEMORY = 32
"""Groups of skeletons that are kept after they were read; a few MB each."""


@dataclass(frozen=True)
class TraceGrid:
    """What is traced: the probability of a volume on the grid that the student sees."""

    shape: Shape
    voxel_size: VoxelSize
    roots: tuple[Point, ...]
    """[voxel of the grid] z y x."""
    read_image: Callable[[Box], NDArray[np.float32]]
    """Normalized voxels of a box of the grid. Raises Stopped on a request to stop, as the next one does."""
    read_probability: Callable[[Box], NDArray[np.uint8]]
    """Probability in a box of the grid, 255 is 1."""


@dataclass(frozen=True)
class VolumeTrees:
    """The trees of one volume, on their way from its probability to their files."""

    cfg: InferConfig
    volume: VolumeRun
    shards: frozenset[str] | None = None
    """Shards of the probability that have a file; None: looked for one by one."""

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
        return self.cfg.out / "strands" / self.volume.source.id / f"{self.key[:16]}_{_SCRATCH_FORM}"

    def read_entry(self) -> PredictionEntry | None:
        """The entry that an earlier run, or a share of this one, left of the same probability and settings."""
        record = read_entry_record(self.cfg.out, self.volume.source.id)
        if record is None:
            return None

        # A file that is missing is written again, with all others.
        return record.entry if record.key == self.key and _has_all(self.cfg.out, record.files) else None

    @property
    def traced_shape(self) -> Shape:
        """[voxel] Of the grid that is traced."""
        source = self.volume.source
        return source.shape if source.resampling is None else source.resampling.new_shape

    def open_grid(self) -> TraceGrid:
        """What is traced. Where neurites have the width that the student knows, the tracer finds them best, too."""
        return self._grid

    @functools.cached_property
    def _grid(self) -> TraceGrid:
        # Opened once: each opening reads metadata, and a brain has millions of tasks.
        source, probability = self.volume.source, self.read_probability
        # Besides the probability, tracing may read the image for long.
        image, grid = stop_signals.stop_on_request(source.show), source.resampling
        if grid is None:
            return TraceGrid(source.shape, source.voxel_size, source.roots, image, probability)

        read = grid.read_new(probability)
        return TraceGrid(
            grid.new_shape,
            grid.new_voxel_size,
            tuple(grid.move_root(root) for root in source.roots),
            image,
            lambda box: np.rint(read(box)).astype(np.uint8),
        )

    @functools.cached_property
    def read_probability(self) -> Callable[[Box], NDArray[np.uint8]]:
        """Reads boxes of the finished probability, 255 is 1. Raises Stopped on a request to stop."""
        # Who traces a large volume reads its packs (see `pack_shards`), which are whole before anything is traced.
        packs = shard_packs.PackReader(self.scratch) if self.is_large else None
        read = ome_zarr.ShardReader(self.volume.folder, _KEPT_BYTES, self.shards, packs.read if packs else None)
        return stop_signals.stop_on_request(lambda box: np.asarray(read(box), dtype=np.uint8))

    def move_back(self, traced: TracedVolume) -> TracedVolume:
        """Trees and contacts in voxels of the grid that is traced -> the same in voxels of the volume."""
        grid = self.volume.source.resampling
        if grid is None:
            return traced
        contacts = []
        for contact in traced.contacts:
            contacts.append(replace(contact, position=grid.move_point_back(contact.position)))
        return replace(traced, trees=[grid.move_tree_back(tree) for tree in traced.trees], contacts=contacts)

    @property
    def is_large(self) -> bool:
        """Whether the volume has more than one super-block."""
        return has_super_blocks(self.traced_shape, self.cfg.trace)

    def list_kept(self) -> set[str]:
        """The names of all files that wait for the next step: one listing, where a look at each takes an hour."""
        return {path.name for path in self.scratch.iterdir()} if self.scratch.is_dir() else set()

    def list_shards_to_pack(self) -> list[list[Shape]]:
        """The shards of a large volume, by the pack that is missing."""
        if not self.is_large or not self.needs_tracing():
            return []
        kept, packs = self.list_kept(), shard_packs.group_shards(ome_zarr.list_shards(self.volume.folder))
        return [shards for pack, shards in packs.items() if shard_packs.name_pack(pack) not in kept]

    def pack_shards(self, shards: Sequence[Shape]) -> None:
        """Copy the shards of one pack into one file."""
        path = self.scratch / shard_packs.name_pack(shard_packs.find_pack(shards[0]))
        shard_packs.write_pack(path, self.volume.folder, shards)

    def list_groups_to_skeletonize(self) -> list[list[Box]]:
        """The blocks, by groups, whose skeletons are missing before the volume can be traced.

        A block without a shard has no skeleton.
        """
        if not self.needs_tracing():
            return []
        boxes = list_trace_blocks(self.traced_shape, self.cfg.trace)

        names = self.list_kept()
        has_shards = self._mark_blocks_with_shards(boxes).tolist()
        return skeleton_groups.group_boxes(
            (
                box
                for box, is_needed in zip(boxes, has_shards, strict=True)
                if is_needed and self._find_skeleton_path(box).name not in names
            ),
            self._skeleton_group,
        )

    def _mark_blocks_with_shards(self, boxes: Sequence[Box]) -> NDArray[np.bool_]:
        """[n] whether any shard has a file in what is read for each of the trace blocks of the volume."""
        grid, source = self.open_grid(), self.volume.source
        written = ome_zarr.list_shards(self.volume.folder)
        shard = np.array(self.volume.tiling.write)

        # The halo of a block along one axis does not depend on the others.
        ranges = []
        for axis in range(3):
            own = {box.start[axis]: box for box in boxes}
            halos = [add_halo(own[start], grid.shape, grid.voxel_size, self.cfg.trace) for start in sorted(own)]
            # Shards lie on the grid of the volume.
            if source.resampling is not None:
                halos = [source.resampling.find_image_box(halo) for halo in halos]
            firsts = [halo.start[axis] // int(shard[axis]) for halo in halos]
            stops = [-(-halo.stop[axis] // int(shard[axis])) for halo in halos]
            ranges.append(np.array([firsts, stops]))

        # Sums over all shards before a corner: eight of them give the number in a box.
        counts = np.zeros([int(stops.max()) + 1 for _, stops in ranges], dtype=np.int64)
        if len(written):
            counts[tuple(np.array(written).T + 1)] = 1
        for axis in range(3):
            counts = counts.cumsum(axis=axis)
        for axis, (firsts, stops) in enumerate(ranges):
            counts = counts.take(stops, axis=axis) - counts.take(firsts, axis=axis)
        return counts.ravel() > 0

    def skeletonize(self, boxes: Sequence[Box]) -> None:
        """Skeletonize the blocks of one group and keep the result until the volume is traced."""
        grid, cfg, read = self.open_grid(), self.cfg.trace, self.open_grid().read_probability
        # Resampling takes more memory than the voxels that it gives.
        if len(boxes) > 1 and self.volume.source.resampling is None:
            halos = [add_halo(box, grid.shape, grid.voxel_size, cfg) for box in boxes]
            read = skeleton_groups.read_at_once(read, halos)

        skeletons = skeleton_groups.Skeletons()
        for box in boxes:
            stop_signals.check()
            skeleton = skeletonize_block(read, grid.shape, box, grid.voxel_size, cfg)
            if skeleton is not None:
                skeletons[skeleton_groups.name_box(box)] = skeleton
        skeleton_groups.save_skeletons(self._find_skeleton_path(boxes[0]), skeletons)

    def needs_tracing(self) -> bool:
        """Whether the trees of the volume are still to be found."""
        return self.cfg.trees and self.read_entry() is None and not self.has_forest()

    def has_forest(self) -> bool:
        """Whether the trees of the volume are found and wait to be written."""
        # A kill may leave part of what is removed at the end.
        return (self._forest_path.exists() or self.order_path.exists()) and self.read_entry() is None

    def trace(self) -> None:
        """Find the trees of the volume and keep them until they are written. InputError for a root off the trees."""
        grid = self.open_grid()
        traced = trace_volume(
            self._load_skeletons(),
            grid.read_probability,
            grid.shape,
            grid.voxel_size,
            roots=grid.roots,
            cfg=self.cfg.trace,
            image=grid.read_image,
        )
        self.keep_forest(self.move_back(traced))

    def keep_forest(self, traced: TracedVolume) -> None:
        """Keep the trees of the volume until they are written."""
        source = self.volume.source

        # Kept for the later steps: a kill in one of them does not cost the tracing. With the forest, which comes last,
        # the volume counts as traced.
        files.write_json(self._contacts_path, [asdict(contact) for contact in traced.contacts])
        save_arrays(self._forest_path, morphology.concatenate_trees(traced.trees))

        trees = files.format_count(len(traced.trees), "tree")
        log.info("%s: %s, %d nodes", source.id, trees, sum(map(len, traced.trees)))
        log_contacts(source.id, traced)

    def load_forest(self) -> Tree:
        """What `trace` found, in voxels."""
        return load_tree(self._forest_path)

    def count_batches(self) -> int:
        """Batches of trees of a volume that is traced; 1 for one that is not large."""
        if not self.order_path.exists():
            return 1
        with np.load(self.order_path) as arrays:
            return len(arrays["starts"]) - 1

    def load_batch(self, batch: int) -> Tree:
        """The trees of a batch; all of a volume that is not large."""
        path = self.batch_path(batch)
        return load_tree(path) if path.exists() else self.load_forest()

    def batch_path(self, batch: int) -> Path:
        """Where the trees of a batch are kept; with them it counts as finished."""
        return self.scratch / f"trees_{batch}.npz"

    def finish(self, write: Callable[[], tuple[PredictionEntry, dict[str, str]]]) -> PredictionEntry:
        """Write the trees; the volume's entry in predictions.json, whose paths are relative to `out`.

        `write` writes them, and gives what the entry says of them and their checksums. Nothing is written again that
        was before.
        """
        entry = self.read_entry()
        # A run that was killed late may have written all files already.
        if entry is None:
            facts, checksums = write()
            entry = describe_volume(self.volume) | facts
            if entry["swc"]:
                entry["sha256"] = {kind: checksums[entry[kind]] for kind in ("swc", "swc_voxel")}

            # The record comes last: with it the volume counts as done.
            record = {"key": self.key, "entry": entry, "files": dict(sorted(checksums.items()))}
            files.write_json(entry_path(self.cfg.out, self.volume.source.id), record)

        return entry

    def list_scratch(self) -> list[Path]:
        """The files that a finished volume needs no more; those of earlier settings, too."""
        # A walk tells files from folders without a look at each.
        return sorted(Path(folder, name) for folder, _, names in os.walk(self.scratch.parent) for name in names)

    def remove_scratch(self) -> None:
        """Remove the folder of the volume's scratch and what is left in it."""
        shutil.rmtree(self.scratch.parent, ignore_errors=True)

        # Scratch of other volumes may still be there.
        with contextlib.suppress(OSError):
            (self.cfg.out / "strands").rmdir()

    def begin_files(self) -> None:
        """Remove the files of earlier settings, and note that files of the volume are being written."""
        # Trees are numbered, so fewer new ones would leave the last old ones behind.
        _remove_old_trees(self.cfg.out, self.volume.source.id)

        # From here to the record at the end, what lies at these paths is ours and half written.
        record = {"key": "", "entry": {}, "files": {}, "writing": True}
        files.write_json(entry_path(self.cfg.out, self.volume.source.id), record)

    def write_files(self, load_views: Callable[[Tree], Floats]) -> tuple[PredictionEntry, dict[str, str]]:
        """Write all files of the trees; what the entry says of them, and the checksum of each file.

        `load_views` gives the confidence in mirrored views.
        """
        out, name = self.cfg.out, self.volume.source.id
        self.begin_files()
        facts = self._write_trees(load_views) if self.cfg.trees else {}

        # Taken from the disk, so that any later change of a file is noticed.
        paths = list_tree_files(out, name)
        return facts, {path.relative_to(out).as_posix(): files.checksum(path) for path in paths}

    def _write_trees(self, load_views: Callable[[Tree], Floats]) -> PredictionEntry:
        """Write SWC files and what to proofread; what the entry says of them."""
        source, out, cfg = self.volume.source, self.cfg.out, self.cfg.trace
        forest = self.load_forest()

        # A volume may hold no neurite, and a tree of no nodes is no SWC.
        if not len(forest):
            return {"trees": 0}

        plain = measure_confidence(forest, self.read_probability, source.shape)
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

        _write_swc(out / "swc", source.id, forest, source)

        # A single tree would only repeat the file of all.
        if 1 < len(forest.roots) <= self.cfg.tree_files:
            for number, tree in enumerate(morphology.split_components(forest), start=1):
                write_single_tree(out, number, tree, source)

        score = proofread.average_score([n.score for n in scores], [n.cable_um for n in scores])
        return self.describe_trees(len(forest.roots), len(places), score)

    def describe_trees(self, trees: int, places: int, score: float) -> PredictionEntry:
        """What the entry says of trees: their number, that of doubtful places, and the share of cable that is sure."""
        name = self.volume.source.id
        return {
            "trees": trees,
            "proofread": {"places": places, "sure_share": score},
            "confidence": f"proofread/{name}.confidence.csv",
            "swc": f"swc/{name}.swc",
            "swc_voxel": f"swc/{name}.voxel.swc",
        }

    def _load_skeletons(self) -> list[BlockSkeleton]:
        """The skeletons of all blocks of the volume, in the blocks' order."""
        # In the order of blocks, not of ending, so that the trees are the same in every run.
        boxes = list_trace_blocks(self.traced_shape, self.cfg.trace)
        return [skeleton for box in boxes if (skeleton := self.load_skeleton(box)) is not None]

    def load_skeleton(self, box: Box) -> BlockSkeleton | None:
        """The skeleton of a block; None for a block without neurite."""
        corner = skeleton_groups.find_corner(box, self._skeleton_group)
        return self._load_skeletons_of_group(corner).get(skeleton_groups.name_box(box))

    @functools.cached_property
    def _load_skeletons_of_group(self) -> Callable[[Shape], skeleton_groups.Skeletons]:
        # The blocks of a super-block are taken row by row, and their rows cross the same groups.
        return functools.lru_cache(maxsize=_GROUPS_IN_MEMORY)(self._read_skeletons_of_group)

    def _read_skeletons_of_group(self, corner: Shape) -> skeleton_groups.Skeletons:
        # Most of a brain is empty, and asking for a file that is not there costs as much as opening one.
        if self.shards is not None and self.shards.isdisjoint(self._list_shards_around(corner)):
            return {}
        return skeleton_groups.load_skeletons(self._skeleton_path(corner))

    def _list_shards_around(self, corner: Shape) -> Iterator[str]:
        """The shards that are read for a group of blocks of tracing, whether they have a file or not."""
        grid, source = self.open_grid(), self.volume.source
        group = Box.at(corner, self._skeleton_group).clip(Box.whole(grid.shape))
        halo = add_halo(group, grid.shape, grid.voxel_size, self.cfg.trace)
        if source.resampling is not None:
            halo = source.resampling.find_image_box(halo)
        return ome_zarr.list_shards_in(halo, self.volume.tiling.write)

    @functools.cached_property
    def _skeleton_group(self) -> Shape:
        return skeleton_groups.choose_group(self.traced_shape, self.cfg.trace.block)

    def _skeleton_path(self, corner: Shape) -> Path:
        """Where the skeletons of a group are kept, by its first voxel."""
        return self.scratch / f"{'_'.join(map(str, corner))}.npz"

    def _find_skeleton_path(self, box: Box) -> Path:
        """Where the skeletons of a block's group are kept."""
        return self._skeleton_path(skeleton_groups.find_corner(box, self._skeleton_group))

    @property
    def _forest_path(self) -> Path:
        return self.scratch / "forest.npz"

    @property
    def order_path(self) -> Path:
        """Where the order of the trees of a large volume is kept; with it they count as found."""
        return self.scratch / "order.npz"

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


def log_contacts(name: str, traced: TracedVolume) -> None:
    """State how much of a volume's neighbors was cut off, and by which rule."""
    if traced.crowd is not None:
        log.info("%s: %s", name, traced.crowd.describe())
    cuts = [contact for contact in traced.contacts if contact.is_cut]
    if cuts:
        cable = sum(contact.cable_um for contact in cuts)
        text = "%s: %.0f um of neighbors cut off at %d contacts (trace.contacts=no keeps them)"
        log.info(text, name, cable, len(cuts))


def save_arrays(path: Path, value: Any) -> None:
    """The arrays of a dataclass in one npz file, whole or not at all; None becomes a file without arrays."""
    arrays = {} if value is None else {field.name: getattr(value, field.name) for field in fields(value)}
    files.write_npz(path, arrays)


def load_tree(path: Path) -> Tree:
    """The tree that `save_arrays` wrote, whatever else the file holds."""
    with np.load(path) as arrays:
        return Tree(**{field.name: arrays[field.name] for field in fields(Tree)})


def read_contacts(path: Path) -> list[Contact]:
    """Where tracing cut neighbors off, or may have left them."""
    records = files.read_json(path, f"remove {path.parent}")
    return [Contact(**{**record, "position": tuple(record["position"])}) for record in records]


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
        if record.writing or (checksum is not None and files.has_checksum(file, checksum)):
            file.unlink()
        else:
            set_aside(out, file)

    # There is no such folder where there was one tree, or none.
    with contextlib.suppress(OSError):
        (out / "swc" / name).rmdir()


def _has_all(out: Path, names: Iterable[str]) -> bool:
    """Whether files below `out` exist. One listing for each folder: a look at each file takes long on a busy disk."""
    folders = dict[Path, set[str]]()
    for name in names:
        path = out / name
        if path.parent not in folders:
            folders[path.parent] = {file.name for file in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.name not in folders[path.parent]:
            return False
    return True


def list_comments(source: InputVolume) -> list[str]:
    """Comments of an SWC file: these are passed on without their folder, so each says where it comes from."""
    return [f"traced by hpc_neuro {run_folder.code_version()} from {source.image}"]


def write_single_tree(out: Path, number: int, tree: Tree, source: InputVolume) -> list[Path]:
    """Write one of several trees of a volume to files of its own; their paths."""
    return _write_swc(out / "swc" / source.id, f"{number:04d}", tree, source)


def _write_swc(folder: Path, name: str, tree: Tree, source: InputVolume) -> list[Path]:
    """NAME.swc in micrometers and NAME.voxel.swc in voxels."""
    um, comments = morphology.scale_tree(tree, source.voxel_size), list_comments(source)
    paths = [folder / f"{name}.swc", folder / f"{name}.voxel.swc"]
    swc.write(paths[0], um, unit="um", voxel_size=source.voxel_size, comments=comments)
    swc.write(paths[1], tree, unit="voxel", voxel_size=source.voxel_size, comments=comments)
    return paths
