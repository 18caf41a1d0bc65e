"""The training store: one chunked, uncompressed HDF5 file per volume, and dataset.json over them.

    OUT/dataset.json      the volumes with their splits, shapes, intensity ranges and hashes
    OUT/ID.h5   image     [Z, Y, X] in the stack's own dtype
                mask      [Z, Y, X] uint8: 1 on neurite, 255 where unlabelled, 0 elsewhere
                skeleton  [Z, Y, X] uint8: 1 in the tube around the centerline
                distance  [Z, Y, X] float16: fine voxels to the centerline, at most the cap
                tangent   [3, Z, Y, X] int8: 127 times the unit direction (z y x) of the nearest edge, 0 beyond the cap
                points/   skeleton, branch, tip: [N, 3] int32 voxels, for the sampler
                tree/     the annotator's tree, in voxels
                fitted/   the tree that was drawn (local radii, moved onto the ridge), in voxels

A volume of labels has empty trees, an unknown distance (infinite), and in `skeleton` the centerlines of its neurites.

Empty chunks are never allocated, so a masked stack of many gigabytes stays small. Readers open files without locks,
with one handle per process and file. A store can be pickled and used after fork, spawn and forkserver.
"""

from hpc_neuro.data.store.reader import FORMAT, INDEX, SPLITS, PointKind, Store, StoredVolume, VolumeRecord
from hpc_neuro.data.store.writer import (
    StoredLabels,
    forecast_bytes,
    is_written,
    write_index,
    write_labelled_volume,
    write_volume,
)

__all__ = [
    "FORMAT",
    "INDEX",
    "SPLITS",
    "PointKind",
    "Store",
    "StoredLabels",
    "StoredVolume",
    "VolumeRecord",
    "forecast_bytes",
    "is_written",
    "write_index",
    "write_labelled_volume",
    "write_volume",
]
