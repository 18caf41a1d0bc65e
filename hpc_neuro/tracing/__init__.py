"""Trees of centerlines from a probability."""

from hpc_neuro.tracing.block_skeleton import add_halo, list_trace_blocks, skeletonize_block
from hpc_neuro.tracing.config import TraceConfig
from hpc_neuro.tracing.contacts import Contact
from hpc_neuro.tracing.crowd_labels import CrowdDecision
from hpc_neuro.tracing.probability import measure_confidence, read_neighborhood_max, sample_edges
from hpc_neuro.tracing.soma import Soma, find_somas
from hpc_neuro.tracing.trace import TracedVolume, trace, trace_block_skeletons, trace_reader, trace_volume
from hpc_neuro.tracing.voxel_graph import BlockSkeleton

__all__ = [
    "BlockSkeleton",
    "Contact",
    "CrowdDecision",
    "Soma",
    "TraceConfig",
    "TracedVolume",
    "add_halo",
    "find_somas",
    "list_trace_blocks",
    "measure_confidence",
    "read_neighborhood_max",
    "sample_edges",
    "skeletonize_block",
    "trace",
    "trace_block_skeletons",
    "trace_reader",
    "trace_volume",
]
