"""MPI ranks that show one another that they live. MPI itself waits for ever for a rank that is gone.

Every rank counts up in a file of its own in the run folder, and looks at the file of the next one:

    rank 0 --looks at--> rank 1 --looks at--> rank 2 --looks at--> rank 0

Who sees no new number for `limit` seconds writes down which rank is lost; all read that and end. Most launchers end a
job with its first dead rank (mpiexec does; srun after its `--wait`), and then this has nothing to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from hpc_neuro.core import files

log = logging.getLogger(__name__)
EXIT_CODE = 1
_LOST = "lost"


class Heartbeat:
    """Beats and looks while it is entered. All ranks of `comm` (None: alone, nothing to do) enter and leave it."""

    def __init__(self, folder: Path, comm: Any, limit: float) -> None:
        """folder: on a file system that all ranks see; removed on leaving. limit: [s] of silence after which a rank is
        lost; within 1.5 times that the others have said so and ended with exit code 1.
        """
        self._folder, self._comm, self._limit, self._period = folder, comm, limit, limit / 6
        self._stop = threading.Event()

    def __enter__(self) -> Heartbeat:
        if self._comm is not None:
            self._rank, self._ranks = self._comm.Get_rank(), self._comm.Get_size()
            self._folder.mkdir(parents=True, exist_ok=True)
            who = f"{0:020d} rank {self._rank} ({platform.node()}, process {os.getpid()})"
            (self._folder / str(self._rank)).write_text(who, encoding="utf-8")
            self._comm.Barrier()  # the next rank's file is there
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._comm is not None:
            if kind is None:
                self._comm.Barrier()  # nobody's silence is noticed by one who is not done yet
            self._stop.set()
            if self._rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _beat(self) -> None:
        mine, following = (self._folder / str(r % self._ranks) for r in (self._rank, self._rank + 1))
        seen, changed, looked, count = "", time.monotonic(), time.monotonic(), 0
        with mine.open("r+b", buffering=0) as file:  # written in place, which a full disk allows
            while not self._stop.wait(self._period):
                count += 1
                with contextlib.suppress(OSError):  # a file system that fails for a while is not death yet
                    os.pwrite(file.fileno(), f"{count:020d}".encode(), 0)
                    os.fsync(file)
                now, found = time.monotonic(), seen
                with contextlib.suppress(OSError):
                    found = following.read_text(encoding="utf-8")
                if found != seen or now - looked > self._limit / 2:  # or this process itself was suspended
                    seen, changed = found, now
                looked = now
                if now - changed > self._limit and not self._stop.is_set():
                    self._declare(seen.partition(" ")[2], now - changed)
                with contextlib.suppress(OSError):
                    self._end((self._folder / _LOST).read_text(encoding="utf-8"), speaks=self._rank == 0)

    def _declare(self, who: str, silent: float) -> None:
        verdict = f"{who} has been silent for {silent:.0f} s"
        with contextlib.suppress(OSError):
            files.write_text(self._folder / _LOST, verdict)
        # rank 0 keeps the log, so it speaks for all, if it is not the lost one
        self._end(verdict, speaks=self._rank == 0 or self._rank + 1 == self._ranks)

    def _end(self, verdict: str, speaks: bool) -> None:
        """End this process, whose main thread may be waiting in MPI for ever."""
        if speaks:
            log.error("%s; the other ranks stop. The same command goes on from what is finished", verdict)
        else:
            time.sleep(2 * self._period)  # a launcher may end all with the first that ends
        logging.shutdown()
        os._exit(EXIT_CODE)
