"""The training store: one chunked, uncompressed HDF5 file per volume, and dataset.json over them.

    OUT/dataset.json      which volumes, their splits, shapes, ranges and hashes
    OUT/ID.h5   image     [Z, Y, X] in the stack's own dtype
                mask      [Z, Y, X] uint8: 1 on neurite, 255 where unlabelled, 0 elsewhere
                skeleton  [Z, Y, X] uint8: 1 in the tube around the centreline
                distance  [Z, Y, X] float16: fine voxels to the centreline, at most the cap
                tangent   [3, Z, Y, X] int8: 127 times the unit direction (z y x) of the nearest edge, 0 beyond the cap
                points/   skeleton, branch, tip: [N, 3] int32 voxels, for the sampler
                tree/, fitted/   the given tree, and the one drawn (local radii, on the ridge), in voxels

Chunks that hold nothing are never allocated, so a masked stack of many gigabytes stays small. Readers open without file
locks, one handle per process and file; a store can be pickled and used after fork, spawn and forkserver.
"""

from hpc_neuro.data.store.layout import FORMAT, SPLITS, VolumeRecord
from hpc_neuro.data.store.reader import Kind, Store, StoredVolume
from hpc_neuro.data.store.writer import forecast_bytes, is_written, write_index, write_volume

__all__ = [
    "FORMAT",
    "SPLITS",
    "Kind",
    "Store",
    "StoredVolume",
    "VolumeRecord",
    "forecast_bytes",
    "is_written",
    "write_index",
    "write_volume",
]
