"""Trees of a volume traced in super-blocks, beside those of one process: how alike they are, and what each step needs.

    python -m tools.bench.super_blocks [--data FOLDER_OR_STACK ...] [--size 128 384 384] [--neurons 24]
                                       [--block 64] [--super-block 2] [--grow 1 8 64]

Otsu's masks of stacks (TIFF of one channel, bright on dark) and of a crowded synthetic volume are traced by
`trace_block_skeletons` and in super-blocks, without roots, with gaps bridged along the image. Printed are the number of
trees, their cable, the F1 of the cable of the one in that of the other within 1 and 2 voxels, and CPU seconds. With
--grow, volumes of so many copies of the crowded one side by side along x, dark between them, are traced in super-blocks
of one size; printed is the peak memory of the process that takes a step, above that of an idle one. The crowded volume
must be wider than a super-block with its margins, or the first super-block lacks surroundings. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from skimage.filters import threshold_otsu

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree, concatenate_trees, length, resample_tree
from hpc_neuro.data.synthetic import Microscope, TreeForm, grow_random_tree, render_stack
from hpc_neuro.infer.super_blocks import read_lines
from hpc_neuro.infer.trees import save_arrays
from hpc_neuro.tracing import BlockSkeleton, TraceConfig, list_trace_blocks, skeletonize_block, trace_block_skeletons
from hpc_neuro.tracing.super_blocks import (
    PieceGroups,
    SuperBlockLines,
    SuperBlockLinks,
    collect_trees,
    finish_batch,
    group_pieces,
    link_super_block,
    list_blocks_of,
    list_super_blocks,
    trace_super_block,
)
from tools.bench.process_memory import read_peak_memory

Image = NDArray[np.generic]

_VOXEL: VoxelSize = (1.0, 0.33, 0.33)  # [um]
_DARK = 24
"""[voxel] Between two copies."""


def main() -> None:
    """Print a line for each volume and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders of TIFF stacks, or stacks")
    parser.add_argument("--size", type=int, nargs=3, default=(128, 384, 384), help="[voxel]")
    parser.add_argument("--neurons", type=int, default=24)
    parser.add_argument("--block", type=int, default=64, help="[voxel] edge of a trace block")
    parser.add_argument("--super-block", type=int, default=2, help="[block] edge of a super-block")
    parser.add_argument("--grow", type=int, nargs="*", default=[], help="sizes of which memory is measured")
    args = parser.parse_args()

    cfg = TraceConfig(block=(args.block,) * 3, super_block=(args.super_block,) * 3)
    z, y, x = args.size

    print(format_header())
    facts: dict[str, Any] = {"alike": {"crowd": compare_trees(render_crowd((z, y, x), args.neurons), cfg, "crowd")}}
    stacks = [path for folder in args.data for path in (sorted(folder.glob("*.tif")) if folder.is_dir() else [folder])]
    for path in stacks:
        facts["alike"][path.stem] = compare_trees(tifffile.imread(path), cfg, path.stem)

    if args.grow:
        print(f"{'copies':>10} " + " ".join(f"{step:>12}" for step in _STEPS) + "   [MiB]")
        facts["memory"] = {str(times): measure_memory((z, y, x), args.neurons, times, cfg) for times in args.grow}
    print(json.dumps(facts))


def render_crowd(shape: Shape, neurons: int) -> Image:
    """A crowded stack with breaks in its light."""
    gold = concatenate_trees([grow_random_tree(n, shape, _VOXEL, TreeForm(cable=150.0)) for n in range(neurons)])
    image = render_stack(gold, shape, _VOXEL, Microscope(gap_every=30.0, fragments=3), 0)
    return np.asarray(gaussian_filter(image.astype(np.float32), 0.7))


def format_header() -> str:
    """The columns of `compare_trees`."""
    f1 = f"{'F1 at 1':>8} {'F1 at 2':>8}"
    return f"{'volume':>10} {'super-blocks':>12} {'trees':>13} {'cable':>17} {f1} {'seconds':>15}"


