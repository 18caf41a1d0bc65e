"""One worker of tests/core/test_task_queue.py: draws from a queue and prints what it drew, and how long it waited.

    python -m tests.helpers.queue_worker PORT COUNT SECONDS LEASE [--serve] [--die-at N]

It prints the port of the store and waits for a line on its input. Then it works, prints its report and waits for
another line. With --serve it serves the store at PORT (0: a free one), which the others need to the end. A task keeps
Python busy for SECONDS, as computing does. With --die-at it kills itself in its N-th task.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time

import torch.distributed as dist

from hpc_neuro.core.task_queue import TaskQueue


def compute(seconds: float) -> None:
    """Hold the interpreter busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def main() -> None:
    """Draw and compute until all tasks are done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("lease", type=float)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--die-at", type=int, default=-1)
    args = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", args.port, is_master=args.serve, wait_for_workers=False)
    print(store.port, flush=True)
    sys.stdin.readline()

    done, waits = [], []
    with TaskQueue(dist.PrefixStore("queue", store), args.count, args.lease) as queue:
        while queue.wait_for_tasks():
            started = time.monotonic()
            for index in queue.draw():
                waits.append(time.monotonic() - started)
                if len(done) == args.die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                compute(args.seconds)
                queue.mark_done(index)
                done.append(index)
                started = time.monotonic()
    print(json.dumps({"done": done, "waits": waits}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
