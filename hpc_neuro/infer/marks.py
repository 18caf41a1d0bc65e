"""Done markers: what was written where, with the checksums that a read-back gave. A block without one is not done.

OUT/blocks/ID/0_1_2.json     a block: written, or skipped with the rule
OUT/blocks/ID/level_1.json   a pyramid level: the checksum of each shard
OUT/failed/ID/0_1_2.json     a block that failed every time: the error and its traceback
OUT/begun/ID/0_1_2           how often a block was begun and the process was killed before it ended
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hpc_neuro import files
from hpc_neuro.geometry import Block, Box, Shape


@dataclass(frozen=True)
class Empty:
    """Why a block was, or would have been, skipped: its brightest cell was not above the level."""

    brightest: float  # normalised
    level: float


@dataclass(frozen=True)
class Mark:
    """One finished block."""

    key: str
    index: Shape
    start: Shape
    files: dict[str, str]  # shard below ID.ome.zarr -> SHA-256 of its bytes; a shard of zeros has no file
    sha256: str  # of the probability, 0 to 255; of nothing where skipped
    foreground: int = 0
    seconds: float = 0.0
    skipped: Empty | None = None
    proof: Empty | None = None  # computed although it could have been skipped, to prove the rule

    @property
    def wrong(self) -> bool:
        """Whether it shows that the rule would have lost something."""
        return self.proof is not None and self.foreground > 0


_MARK = TypeAdapter(Mark)
_LEVEL = TypeAdapter(dict[str, str])


class Marks:
    """The markers of one volume of a run folder."""

    def __init__(self, out: Path, name: str, key: str) -> None:
        self.folder, self.failed, self.key = out / "blocks" / name, out / "failed" / name, key
        self._begun = out / "begun" / name

    def path(self, index: Shape) -> Path:
        """Where a block's marker is."""
        return self.folder / f"{'_'.join(map(str, index))}.json"

    def read(self, index: Shape) -> Mark | None:
        """A block's marker; None when it is missing, torn, or of other contents."""
        try:
            mark: Mark = _MARK.validate_json(self.path(index).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return mark if mark.key == self.key and mark.index == index else None

    def write(self, mark: Mark) -> None:
        """Mark a block done; it is no longer among the failed."""
        files.write_json(self.path(mark.index), asdict(mark))
        self._failure(mark.index).unlink(missing_ok=True)

    def all(self, blocks: Iterable[Block]) -> Iterator[Mark]:
        """The markers of those blocks that are done."""
        for block in blocks:
            if (mark := self.read(block.index)) is not None:
                yield mark

    def todo(self, blocks: Iterable[Block]) -> list[Block]:
        """The blocks that are not done."""
        return [block for block in blocks if self.read(block.index) is None]

    def clear(self) -> None:
        """Forget everything."""
        for path in [*self.folder.glob("*.json"), *self.failed.glob("*.json"), *self._begun.glob("*")]:
            path.unlink()

    def deaths(self, index: Shape) -> int:
        """How often a process was killed while it was at a block."""
        try:
            return int(self._beginning(index).read_text(encoding="utf-8") or 1)
        except FileNotFoundError:
            return 0

    def begin(self, index: Shape) -> None:
        """Count a block as begun, until `end`. Not flushed to the disk: it is processes that die here, not machines."""
        count = self.deaths(index) + 1
        self._begun.mkdir(parents=True, exist_ok=True)
        self._beginning(index).write_text(str(count), encoding="utf-8")

    def end(self, index: Shape) -> None:
        """The process has outlived this block."""
        self._beginning(index).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the folder of what was begun when nothing is left in it."""
        for folder in (self._begun, self._begun.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def by_deaths(self, blocks: Iterable[Block], most: int) -> tuple[list[Block], list[Block], list[Block]]:
        """Blocks at which nobody died; at which somebody did; and those for which one more death would be the last."""
        found: tuple[list[Block], list[Block], list[Block]] = ([], [], [])
        for block in blocks:
            deaths = self.deaths(block.index)
            found[0 if not deaths else 2 if deaths >= most - 1 else 1].append(block)
        return found

    def park(self, index: Shape, box: Box, error: str, trace: str, tries: int) -> None:
        """Record a block that failed every time."""
        record = {"index": index, "start": box.start, "stop": box.stop, "tries": tries, "error": error}
        files.write_json(self._failure(index), record | {"traceback": trace.splitlines()})

    def parked(self) -> list[dict[str, Any]]:
        """The blocks that failed every time."""
        return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(self.failed.glob("*.json"))]

    def level(self, number: int) -> dict[str, str] | None:
        """Checksums of a finished pyramid level, by shard; None when it is not done or the record is torn."""
        try:
            return _LEVEL.validate_json(self._level(number).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write_level(self, number: int, digests: dict[str, str]) -> None:
        """Mark a pyramid level done."""
        files.write_json(self._level(number), dict(sorted(digests.items())))

    def drop_levels(self) -> None:
        """Let the pyramid be made again."""
        for path in self.folder.glob("level_*.json"):
            path.unlink()

    def _level(self, number: int) -> Path:
        return self.folder / f"level_{number}.json"

    def _beginning(self, index: Shape) -> Path:
        return self._begun / "_".join(map(str, index))

    def _failure(self, index: Shape) -> Path:
        return self.failed / f"{'_'.join(map(str, index))}.json"
