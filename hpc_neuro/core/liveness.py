"""Ranks that watch one another: a rank that dies or falls silent is named, and the others end instead of waiting.

Ranks that share a board stand in a ring. Each writes signs of life, numbered, and looks at those of the next one:

    rank 0 --looks at--> rank 1 --looks at--> rank 2 --looks at--> rank 0

A rank that sees no new sign for `limit` seconds writes down which rank is lost. All ranks read that and end.

The ranks of a torch group have one ring, on their rendezvous store (StoreBoard). Those of an MPI job have one on each
node, in memory that they share (MemoryBoard), and the first ranks of all nodes have another, on a folder that all of
them see (FolderBoard): at thousands of ranks, a file of each would keep a file system busy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import distributed
from hpc_neuro.core.distributed import Ranks

log = logging.getLogger(__name__)
EXIT_CODE = 1
_STORE_PREFIX = "hpc_neuro_watch"
_VERDICT = "verdict"
"""Key under which a lost rank is named."""
_LOOKS = 6
"""Looks at the next rank in the time after which it is lost."""
_LOOKS_IN_MEMORY = 24
"""The same where ranks share memory."""
_SIGN_BYTES = 512
"""[bytes] Of a sign or a verdict in memory."""
_TEXT_END = b"\n"


class BoardUnreachableError(Exception):
    """The board is gone; the message names what held it."""


class FolderBoard:
    """A folder with one file per key. Errors are ignored: a file system that fails for a while is no lost rank."""

    silence_means_loss = False
    """Whether a rank is lost when the board does not answer for `limit` seconds."""

    def __init__(self, folder: Path) -> None:
        """folder: on a file system that all ranks see."""
        self.folder = folder

    def create(self, key: str, text: str) -> None:
        """Set a key for the first time."""
        self._write(key, text, os.O_CREAT)

    def write(self, key: str, text: str) -> None:
        """Set a key again; nothing when it was removed.

        A rank may still be at its last beat while the folder is removed, and a file made then would let it stay.
        """
        self._write(key, text, 0)

    def _write(self, key: str, text: str, flags: int) -> None:
        with contextlib.suppress(OSError):
            # Rewritten in place, which a full disk allows.
            file = os.open(self.folder / key, os.O_WRONLY | flags, 0o644)
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


class MemoryBoard:
    """A slot for each key, in memory that the processes of a node share."""

    silence_means_loss = False
    """Whether a rank is lost when the board does not answer for `limit` seconds."""

    def __init__(self, keys: Sequence[str], slots: NDArray[np.uint8]) -> None:
        """slots: [key, byte] zeros at first."""
        self._slots = dict(zip(keys, slots, strict=True))

    def write(self, key: str, text: str) -> None:
        """Set a key; what does not fit is cut off."""
        slot = self._slots[key]
        content = text.encode()[: len(slot) - 1] + _TEXT_END
        slot[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        slot[len(content) :] = 0

    create = write

    def read(self, key: str) -> str:
        """The text of a key; "" when it was not set, or is half written."""
        text, end, _ = self._slots[key].tobytes().partition(_TEXT_END)
        return text.decode(errors="ignore") if end else ""


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

    create = write

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


Board = FolderBoard | MemoryBoard | StoreBoard


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


class Ring:
    """Ranks on one board, seen by one of them."""

    def __init__(self, board: Board, members: Sequence[int], rank: int, limit: float, looks: int) -> None:
        """members: the ranks, in the same order for all. limit: [s] of silence. looks: how often one looks in it."""
        self.board, self.limit, self.period = board, limit, limit / looks
        self._key = f"sign_{rank}"
        self._next_rank = members[(list(members).index(rank) + 1) % len(members)]
        self._identity = f"rank {rank} ({platform.node()}, process {os.getpid()})"

        self._count = 0
        self._last_sign: SignOfLife | None = None
        self._changed_at = self._looked_at = time.monotonic()

    def begin(self) -> None:
        """Write the first sign of this rank. Raises BoardUnreachableError."""
        self.board.create(self._key, self.build_sign("").encode())

    def build_sign(self, activity: str) -> SignOfLife:
        """The sign of this rank now."""
        return SignOfLife(self._count, self._identity, activity)

    def beat_and_look(self, activity: str) -> str:
        """Write a sign, look at the next rank, and return who was declared lost; "" for nobody.

        Raises BoardUnreachableError.
        """
        self._count += 1
        self.board.write(self._key, self.build_sign(activity).encode())
        sign = SignOfLife.decode(self.board.read(f"sign_{self._next_rank}")) or self._last_sign
        if verdict := self.board.read(_VERDICT):
            return verdict

        now = time.monotonic()
        # A long pause between two looks means that this process itself was suspended.
        was_suspended = now - self._looked_at > self.limit / 2
        if sign != self._last_sign or was_suspended:
            self._last_sign, self._changed_at = sign, now
        self._looked_at = now
        if now - self._changed_at > self.limit:
            lost = sign or SignOfLife(0, f"rank {self._next_rank}", "")
            # All read the verdict at their next look, which of several it is then.
            self.board.create(_VERDICT, lost.describe(f"has been silent for {now - self._changed_at:.0f} s"))
        return ""


class RankWatch(ABC):
    """Beats and watches the next rank of each ring while it is entered. All ranks enter and leave it together."""

    def __init__(self, rings: Sequence[Ring], rank: int, ranks: int, limit: float, barrier: Callable[[], None]) -> None:
        """limit: [s] of silence after which a rank is lost; the others have ended 2 limits after its last sign."""
        self.activity = ""
        self.verdict = ""
        self._rings, self._rank, self._ranks, self._barrier = rings, rank, ranks, barrier
        self._limit, self._period = limit, limit / _LOOKS
        self._is_left, self._has_verdict = threading.Event(), threading.Event()
        self._answered_at = time.monotonic()
        self._threads = list[threading.Thread]()

    def __enter__(self) -> Self:
        # Before any rank can leave, so that nothing is created when all have left.
        for ring in self._rings:
            try:
                ring.begin()
            except BoardUnreachableError as error:
                self._conclude(str(error))
            self._threads.append(threading.Thread(target=self._follow, args=(ring,), name="liveness", daemon=True))
        if self._rings:
            self._threads.append(threading.Thread(target=self._end_process, name="liveness", daemon=True))
        for thread in self._threads:
            thread.start()
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

        # MPI unmaps the memory of a board when the process ends. A thread may hang in a file system.
        for thread in self._threads:
            thread.join(self._period)

    def _follow(self, ring: Ring) -> None:
        """Beat in a ring and look at the next rank there until the watch is left, or a rank is declared lost."""
        while not self._is_left.is_set():
            started_at = time.monotonic()
            try:
                verdict = ring.beat_and_look(self.activity)
                # The other rings learn of it before this process ends.
                for other in self._rings if verdict else ():
                    if other is not ring and not other.board.read(_VERDICT):
                        other.board.create(_VERDICT, verdict)
            except BoardUnreachableError as error:
                verdict = "" if self._is_left.is_set() else str(error)
            if verdict:
                self._conclude(verdict)
                return

            self._answered_at = time.monotonic()
            self._is_left.wait(max(0.0, ring.period - (self._answered_at - started_at)))

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
            silence_means_loss = any(ring.board.silence_means_loss for ring in self._rings)
            if silence_means_loss and now - self._answered_at > 1.2 * self._limit:
                self._conclude(
                    "the rendezvous does not answer: rank 0 or the launcher, which holds it, hangs or is cut off"
                )
        if self._has_verdict.is_set() and not self._is_left.is_set():
            self._report_and_exit()

    @abstractmethod
    def _report_and_exit(self) -> None:
        """Log the verdict and end this process with EXIT_CODE."""


class MpiRankWatch(RankWatch):
    """Watches MPI ranks, on each node through memory and between nodes through a folder with one file per node.

    MPI waits for ever for a rank that is gone, so the process is ended here. Most launchers end a job with its first
    dead rank (mpiexec does; srun after its `--wait`), and then this has nothing to do.
    """

    def __init__(self, folder: Path, ranks: Ranks, limit: float) -> None:
        """Collective. folder: on a file system that all ranks see; removed at the end."""
        self._folder, rings = folder, list[Ring]()
        if ranks.size > 1:
            rings = _join_rings(folder, ranks, limit)
        super().__init__(rings, ranks.rank, ranks.size, limit, ranks.barrier)

    def _leave(self, error: BaseException | None) -> None:
        super()._leave(error)
        if self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _report_and_exit(self) -> None:
        # Rank 1 stands in a ring with rank 0 unless each has a node to itself, so it is among the first to know.
        reporter = 1 if self.verdict.startswith("rank 0 ") else 0
        if self._rank == reporter:
            log.error("%s; the other ranks stop. The same command goes on from what is finished", self.verdict)
        # A launcher may end all ranks with the first that ends: before the reporter has written, or before a rank
        # that stands in two rings has told the other one. A verdict of one ring may reach the last rank of another
        # ring two looks later.
        time.sleep(3 * self._period)
        logging.shutdown()
        os._exit(EXIT_CODE)


def _join_rings(folder: Path, ranks: Ranks, limit: float) -> list[Ring]:
    """The rings of a rank of an MPI job: that of its node, and that of all nodes for the first rank of one."""
    memory = ranks.share_node_memory(_SIGN_BYTES)
    first_ranks = sorted({members[0] for members in ranks.gather(memory.members)})
    rings = list[Ring]()
    if len(memory.members) > 1:
        keys = [*(f"sign_{rank}" for rank in memory.members), _VERDICT]
        # Looks into memory cost nothing, and a verdict passes through two rings.
        rings.append(Ring(MemoryBoard(keys, memory.slots), memory.members, ranks.rank, limit, _LOOKS_IN_MEMORY))
    if len(first_ranks) > 1 and ranks.rank in first_ranks:
        folder.mkdir(parents=True, exist_ok=True)
        rings.append(Ring(FolderBoard(folder), first_ranks, ranks.rank, limit, _LOOKS))
    return rings


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
        self._is_explained, rank, ranks = False, distributed.rank(), distributed.world_size()
        self._ring = Ring(StoreBoard(store), range(ranks), rank, limit, _LOOKS)
        super().__init__([self._ring] if ranks > 1 else [], rank, ranks, limit, distributed.barrier)

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
            sign = self._ring.build_sign(self.activity)
            self._ring.board.create(_VERDICT, sign.describe(f"stopped: {type(error).__name__}: {sentence}"))
        except BoardUnreachableError:
            log.debug("the store is gone", exc_info=True)

    def _report_and_exit(self) -> None:
        if self._is_left.wait(self._period):
            return
        if not self._is_explained:
            log.error("train: %s; the others stop. The same command goes on from the last checkpoint", self.verdict)
        logging.shutdown()
        os._exit(EXIT_CODE)
