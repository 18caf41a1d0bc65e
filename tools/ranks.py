"""The ranks of a tool on this machine, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def environment(ranks: int) -> list[dict[str, str]]:
    """What each rank is to find in its environment, over a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


def launched(module: str, ranks: int, words: Sequence[str]) -> int:
    """Run `python -m module words` as so many ranks. 0 when all end with 0; a signal's number counts as a failure."""
    command = [sys.executable, "-m", module, *words]
    processes = [subprocess.Popen(command, env=os.environ | own) for own in environment(ranks)]
    return max(abs(process.wait()) for process in processes)
