"""The verb `trace`: image stacks in, trees out, without labels and without a network.

OUT/swc/ID.swc, ID.voxel.swc   the trees of a stack in micrometers and in voxels
OUT/swc/ID/0001.swc            each tree by itself, where a stack has several
OUT/overlay/ID.png             maximum projections, with the trees over them
OUT/trace.html, trace.json     the page to look at, and the same for programs
"""

from __future__ import annotations

from hpc_neuro.trace_stacks.config import TraceStacksConfig

__all__ = ["TraceStacksConfig", "forecast", "run"]


def forecast(cfg: TraceStacksConfig) -> list[str]:
    """Open every stack and describe what a run would do, in lines. Writes nothing."""
    from hpc_neuro.trace_stacks import verb

    return verb.forecast(cfg)


def run(cfg: TraceStacksConfig) -> int:
    """Trace every stack, or resume. Returns the exit code."""
    from hpc_neuro.trace_stacks import verb

    return verb.run(cfg)
