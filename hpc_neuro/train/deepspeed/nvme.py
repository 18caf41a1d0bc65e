"""Parameters that wait in files at stage 3: the folder, DeepSpeed's buffers, and its operator, built once.

    a rank's part of a parameter, 1 MiB or more   a file  <->  a locked buffer in host memory  <->  gathered for a layer
    a smaller one                                 host memory

DeepSpeed sends them to files only beyond `max_in_cpu` parameters, by default a thousand million; here it is 0.
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
from torch import nn
from torch.utils import cpp_extension

from hpc_neuro.core import distributed
from hpc_neuro.core.files import format_bytes
from hpc_neuro.core.schema import ConfigError

_LEAST = 1 << 20  # [bytes] of a part that DeepSpeed takes to a file
_LAYER = 4  # parameters that one layer may need at once, besides those that are live


def folder(nvme: Path, out: Path) -> Path:
    """Where one run keeps its files: other runs may use the same disk, and DeepSpeed removes what it finds."""
    return nvme / f"hpc_neuro_{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]}"


def path_of(settings: Mapping[str, Any]) -> Path | None:
    """The folder that DeepSpeed is told; None: parameters do not go to files."""
    found = settings["zero_optimization"].get("offload_param", {}).get("nvme_path")
    return None if found is None else Path(found)


def clear(path: Path) -> None:
    """Remove this rank's files, and the folder when the others' are gone."""
    for mine in path.glob(f"zero_stage_3/*/rank{distributed.rank()}"):
        shutil.rmtree(mine, ignore_errors=True)
    for left in (*path.glob("zero_stage_3/*"), path / "zero_stage_3", path):
        try:
            left.rmdir()
        except OSError:
            return


def parts(sizes: Sequence[int], value_bytes: int) -> list[int]:
    """Elements of this rank's parts that go to files, of parameters with so many elements."""
    ranks = distributed.world_size()
    return [part for part in (-(-n // ranks) for n in sizes) if part * value_bytes >= _LEAST]


def buffers(sizes: Sequence[int], value_bytes: int, live: int) -> dict[str, int]:
    """DeepSpeed's keys. A buffer holds any part; there are enough for `live` elements and two layers."""
    found = sorted(parts(sizes, value_bytes))
    count = room = 0
    for part in found:
        room += part * distributed.world_size()
        count += room <= live
    return {
        "max_in_cpu": 0,
        "buffer_size": max(found, default=_LEAST // value_bytes),
        "buffer_count": count + 2 * _LAYER,
    }


def keep_free(module: nn.Module) -> None:
    """Let DeepSpeed read ahead into all free buffers but some: what is fetched out of turn would find none (0.19)."""
    swapper: Any = getattr(next(module.parameters()), "nvme_swapper", None)
    if swapper is not None:
        swapper.available_swap_in_buffers = lambda: max(0, len(swapper.available_buffer_ids) - _LAYER)


def require(path: Path, sizes: Sequence[int], value_bytes: int, held: dict[str, Any]) -> str:
    """What goes where, in words. Raises ConfigError where the disk is full or the buffers cannot be locked in memory.

    held: the keys of `buffers`.
    """
    found = parts(sizes, value_bytes)
    locked = value_bytes * (held["buffer_count"] * held["buffer_size"] + sum(found))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = value_bytes * sum(found) * here, shutil.disk_usage(path.parent).free
    if needed > 0.99 * free:
        raise ConfigError(
            f"engine.nvme: parameters take {format_bytes(needed)} of this node's disk, but {path.parent} has "
            f"{format_bytes(free)} free; make room or give another folder"
        )
    if not _can_lock(locked):
        raise ConfigError(
            f"engine.nvme: DeepSpeed's buffers are {format_bytes(locked)} of memory that may not be swapped out, more "
            "than this process may lock; raise the limit (`ulimit -l unlimited`, Slurm: PropagateResourceLimits), or "
            "take engine.offload_parameters=cpu"
        )
    return (
        f"{len(found)} of {len(sizes)} parameters wait in {path}, {format_bytes(value_bytes * sum(found))} per rank"
        f"; the others, below {format_bytes(_LEAST)} per rank, in host memory"
    )


def _can_lock(size: int) -> bool:
    """Whether so much memory can be locked now; DeepSpeed would crash in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    block = torch.empty(size, dtype=torch.uint8)
    pointer = ctypes.c_void_p(block.data_ptr())
    if libc.mlock(pointer, ctypes.c_size_t(size)):
        return False
    libc.munlock(pointer, ctypes.c_size_t(size))
    return True


def lacks(links: Callable[[], bool]) -> str | None:
    """What compiling the operator needs and this machine has not, and how to get it. links: whether libaio is found."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "a C++ compiler: `apt install g++`, or `module load gcc`"
    if not cpp_extension.is_ninja_available():
        return "ninja: `pip install ninja`, and its folder in PATH"
    if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
        return "the headers of CUDA: `module load cuda`, or CUDA_HOME naming its folder"
    if not links():
        return "libaio: `apt install libaio-dev`, or CFLAGS and LDFLAGS naming its folders (-I, -L)"
    return None


def built_once(load: Callable[[], object]) -> None:
    """Load an operator that torch compiles where it has not been: one process after the other, of all on this machine.

    torch itself waits without limit for a compiler that was killed, as it goes by a file that is left behind. The lock
    that is held here ends with its process; what lies there then is of the dead.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "hpc_neuro.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for name in ("async_io", "pin_memory"):
            for left in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")):
                left.unlink(missing_ok=True)
        load()
