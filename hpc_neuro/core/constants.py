"""Values that several parts of the package must agree on."""

from __future__ import annotations

from dataclasses import dataclass

UNLABELED = 255
"""Mask value of a voxel without a label; such voxels count neither in a loss nor in a metric."""

TOLERANCE_VOX = 4.0
"""[voxel] How near cable must lie to agree, where no other tolerance is given; the keys name it (`f1_4vox`)."""

TREE_COLORS = ("#5bc0ff", "#f2c14e", "#ff6b4a", "#8fe388", "#c9a0ff", "#ff9ecb")
"""Colors of the trees of a stack, in turn."""

EXIT_DONE = 0
"""The command did what was asked."""
EXIT_BAD_INPUT = 2
"""The input or the configuration cannot be used; nothing was written."""
EXIT_FAILURES = 3
"""The command finished, with failures that it lists."""
EXIT_NETWORK = 69
"""The network between ranks failed, or a peer was lost (EX_UNAVAILABLE of sysexits.h)."""
EXIT_HARDWARE = 71
"""A device or a file system failed, which is no bug (EX_OSERR of sysexits.h)."""
EXIT_STOPPED = 75
"""The command was stopped by a signal; the same command resumes it (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True)
class ExitCode:
    """What an exit code of `hpc-neuro VERB` tells."""

    meaning: str
    advice: str
    """What the user does next."""
    effect: str
    """What the launcher does with the job."""


EXIT_CODES = {
    EXIT_DONE: ExitCode("done, or already complete", "nothing", "the job ends; dependent jobs start"),
    EXIT_BAD_INPUT: ExitCode(
        "bad input or config; nothing was written",
        "read the message: it names what was found, what was expected and the fix",
        "the job ends and is not requeued; dependent jobs are removed",
    ),
    EXIT_FAILURES: ExitCode(
        "finished, with failures that are listed",
        "run the same command again; only the failed pieces are retried",
        f"as for {EXIT_BAD_INPUT}",
    ),
    EXIT_NETWORK: ExitCode(
        "the network between GPUs failed, or a peer was lost",
        "run the same command again; where it fails again, `hpc-neuro doctor` on these nodes",
        "requeued, where no rank crashed",
    ),
    EXIT_HARDWARE: ExitCode(
        "a device or a file system failed; the message names what",
        "run the same command again, on another node where it fails again",
        "requeued, a few times at most",
    ),
    EXIT_STOPPED: ExitCode(
        "stopped by a signal or the time limit, state saved",
        "run the same command again; it resumes",
        "the job is requeued, at most `max_requeue` times",
    ),
}
"""Every exit code that a verb returns on purpose."""
