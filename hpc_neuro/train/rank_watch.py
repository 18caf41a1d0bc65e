"""A rank that dies or falls silent is named by the others, which stop; none waits for a collective that cannot end.

Every rank counts up a number of its own in the rendezvous store and looks at that of the next rank:

    rank 0 --looks at--> rank 1 --looks at--> rank 2 --looks at--> rank 0

Who sees no new number for `limit` seconds says so in the store, where all read it.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from types import TracebackType
from typing import Any

import torch.distributed as dist

from hpc_neuro.core import distributed

log = logging.getLogger(__name__)
EXIT_CODE = 1
_PREFIX = "hpc_neuro_watch"


class Watch:
    """Beats and looks while it is entered, after `join_group`; all ranks enter and leave it together."""

    starts = 0  # of this process: one run's numbers are not the next one's

    def __init__(self, limit: float) -> None:
        """limit: [s] silence after which a rank is lost; the others have ended 1.6 limits after its last sign."""
        self.doing = "starting"
        self.verdict = ""
        self._said = False  # the verdict, by whoever asked for it
        self._limit, self._period = limit, limit / 6
        self._stop, self._known = threading.Event(), threading.Event()
        self._answered = time.monotonic()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watch:
        Watch.starts += 1
        self._ranks, self._rank = distributed.world_size(), distributed.rank()
        if self._ranks > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store: Any = dist.distributed_c10d.PrefixStore(f"{_PREFIX}/{Watch.starts}", store.clone())
            self._store.set(f"who/{self._rank}", f"rank {self._rank} ({platform.node()}, process {os.getpid()})")
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._judge)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ranks == 1 or self.verdict:  # `_judge` sees to it that this process ends: its groups may not let it
            return
        self._stop.set()
        if kind is None:
            distributed.barrier()  # nobody's silence is noticed by one who is not done yet, and rank 0 keeps the store
            return
        try:
            self._say(self._rank, f"stopped: {kind.__name__}: {' '.join(str(error).split())[:300]}")
        except RuntimeError:
            log.debug("the store is gone", exc_info=True)

    def explain(self, error: RuntimeError) -> str:
        """What a collective that broke was about: the rank that is gone; "" when no other rank is to blame."""
        broke = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if self._ranks > 1 and broke:
            self._known.wait(1.5 * self._limit)
        self._said = bool(self.verdict)
        return self.verdict

    def _beat(self) -> None:
        following = (self._rank + 1) % self._ranks
        last, changed, said = -1, time.monotonic(), ""
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                if said != self.doing:
                    said = self.doing
                    self._store.set(f"doing/{self._rank}", said)
                self._store.add(f"beat/{self._rank}", 1)
                value = self._store.add(f"beat/{following}", 0)
                if self._store.add("lost", 0):
                    self._found(self._store.get("why").decode())
                    return
            except RuntimeError as error:
                if not self._stop.is_set():
                    self._found(f"rank 0 or the launcher that holds the rendezvous is gone ({str(error)[:120]})")
                return
            now = time.monotonic()
            if value != last or now - self._answered > self._limit / 2:  # or this process itself was suspended
                last, changed = value, now
            self._answered = now
            if now - changed > self._limit:
                self._say(following, f"has been silent for {now - changed:.0f} s")
            self._stop.wait(max(0.0, self._period - (now - begun)))

    def _judge(self) -> None:
        """Ends this process when it does not end by itself: it may be waiting in a collective."""
        seen = time.monotonic()
        while not self._stop.wait(self._period / 2) and not self._known.is_set():
            now = time.monotonic()
            if now - seen > self._limit / 2:  # suspended with all of its threads
                self._answered = now
            seen = now
            if now - self._answered > 1.2 * self._limit:
                self._found(
                    "the rendezvous does not answer: rank 0 or the launcher, which holds it, hangs or is cut off"
                )
        if self._known.is_set() and not self._stop.wait(self._period):
            if not self._said:
                log.error("train: %s; the others stop. The same command goes on from the last checkpoint", self.verdict)
            logging.shutdown()
            os._exit(EXIT_CODE)

    def _say(self, rank: int, what: str) -> None:
        who, doing = self._store.get(f"who/{rank}").decode(), ""
        if self._store.check([f"doing/{rank}"]):
            doing = f", last at: {self._store.get(f'doing/{rank}').decode()}"
        self._store.set("why", f"{who} {what}{doing}")
        self._store.add("lost", 1)

    def _found(self, verdict: str) -> None:
        self.verdict = verdict
        self._known.set()
