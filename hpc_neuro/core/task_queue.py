"""Tasks that several workers share: drawn one by one, tried again after an error, left out after too many deaths.

A worker draws the next task from a counter in a torch store, so that a fast worker takes more and none waits for
another's computing. It holds the task until it is done. A worker that gives no sign of life for a while loses what it
holds to the others, and a worker that joins late draws from what is left.

A task that raises is tried again, then left out and listed with its traceback. A task that kills its process cannot
report that afterwards, so its journal counts it as begun beforehand. The next start does all other tasks first, then
those at which a process died. Where one more death would be the last, one rank works at a time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from hpc_neuro.core import stop_signals
from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.hardware_faults import find_hardware_fault
from hpc_neuro.core.schema import InputError

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)

RETRYABLE = (OSError, ValueError, RuntimeError)
"""Errors after which a task is tried again."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers after which no other task will fare better."""
KILLED = (
    "{} times the process that was at it was killed (out of memory, a crash in compiled code, or by somebody), so it "
    "is not tried again; a higher `deaths` tries it again"
)
"""Why a task with that many deaths is left out."""
LEASE_SECONDS = 60.0
"""[s] A worker that is silent for so long loses the tasks that it holds."""
_IDLE_SECONDS = (0.005, 0.2)
"""[s] First and longest pause between two looks of a worker that waits for the others."""
_BEATS_PER_LEASE = 6
_HAS_LEFT = 1 << 40
"""Added to the beats of a worker that leaves: its silence is no death."""
_FREE, _DONE = "", "done"


