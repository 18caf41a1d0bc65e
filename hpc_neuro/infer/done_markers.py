"""Done markers: what was written where, with the checksums that a read-back gave. A block without one is not done.

OUT/blocks/ID/0_1_2.json     a block: written, or skipped with the rule
OUT/blocks/ID/level_1.json   a pyramid level: the checksum of each shard
OUT/failed/ID/0_1_2.json     a block that failed every time: the error and its traceback
OUT/begun/ID/0_1_2           how often a block was begun and the process was killed before it ended
OUT/failed/ID/trees.json, OUT/begun/ID/trees, ...     the same of the other parts of the work (see parts.py)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Block, Shape

T = TypeVar("T")
Name = Shape | str
"""A block by its index, another part of the work by a name that begins with a letter."""


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
        return self.folder / f"{_file(index)}.json"

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
        self.unpark(mark.index)

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
        for path in [*self.folder.glob("*.json"), *self.failed.glob("*.json")]:
            path.unlink()
        self.end_all()

    def deaths(self, name: Name) -> int:
        """How often a process was killed while it was at this."""
        try:
            return int(self._beginning(name).read_text(encoding="utf-8") or 1)
        except FileNotFoundError:
            return 0

    def begin(self, name: Name) -> None:
        """Count this as begun, until `end`. Not flushed to the disk: it is processes that die here, not machines."""
        count = self.deaths(name) + 1
        self._begun.mkdir(parents=True, exist_ok=True)
        self._beginning(name).write_text(str(count), encoding="utf-8")

    def end(self, name: Name) -> None:
        """The process has outlived this."""
        self._beginning(name).unlink(missing_ok=True)

    def end_all(self) -> None:
        """All of the volume is done. Who was killed between that and `end` left something that means nothing now."""
        for path in self._begun.glob("*"):
            path.unlink()

    def tidy(self) -> None:
        """Remove the folder of what was begun when nothing is left in it."""
        for folder in (self._begun, self._begun.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def park(self, name: Name, about: dict[str, Any], error: str, trace: str, tries: int) -> None:
        """Record what failed every time; `about` says what and where it is."""
        files.write_json(self._failure(name), about | {"tries": tries, "error": error, "traceback": trace.splitlines()})

    def unpark(self, name: Name) -> None:
        """This has not failed after all."""
        self._failure(name).unlink(missing_ok=True)

    def parked(self) -> list[dict[str, Any]]:
        """The blocks that failed every time."""
        return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(self.failed.glob("[0-9]*.json"))]

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

    def _beginning(self, name: Name) -> Path:
        return self._begun / _file(name)

    def _failure(self, name: Name) -> Path:
        return self.failed / f"{_file(name)}.json"


def where(block: Block) -> dict[str, Any]:
    """What `Marks.park` is told of a block."""
    return {"index": block.index, "start": block.write.start, "stop": block.write.stop}


def by_deaths(items: Iterable[T], deaths: Callable[[T], int], most: int) -> tuple[list[T], list[T], list[T]]:
    """Those at which nobody died; at which somebody did; and those for which one more death would be the last."""
    found: tuple[list[T], list[T], list[T]] = ([], [], [])
    for item in items:
        count = deaths(item)
        found[0 if not count else 2 if count >= most - 1 else 1].append(item)
    return found


def _file(name: Name) -> str:
    return name if isinstance(name, str) else "_".join(map(str, name))
