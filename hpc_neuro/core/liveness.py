"""Ranks that watch one another: a rank that dies or falls silent is named, and the others end instead of waiting.

Every rank writes signs of life, numbered, on a board that all ranks see, and looks at those of the next rank:

    rank 0 --looks at--> rank 1 --looks at--> rank 2 --looks at--> rank 0

A rank that sees no new sign for `limit` seconds writes down which rank is lost. All ranks read that and end. The
board is the rendezvous store of a torch group (StoreBoard) or a folder that all ranks of an MPI job see (FolderBoard).
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hpc_neuro.core import distributed
from hpc_neuro.core.distributed import Ranks

log = logging.getLogger(__name__)
EXIT_CODE = 1
_STORE_PREFIX = "hpc_neuro_watch"
_VERDICT = "verdict"
"""Key under which a lost rank is named."""


class BoardUnreachableError(Exception):
    """The board is gone; the message names what held it."""


class FolderBoard:
    """A folder with one file per key. Errors are ignored: a file system that fails for a while is no lost rank."""

    silence_means_loss = False
    """Whether a rank is lost when the board does not answer for `limit` seconds."""

    def __init__(self, folder: Path) -> None:
        """folder: on a file system that all ranks see."""
        self.folder = folder

    def write(self, key: str, text: str) -> None:
        """Set a key; nothing when the folder was removed."""
        with contextlib.suppress(OSError):
            # Rewritten in place, which a full disk allows.
            file = os.open(self.folder / key, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.ftruncate(file, os.pwrite(file, text.encode(), 0))
                os.fsync(file)
            finally:
                os.close(file)

    def read(self, key: str) -> str:
        """The text of a key; "" when it was not set or cannot be read now."""
        try:
            return (self.folder / key).read_text(encoding="utf-8")
        except OSError:
            return ""


class StoreBoard:
    """Keys of a torch store, which rank 0 or the launcher holds. Without that process no collective can end."""

    silence_means_loss = True
    """Whether a rank is lost when the board does not answer for `limit` seconds."""

    def __init__(self, store: Any) -> None:
        """store: a torch.distributed Store."""
        self._store = store

    def write(self, key: str, text: str) -> None:
        """Set a key. Raises BoardUnreachableError."""
        with self._report_loss():
            self._store.set(key, text)

    def read(self, key: str) -> str:
        """The text of a key, "" when it was not set. Raises BoardUnreachableError."""
        with self._report_loss():
            return str(self._store.get(key).decode()) if self._store.check([key]) else ""

    @contextlib.contextmanager
    def _report_loss(self) -> Iterator[None]:
        """Turn the RuntimeError of a torch store into one sentence."""
        try:
            yield
        except RuntimeError as error:
            sentence = f"rank 0 or the launcher that holds the rendezvous is gone ({str(error)[:120]})"
            raise BoardUnreachableError(sentence) from error


@dataclass(frozen=True)
class SignOfLife:
    """What a rank writes at each beat."""

    count: int
    identity: str
    activity: str

    def encode(self) -> str:
        """One text, which `decode` reads."""
        return f"{self.count:020d}|{self.identity}|{self.activity}"

    @classmethod
    def decode(cls, text: str) -> SignOfLife | None:
        """None for a text that was not written yet, or is half written."""
        count, _, rest = text.partition("|")
        identity, _, activity = rest.partition("|")
        return cls(int(count), identity, activity) if count.isdecimal() and identity else None

    def describe(self, fate: str) -> str:
        """The sentence that names a lost rank: `rank 1 (node7, process 412) FATE, last at: step 7`."""
        return f"{self.identity} {fate}" + (f", last at: {self.activity}" if self.activity else "")


class RankWatch:
    """Beats and watches the next rank while it is entered. All ranks enter and leave it together."""

    def __init__(
        self, board: FolderBoard | StoreBoard, rank: int, ranks: int, limit: float, barrier: Callable[[], None]
    ) -> None:
        """limit: [s] of silence after which a rank is lost; the others have ended 1.6 limits after its last sign."""
        self.activity = ""
        self.verdict = ""
        self._board, self._rank, self._ranks, self._barrier = board, rank, ranks, barrier
        self._limit, self._period = limit, limit / 6
        self._is_left, self._has_verdict = threading.Event(), threading.Event()
        self._identity = f"rank {rank} ({platform.node()}, process {os.getpid()})"
        self._answered_at = time.monotonic()

    def __enter__(self) -> Self:
        if self._ranks > 1:
            for target in (self._beat_and_watch, self._end_process):
                threading.Thread(target=target, name="liveness", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a verdict `_end_process` ends this process, whose collectives may never return.
        if self._ranks > 1 and not self.verdict:
            self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Stop watching. After an error the other ranks are not waited for."""
        # No rank stops beating before all are done, else its silence would be taken for a loss.
        if error is None:
            self._barrier()
        self._is_left.set()

    def _beat_and_watch(self) -> None:
        """Beat, look at the next rank, declare it lost after `limit` seconds without a new sign."""
        try:
            self._watch_next_rank()
        except BoardUnreachableError as error:
            if not self._is_left.is_set():
                self._conclude(str(error))

    def _watch_next_rank(self) -> None:
        next_key = f"sign_{(self._rank + 1) % self._ranks}"
        count, last_sign = 0, None
        changed_at = time.monotonic()

        while not self._is_left.is_set():
            started_at = time.monotonic()
            count += 1
            self._board.write(f"sign_{self._rank}", SignOfLife(count, self._identity, self.activity).encode())
            sign = SignOfLife.decode(self._board.read(next_key)) or last_sign
            if verdict := self._board.read(_VERDICT):
                self._conclude(verdict)
                return

            now = time.monotonic()
            # A long pause between two looks means that this process itself was suspended.
            was_suspended = now - self._answered_at > self._limit / 2
            if sign != last_sign or was_suspended:
                last_sign, changed_at = sign, now
            self._answered_at = now
            if now - changed_at > self._limit:
                lost = sign or SignOfLife(0, f"rank {(self._rank + 1) % self._ranks}", "")
                self._board.write(_VERDICT, lost.describe(f"has been silent for {now - changed_at:.0f} s"))

            self._is_left.wait(max(0.0, self._period - (now - started_at)))

    def _conclude(self, verdict: str) -> None:
        self.verdict = verdict
        self._has_verdict.set()

    def _end_process(self) -> None:
        """End this process when it does not end by itself: it may wait in a collective for ever."""
        looked_at = time.monotonic()
        while not self._is_left.wait(self._period / 2) and not self._has_verdict.is_set():
            now = time.monotonic()
            # This process was suspended with all its threads, so the board had no chance to answer.
            if now - looked_at > self._limit / 2:
                self._answered_at = now
            looked_at = now
            if self._board.silence_means_loss and now - self._answered_at > 1.2 * self._limit:
                self._conclude(
                    "the rendezvous does not answer: rank 0 or the launcher, which holds it, hangs or is cut off"
                )
        if self._has_verdict.is_set() and not self._is_left.is_set():
            self._report_and_exit()

    def _report_and_exit(self) -> None:
        """Log the verdict and end this process with EXIT_CODE."""
        raise NotImplementedError


