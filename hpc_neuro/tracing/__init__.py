"""Probability -> centre-line trees."""

from hpc_neuro.tracing.confidence import confidence
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.foreground import Strands
from hpc_neuro.tracing.strands import context, reduced, trace_blocks
from hpc_neuro.tracing.trace import trace, trace_read, trace_strands

__all__ = [
    "Strands",
    "TraceConfig",
    "confidence",
    "context",
    "reduced",
    "trace",
    "trace_blocks",
    "trace_read",
    "trace_strands",
]
