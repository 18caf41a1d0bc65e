"""What trees cost once the blocks are skeletonized: microseconds per skeleton voxel, and seconds per number of pieces.

    python -m tools.bench.trees [--size 64 256 256] [--neurons 12] [--pieces 20000 80000] [--repeat 2]

Crowded synthetic neurons (hpc_neuro.data.synthetic) with breaks in their light give Otsu's mask, of which the trees are
made without the image and with it. Gaps are bridged between straight dashes of 12 voxels in rows, 8 voxels apart; a
time that grows faster than the pieces is a fault. Times are CPU seconds of one thread, the least of the repetitions.
Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import concatenate_trees
from hpc_neuro.data.synthetic import Microscope, TreeForm, grow_random_tree, render_stack
from hpc_neuro.tracing import BlockSkeleton, TraceConfig, list_trace_blocks, skeletonize_block, trace_block_skeletons
from hpc_neuro.tracing.centerlines import Centerlines, find_far_ends, find_paths_home
from hpc_neuro.tracing.gaps import join_gaps
from hpc_neuro.tracing.voxel_graph import VoxelGraph, merge_block_skeletons

_VOXEL: VoxelSize = (1.0, 0.33, 0.33)
"""[um] z y x."""
_DASH, _GAP, _PITCH, _ROW = 12, 8, 24, 100
"""[voxel] Of a dash, between dashes and between rows; dashes of a row."""


def main() -> None:
    """Print a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(64, 256, 256), help="[voxel]")
    parser.add_argument("--neurons", type=int, default=12)
    parser.add_argument("--pieces", type=int, nargs="+", default=[20000, 80000])
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    z, y, x = args.size

    facts = time_crowd((z, y, x), args.neurons, args.repeat)
    facts["bridging"] = {str(pieces): time_bridging(pieces, args.repeat) for pieces in args.pieces}
    print(json.dumps(facts))


def time_crowd(shape: Shape, neurons: int, repeat: int) -> dict[str, Any]:
    """Skeleton voxels of a crowded mask, and the microseconds that each costs, printed."""
    cfg = TraceConfig()
    gold = concatenate_trees([grow_random_tree(n, shape, _VOXEL, TreeForm(cable=150.0)) for n in range(neurons)])

    image = render_stack(gold, shape, _VOXEL, Microscope(gap_every=30.0, fragments=3), 0).astype(np.float32)
    smooth = gaussian_filter(image, 0.7)
    mask = smooth > threshold_otsu(smooth)

    def skeletonize() -> list[BlockSkeleton]:
        boxes = list_trace_blocks(shape, cfg)
        skeletons = [skeletonize_block(lambda box: mask[box.slices], shape, box, _VOXEL, cfg) for box in boxes]
        return [skeleton for skeleton in skeletons if skeleton is not None]

    skeletons = skeletonize()
    voxels = sum(len(skeleton.voxels) for skeleton in skeletons)

    def make_trees(with_image: bool) -> None:
        read_image = (lambda box: image[box.slices]) if with_image else None
        trace_block_skeletons(skeletons, lambda box: mask[box.slices], shape, _VOXEL, cfg=cfg, image=read_image)

    facts: dict[str, Any] = {"shape": list(shape), "neurons": neurons, "skeleton_voxels": voxels}
    for name, part in (
        ("skeletons", skeletonize),
        ("trees", lambda: make_trees(False)),
        ("trees_with_image", lambda: make_trees(True)),
    ):
        facts[f"{name}_us_per_voxel"] = round(1e6 * _measure_time(part, repeat) / voxels, 1)
        print(f"{name:>17}: {facts[f'{name}_us_per_voxel']:7.1f} us per skeleton voxel of {voxels}", flush=True)
    return facts


def time_bridging(pieces: int, repeat: int) -> float:
    """Seconds of CPU to bridge the gaps between some dashes, printed."""
    graph = build_dashes(pieces)
    following, _ = find_paths_home(graph, find_far_ends(graph)[0], np.ones(len(graph.voxels)))
    centerlines = Centerlines(following, np.ones(len(graph.voxels), dtype=bool))

    # The search tree is shared with the other parts of tracing.
    assert graph.kdtree.n == len(graph.voxels)

    seconds = round(_measure_time(lambda: join_gaps(graph, centerlines, TraceConfig()), repeat), 2)
    print(f"{pieces:>9} pieces: {seconds:7.2f} s", flush=True)
    return seconds


def build_dashes(pieces: int) -> VoxelGraph:
    """A graph of straight dashes in rows along x."""
    number = np.arange(pieces)
    row, place = number // _ROW, number % _ROW
    side = int(np.ceil(np.sqrt(row.max() + 1)))

    start = np.stack([row // side * _PITCH + 4, row % side * _PITCH + 4, place * (_DASH + _GAP) + 4], axis=1)
    voxels = (start[:, None] + np.arange(_DASH)[:, None] * np.array([0, 0, 1])).reshape(-1, 3).astype(np.int32)
    z, y, x = (voxels.max(axis=0) + 5).tolist()

    count, radius = len(voxels), np.full(len(voxels), 1.5, dtype=np.float32)
    component = np.repeat(number, _DASH).astype(np.int32)
    skeleton = BlockSkeleton(
        voxels,
        np.ones(count, dtype=np.float32),
        radius,
        radius,
        component,
        np.full(pieces, _DASH),
        np.ones(pieces, dtype=bool),
    )
    graph = merge_block_skeletons([skeleton], _read_darkness, (z, y, x), np.ones(3), 0.3, _DASH)
    assert graph is not None
    return graph


def _read_darkness(box: Box) -> Any:
    return np.zeros(box.shape, dtype=np.uint8)


def _measure_time(part: Callable[[], object], repeat: int) -> float:
    """The least CPU seconds of some repetitions."""
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        part()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
