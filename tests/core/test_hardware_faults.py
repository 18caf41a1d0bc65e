"""Errors of hardware are told from bugs by what they say."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from hpc_neuro import cli
from hpc_neuro.core import schema
from hpc_neuro.core.constants import EXIT_HARDWARE, EXIT_NETWORK
from hpc_neuro.core.hardware_faults import find_hardware_fault
from hpc_neuro.core.task_queue import RetryLimits, Task, TaskLedger
from hpc_neuro.pipeline import VERBS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA`"), 71),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), 71),
        (RuntimeError("No CUDA GPUs are available"), 71),
        (OSError(errno.EIO, "Input/output error", "a.h5"), 71),
        (OSError(errno.ESTALE, "Stale file handle"), 71),
        (OSError("Unable to synchronously open object (file read failed: errno = 5, error message = 'x')"), 71),
        (RuntimeError("NCCL error in: x.cpp:3, unhandled system error\nncclSystemError: System call failed"), 69),
        (RuntimeError("NCCL error: remote process exited or there was a network error, NCCL version 2.27"), 69),
        # Bugs, and what a user can correct, are no faults of hardware.
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("CUDA error: device-side assert triggered"), None),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), None),
        (RuntimeError("NCCL error: invalid usage, ncclInvalidUsage"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (ValueError("a file that says: uncorrectable ECC error"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hardware_is_told_from_bugs(error: Exception, code: int | None) -> None:
    fault = find_hardware_fault(error)
    assert (None if fault is None else fault.exit_code) == code


def test_the_cause_of_an_error_counts_too() -> None:
    try:
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError as cause:
            raise RuntimeError("the block cannot be read") from cause
    except RuntimeError as error:
        fault = find_hardware_fault(error)
    assert fault is not None
    assert (fault.text, fault.is_lasting) == ("input/output error", False)


@pytest.mark.parametrize(
    ("text", "code"),
    [("uncorrectable ECC error encountered", EXIT_HARDWARE), ("NCCL ncclRemoteError", EXIT_NETWORK), ("a bug", None)],
)
def test_the_exit_code_says_so(
    text: str, code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(cfg: object) -> int:
        raise RuntimeError(text)

    monkeypatch.setattr(VERBS["prepare"].load_module(), "run", run)
    monkeypatch.setattr(schema, "load", lambda *_: None)
    if code is None:
        with pytest.raises(RuntimeError, match="a bug"):
            cli.main(["prepare"])
        return
    assert cli.main(["prepare"]) == code
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert message.splitlines()[-1].startswith("hpc-neuro prepare: hardware fault on ")


def test_a_lost_gpu_ends_the_run_and_is_not_the_failure_of_one_block(tmp_path: Path) -> None:
    class Silent:
        def count_deaths(self, name: str) -> int:
            return 0

        def begin(self, name: str) -> None: ...

        def end(self, name: str) -> None: ...

        def record_failure(self, *args: object) -> None: ...

        def succeed(self, name: str) -> None: ...

    ledger: TaskLedger[None, None] = TaskLedger({"": Silent()}, RetryLimits(tries=1))
    task = Task("t", "a task", None)
    with ledger:
        ledger.begin(task)
        ledger.fail(task, OSError(errno.EIO, "Input/output error"))
        assert len(ledger.report.failures) == 1
        ledger.begin(task)
        with pytest.raises(RuntimeError, match="ECC"):
            ledger.fail(task, RuntimeError("CUDA error: uncorrectable ECC error encountered"))
