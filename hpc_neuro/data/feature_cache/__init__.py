"""Teacher features on disk: one HDF5 shard per slab of slices, a manifest written last, and the reader training uses.

A shard holds `features` [S, L, h, w, D]: S slices orthogonal to the view's axis, L teacher layers, an h x w token map,
D channels (fewer with `pca`). A token is a cell of voxels; cells of any size are brought to the student's token grid by
area weights, so a grid that is the student's own passes through unchanged.
"""

from hpc_neuro.data.feature_cache.encoding import RAW, Coding
from hpc_neuro.data.feature_cache.layout import (
    CODING,
    FORMAT,
    MANIFEST,
    VIEW_AXES,
    CacheMismatch,
    Unit,
    hash_manifest,
    read_manifest,
    tiles,
)
from hpc_neuro.data.feature_cache.reader import FeatureCache
from hpc_neuro.data.feature_cache.resample import Cells
from hpc_neuro.data.feature_cache.shard import (
    ShardWriter,
    is_shard_sound,
    read_shard_key,
    read_shard_record,
    read_shard_values,
    write_manifest,
)
from hpc_neuro.data.feature_cache.users import list_uses, record_use

__all__ = [
    "CODING",
    "FORMAT",
    "MANIFEST",
    "RAW",
    "VIEW_AXES",
    "CacheMismatch",
    "Cells",
    "Coding",
    "FeatureCache",
    "ShardWriter",
    "Unit",
    "hash_manifest",
    "is_shard_sound",
    "list_uses",
    "read_manifest",
    "read_shard_key",
    "read_shard_record",
    "read_shard_values",
    "record_use",
    "tiles",
    "write_manifest",
]
