"""Trees of centerlines from a probability."""

from hpc_neuro.tracing.block_skeleton import add_halo, list_trace_blocks, skeletonize_block
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.probability import measure_confidence, read_neighborhood_max, sample_edges
from hpc_neuro.tracing.trace import trace, trace_block_skeletons, trace_reader
from hpc_neuro.tracing.voxel_graph import BlockSkeleton

__all__ = [
    "BlockSkeleton",
    "TraceConfig",
    "add_halo",
    "list_trace_blocks",
    "measure_confidence",
    "read_neighborhood_max",
    "sample_edges",
    "skeletonize_block",
    "trace",
    "trace_block_skeletons",
    "trace_reader",
]
