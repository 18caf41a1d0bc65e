"""Values that several parts of the package must agree on."""

from __future__ import annotations

UNLABELLED = 255
"""Mask value of a voxel without a label; such voxels count neither in a loss nor in a metric."""

TOLERANCE_VOX = 4.0
"""[voxel] How near cable must lie to agree, where no other tolerance is given; the keys name it (`f1_4vox`)."""

EXIT_DONE = 0
"""The command did what was asked."""
EXIT_BAD_INPUT = 2
"""The input or the configuration cannot be used; nothing was written."""
EXIT_FAILURES = 3
"""The command finished, with failures that it lists."""
EXIT_STOPPED = 75
"""The command was stopped by a signal; the same command resumes it (EX_TEMPFAIL of sysexits.h)."""