class MpiRankWatch(RankWatch):
    """Watches MPI ranks through a folder. MPI waits for ever for a rank that is gone, so the process is ended here.

    Most launchers end a job with its first dead rank (mpiexec does; srun after its `--wait`), and then this has nothing
    to do.
    """

    def __init__(self, folder: Path, ranks: Ranks, limit: float) -> None:
        """folder: on a file system that all ranks see; removed at the end."""
        self._folder = folder
        if ranks.size > 1:
            folder.mkdir(parents=True, exist_ok=True)
        super().__init__(FolderBoard(folder), ranks.rank, ranks.size, limit, ranks.barrier)

    def _leave(self, error: BaseException | None) -> None:
        super()._leave(error)
        if self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _report_and_exit(self) -> None:
        lost_rank_zero = self.verdict.startswith("rank 0 ")
        reporter = self._ranks - 1 if lost_rank_zero else 0
        if self._rank == reporter:
            log.error("%s; the other ranks stop. The same command goes on from what is finished", self.verdict)
        else:
            # A launcher may end all ranks with the first that ends, before the reporter has written.
            time.sleep(2 * self._period)
        logging.shutdown()
        os._exit(EXIT_CODE)


class TorchRankWatch(RankWatch):
    """Watches the ranks of a torch group through its rendezvous store; entered after the group is joined.

    The collectives of gloo and NCCL break when a rank is gone, so the main thread has one period to end by itself.
    """

    watches_started = 0
    """Of this process: the numbers of one watch are not taken for those of the next."""

    def __init__(self, limit: float) -> None:
        """limit: see RankWatch."""
        import torch.distributed as dist

        TorchRankWatch.watches_started += 1
        store: Any = None
        if distributed.world_size() > 1:
            default_store: Any = dist.distributed_c10d._get_default_store()
            prefix = f"{_STORE_PREFIX}/{TorchRankWatch.watches_started}"
            store = dist.distributed_c10d.PrefixStore(prefix, default_store.clone())
        board = StoreBoard(store)
        self._is_explained = False
        super().__init__(board, distributed.rank(), distributed.world_size(), limit, distributed.barrier)

    def explain(self, error: RuntimeError) -> str:
        """Which rank's loss broke a collective; "" when no other rank is to blame."""
        import torch.distributed as dist

        is_broken_collective = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if self._ranks > 1 and is_broken_collective:
            self._has_verdict.wait(1.5 * self._limit)
        self._is_explained = bool(self.verdict)
        return self.verdict

    def _leave(self, error: BaseException | None) -> None:
        super()._leave(error)
        if error is None:
            return
        try:
            sentence = " ".join(str(error).split())[:300]
            sign = SignOfLife(0, self._identity, self.activity)
            self._board.write(_VERDICT, sign.describe(f"stopped: {type(error).__name__}: {sentence}"))
        except BoardUnreachableError:
            log.debug("the store is gone", exc_info=True)

    def _report_and_exit(self) -> None:
        if self._is_left.wait(self._period):
            return
        if not self._is_explained:
            log.error("train: %s; the others stop. The same command goes on from the last checkpoint", self.verdict)
        logging.shutdown()
        os._exit(EXIT_CODE)