def compare_trees(image: Image, cfg: TraceConfig, name: str) -> dict[str, Any]:
    """Trees of one process and of super-blocks, printed."""
    z, y, x = image.shape
    shape, mask = (z, y, x), image > threshold_otsu(np.asarray(image))

    skeletons = skeletonize(mask, shape, cfg)
    read, read_image = (lambda box: mask[box.slices]), (lambda box: image[box.slices])

    start = time.process_time()
    whole = trace_block_skeletons(list(skeletons.values()), read, shape, _VOXEL, cfg=cfg, image=read_image)
    middle = time.process_time()
    parts = trace_in_super_blocks(skeletons, read, shape, cfg, read_image)
    end = time.process_time()

    facts: dict[str, Any] = {
        "super_blocks": len(list_super_blocks(shape, cfg)),
        "trees": [len(whole), len(parts)],
        "cable": [round(sum(map(length, trees))) for trees in (whole, parts)],
        "f1": [round(measure_f1(parts, whole, tolerance), 4) for tolerance in (1.0, 2.0)],
        "seconds": [round(middle - start, 1), round(end - middle, 1)],
    }
    print(format_row(name, facts), flush=True)
    return facts


def format_row(name: str, facts: dict[str, Any]) -> str:
    """The figures of a volume in the columns of `format_header`."""
    trees, cable, f1, seconds = facts["trees"], facts["cable"], facts["f1"], facts["seconds"]
    return (
        f"{name:>10} {facts['super_blocks']:12d} {trees[0]:6d} {trees[1]:6d} {cable[0]:8d} {cable[1]:8d} "
        f"{f1[0]:8.4f} {f1[1]:8.4f} {seconds[0]:7.1f} {seconds[1]:7.1f}"
    )


def skeletonize(mask: Image, shape: Shape, cfg: TraceConfig) -> dict[Box, BlockSkeleton]:
    """The skeletons of all blocks that have one."""
    boxes = list_trace_blocks(shape, cfg)
    skeletons = {box: skeletonize_block(lambda b: mask[b.slices], shape, box, _VOXEL, cfg) for box in boxes}
    return {box: skeleton for box, skeleton in skeletons.items() if skeleton is not None}


def trace_in_super_blocks(
    skeletons: dict[Box, BlockSkeleton],
    read: Callable[[Box], Image],
    shape: Shape,
    cfg: TraceConfig,
    image: Callable[[Box], Image],
) -> list[Tree]:
    """The trees of a volume, traced in super-blocks one after the other."""
    cores = list_super_blocks(shape, cfg)

    def trace(core: Box) -> SuperBlockLines | None:
        own = {box: skeletons[box] for box in list_blocks_of(core, shape, _VOXEL, cfg) if box in skeletons}
        return trace_super_block(own, read, shape, core, _VOXEL, cfg=cfg, image=image)

    lines = [trace(core) for core in cores]

    links = [link_super_block(lines.__getitem__, n, cores, shape, _VOXEL, cfg=cfg) for n in range(len(cores))]
    groups = group_pieces(links.__getitem__, len(cores), cfg=cfg)
    members = [groups.list_members(batch, links.__getitem__) for batch in range(groups.batches)]
    batches = [
        finish_batch(lines.__getitem__, own, groups, batch, read, shape, _VOXEL, cfg=cfg, image=image)
        for batch, own in enumerate(members)
    ]
    return collect_trees(batches, groups).trees


def measure_f1(trees: Sequence[Tree], gold: Sequence[Tree], tolerance: float) -> float:
    """F1 of the cable of all trees, cut into pieces of a voxel, within a tolerance [voxel]."""
    a, b = (resample_tree(concatenate_trees(forest), 1.0).points for forest in (trees, gold))
    if not (len(a) and len(b)):
        return float(len(a) == len(b))

    precision = float(np.mean(cKDTree(b).query(a)[0] <= tolerance))
    recall = float(np.mean(cKDTree(a).query(b)[0] <= tolerance))
    return 2 * precision * recall / max(precision + recall, 1e-9)


