"""Start the ranks of a tool on this machine, as a launcher would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def list_rank_environments(ranks: int) -> list[dict[str, str]]:
    """Environment variables of each rank; they meet at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def launch_ranks(module: str, ranks: int, words: Sequence[str]) -> int:
    """Run `python -m module words` as `ranks` ranks. 0 when all end with 0; a signal's number counts as a failure."""
    command = [sys.executable, "-m", module, *words]
    processes = [
        subprocess.Popen(command, env=os.environ | environment) for environment in list_rank_environments(ranks)
    ]
    return max(abs(process.wait()) for process in processes)
