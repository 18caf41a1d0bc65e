"""Probability -> centre-line trees."""

from hpc_neuro.tracing.confidence import brightest_around, confidence, samples
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.skeletonize_block import context, reduced, trace_blocks
from hpc_neuro.tracing.trace import trace, trace_read, trace_strands
from hpc_neuro.tracing.voxel_graph import Strands

__all__ = [
    "Strands",
    "TraceConfig",
    "brightest_around",
    "confidence",
    "context",
    "reduced",
    "samples",
    "trace",
    "trace_blocks",
    "trace_read",
    "trace_strands",
]