@dataclass(frozen=True)
class CopiedVolume:
    """Copies of a mask side by side along x, dark between them; kept in a folder with what the steps make."""

    mask: Image
    copies: int
    cfg: TraceConfig
    folder: Path

    @property
    def shape(self) -> Shape:
        """Voxels along z, y, x."""
        z, y, x = self.mask.shape
        return z, y, self.copies * x

    def read(self, box: Box) -> Image:
        """A box of the volume."""
        index = [np.arange(a, b) % n for a, b, n in zip(box.start, box.stop, self.mask.shape, strict=True)]
        return self.mask[np.ix_(*index)]

    def make_skeletons(self) -> None:
        """Skeletonize all blocks."""
        for box in list_trace_blocks(self.shape, self.cfg):
            skeleton = skeletonize_block(self.read, self.shape, box, _VOXEL, self.cfg)
            if skeleton is not None:
                save_arrays(self._path("block", box), skeleton)

    def trace_super_blocks(self) -> None:
        """Trace all super-blocks, one after the other."""
        for core in list_super_blocks(self.shape, self.cfg):
            boxes = list_blocks_of(core, self.shape, _VOXEL, self.cfg)
            skeletons = {
                box: BlockSkeleton(**np.load(self._path("block", box)))
                for box in boxes
                if self._path("block", box).exists()
            }
            lines = trace_super_block(skeletons, self.read, self.shape, core, _VOXEL, cfg=self.cfg)
            save_arrays(self._path("lines", core), lines)

    def link_super_blocks(self) -> None:
        """Find what joins each super-block to its neighbors, one after the other."""
        cores = list_super_blocks(self.shape, self.cfg)
        for number, core in enumerate(cores):
            links = link_super_block(self._load_lines, number, cores, self.shape, _VOXEL, cfg=self.cfg)
            save_arrays(self._path("links", core), links)

    def group_pieces(self) -> None:
        """Join the pieces of all super-blocks."""
        count = len(list_super_blocks(self.shape, self.cfg))
        save_arrays(self.folder / "groups.npz", group_pieces(self._load_links, count, cfg=self.cfg))

    def finish_batches(self) -> None:
        """Make the trees of all batches, one after the other."""
        groups = PieceGroups(**np.load(self.folder / "groups.npz"))
        for batch in range(groups.batches):
            members = groups.list_members(batch, self._load_links)
            finish_batch(self._load_lines, members, groups, batch, self.read, self.shape, _VOXEL, cfg=self.cfg)

    def trace_whole(self) -> None:
        """Make the trees in one process."""
        skeletons = [BlockSkeleton(**np.load(path)) for path in sorted(self.folder.glob("block_*"))]
        trace_block_skeletons(skeletons, self.read, self.shape, _VOXEL, cfg=self.cfg)

    def _load_lines(self, number: int) -> SuperBlockLines | None:
        core = list_super_blocks(self.shape, self.cfg)[number]
        return read_lines(self._path("lines", core))

    def _load_links(self, number: int) -> SuperBlockLinks | None:
        core = list_super_blocks(self.shape, self.cfg)[number]
        with np.load(self._path("links", core)) as arrays:
            return SuperBlockLinks(**arrays) if arrays.files else None

    def _path(self, kind: str, box: Box) -> Path:
        return self.folder / f"{kind}_{'_'.join(map(str, box.start))}.npz"


_STEPS: dict[str, Callable[[CopiedVolume], None]] = {
    "skeletons": CopiedVolume.make_skeletons,
    "lines": CopiedVolume.trace_super_blocks,
    "links": CopiedVolume.link_super_blocks,
    "groups": CopiedVolume.group_pieces,
    "trees": CopiedVolume.finish_batches,
    "one process": CopiedVolume.trace_whole,
}


def measure_memory(shape: Shape, neurons: int, times: int, cfg: TraceConfig) -> dict[str, float]:
    """Peak memory of a process at each step, in MiB above that of an idle one, printed."""
    image = render_crowd(shape, neurons)
    mask = np.pad(image > threshold_otsu(np.asarray(image)), _DARK)

    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        volume = CopiedVolume(mask, times, cfg, Path(folder))
        for step in _STEPS:
            # A fresh process: the peak of a process never falls.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[step] = pool.apply(measure_step, (volume, step))

    print(f"{times:10d} " + " ".join(f"{peak:12.1f}" for peak in peaks.values()), flush=True)
    return peaks


def measure_step(volume: CopiedVolume, step: str) -> float:
    """Take a step; by how much the peak memory of this process has grown [MiB]."""
    # getrusage would count the memory of the parent, from before this process was started.
    before = read_peak_memory()
    _STEPS[step](volume)
    return round((read_peak_memory() - before) / 2**20, 1)


if __name__ == "__main__":
    main()
