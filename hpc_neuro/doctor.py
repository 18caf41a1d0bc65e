"""The verb `doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hpc_neuro.core import files
from hpc_neuro.core.run_folder import code_version

_NEEDED = (
    "torch", "deepspeed", "timm", "h5py", "mpi4py", "numpy", "wandb", "submitit", "pydantic", "tensorstore",
    "tifffile", "imagecodecs", "nibabel", "pynrrd", "connected-components-3d", "edt", "scikit-image",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` None: worth knowing, neither good nor bad."""

    what: str
    ok: bool | None
    text: str


def main(argv: Sequence[str]) -> int:
    """Print the report; exit code 0 when everything that is needed is there, 3 when something is missing."""
    if argv:
        sys.stderr.write("hpc-neuro doctor takes no arguments\n")
        return 2
    findings = [finding for part in PARTS for finding in part()]
    mark = {True: "ok     ", False: "MISSING", None: "       "}
    width = max(len(f.what) for f in findings)
    sys.stdout.write("".join(f"{mark[f.ok]} {f.what:<{width}}  {f.text}\n" for f in findings))
    return 3 if any(f.ok is False for f in findings) else 0


def packages() -> Iterator[Finding]:
    """Versions of everything that setup.py asks for."""
    yield Finding("hpc_neuro", True, f"{code_version()}, Python {platform.python_version()}, {platform.platform()}")
    for name in _NEEDED:
        try:
            yield Finding(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, False, f"`pip install -c requirements.lock {name}`")
    try:
        importlib.import_module("hpc_neuro.models.teacher").timm()
        yield Finding("timm beside torch", True, "imports")
    except (ImportError, RuntimeError) as error:
        yield Finding("timm beside torch", False, f"{error}; install a torchvision built for torch {torch.__version__}")


def devices() -> Iterator[Finding]:
    """GPUs, or the processors that stand in for them."""
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: train with engine.dtype=fp16"
        yield Finding(f"GPU {i}", True, f"{p.name}, {files.format_bytes(p.total_memory)}, {bf16}")
    if not torch.cuda.device_count():
        yield Finding("GPU", None, "none seen by torch; training runs on the CPU with gloo")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(
        "CPU", True, f"{len(os.sched_getaffinity(0))} cores for this process, {files.format_bytes(memory)} memory"
    )


def mpi() -> Iterator[Finding]:
    """The MPI library behind mpi4py, asked in a process of its own (importing it starts MPI), and mpiexec."""
    code = "from mpi4py import MPI; print(MPI.Get_library_version().split(chr(10))[0].split(chr(0))[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        yield Finding("MPI", True, done.stdout.strip()[:80])
    else:
        yield Finding("MPI", False, "mpi4py finds no MPI library: `module load openmpi`, or `pip install mpich`")
    beside = Path(sys.executable).with_name("mpiexec")
    found = shutil.which("mpiexec") or (str(beside) if beside.exists() else None)
    yield Finding(
        "mpiexec", bool(found), found or "`module load openmpi`, or `pip install mpich`; needed for many ranks"
    )


def hdf5() -> Iterator[Finding]:
    """The HDF5 library and its locking rule."""
    import h5py  # asked for its version only

    locking = os.environ.get("HDF5_USE_FILE_LOCKING", "not set")
    yield Finding("HDF5", True, f"{h5py.version.hdf5_version}; files are read without locks (environment: {locking})")


def parameter_files() -> Iterator[Finding]:
    """Whether a training could keep parameters in files on a fast disk; few need it."""
    lacks = importlib.import_module("hpc_neuro.train.deepspeed.engine").find_missing_for_nvme()
    ready = "ready; compiled at the first use, for some minutes" if lacks is None else f"needs {lacks}"
    yield Finding("engine.nvme", None if lacks else True, f"DeepSpeed's async_io: {ready}")


def slurm() -> Iterator[Finding]:
    """Whether Slurm's commands are here and answer."""
    command = shutil.which("sinfo")
    if command is None:
        yield Finding("Slurm", None, "no sinfo here: verbs run on this machine; on a login node `module load slurm`")
        return
    try:
        done = subprocess.run(
            [command, "-h", "-o", "%P %D nodes %l"], capture_output=True, text=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding("Slurm", False, "sinfo did not answer in 10 s: is slurmctld up?")
        return
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        yield Finding("Slurm", None, f"installed but not up: {' '.join(done.stderr.split())[:100]}")
    for line in lines:
        yield Finding("Slurm", True, f"partition {line}")


def disk() -> Iterator[Finding]:
    """Space where a run would write."""
    for folder in dict.fromkeys(Path(p) for p in (".", os.environ.get("TMPDIR", "/tmp"), "/dev/shm")):
        if folder.is_dir():
            usage = shutil.disk_usage(folder)
            text = f"{files.format_bytes(usage.free)} free of {files.format_bytes(usage.total)}"
            yield Finding(f"disk {folder}", usage.free > 2e9 or str(folder) == "/dev/shm", text)


def network() -> Iterator[Finding]:
    """What offline settings are in force."""
    for name in ("WANDB_MODE", "HF_HUB_OFFLINE"):
        yield Finding(name, None, os.environ.get(name, "not set"))


PARTS: tuple[Callable[[], Iterator[Finding]], ...] = (
    packages,
    devices,
    parameter_files,
    mpi,
    hdf5,
    slurm,
    disk,
    network,
)
