"""Done markers: which block was written where, with the checksums of its read-back. A block without one is not done.

OUT/blocks/ID/0_1_2.json     a block: written, or skipped with the evidence
OUT/blocks/ID/level_1.json   a pyramid level: the checksum of each shard
OUT/failed/ID/0_1_2.json     a block that failed at every try: the error and its traceback
OUT/begun/ID/0_1_2           how often a block was begun and its process was killed before it ended
OUT/failed/ID/trees.json, OUT/begun/ID/trees, ...     the same for the other tasks of a volume (see volume_stages.py)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Block, Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.task_queue import Task


@dataclass(frozen=True)
class EmptyEvidence:
    """Why a block was, or would have been, skipped: its brightest cell is not above the level."""

    brightest: float
    """Normalized brightness."""
    level: float
    """The setting `empty_level`."""


@dataclass(frozen=True)
class BlockMarker:
    """One finished block."""

    key: str
    """Hash of all that the probability depends on."""
    index: Shape
    start: Shape
    """[voxel] First voxel of the block."""
    files: dict[str, str]
    """Shard below ID.ome.zarr -> SHA-256 of its bytes; a shard of zeros has no file."""
    sha256: str
    """Of the probability, 0 to 255; "" for a skipped block."""
    foreground: int = 0
    """[voxel] Above the threshold."""
    seconds: float = 0.0
    """[s] From the wait for its voxels to its probability."""
    skipped: EmptyEvidence | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    """[bytes] Of the same shards as `files`: compared at every start, where reading all of them would take long."""
    proof: EmptyEvidence | None = None
    """Set where the block was predicted to prove the rule, although it could have been skipped."""

    @property
    def contradicts_rule(self) -> bool:
        """Whether skipping this block would have lost foreground."""
        return self.proof is not None and self.foreground > 0


@with_config(ConfigDict(extra="allow"))
class _FailureForm(TypedDict):
    """The record of a block that failed."""

    index: list[int]
    start: list[int]
    error: str


# Building an adapter takes far longer than validating with it.
_MARKER = TypeAdapter(BlockMarker)
_LEVEL = TypeAdapter(dict[str, str])


class DoneMarkers:
    """The markers of one volume of a run folder, and the journal of its tasks (core.task_queue.Journal)."""

    def __init__(self, out: Path, name: str, key: str) -> None:
        """key: hash of all that the probability depends on; markers with another key do not count."""
        self.folder, self.failed, self.key = out / "blocks" / name, out / "failed" / name, key
        self._begun = out / "begun" / name

    def path(self, index: Shape) -> Path:
        """Where a block's marker is."""
        return self.folder / f"{name_block(index)}.json"

    def read(self, index: Shape) -> BlockMarker | None:
        """A block's marker; None when it is missing, torn, or has another key."""
        try:
            marker: BlockMarker = _MARKER.validate_json(self.path(index).read_bytes())
        except (OSError, ValidationError):
            return None

        # Other settings leave another key; a file that was renamed or copied has another index.
        return marker if marker.key == self.key and marker.index == index else None

    def write(self, marker: BlockMarker) -> None:
        """Mark a block done."""
        files.write_json(self.path(marker.index), asdict(marker))

    def read_all(self, blocks: Iterable[Block]) -> Iterator[BlockMarker]:
        """The markers of those blocks that are done."""
        for block in blocks:
            if (marker := self.read(block.index)) is not None:
                yield marker

    def list_missing(self, blocks: Iterable[Block]) -> list[Block]:
        """The blocks that are not done."""
        return [block for block in blocks if self.read(block.index) is None]

    def forget_damaged(self, image: Path) -> list[str]:
        """Forget the blocks and levels whose shards are missing below `image` or have other sizes; those shards."""
        damaged = list_damaged_shards(self.folder, image)
        for path in damaged:
            path.unlink(missing_ok=True)

        # What is built from a block may belong to other values than it will have.
        if damaged:
            self.remove_levels()
        return sorted(shard for shards in damaged.values() for shard in shards)

    def clear(self) -> None:
        """Remove all markers, failures and counts."""
        # What was done, or failed, with other settings says nothing about these.
        for path in [*self.folder.glob("*.json"), *self.failed.glob("*.json")]:
            path.unlink()
        self.end_all()

    def count_deaths(self, name: str) -> int:
        """How often a process was killed while it was at a task."""
        try:
            return int((self._begun / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return 0
        # A kill while the file was written leaves it empty or torn: the task was begun at least once.
        except ValueError:
            return 1

    def begin(self, name: str) -> None:
        """Count a task as begun, until `end`. Not flushed to the disk: it is processes that die here, not machines."""
        # Counted beforehand, because a task that kills its process cannot report it.
        count = self.count_deaths(name) + 1
        self._begun.mkdir(parents=True, exist_ok=True)
        (self._begun / name).write_text(str(count), encoding="utf-8")

    def end(self, name: str) -> None:
        """The process has outlived a task."""
        (self._begun / name).unlink(missing_ok=True)

    def end_all(self) -> None:
        """All of the volume is done: counts that a kill left between that and `end` mean nothing any more."""
        for path in self._begun.glob("*"):
            path.unlink()

    def remove_empty_folders(self) -> None:
        """Remove the folder of counts when it holds none."""
        for folder in (self._begun, self._begun.parent):
            # Counts of other volumes may still be there.
            with contextlib.suppress(OSError):
                folder.rmdir()

    def record_failure(self, name: str, facts: Mapping[str, Any], error: str, trace: str, tries: int) -> None:
        """Keep what made a task be left out; `facts` say where it is."""
        # A list of lines keeps the traceback readable in JSON.
        record = {**facts, "tries": tries, "error": error, "traceback": trace.splitlines()}
        files.write_json(self._failure_path(name), record)

    def forget_failure(self, name: str) -> None:
        """A task has not failed after all."""
        self._failure_path(name).unlink(missing_ok=True)

    def read_failed_blocks(self) -> list[dict[str, Any]]:
        """The records of blocks that failed at every try."""
        # The names of blocks begin with a digit, those of other tasks with a letter.
        records = []
        for path in sorted(self.failed.glob("[0-9]*.json")):
            # A record that cannot be read is not written; its block is missing, and done again by the next start.
            with contextlib.suppress(InputError):
                records.append(dict(files.read_json(path, "", _FailureForm)))
        return records

    def read_level(self, number: int) -> dict[str, str] | None:
        """Checksums of a finished pyramid level, by shard; None when it is not done or its marker is torn."""
        try:
            return _LEVEL.validate_json(self._level_path(number).read_bytes())
        except (OSError, ValidationError):
            return None

    def write_level(self, number: int, checksums: Mapping[str, str]) -> None:
        """Mark a pyramid level done."""
        # Sorted, so that the file does not depend on which rank ended first.
        files.write_json(self._level_path(number), dict(sorted(checksums.items())))

    def remove_levels(self) -> None:
        """Let the pyramid be built again."""
        for path in self.folder.glob("level_*.json"):
            path.unlink()

    def _level_path(self, number: int) -> Path:
        return self.folder / f"level_{number}.json"

    def _failure_path(self, name: str) -> Path:
        return self.failed / f"{name}.json"


def list_damaged_shards(markers: Path, image: Path) -> dict[Path, list[str]]:
    """Marker in the folder `markers` -> its shards that are missing below `image` or have other sizes.

    A marker that cannot be read counts as damaged; it is of no block.
    """
    damaged = dict[Path, list[str]]()
    for path in sorted(markers.glob("*.json")):
        try:
            if path.name.startswith("level_"):
                # A shard of zeros has no file, and no checksum.
                shards = {shard for shard, digest in _LEVEL.validate_json(path.read_bytes()).items() if digest}
                sizes = dict[str, int]()
            else:
                marker: BlockMarker = _MARKER.validate_json(path.read_bytes())
                shards, sizes = set(marker.files), marker.sizes
        except (OSError, ValidationError):
            damaged[path] = []
            continue

        if faulty := [shard for shard in sorted(shards) if not _is_whole(image / shard, sizes.get(shard))]:
            damaged[path] = faulty
    return damaged


def _is_whole(shard: Path, size: int | None) -> bool:
    try:
        actual = shard.stat().st_size
    except OSError:
        return False
    return actual > 0 if size is None else actual == size


def name_block(index: Shape) -> str:
    """A block's name in the run folder."""
    return "_".join(map(str, index))


def make_block_task(block: Block, volume: str) -> Task[Block]:
    """The task to predict and write one block of a volume."""
    return Task(
        name=name_block(block.index),
        label=f"block {block.index}",
        payload=block,
        group=volume,
        facts={"index": block.index, "start": block.write.start, "stop": block.write.stop},
    )
