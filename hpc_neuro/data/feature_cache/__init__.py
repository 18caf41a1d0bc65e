"""Teacher features on disk: one HDF5 shard per slab of slices, a manifest that is written last, and their reader.

A shard holds `features` [S, L, h, w, D]: S slices orthogonal to the view's axis, L teacher layers, an h x w token map,
D channels (fewer with `pca`). A token stands for a cell of voxels. Cells of any size are averaged onto the student's
token grid by area, so cells that are the student's own tokens pass through unchanged.
"""

from hpc_neuro.data.feature_cache.encoding import RAW, FeatureCoding
from hpc_neuro.data.feature_cache.manifest import (
    CODING,
    FORMAT,
    MANIFEST,
    CacheMismatch,
    ShardSpec,
    hash_manifest,
    iter_tiles,
    list_uses,
    read_manifest,
    record_use,
)
from hpc_neuro.data.feature_cache.reader import FeatureCache
from hpc_neuro.data.feature_cache.resample import CropCells
from hpc_neuro.data.feature_cache.shard import (
    TOKEN_CHUNK,
    ShardWriter,
    is_shard_sound,
    read_shard_key,
    read_shard_record,
    read_shard_values,
    write_manifest,
)

__all__ = [
    "CODING",
    "FORMAT",
    "MANIFEST",
    "RAW",
    "TOKEN_CHUNK",
    "CacheMismatch",
    "CropCells",
    "FeatureCache",
    "FeatureCoding",
    "ShardSpec",
    "ShardWriter",
    "hash_manifest",
    "is_shard_sound",
    "iter_tiles",
    "list_uses",
    "read_manifest",
    "read_shard_key",
    "read_shard_record",
    "read_shard_values",
    "record_use",
    "write_manifest",
]
