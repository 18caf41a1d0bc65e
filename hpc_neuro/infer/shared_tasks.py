"""The parts of the work besides blocks: shards of a pyramid, blocks to trace, trees, second looks. Ranks draw them.

A part that raises is tried again (`tries`), then left out and listed with its traceback in OUT/failed. One that kills
its process cannot say so afterwards, so it is counted as begun before; the next start does all others first, then those
at which a process died, and those for which one more death would be the last (`deaths`) with nobody else at work. Then
it is left out and listed. The volume is not finished without it; the others are.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hpc_neuro.core import distributed
from hpc_neuro.core.schema import InputError
from hpc_neuro.infer.block_pipeline import FULL, Work
from hpc_neuro.infer.done_markers import by_deaths

T = TypeVar("T")
log = logging.getLogger(__name__)
KILLED = (
    "{} times the process that was at it was killed (out of memory, a crash in compiled code, or by somebody), so it "
    "is not tried again; a higher `deaths` tries it again"
)


@dataclass(frozen=True)
class Part(Generic[T]):
    """One part of the work on one of several volumes."""

    volume: int  # which of the works
    name: str  # below OUT/begun/ID; begins with a letter
    said: str  # what it is, for people
    what: T


@dataclass(frozen=True)
class Failure:
    """A part that is left out."""

    volume: int
    line: str


def made(
    works: Sequence[Work], todo: Callable[[], Iterable[Part[T]]], make: Callable[[Part[T]], None], comm: Any
) -> list[Failure]:
    """Make parts, which the first rank asks for; those that failed, on all ranks. All ranks call this.

    A full disk is raised, since no other part will fare better.
    """
    failures: list[Failure] = []

    def tell(part: Part[T], error: str, trace: str, tries: int) -> None:
        marks = works[part.volume].marks
        marks.park(part.name, {"part": part.said}, error, trace, tries)
        failures.append(Failure(part.volume, f"{works[part.volume].source.id}, {part.said}: {error}"))

    def deaths(part: Part[T]) -> int:
        return works[part.volume].marks.deaths(part.name)

    def grouped() -> tuple[list[Part[T]], list[Part[T]], list[Part[T]]]:
        most = max((work.deaths for work in works), default=1)  # the same for all
        parts = list(todo())
        for part in parts:
            if (count := deaths(part)) >= most:
                tell(part, KILLED.format(count), "", count)
        return by_deaths((part for part in parts if deaths(part) < most), deaths, most)

    def draw(some: list[Part[T]], among: Any) -> None:
        with drawn(len(some), among) as mine:
            for part in (some[i] for i in mine):
                _try(works[part.volume], part, make, tell)

    main = is_main(comm)
    groups = distributed.together(lambda: grouped() if main else ([], [], []), comm)
    fresh, suspects, last = groups if comm is None else comm.bcast(groups)
    distributed.together(lambda: draw(fresh, comm), comm)
    if suspects:
        distributed.together(lambda: draw(suspects, comm), comm)
    if last:  # with nobody else at work, for when a rank dies, all die, and who was it?
        distributed.together(lambda: draw(last if main else [], None), comm)
    return failures if comm is None else [failure for part in comm.allgather(failures) for failure in part]


def _try(
    work: Work, part: Part[T], make: Callable[[Part[T]], None], tell: Callable[[Part[T], str, str, int], None]
) -> None:
    name = f"{work.source.id}, {part.said},"
    work.marks.begin(part.name)
    try:
        for attempt in range(1, work.tries + 1):
            try:
                make(part)
                work.marks.unpark(part.name)
                return
            except (OSError, ValueError, RuntimeError) as error:
                if getattr(error, "errno", None) in FULL:
                    raise
                if not isinstance(error, InputError):  # bad input does not become good
                    log.warning("%s failed (try %d of %d): %s", name, attempt, work.tries, error)
                if isinstance(error, InputError) or attempt == work.tries:
                    tell(part, str(error), "".join(traceback.format_exception(error)), attempt)
                    return
    finally:
        work.marks.end(part.name)


def is_main(comm: Any) -> bool:
    """Whether this is the rank that speaks, and writes what is written once."""
    return comm is None or comm.Get_rank() == 0


@contextlib.contextmanager
def drawn(count: int, comm: Any) -> Iterator[Iterator[int]]:
    """This rank's numbers below `count`. After a failure the rest is drawn but not done, so that others stop soon."""
    mine = distributed.turns(count, comm)
    try:
        yield mine
    finally:
        for _ in mine:
            pass
