"""Memory of the process at hand, as Linux counts it."""

from __future__ import annotations

import resource
from pathlib import Path


def reset_peak_memory() -> None:
    """Let the peak be counted from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_peak_memory() -> int:
    """[byte] The most memory that the process has held since the last reset."""
    peak = _read_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def read_memory() -> int:
    """[byte] The memory that the process holds. Raises RuntimeError where the system does not count it."""
    memory = _read_status("VmRSS")
    if memory is None:
        raise RuntimeError("/proc/self/status has no VmRSS; memory is measured on Linux only")
    return memory


def _read_status(key: str) -> int | None:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None
