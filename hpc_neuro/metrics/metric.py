"""What every metric has: a key, a direction, a definition."""

from __future__ import annotations

from typing import Literal


def tolerance_key(name: str, tolerance: float, unit: Literal["vox", "um"] = "vox") -> str:
    """Name the key of a metric at a tolerance: `f1` at 4 voxels is `f1_4vox`."""
    return f"{name}_{tolerance:g}{unit}"
