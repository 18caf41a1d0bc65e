"""Parameters kept in files at stage 3: the folder, DeepSpeed's buffers, and its file operator, compiled once.

    a rank's part of a parameter, 1 MiB or more   a file  <->  a locked buffer in host memory  <->  gathered for a layer
    a smaller one                                 host memory

DeepSpeed uses files only beyond `max_in_cpu` parameters, by default a thousand million; here it is 0.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from hpc_neuro.core import distributed
from hpc_neuro.core.files import format_bytes
from hpc_neuro.core.schema import ConfigError

_SMALLEST_FILE = 1 << 20
"""[bytes] Smallest part that DeepSpeed keeps in a file."""

_LAYER_PARAMETERS = 4
"""Parameters that one layer may need at once, besides those that are live."""


# --- The folder ---


def folder_of_run(nvme: Path, out: Path) -> Path:
    """Folder of one run on the disk: other runs may share the disk, and DeepSpeed removes what it finds."""
    return nvme / f"hpc_neuro_{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]}"


def folder_in(settings: Mapping[str, Any]) -> Path | None:
    """The folder in DeepSpeed's settings; None if parameters are not kept in files."""
    path = settings["zero_optimization"].get("offload_param", {}).get("nvme_path")
    return None if path is None else Path(path)


def remove_files(path: Path) -> None:
    """Remove this rank's files, and the folder once the other ranks' are gone."""
    for own in path.glob(f"zero_stage_3/*/rank{distributed.rank()}"):
        shutil.rmtree(own, ignore_errors=True)

    # A folder that is not empty still has files of another rank, which removes it in the end.
    for folder in (*path.glob("zero_stage_3/*"), path / "zero_stage_3", path):
        try:
            folder.rmdir()
        except OSError:
            return


# --- Buffers, disk and memory ---


def plan_buffers(sizes: Sequence[int], value_bytes: int, live: int) -> dict[str, int]:
    """DeepSpeed's buffer keys. A buffer holds any part; there are enough for `live` elements and two layers."""
    parts = sorted(_sizes_in_files(sizes, value_bytes))

    # Small parts come first, so the count is the most that can be live at once.
    count = elements = 0
    for part in parts:
        elements += part * distributed.world_size()
        count += elements <= live

    return {
        "max_in_cpu": 0,
        "buffer_size": max(parts, default=_SMALLEST_FILE // value_bytes),
        "buffer_count": count + 2 * _LAYER_PARAMETERS,
    }


def require_room(path: Path, sizes: Sequence[int], value_bytes: int, buffers: Mapping[str, Any]) -> str:
    """Describe what is kept where. buffers: the keys of `plan_buffers`.

    Raises ConfigError if the disk is full or the buffers cannot be locked in memory.
    """
    parts = _sizes_in_files(sizes, value_bytes)

    # The ranks of a node share its disk.
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    needed, free = value_bytes * sum(parts) * local_ranks, shutil.disk_usage(path.parent).free
    if needed > 0.99 * free:
        raise ConfigError(
            f"engine.nvme: parameters take {format_bytes(needed)} of this node's disk, but {path.parent} has "
            f"{format_bytes(free)} free; make room or give another folder"
        )

    locked = value_bytes * (buffers["buffer_count"] * buffers["buffer_size"] + sum(parts))
    if not _can_lock(locked):
        raise ConfigError(
            f"engine.nvme: DeepSpeed's buffers are {format_bytes(locked)} of memory that may not be swapped out, more "
            "than this process may lock; raise the limit (`ulimit -l unlimited`, Slurm: PropagateResourceLimits), or "
            "set engine.offload_parameters=cpu"
        )

    return (
        f"{len(parts)} of {len(sizes)} parameters wait in {path}, {format_bytes(value_bytes * sum(parts))} per rank; "
        f"the others, below {format_bytes(_SMALLEST_FILE)} per rank, in host memory"
    )


def _sizes_in_files(sizes: Sequence[int], value_bytes: int) -> list[int]:
    """[element] Sizes of this rank's parts that are kept in files, for parameters of so many elements."""
    ranks = distributed.world_size()
    parts = [-(-size // ranks) for size in sizes]
    return [part for part in parts if part * value_bytes >= _SMALLEST_FILE]


def _can_lock(size: int) -> bool:
    """Whether `size` bytes of memory can be locked now; DeepSpeed would crash when it cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    block = torch.empty(size, dtype=torch.uint8)
    pointer = ctypes.c_void_p(block.data_ptr())
    if libc.mlock(pointer, ctypes.c_size_t(size)):
        return False

    libc.munlock(pointer, ctypes.c_size_t(size))
    return True


# --- The file operator ---


def find_missing_tool(links: Callable[[], bool]) -> str | None:
    """What this machine lacks to compile the file operator, with the command that installs it; None if nothing.

    links: whether libaio is found.
    """
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "a C++ compiler: `apt install g++`, or `module load gcc`"
    if not cpp_extension.is_ninja_available():
        return "ninja: `pip install ninja`, and its folder in PATH"
    if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
        return "the headers of CUDA: `module load cuda`, or CUDA_HOME naming its folder"

    # The test of the library needs the compiler, so it comes last.
    if not links():
        return "libaio: `apt install libaio-dev`, or CFLAGS and LDFLAGS naming its folders (-I, -L)"
    return None


def compile_once(load: Callable[[], object]) -> None:
    """Load an operator that torch compiles if needed, one process after the other on this machine.

    torch waits without limit for a compiler that was killed, because its lock is a file that stays behind. The lock
    taken here ends with its process, so a lock file found under it belongs to a dead process and is removed.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)

    with (root / "hpc_neuro.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for name in ("async_io", "pin_memory"):
            for stale in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")):
                stale.unlink(missing_ok=True)
        load()
