"""Real ranks for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools.ranks import list_rank_environments

HERE = Path(__file__).resolve().parent


def launch(script: str, ranks: int, *arguments: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run tests/train/`script` on `ranks` processes that meet at a free port; each has one thread."""
    procs = start(script, ranks, *arguments)
    try:
        out = [p.communicate(timeout=timeout)[0] for p in procs]
    finally:
        for p in procs:
            p.kill()
    code = next((p.returncode for p in procs if p.returncode not in (0, 75)), procs[0].returncode)
    return subprocess.CompletedProcess(procs[0].args, code, "", "\n".join(out))


def start(script: str, ranks: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """The processes of `launch`, as srun would start them: without an agent that ends the others when one dies."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            env=env | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in list_rank_environments(ranks)
    ]


def quote_end(done: subprocess.CompletedProcess[str], size: int = 6000) -> str:
    """What a failed process printed from its first traceback on, or its last characters: an abort has no traceback."""
    begin = done.stderr.find("Traceback")
    return done.stderr[begin:][:size] if begin >= 0 else done.stderr[-size:]
