"""Probability -> centre-line trees."""

from hpc_neuro.tracing.confidence import confidence
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.trace import trace, trace_read

__all__ = ["TraceConfig", "confidence", "trace", "trace_read"]
