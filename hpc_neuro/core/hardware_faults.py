"""Faults of a device, the network or a file system, told from bugs by the error that they raise.

A job that meets one is worth another start, most likely elsewhere; a job with a bug is not. Only errors whose texts or
numbers name the hardware count: an illegal memory access, a failed assertion on the device or an invalid use of NCCL
comes from code, and stays a crash.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hpc_neuro.core.constants import EXIT_HARDWARE, EXIT_NETWORK

_FILE_SYSTEM_ERRORS = {
    errno.EIO: "input/output error",
    errno.EREMOTEIO: "remote input/output error",
    errno.ESTALE: "stale file handle",
    errno.ENODEV: "no such device",
    errno.ENXIO: "no such device or address",
    errno.ESHUTDOWN: "the transport endpoint is shut down",
    errno.EHOSTDOWN: "host is down",
}
"""Error numbers of disks and network file systems -> what happened."""
_DEVICE_TEXTS = {
    r"uncorrectable (ECC|NVLink) error": "an uncorrectable memory or NVLink error of the GPU",
    r"GPU is lost|fallen off the bus": "the GPU is lost",
    r"hardware stack error|unspecified launch failure.*Xid": "an error of the GPU's hardware",
    r"all CUDA-capable devices are busy or unavailable": "the GPU is busy or unavailable",
    r"CUDA (driver )?error: (unknown error|system not yet initialized|OS call failed)": "the GPU's driver failed",
    r"no CUDA-capable device is detected|No CUDA GPUs are available": "the driver finds no GPU",
    r"cudaErrorECCUncorrectable|CUDA_ERROR_ECC_UNCORRECTABLE": "an uncorrectable memory error of the GPU",
}
"""Texts of CUDA's errors -> what happened."""
_NETWORK_TEXTS = {
    r"ncclSystemError|NCCL.*unhandled system error": "a system call of NCCL failed",
    r"ncclRemoteError|NCCL.*remote process exited or there was a network error": "the network between GPUs failed",
    r"NCCL.*(unhandled cuda error|ncclUnhandledCudaError)": "NCCL met an error of the GPU",
    r"NET/IB.*(error|failed)": "the InfiniBand adapter failed",
}
"""Texts of NCCL's errors -> what happened."""
_HDF5_ERRNO = re.compile(r"errno = (\d+)")
"""HDF5 puts the error number into its text."""


@dataclass(frozen=True)
class HardwareFault:
    """What failed."""

    text: str
    """For people."""
    exit_code: int
    """EXIT_HARDWARE for what belongs to this node, EXIT_NETWORK for what may be another rank's."""
    is_lasting: bool = False
    """Whether nothing else on the device succeeds in this process."""


def find_hardware_fault(error: BaseException) -> HardwareFault | None:
    """What failed when an error, or one from which it was raised, is a fault of hardware; None for any other error."""
    return next((fault for cause in _list_causes(error) if (fault := _judge(cause))), None)


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and the errors from which it was raised."""
    seen = set[int]()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _judge(error: BaseException) -> HardwareFault | None:
    if isinstance(error, OSError):
        match = _HDF5_ERRNO.search(str(error))
        text = _FILE_SYSTEM_ERRORS.get(int(match[1]) if match else error.errno or 0)
        return HardwareFault(text, EXIT_HARDWARE) if text else None

    # torch raises RuntimeError and its subclasses; in another error such a text, of a file for example, is no evidence.
    if not isinstance(error, RuntimeError):
        return None
    if text := _match(_DEVICE_TEXTS, str(error)):
        return HardwareFault(text, EXIT_HARDWARE, is_lasting=True)
    text = _match(_NETWORK_TEXTS, str(error))
    return HardwareFault(text, EXIT_NETWORK, is_lasting=True) if text else None


def _match(texts: dict[str, str], message: str) -> str | None:
    return next((meaning for pattern, meaning in texts.items() if re.search(pattern, message, re.DOTALL)), None)
