"""Probability -> centre-line trees."""

from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.trace import trace, trace_read

__all__ = ["TraceConfig", "trace", "trace_read"]