class TaskQueue:
    """The numbers 0 to `count` - 1, each drawn by one worker at a time until one worker has done it.

        with TaskQueue(store, count) as queue:
            while queue.wait_for_tasks():
                for index in queue.draw():
                    ...
                    queue.mark_done(index)

    The state of a task is a key of the store: free, the number of the worker that holds it, or done. A death between
    the draw and the claim leaves a task free, and only a claim by compare-and-set makes it a worker's own.
    """

    def __init__(self, store: Any, count: int, lease: float = LEASE_SECONDS) -> None:
        """store: a torch.distributed Store, or a PrefixStore, whose keys belong to this queue alone."""
        self._store, self._count, self._lease = store, count, lease
        self._worker = int(store.add("workers", 1))
        self._own_state, self._done_state = f"held {self._worker}", f"{_DONE} {self._worker}"
        self._held: set[int] = set()
        self._is_counter_exhausted = False
        self._returned_before = 0
        self._unfinished: list[int] | None = None
        self._others = _WorkerWatch(store, self._worker, lease)
        self._is_left = threading.Event()

    def __enter__(self) -> TaskQueue:
        threading.Thread(target=self._beat, name="task queue", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_left.set()
        # After an error the store may be gone, and the first error is the one to report.
        with contextlib.suppress(RuntimeError) if error else contextlib.nullcontext():
            for index in tuple(self._held):
                self.give_back(index)
            self._store.add(f"beat/{self._worker}", _HAS_LEFT)
            # An interrupt between a draw and its claim leaves a task unclaimed; the others look for it.
            self._store.add("returned", 1)

    def wait_for_tasks(self) -> bool:
        """Wait until a task can be drawn (True), or all are done or the queue is closed (False)."""
        pause, longest_pause = _IDLE_SECONDS
        while not self._store.check(["closed"]):
            stop_signals.check()
            if not self._is_counter_exhausted or self._list_free():
                return True
            if self._is_all_done():
                return False
            time.sleep(pause)
            pause = min(2 * pause, longest_pause)
        return False

    def draw(self) -> Iterator[int]:
        """Take one task after another, until none is free now. Raises Stopped on a request to stop."""
        while True:
            stop_signals.check()
            index = self._draw_from_counter()
            if index is None:
                index = next((free for free in self._list_free() if self._claim(free)), None)
            if index is None:
                return
            self._held.add(index)
            yield index

    def mark_done(self, index: int) -> None:
        """Mark a task as done by this worker; without effect if the task was taken from it meanwhile."""
        self._held.discard(index)
        if self._swap(index, self._own_state, self._done_state):
            self._store.add("done", 1)

    def give_back(self, index: int) -> None:
        """Return a task, so that another worker may draw it."""
        self._held.discard(index)
        if self._swap(index, self._own_state, _FREE):
            self._store.add("returned", 1)

    def close(self) -> None:
        """Let no worker draw any more."""
        self._store.set("closed", "")
        self._store.add("next", self._count)

    def _draw_from_counter(self) -> int | None:
        while not self._is_counter_exhausted:
            index = int(self._store.add("next", 1)) - 1
            self._is_counter_exhausted = index >= self._count
            if not self._is_counter_exhausted and self._claim(index):
                return index
        return None

    def _claim(self, index: int) -> bool:
        state = self._read_state(index)
        return self._is_free(state) and self._swap(index, state, self._own_state)

    def _is_free(self, state: str) -> bool:
        """Whether a task in this state is neither done nor held by a living worker."""
        if state.startswith(_DONE):
            return False
        return state == _FREE or int(state.split()[1]) in self._others.dead

    def _swap(self, index: int, expected: str, desired: str) -> bool:
        """Set the state of a task if it is as expected; whether it was."""
        return bool(self._store.compare_set(f"task/{index}", expected, desired).decode() == desired)

    def _read_state(self, index: int) -> str:
        # `get` would wait for a key that is not set yet.
        return str(self._store.compare_set(f"task/{index}", _FREE, _FREE).decode())

    def _list_free(self) -> list[int]:
        """Tasks that no living worker holds and none has done. Reads their states only after a death or a return."""
        returned = int(self._store.add("returned", 0))
        if returned == self._returned_before and not self._others.find_dead():
            return []

        candidates = range(self._count) if self._unfinished is None else self._unfinished
        states = {index: self._read_state(index) for index in candidates}
        self._unfinished = [index for index, state in states.items() if not state.startswith(_DONE)]
        free = [index for index in self._unfinished if self._is_free(states[index])]
        # Once none is free, nothing is read again before the next return.
        if not free:
            self._returned_before = returned
        return free

    def _is_all_done(self) -> bool:
        # A worker may die after it has set the state of a task and before it has counted it.
        return int(self._store.add("done", 0)) >= self._count or self._unfinished == []

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not self._is_left.wait(self._lease / _BEATS_PER_LEASE):
                self._store.add(f"beat/{self._worker}", 1)


@contextlib.contextmanager
def draw_indices(store: Any, count: int) -> Iterator[Iterator[int]]:
    """The numbers below `count` that this worker draws, each drawn once. For runs that end when a worker dies.

    After an error, or a request to stop, no worker draws any more.
    """
    with TaskQueue(store, count) as queue:
        try:
            yield queue.draw()
        except BaseException:
            queue.close()
            raise


class _WorkerWatch:
    """Finds the workers of a queue that gave no sign of life for `lease` seconds."""

    def __init__(self, store: Any, worker: int, lease: float) -> None:
        self.dead: set[int] = set()
        self._store, self._worker, self._lease = store, worker, lease
        self._last_beats: dict[int, tuple[int, float]] = {}
        self._looked_at = time.monotonic()

    def find_dead(self) -> bool:
        """Look at the beats of all other workers, a few times per lease; whether any worker is dead."""
        now = time.monotonic()
        pause = now - self._looked_at
        if pause < self._lease / _BEATS_PER_LEASE and self._last_beats:
            return bool(self.dead)

        self._looked_at = now
        # After a long pause, in which this process was suspended or busy, it has not seen the beats of the others.
        was_away = pause > self._lease / 2
        for worker in range(1, int(self._store.add("workers", 0)) + 1):
            beat = int(self._store.add(f"beat/{worker}", 0))
            last_beat, changed_at = self._last_beats.get(worker, (-1, now))
            if beat != last_beat or was_away:
                changed_at = now
                self.dead.discard(worker)
            self._last_beats[worker] = beat, changed_at
            if worker != self._worker and beat < _HAS_LEFT and now - changed_at > self._lease:
                self.dead.add(worker)
        return bool(self.dead)


@dataclass(frozen=True)
class Task(Generic[T]):
    """One piece of work that can be done again."""

    name: str
    """Its name in the journal."""
    label: str
    """Its name for people."""
    payload: T
    group: str = ""
    """Which of several journals it belongs to."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the record of its failure contains besides the error."""


class Journal(Protocol):
    """Counts, across processes, at which tasks a process died, and keeps the failures."""

    def count_deaths(self, name: str) -> int:
        """How often a process was killed while it was at a task."""

    def begin(self, name: str) -> None:
        """Count a task as begun, until `end`."""

    def end(self, name: str) -> None:
        """Note that the process survived a task."""

    def succeed(self, name: str) -> None:
        """Note that the process survived a task, which is done: it has not failed after all."""

    def record_failure(self, name: str, facts: Mapping[str, Any], error: str, trace: str, tries: int) -> None:
        """Record why a task is left out."""


@dataclass(frozen=True)
class RetryLimits:
    """How often a task is tried."""

    tries: int = 2
    """Attempts after which a task that raises is left out."""
    deaths: int = 3
    """Killed processes after which a task is left out."""


@dataclass(frozen=True)
class TaskFailure:
    """A task that is left out."""

    group: str
    name: str
    line: str
    """For people: what failed, and why."""


@dataclass(frozen=True)
class TaskPlan(Generic[T]):
    """Tasks in the order in which they are tried, the safest first."""

    fresh: Sequence[Task[T]]
    """Tasks at which no process died. A worker may hold several."""
    suspects: Sequence[Task[T]] = ()
    """Tasks at which a process died. A worker holds one, so that the next death names its task."""
    last_chances: Sequence[Task[T]] = ()
    """Tasks for which one more death would be the last. Only the first rank works, and holds one."""
    failures: Sequence[TaskFailure] = ()
    """Tasks left out after too many deaths."""

    @property
    def tasks(self) -> list[Task[T]]:
        """All tasks that are to be done."""
        return [*self.fresh, *self.suspects, *self.last_chances]


@dataclass
class TaskReport(Generic[R]):
    """Results and failures of tasks."""

    results: list[R] = field(default_factory=list)
    failures: list[TaskFailure] = field(default_factory=list)

    def extend(self, other: TaskReport[R]) -> None:
        """Add what another worker, or a later phase, reports."""
        self.results += other.results
        self.failures += other.failures


class TaskLedger(Generic[T, R]):
    """The tasks that one worker holds, and the results and failures of the others.

    A Worker calls `begin` before each task, and `finish` or `fail` after it. Leaving the ledger, or a request to stop,
    returns what it holds: a process that stops in good order did not die at a task.
    """

    def __init__(
        self,
        journals: Mapping[str, Journal],
        limits: RetryLimits,
        settle: Callable[[Task[T]], None] = lambda task: None,
    ) -> None:
        """settle: called for each task that is done or left out."""
        self.report: TaskReport[R] = TaskReport()
        self.attempt = 1
        self._journals, self._limits, self._settle = journals, limits, settle
        self._failed: list[Task[T]] = []
        self._in_hand: dict[tuple[str, str], Task[T]] = {}
        # A request to stop is handled in a thread of its own.
        self._lock = threading.RLock()
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> TaskLedger[T, R]:
        self._exits.enter_context(stop_signals.call_on_request(self._release_all))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()
        self._release_all()

    def begin(self, task: Task[T]) -> None:
        """Take a task in hand. It is counted now, since a killed process cannot report it afterwards."""
        with self._lock:
            stop_signals.check()
            self._in_hand[task.group, task.name] = task
            self._journals[task.group].begin(task.name)

    def finish(self, task: Task[T], result: R | None = None) -> None:
        """A task is done; a result other than None goes into the report."""
        with self._lock:
            self._journals[task.group].succeed(task.name)
            self._in_hand.pop((task.group, task.name), None)
        if result is not None:
            self.report.results.append(result)
        self._settle(task)

    def fail(self, task: Task[T], error: BaseException) -> None:
        """A task has failed this time. Raises the error of a full disk or a lost GPU: others would fail as well."""
        fault = find_hardware_fault(error)
        if getattr(error, "errno", None) in FULL_DISK or (fault is not None and fault.is_lasting):
            raise error
        # Bad input does not become good when it is read again, so it is not worth a warning either.
        is_bad_input = isinstance(error, InputError)
        if not is_bad_input:
            tries = f"try {self.attempt} of {self._limits.tries}"
            log.warning("%s failed (%s): %s", _name_for_people(task), tries, error)

        if is_bad_input or self.attempt >= self._limits.tries:
            trace = "".join(traceback.format_exception(error))
            failure = _leave_out(task, self._journals[task.group], str(error), trace, self.attempt)
            self.report.failures.append(failure)
            self._settle(task)
        else:
            self._failed.append(task)
        self._release(task)

    def next_attempt(self) -> list[Task[T]]:
        """Begin the next attempt; return the tasks to try again."""
        failed, self._failed = self._failed, []
        self.attempt = self.attempt + 1 if failed else 1
        return failed

    def _release_all(self) -> None:
        with self._lock:
            for task in tuple(self._in_hand.values()):
                self._release(task)

    def _release(self, task: Task[T]) -> None:
        with self._lock:
            if self._in_hand.pop((task.group, task.name), None) is not None:
                self._journals[task.group].end(task.name)


Worker = Callable[[Iterable[Task[T]], TaskLedger[T, R]], None]
"""Works through tasks and reports each to the ledger."""


def do_each(make: Callable[[Task[T]], R | None]) -> Worker[T, R]:
    """A worker that does one task after another with `make`."""

    def work(tasks: Iterable[Task[T]], ledger: TaskLedger[T, R]) -> None:
        for task in tasks:
            ledger.begin(task)
            try:
                result = make(task)
            except RETRYABLE as error:
                ledger.fail(task, error)
            else:
                ledger.finish(task, result)

    return work


def plan_tasks(tasks: Iterable[Task[T]], journals: Mapping[str, Journal], limits: RetryLimits) -> TaskPlan[T]:
    """Order tasks by the deaths that their journals count; those with too many are left out. One process calls this."""
    failures = list[TaskFailure]()
    remaining = list[Task[T]]()
    for task in tasks:
        deaths = journals[task.group].count_deaths(task.name)
        if deaths >= limits.deaths:
            failures.append(_leave_out(task, journals[task.group], KILLED.format(deaths), "", deaths))
        else:
            remaining.append(task)

    groups = group_by_deaths(remaining, lambda t: journals[t.group].count_deaths(t.name), limits.deaths)
    return TaskPlan(*groups, failures)


def group_by_deaths(
    items: Iterable[T], count_deaths: Callable[[T], int], limit: int
) -> tuple[list[T], list[T], list[T]]:
    """Items without deaths, with some, and those for which one more death would reach `limit`."""
    fresh, suspects, last_chances = list[T](), list[T](), list[T]()
    for item in items:
        deaths = count_deaths(item)
        group = fresh if deaths == 0 else last_chances if deaths >= limit - 1 else suspects
        group.append(item)
    return fresh, suspects, last_chances


def run_tasks(
    plan: TaskPlan[T], work: Worker[T, R], journals: Mapping[str, Journal], limits: RetryLimits, ranks: Ranks
) -> TaskReport[R]:
    """Do the tasks of a plan on all ranks; return the report of all ranks, in the order of the plan. Collective.

    Raises the error of a full disk, and Stopped on a request to stop.
    """
    own = TaskReport[R]()
    if plan.fresh:
        own.extend(_share_tasks(plan.fresh, work, journals, limits, ranks, one_at_a_time=False))
    if plan.suspects:
        own.extend(_share_tasks(plan.suspects, work, journals, limits, ranks, one_at_a_time=True))
    if plan.last_chances:
        # MPI aborts every rank when one dies: with several at work we could not tell whose task was fatal.
        tasks = plan.last_chances if ranks.is_main else []
        own.extend(ranks.run(lambda: _share_tasks(tasks, work, journals, limits, Ranks(), one_at_a_time=True)))

    report = TaskReport[R](failures=list(plan.failures))
    for other in ranks.gather(own):
        report.extend(other)
    position = {(task.group, task.name): number for number, task in enumerate(plan.tasks)}
    report.failures.sort(key=lambda failure: position.get((failure.group, failure.name), -1))
    return report


def _share_tasks(
    tasks: Sequence[Task[T]],
    work: Worker[T, R],
    journals: Mapping[str, Journal],
    limits: RetryLimits,
    ranks: Ranks,
    one_at_a_time: bool,
) -> TaskReport[R]:
    """Do tasks on all ranks, each on one; return the report of this rank. Collective."""
    store = ranks.open_store()
    index_of = {(task.group, task.name): index for index, task in enumerate(tasks)}

    def work_on_drawn() -> TaskReport[R]:
        with TaskQueue(store, len(tasks)) as queue:
            ledger = TaskLedger[T, R](journals, limits, lambda task: queue.mark_done(index_of[task.group, task.name]))
            try:
                with ledger:
                    while queue.wait_for_tasks():
                        drawn = (tasks[index] for index in queue.draw())
                        try_all(drawn, work, ledger, one_at_a_time)
            except BaseException:
                # The other ranks stop soon, since this one's tasks would be missing in the end.
                queue.close()
                raise
            return ledger.report

    return ranks.run(work_on_drawn)


def try_all(
    tasks: Iterable[Task[T]], work: Worker[T, R], ledger: TaskLedger[T, R], one_at_a_time: bool = False
) -> None:
    """Work through tasks, then again through those that failed, until each is done or left out."""
    while tasks:
        for batch in ([task] for task in tasks) if one_at_a_time else [tasks]:
            work(batch, ledger)
        tasks = ledger.next_attempt()


def _leave_out(task: Task[Any], journal: Journal, error: str, trace: str, tries: int) -> TaskFailure:
    journal.record_failure(task.name, task.facts, error, trace, tries)
    return TaskFailure(task.group, task.name, f"{_name_for_people(task)}: {error}")


def _name_for_people(task: Task[Any]) -> str:
    return f"{task.group}, {task.label}" if task.group else task.label
