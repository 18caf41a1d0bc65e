"""The verb `doctor`: what this machine has and what is missing, or whether a teacher is worth anything on a store."""

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

from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.files import format_bytes
from hpc_neuro.core.run_folder import code_version
from hpc_neuro.teacher import probe

HELP = """\
hpc-neuro doctor
    What this machine has, what is missing, and how to get it.

hpc-neuro doctor teacher=NAME store=STORE
    Whether a teacher is worth anything on the volumes of a store, as `hpc-neuro teacher probe` says, with its keys:
    teacher.weights=FOLDER volumes=[ID,ID] layer=N samples=N copies=N.
    Exit code: 0 it passes, 3 it fails.
"""
_REQUIRED = (
    "torch", "deepspeed", "timm", "h5py", "mpi4py", "numpy", "wandb", "submitit", "pydantic", "tensorstore",
    "tifffile", "imagecodecs", "nibabel", "pynrrd", "connected-components-3d", "edt", "scikit-image",
)  # fmt: skip
_MIN_FREE_BYTES = 2e9
"""[bytes] Free space below which a disk is reported as too full."""
_SLURM_SECONDS = 10
"""[s] Time that Slurm's controller has to answer."""


@dataclass(frozen=True)
class Diagnosis:
    """One line of the report."""

    subject: str
    ok: bool | None
    """None: worth knowing, neither good nor bad."""
    text: str
    """What was found; where something is missing, how to install it."""


def main(argv: Sequence[str]) -> int:
    """Print the report. Exit code 0: everything required is there, 3: something is missing.

    With the keys of GateConfig: judge a teacher. Exit code 0: it passes, 3: it fails. Raises ConfigError, and
    InputError where it cannot be judged.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP)
        return EXIT_DONE
    if argv:
        return probe.main(argv)

    lines = [diagnosis for check in CHECKS for diagnosis in check()]
    # Of one width, so that subjects start in one column.
    marks = {True: "ok     ", False: "MISSING", None: "       "}
    width = max(len(line.subject) for line in lines)
    for line in lines:
        sys.stdout.write(f"{marks[line.ok]} {line.subject:<{width}}  {line.text}\n")
    return EXIT_FAILURES if any(line.ok is False for line in lines) else EXIT_DONE


def check_packages() -> Iterator[Diagnosis]:
    """Versions of the packages that setup.py requires."""
    yield Diagnosis("hpc_neuro", True, f"{code_version()}, Python {platform.python_version()}, {platform.platform()}")

    for name in _REQUIRED:
        try:
            yield Diagnosis(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Diagnosis(name, False, f"`pip install -c constraints.txt {name}`")

    # timm imports torchvision, which fails beside a torch of another build.
    try:
        importlib.import_module("hpc_neuro.models.teacher").timm()
        yield Diagnosis("timm beside torch", True, "imports")
    except (ImportError, RuntimeError) as error:
        advice = f"install a torchvision built for torch {torch.__version__}"
        yield Diagnosis("timm beside torch", False, f"{error}; {advice}")


def check_devices() -> Iterator[Diagnosis]:
    """The GPUs that torch sees, the cores and the memory."""
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = "bf16" if is_native else "no bf16: train with engine.dtype=fp16"
        yield Diagnosis(f"GPU {index}", True, f"{gpu.name}, {format_bytes(gpu.total_memory)}, {bf16}")
    if not torch.cuda.device_count():
        yield Diagnosis("GPU", None, "torch sees none; training runs on the CPU with gloo")

    # Cores that this process may use: a container or a job often has fewer than the machine.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    yield Diagnosis("CPU", True, f"{cores} cores for this process, {format_bytes(memory)} memory")


def check_parameter_files() -> Iterator[Diagnosis]:
    """Whether a training could keep parameters in files on a fast disk, which few need."""
    missing = importlib.import_module("hpc_neuro.train.deepspeed.engine").find_missing_for_nvme()
    status = f"needs {missing}" if missing else "ready; compiled at the first use, for some minutes"
    yield Diagnosis("engine.nvme", None if missing else True, f"DeepSpeed's async_io: {status}")


def check_mpi() -> Iterator[Diagnosis]:
    """The MPI library behind mpi4py, and mpiexec."""
    # In a process of its own: importing mpi4py.MPI starts MPI.
    code = "from mpi4py import MPI; print(MPI.Get_library_version().split(chr(10))[0].split(chr(0))[0])"
    library = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if library.returncode == 0:
        yield Diagnosis("MPI", True, library.stdout.strip()[:80])
    else:
        yield Diagnosis("MPI", False, "mpi4py finds no MPI library: `module load openmpi`, or `pip install mpich`")

    # The wheel of MPICH puts mpiexec beside Python, which may not be on the PATH.
    beside_python = Path(sys.executable).with_name("mpiexec")
    mpiexec = shutil.which("mpiexec") or (str(beside_python) if beside_python.exists() else None)
    advice = "`module load openmpi`, or `pip install mpich`; required for several ranks"
    yield Diagnosis("mpiexec", bool(mpiexec), mpiexec or advice)


def check_hdf5() -> Iterator[Diagnosis]:
    """The HDF5 library and its file locking."""
    import h5py

    # Locks fail on many network file systems, so files are opened without them.
    locking = os.environ.get("HDF5_USE_FILE_LOCKING", "not set")
    text = f"{h5py.version.hdf5_version}; files are read without locks (environment: {locking})"
    yield Diagnosis("HDF5", True, text)


def check_slurm() -> Iterator[Diagnosis]:
    """Whether Slurm's commands are installed and its controller answers."""
    # Without Slurm everything runs on this machine, so a missing sinfo is no fault.
    command = shutil.which("sinfo")
    if command is None:
        yield Diagnosis("Slurm", None, "no sinfo here: verbs run on this machine; on a login node `module load slurm`")
        return

    # One line per partition: name, nodes, time limit.
    arguments = [command, "-h", "-o", "%P %D nodes %l"]
    try:
        sinfo = subprocess.run(arguments, capture_output=True, text=True, timeout=_SLURM_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Diagnosis("Slurm", False, f"sinfo did not answer in {_SLURM_SECONDS} s: is slurmctld up?")
        return

    lines = sinfo.stdout.strip().splitlines()
    if sinfo.returncode or not lines:
        yield Diagnosis("Slurm", None, f"installed but not up: {' '.join(sinfo.stderr.split())[:100]}")
    for line in lines:
        yield Diagnosis("Slurm", True, f"partition {line}")


def check_disks() -> Iterator[Diagnosis]:
    """Free space where a run would write."""
    folders = (Path(), Path(os.environ.get("TMPDIR", "/tmp")), Path("/dev/shm"))
    for folder in dict.fromkeys(folders):
        if not folder.is_dir():
            continue
        usage = shutil.disk_usage(folder)
        # Containers often have a small /dev/shm; little is written there.
        ok = usage.free > _MIN_FREE_BYTES or str(folder) == "/dev/shm"
        yield Diagnosis(f"disk {folder}", ok, f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}")


def check_network() -> Iterator[Diagnosis]:
    """The offline settings in force."""
    for name in ("WANDB_MODE", "HF_HUB_OFFLINE"):
        yield Diagnosis(name, None, os.environ.get(name, "not set"))


CHECKS: tuple[Callable[[], Iterator[Diagnosis]], ...] = (
    check_packages,
    check_devices,
    check_parameter_files,
    check_mpi,
    check_hdf5,
    check_slurm,
    check_disks,
    check_network,
)
