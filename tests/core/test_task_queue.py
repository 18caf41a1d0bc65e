"""The queue in real processes: nobody waits for another's computing, a dead worker's task is done, a late one works."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from hpc_neuro.core.task_queue import TaskQueue


class Workers:
    """Processes that draw from one queue; the first one serves its store."""

    def __init__(self, count: int, lease: float) -> None:
        self.count, self.lease = count, lease
        self.server: subprocess.Popen[str] | None = None
        self.clients: list[subprocess.Popen[str]] = []
        self.port = 0

    def add(self, seconds: float, *options: str) -> subprocess.Popen[str]:
        """Start a worker whose tasks take `seconds`."""
        serve = [] if self.server else ["--serve"]
        arguments = [str(self.port), str(self.count), str(seconds), str(self.lease), *serve, *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.queue_worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(process.stdout.readline())
        if self.server is None:
            self.server = process
        else:
            self.clients.append(process)
        return process


def begin(*processes: subprocess.Popen[str]) -> None:
    """Let workers that are ready begin."""
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


@contextmanager
def start_workers(count: int, lease: float) -> Iterator[Workers]:
    workers = Workers(count, lease)
    try:
        yield workers
    finally:
        for process in [*workers.clients, *([workers.server] if workers.server else [])]:
            process.kill()
            process.communicate()


def report(process: subprocess.Popen[str]) -> dict[str, Any]:
    return json.loads(process.stdout.readline())


@pytest.mark.slow
def test_no_draw_waits_for_the_computing_of_the_rank_that_serves_the_queue() -> None:
    """The server has items of 2 s, the other worker items of 10 ms; a busy machine gets three attempts."""
    longest_waits = []
    for _ in range(3):
        with start_workers(60, 60.0) as workers:
            server = workers.add(2.0)
            client = workers.add(0.01)
            begin(server, client)
            fast, slow = report(client), report(server)
        assert sorted(fast["done"] + slow["done"]) == list(range(60))
        assert len(fast["done"]) > len(slow["done"])
        longest_waits.append(max(fast["waits"] + slow["waits"]))
        if longest_waits[-1] < 0.05:
            return
    raise AssertionError(f"a draw waited {min(longest_waits):.3f} s")


@pytest.mark.slow
def test_the_task_of_a_killed_worker_is_done_and_a_late_worker_gets_work() -> None:
    with start_workers(60, 1.5) as workers:
        server = workers.add(0.2)
        mortal, other = workers.add(0.2, "--die-at", "3"), workers.add(0.2)
        late = workers.add(0.2)
        begin(server, mortal, other)
        mortal.wait(60)
        begin(late)
        reports = [report(process) for process in (server, other, late)]

    done = [index for worker in reports for index in worker["done"]]
    # What the killed worker had done before is done once more by nobody.
    assert len(done) == len(set(done)) == 60 - 3
    assert reports[2]["done"]


def test_a_worker_that_leaves_gives_its_tasks_back() -> None:
    store = dist.HashStore()
    with TaskQueue(store, 3) as leaving:
        draws = leaving.draw()
        assert [next(draws), next(draws)] == [0, 1]
        leaving.mark_done(0)
    with TaskQueue(store, 3) as staying:
        assert list(staying.draw()) == [2, 1]
        assert staying.wait_for_tasks
        for index in (1, 2):
            staying.mark_done(index)
        assert not staying.wait_for_tasks()


def test_a_task_that_another_worker_took_over_is_counted_once() -> None:
    store = dist.HashStore()
    with TaskQueue(store, 1, lease=0.1) as first, TaskQueue(store, 1, lease=0.1) as second:
        assert list(first.draw()) == [0]
        # As if the first worker had been silent.
        second._others.dead.add(first._worker)
        second._others.find_dead = lambda: True
        assert list(second.draw()) == [0]
        second.mark_done(0)
        first.mark_done(0)
        assert int(store.add("done", 0)) == 1


def test_a_closed_queue_gives_no_more() -> None:
    with TaskQueue(dist.HashStore(), 5) as queue:
        draws = queue.draw()
        assert next(draws) == 0
        queue.close()
        assert list(draws) == []
        assert not queue.wait_for_tasks()
