"""Simulate `infer` on a whole brain: hours, core-hours, files, metadata operations, and what keeps all ranks waiting.

    python -m tools.bench.brain --voxels 1e12 --ranks 512 --limit 120m --latency 1ms

Every block, shard, super-block and batch of pieces is drawn by the rank that is free first, as the task queue does. A
start ends at the time limit, or when a node fails: what is in hand then is given back or lost, and the next start waits
in the queue, lists all blocks and reads all markers on one rank before it goes on. A metadata operation takes the
latency of the file system, and no more than --metadata-rate are served per second.

The unit costs are printed; class UnitCosts names their sources. Those of listing blocks, of reading a marker, and of
all that follows the super-blocks but the trees themselves are measured at the start, on this machine (--costs stated:
none is). Test-time augmentation is left out. Last line: JSON.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core import files, sorted_parts
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume
from hpc_neuro.core.morphology import build_tree, concatenate_trees
from hpc_neuro.core.sorted_parts import Items, Stream
from hpc_neuro.data import ome_zarr, shard_packs, swc
from hpc_neuro.data.run_journal import BlockMarker, name_block
from hpc_neuro.infer import forest_files, skeleton_groups
from hpc_neuro.infer.done_markers import DoneMarkers
from hpc_neuro.infer.proofread import ForestLabels, NodeConfidence
from hpc_neuro.infer.tiling import MASK, Tiling
from hpc_neuro.infer.trees import save_arrays
from hpc_neuro.tracing import TraceConfig, add_halo, list_trace_blocks
from hpc_neuro.tracing.super_blocks import (
    MARGIN,
    SuperBlockLines,
    SuperBlockLinks,
    group_pieces,
    link_super_block,
)

_VOXEL: VoxelSize = (1.0, 0.25, 0.25)
"""[um] z y x."""
_TILING = Tiling((32, 128, 128), 0.25, (4, 16, 16), (128, 512, 512), (32, 64, 64))
_KEPT = 0.6
"""Share of the strand voxels of a super-block that is left for its groups."""
_NODES = 0.5
"""Nodes of a tree per strand voxel."""
_STREAMS = forest_files.STREAMS
"""Files of all trees."""
_TREE_FILES = 10_000
"""Trees, at most, that have files of their own."""
_TREE_NODES = 500
"""Nodes of a tree: about 1 mm of cable at 1 um."""
_PLACE_NODES = 100
"""Nodes for each doubtful place."""
_TREE_BYTES = 3 * 48 + 16
"""[byte] Of a node in the three SWC files of all trees and in the table of confidence."""
_PLACE_BYTES, _NEURON_BYTES = 75, 50
"""[byte] Of a row."""
_TOGETHER = 1.5
"""Groups of blocks of tracing that hold something, per block that does."""
_PACKED = 0.05
"""[byte] Of a voxel of a shard that is not empty."""
_LISTINGS = 10
"""Listings of the folder of intermediate files, by the steps of tracing."""
_SLANT = 0.5
"""Crossings of a unit of area per unit of length in a unit of volume, in all directions alike."""


@dataclass(frozen=True)
class UnitCosts:
    """What each piece of work costs; seconds of one rank unless it says otherwise."""

    student: float = 1 / 1.28e6
    """[s/voxel] docs/infer.md, student of the demo on one CPU thread; on a GPU give --student."""
    empty: float = 1 / 23e6
    """[s/voxel] docs/infer.md, reading and skipping a volume of which 99 % is empty."""
    pyramid: float = 1 / 400e6
    """[s/voxel of the finer level] `tools.bench.pyramid`, its upper bound."""
    skeleton: float = 8.7 / 512**3
    """[s/voxel] docs/infer.md, a block of 512^3 voxels with 100 neurites."""
    lines: float = 156e-6
    """[s/strand voxel] docs/infer.md, trees with links along the image."""
    links: float = 1.7e-6
    """[s/strand voxel that is kept] of one super-block and all its neighbors; measured at the start."""
    groups: float = 0.4e-6
    """[s/piece that goes on in another super-block] measured at the start."""
    trees: float = 30e-6
    """[s/strand voxel that is kept] docs/infer.md, trees without links: gaps are bridged already."""
    texts: float = 8e-6
    """[s/node] rows of three SWC files and of the tables of a batch; measured at the start."""
    single_tree: float = 10e-6
    """[s/node] both SWC files of one tree by itself; measured at the start."""
    sort: float = 0.35e-6
    """[s/item] of one rank that puts trees, or places, in the order of the file; measured at the start."""
    gather: float = 7e-9
    """[s/byte] of a stretch of a file, from the texts of the batches; measured at the start."""
    checksum: float = 1.3e-9
    """[s/byte] reading a file back and hashing it; measured at the start."""
    read_part: float = 1e-3
    """[s/file] reading one file of arrays, without the latency; measured at the start."""
    list_trace_block: float = 2.5e-6
    """[s/block] listing the blocks of tracing; measured at the start."""
    list_block: float = 30e-6
    """[s/block] listing and counting blocks in Python; measured at the start."""
    read_marker: float = 60e-6
    """[s/marker] reading and checking one done marker, without the latency; measured at the start."""
    draw: float = 100e-6
    """[s] of the store of rank 0 for each task that is drawn and reported."""
    list_shard: float = 20e-6
    """[s/shard] listing a shard of the pyramid and what it is computed from; measured at the start."""
    block_operations: int = 6
    """Path operations of a block that is not empty: two shards are written and read back; its records go to
    an open log. An empty block takes none. These counts are those of tests/tools/bench/test_brain_operations.py."""
    shard_operations: int = 3
    """The same of a shard of the pyramid, besides one for each shard that it is computed from."""
    task_operations: int = 5
    """The same of another task with one result file, which is written whole."""
    log_operations: int = 2
    """Of each log that the next start reads and writes as one with others."""


@dataclass(frozen=True)
class Site:
    """The machine."""

    ranks: int
    limit: float = math.inf
    """[s] Time limit of a start."""
    latency: float = 0.0
    """[s] Of a metadata operation."""
    metadata_rate: float = 50e3
    """[1/s] Metadata operations that the file system serves."""
    ranks_per_node: int = 8
    node_hours: float = math.inf
    """[h] Mean time between failures of a node."""
    queue: float = 300.0
    """[s] Wait from the end of a start to the next one."""


@dataclass(frozen=True)
class Stage:
    """Tasks that ranks share, or one task of one rank."""

    name: str
    seconds: np.ndarray
    """[n] of each task, without metadata."""
    operations: int | np.ndarray
    """Metadata operations of each task, or [n] of all tasks."""
    files: int = 0
    """Files that the stage leaves."""
    reads: float = 0.0
    """Of the operations of each task, on average: those that open data to read it."""
    is_serial: bool = False
    """Whether one rank does all of it while the others wait."""


@dataclass
class Outcome:
    """What a simulation counts."""

    stages: dict[str, float] = field(default_factory=dict)
    """[s] Wall time of each stage."""
    starts: int = 1
    failures: int = 0
    wall: float = 0.0
    """[s] From the first start to the end, waits in the queue included."""
    allocated: float = 0.0
    """[s] Of it, with the ranks held."""
    serial: float = 0.0
    """[s] Of it, with one rank at work and all others waiting."""
    serial_stages: dict[str, float] = field(default_factory=dict)
    """[s] Of it, by stage."""
    longest_serial: float = 0.0
    longest_serial_name: str = ""
    operations: float = 0.0
    reads: float = 0.0
    """Of them, those that open data to read it."""
    files: int = 0
    too_long: list[str] = field(default_factory=list)
    """Stages with a task that is longer than the time limit: it would never end."""


def simulate(
    stages: list[Stage], site: Site, startup: tuple[float, float], seed: int = 0, again: float = 0.0
) -> Outcome:
    """Run stages one after the other.

    startup: seconds and metadata operations of one rank at each start. again: metadata operations of all ranks
    together at each start but the first.
    """
    return _Simulation(site, startup, seed, again).run(stages)


class _Simulation:
    def __init__(self, site: Site, startup: tuple[float, float], seed: int, again: float) -> None:
        self._site, self._startup, self._random, self._again = site, startup, random.Random(seed), again
        self._out = Outcome()
        self._clock = self._start_ends = 0.0
        self._fails = False

    def run(self, stages: list[Stage]) -> Outcome:
        out = self._out
        self._begin_start()
        for stage in stages:
            start = self._clock
            self._run_stage(stage)
            out.stages[stage.name] = self._clock - start
            out.operations += float(np.broadcast_to(stage.operations, stage.seconds.shape).sum())
            out.reads += stage.reads * len(stage.seconds)
            out.files += stage.files

        out.wall = self._clock
        out.allocated = self._clock - (out.starts - 1) * self._site.queue
        return out

    def _begin_start(self) -> None:
        site, (seconds, operations) = self._site, self._startup
        nodes = max(site.ranks // site.ranks_per_node, 1)
        failure = math.inf
        if math.isfinite(site.node_hours):
            failure = self._random.expovariate(nodes / (site.node_hours * 3600))

        self._fails = failure < site.limit
        self._start_ends = self._clock + min(site.limit, failure)

        cost = seconds + operations * site.latency
        if cost >= site.limit and "start" not in self._out.too_long:
            self._out.too_long.append("start")

        self._clock += cost
        # A start that takes all of its time would never do any work: it is shown, and counted as if it had time left.
        self._start_ends = max(self._start_ends, self._clock + 1.0 if cost >= site.limit else self._start_ends)
        self._out.operations += operations
        self._add_serial("start", cost)

    def _restart(self) -> None:
        self._out.failures += self._fails
        self._clock = self._start_ends + self._site.queue
        self._out.starts += 1
        self._begin_start()
        self._clock += self._again * max(self._site.latency / self._site.ranks, 1 / self._site.metadata_rate)
        self._out.operations += self._again

    def _add_serial(self, name: str, seconds: float) -> None:
        out = self._out
        out.serial += seconds
        out.serial_stages[name] = out.serial_stages.get(name, 0.0) + seconds
        if seconds > out.longest_serial:
            out.longest_serial, out.longest_serial_name = seconds, name

    def _run_stage(self, stage: Stage) -> None:
        site = self._site
        # The file system serves all ranks; where it is slower than they ask, all wait.
        ranks = 1 if stage.is_serial else site.ranks
        durations = stage.seconds + stage.operations * max(
            site.latency, ranks / site.metadata_rate if np.any(stage.operations) else 0
        )

        longest = float(durations.max(initial=0.0))
        budget = site.limit - self._startup[0] - self._startup[1] * site.latency
        if longest > budget:
            self._out.too_long.append(stage.name)

        pending = list(durations.tolist())
        while pending:
            pending = self._run_until_end_of_start(pending, ranks, unlimited=longest > budget)
            if pending:
                self._restart()

        if stage.is_serial:
            self._add_serial(stage.name, float(durations.sum()))

    def _run_until_end_of_start(self, durations: list[float], ranks: int, unlimited: bool) -> list[float]:
        """Work until the start ends; the tasks that remain."""
        free = [self._clock] * min(ranks, len(durations))
        remaining, last = [], self._clock
        stop = math.inf if unlimited else self._start_ends

        for number, seconds in enumerate(durations):
            # Every rank has a task that the start is too short for.
            if not free:
                remaining += durations[number:]
                break
            end = free[0] + seconds
            if end > stop:
                heapq.heappop(free)
                remaining.append(seconds)
                continue
            heapq.heapreplace(free, end)
            last = max(last, end)

        self._clock = last
        if unlimited:
            self._start_ends = max(self._start_ends, last)
        return remaining


def plan_brain(voxels: float, dense: float, costs: UnitCosts, site: Site) -> tuple[list[Stage], tuple[float, float]]:
    """The stages of `infer` on a volume, and the seconds and operations of one rank at a start.

    dense: share of blocks that are not empty.
    """
    shape = make_shape(voxels)
    rng = np.random.default_rng(0)
    blocks = count_tiles(shape, _TILING.write)
    strands = 4e8 * voxels / 1e12

    def vary(count: int, mean: float) -> np.ndarray:
        # Blocks differ: a third of a mean either way, most of it from what they hold.
        return mean * np.clip(rng.normal(1.0, 0.3, count), 0.2, 2.5)

    block_voxels = math.prod(_TILING.write)
    full = round(blocks * dense)
    # The dearest first, as they are listed.
    predict = np.concatenate(
        [np.sort(vary(full, block_voxels * costs.student))[::-1], np.full(blocks - full, block_voxels * costs.empty)]
    )

    # Each row of shards along x has a folder, in both images, which takes three operations; each rank has a log.
    rows = 2 * _count_rows(shape)
    operations = np.where(np.arange(blocks) < full, costs.block_operations + 3 * rows / full, 0)
    # Both shards are opened to be read back.
    stages = [Stage("blocks", predict, operations, 2 * full + site.ranks, 2 * full / blocks)]

    levels = ome_zarr.plan_shards(shape, _VOXEL, _TILING.write, MASK) if blocks < 2e6 else []
    finer = 2 * blocks
    for number, shards in enumerate(levels, start=1):
        # Those of zeros are only listed.
        written = round(len(shards) * dense)
        below = math.ceil(finer / len(shards))
        stages += [
            Stage(f"list {number}", np.array([len(shards) * costs.list_shard]), 0, is_serial=True),
            Stage(
                f"pyramid {number}",
                vary(written, 8 * block_voxels * costs.pyramid),
                costs.shard_operations + below,
                written,
                below + 1,
            ),
        ]
        finer = len(shards)

    stages += plan_trees(shape, strands, dense, costs, vary, site.ranks)
    startup = blocks * (costs.list_block + costs.read_marker), 30.0

    # The store of rank 0 serves one request at a time.
    draws = [replace(s, seconds=np.maximum(s.seconds, costs.draw * min(site.ranks, len(s.seconds)))) for s in stages]
    return draws, startup


def plan_trees(
    shape: Shape,
    strands: float,
    dense: float,
    costs: UnitCosts,
    vary: Callable[[int, float], np.ndarray],
    ranks: int,
) -> list[Stage]:
    """The stages from the blocks to the files of the trees. strands: voxels of centerlines."""
    cfg = TraceConfig()
    trace_blocks = count_tiles(shape, cfg.block)
    super_edges = tuple(a * b for a, b in zip(cfg.block, cfg.super_block, strict=True))
    supers = count_tiles(shape, super_edges)
    grown = math.prod((edge + 2 * MARGIN) / edge for edge in super_edges)
    in_trees, kept, nodes = round(trace_blocks * dense), strands * _KEPT, strands * _NODES

    full = round(count_tiles(shape, _TILING.write) * dense)
    pack = tuple(edge * shards for edge, shards in zip(_TILING.write, shard_packs.PACK, strict=True))
    packs = count_tiles(shape, pack)

    # What is not empty lies together, so that more groups of blocks hold something than blocks do.
    group = skeleton_groups.choose_group(shape, cfg.block)
    groups = count_tiles(shape, group)
    occupied = min(1.0, _TOGETHER * dense)
    in_groups = round(groups * occupied)
    halo = add_halo(Box.at((10**6,) * 3, group), (10**7,) * 3, _VOXEL, cfg).shape
    # A process opens each pack once, and no group of blocks that has no file.
    group_packs = round(_count_touched(halo, pack))
    super_packs = round(_count_touched(tuple(edge + 2 * MARGIN for edge in super_edges), pack))
    # A super-block begins with a group, and a margin of one block is read around it.
    group_files = round(math.prod(edge / g + 2 for edge, g in zip(super_edges, group, strict=True)) * occupied)

    # Each super-block has three faces of its own, and two pieces meet at each crossing.
    area = supers * sum(math.prod(super_edges) / edge for edge in super_edges)
    going_on = 2 * _SLANT * area * strands / math.prod(shape)

    # Pieces that go on, and those that do not, are batches of their own.
    batches = 2 * supers
    _, ranges, sums = _count_file_parts(nodes)
    runs = len(_STREAMS) * math.prod(_choose_runs(nodes, batches))

    scratch = packs + in_groups + 2 * supers + 4 * batches + runs + ranges + sums

    task = costs.task_operations
    return [
        # A listing of a folder of a thousand files is one operation.
        Stage(
            "packs",
            vary(packs, full / packs * math.prod(_TILING.write) * _PACKED * costs.gather),
            task + math.ceil(full / packs),
            reads=full / packs,
        ),
        _plan_one_rank("list of skeletons", trace_blocks * costs.list_trace_block, 4 * _count_rows(shape)),
        Stage(
            "skeletons",
            vary(in_groups, in_trees / in_groups * math.prod(cfg.block) * costs.skeleton),
            task + group_packs,
            reads=group_packs,
        ),
        Stage(
            "super-blocks",
            vary(supers, strands / supers * grown * costs.lines),
            task + group_files + super_packs,
            reads=group_files + super_packs,
        ),
        Stage("links", vary(supers, kept / supers * costs.links), task + 27, reads=27),
        _plan_one_rank("groups", going_on * costs.groups + supers * costs.read_part, supers + task),
        Stage(
            "batches", vary(batches, kept / batches * costs.trees), 2 * task + 8 + super_packs, reads=8 + super_packs
        ),
        *plan_tree_files(nodes, batches, scratch, costs, vary, ranks),
        Stage("removal", np.zeros(scratch // 512 + 1), 512),
    ]


def plan_tree_files(
    nodes: float,
    batches: int,
    scratch: int,
    costs: UnitCosts,
    vary: Callable[[int, float], np.ndarray],
    ranks: int,
) -> list[Stage]:
    """The stages from the finished batches to the files. scratch: files that wait for a later step."""
    task, trees, places = costs.task_operations, nodes / _TREE_NODES, nodes / _PLACE_NODES
    has_own_files = trees <= _TREE_FILES
    texts = costs.texts + (costs.single_tree if has_own_files else 0.0)
    single_files = round(2 * trees) if has_own_files else 0
    total_bytes, ranges, sums = _count_file_parts(nodes)

    # A range has items of nearly all batches, and opens each, or runs that were copied from many.
    stripes, run_groups = _choose_runs(nodes, batches)
    runs, opened = len(_STREAMS) * stripes * run_groups, run_groups if stripes else batches
    copies = []
    if runs:
        parts = math.ceil(batches / run_groups)
        seconds = vary(runs, total_bytes / runs * (costs.gather + costs.checksum))
        copies.append(Stage("runs", seconds, task + 1 + parts, reads=1 + parts))

    return [
        _plan_one_rank("order of trees", trees * costs.sort + batches * costs.read_part, batches + task),
        Stage(
            "texts",
            vary(batches, nodes / batches * texts),
            2 * task + 7 + task * single_files // batches,
            single_files,
            reads=7,
        ),
        # The files are put in order side by side; the one with most items takes longest.
        _plan_one_rank("order of rows", max(trees, places) * costs.sort + batches * costs.read_part, batches + task),
        *copies,
        Stage(
            "files",
            vary(ranges, total_bytes / ranges * costs.gather),
            task + opened,
            len(_STREAMS),
            reads=3 + opened,
        ),
        Stage("checksums", vary(sums, total_bytes / sums * costs.checksum), task),
        # One rank lists the folder of all results before each stage.
        _plan_one_rank("list of results", 0.0, _LISTINGS * math.ceil(scratch / 1000)),
        # The rank that writes the record has not read the journal before.
        _plan_one_rank("record", batches * costs.read_part + trees * costs.sort, batches + task + ranks),
    ]


def _count_file_parts(nodes: float) -> tuple[float, int, int]:
    """[byte] Of all files of the trees, and the stretches in which they are written and in which they are hashed."""
    trees, places = nodes / _TREE_NODES, nodes / _PLACE_NODES
    total_bytes = nodes * _TREE_BYTES + places * _PLACE_BYTES + trees * _NEURON_BYTES
    return (
        total_bytes,
        math.ceil(total_bytes / sorted_parts.RANGE_BYTES),
        math.ceil(total_bytes / (16 * files.CHUNK_BYTES)),
    )


def _choose_runs(nodes: float, batches: int) -> tuple[int, int]:
    """Stripes and groups of the runs of one of the files, as if all were of one size."""
    total_bytes, ranges, _ = _count_file_parts(nodes)
    return sorted_parts.choose_runs(batches, ranges // len(_STREAMS), round(total_bytes / len(_STREAMS)))


def _plan_one_rank(name: str, seconds: float, operations: int) -> Stage:
    """A stage of one task, for which all other ranks wait."""
    return Stage(name, np.array([seconds]), operations, is_serial=True)


def _count_rows(shape: Shape) -> int:
    """Rows of shards along x of one image."""
    return count_tiles(shape[:2], _TILING.write[:2])


def _count_touched(edges: tuple[int, ...], tile: tuple[int, ...]) -> float:
    """Tiles [voxel] that a box of these edges [voxel] touches, on average."""
    return math.prod(edge / size + 1 for edge, size in zip(edges, tile, strict=True))


def count_again(stages: list[Stage], costs: UnitCosts, site: Site) -> float:
    """Metadata operations of all ranks at a start that goes on: the logs of the last one, and a look at each shard."""
    return site.ranks * costs.log_operations + 2 * int(np.count_nonzero(stages[0].operations))


def make_shape(voxels: float) -> Shape:
    """A volume of about so many voxels with the proportions of a mouse brain at 1 x 0.25 x 0.25 um."""
    edge = (voxels / (0.8 * 2.2 * 3.2)) ** (1 / 3)
    return round(0.8 * edge), round(2.2 * edge), round(3.2 * edge)


def count_tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """Tiles of a volume."""
    return math.prod(math.ceil(n / t) for n, t in zip(shape, tile, strict=True))


def measure_costs(stated: UnitCosts) -> UnitCosts:
    """The unit costs that a second of this machine can tell, in place of the stated ones."""
    with tempfile.TemporaryDirectory() as folder:
        links, groups, read_part = _measure_joins(Path(folder))
        texts, single_tree = _measure_texts(Path(folder))
        sort, gather, checksum = _measure_merge(Path(folder))
        return replace(
            stated,
            links=links,
            groups=groups,
            read_part=read_part,
            texts=texts,
            single_tree=single_tree,
            sort=sort,
            gather=gather,
            checksum=checksum,
            list_block=_measure_listing(),
            list_trace_block=_measure_trace_listing(),
            list_shard=_measure_shard_listing(),
            read_marker=_measure_marker(Path(folder)),
        )


def _measure_joins(folder: Path, length: int = 20) -> tuple[float, float, float]:
    """Linking and joining two super-blocks of straight lines that all go on, and reading the links of one."""
    cfg, shape = TraceConfig(), (64, 2048, 2 * length)
    half = shape[2] // 2
    cores = [Box((0, 0, 0), (64, 2048, half)), Box((0, 0, half), shape)]

    def build(core: Box) -> SuperBlockLines:
        along = np.arange(core.start[2], core.stop[2])
        rows = np.stack(np.meshgrid(np.arange(0, 64, 8), np.arange(0, 2048, 8), along, indexing="ij"))
        points = rows.reshape(3, -1).T.astype(np.int32)
        ones = np.ones(len(points), dtype=np.float32)

        empty = np.zeros((0, 3), dtype=np.int32)
        none = np.zeros(0, dtype=np.int64)
        piece = (points[:, 0] // 8 * 256 + points[:, 1] // 8).astype(np.int32)
        pieces = int(piece.max()) + 1
        return SuperBlockLines(
            points, ones, ones, ones, piece, np.full(pieces, half), np.ones(pieces, dtype=bool),
            empty, empty, none, np.zeros((0, 3)), none, empty,
        )  # fmt: skip

    lines = [build(core) for core in cores]
    links = list[SuperBlockLinks | None]()

    def link() -> None:
        links[:] = [link_super_block(lines.__getitem__, n, cores, shape, (1.0, 1.0, 1.0), cfg=cfg) for n in range(2)]

    # Each of the two looks at both; a super-block inside a brain looks at itself and 26 others.
    per_voxel = _measure_time(link) / (2 * sum(len(part.voxels) for part in lines))
    pieces = sum(len(part.pieces) for part in links if part is not None)
    per_piece = _measure_time(lambda: group_pieces(links.__getitem__, len(cores), cfg=cfg)) / pieces

    save_arrays(folder / "links.npz", links[0])

    def read() -> None:
        for _ in range(20):
            with np.load(folder / "links.npz") as arrays:
                SuperBlockLinks(**arrays)

    return 27 * per_voxel, per_piece, _measure_time(read) / 20


def _measure_texts(folder: Path, trees: int = 20) -> tuple[float, float]:
    """The texts of a batch, and the files of single trees; seconds per node."""
    count = _TREE_NODES * trees
    line = np.arange(_TREE_NODES)[:, None] * np.array([0.1, 0.7, 0.7])
    single = [build_tree(line + 10 * number, np.arange(_TREE_NODES) - 1) for number in range(trees)]
    forest, numbers = concatenate_trees(single), np.arange(2, trees + 2)
    labels = ForestLabels(numbers, np.arange(count) + 500)

    # A run of doubtful nodes for each place.
    sure = np.where(np.arange(count) % _PLACE_NODES < 5, 0.4, 0.9)
    confidence = NodeConfidence(sure, np.zeros((0, count)), 0.3, 0.5)

    seconds = _measure_time(
        lambda: forest_files.write_texts(
            folder, 0, forest, numbers, labels, confidence, (10**6,) * 3, _VOXEL, _TILING.write
        )
    )

    def write_alone() -> None:
        for tree in single:
            swc.write(folder / "a.swc", tree, unit="voxel", voxel_size=_VOXEL, comments=[])

    return seconds / count, 2 * _measure_time(write_alone) / count


def _measure_merge(folder: Path, items: int = 200_000) -> tuple[float, float, float]:
    """Ordering items [s/item], gathering them [s/byte], and hashing the file [s/byte]."""
    rng = np.random.default_rng(0)
    row = b"x" * _PLACE_BYTES
    for part in range(4):
        keys = [rng.random(items // 4), np.arange(items // 4)]
        sorted_parts.write_part(folder, part, {"rows": Items(keys, [row] * (items // 4))}, {})

    stream, size = Stream("rows", folder / "rows.csv"), items * len(row)
    order = _measure_time(lambda: sorted_parts.plan_stream(folder, 4, stream))
    gather = _measure_time(lambda: sorted_parts.write_range(folder, stream, 0))
    checksum = _measure_time(lambda: sorted_parts.hash_range(folder, stream, 0))
    return order / items, gather / size, checksum / size


def _measure_trace_listing(blocks: int = 5_000) -> float:
    """Listing the blocks of tracing."""
    cfg = TraceConfig()
    return _measure_time(lambda: list_trace_blocks((cfg.block[0], cfg.block[1], cfg.block[2] * blocks), cfg)) / blocks


def _measure_shard_listing(shards: int = 2_000) -> float:
    """Listing shards of a level of which all is zero below."""
    z, y, x = _TILING.write
    shape = (z * 4, y * 16, x * shards // 64)
    (level, *_) = ome_zarr.plan_shards(shape, _VOXEL, _TILING.write, MASK)
    levels = ome_zarr.plan_levels(shape, _VOXEL)

    def look() -> None:
        for shard in level:
            _, box = ome_zarr.locate_fine_box(levels, shard)
            set[str]().isdisjoint(ome_zarr.list_shards_in(box, _TILING.write, shard.level - 1, shard.label))

    return _measure_time(look) / len(level)


def _measure_listing(blocks: int = 2_000) -> float:
    """Listing blocks and counting their windows."""
    z, y, x = _TILING.write
    shape = (z, y, x * blocks)
    return _measure_time(lambda: _TILING.count_all_windows(shape)) / len(list(tile_volume(shape, _TILING.write)))


def _measure_marker(folder: Path, count: int = 2_000) -> float:
    """Reading the journal, and the markers in it, of which the page cache holds the bytes."""
    writer = DoneMarkers(folder, "a", "key")
    shards = {f"0/c/{n}/0/0": "0" * 64 for n in range(2)}
    blocks = list(tile_volume((1, 1, count), (1, 1, 1)))
    for block in blocks:
        writer.begin(name_block(block.index))
        writer.write(BlockMarker(block.index, block.write.start, shards, "0" * 64, sizes=dict.fromkeys(shards, 1000)))
        writer.succeed(name_block(block.index))

    reader = DoneMarkers(folder, "a", "key")
    return _measure_time(lambda: reader.list_missing(blocks)) / count


def _measure_time(part: Callable[[], object]) -> float:
    start = time.process_time()
    part()
    return time.process_time() - start


def parse_time(text: str) -> float:
    """Seconds of "120m", "1ms", "2h", "30s" or a number of seconds."""
    match = re.fullmatch(r"([0-9.]+)(ms|s|m|h|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write it as 120m, 2h, 30s or 1ms")
    return float(match[1]) * {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def main() -> None:
    """Print what a run would take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", type=float, default=1e12)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--limit", type=parse_time, default=math.inf, help="time limit of a start, such as 120m")
    parser.add_argument("--latency", type=parse_time, default=1e-3, help="of a metadata operation, such as 1ms")
    parser.add_argument("--metadata-rate", type=float, default=50e3, help="operations per second")
    parser.add_argument("--node-hours", type=float, default=20e3, help="mean time between failures of a node")
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--queue", type=parse_time, default=300.0, help="wait before each further start")
    parser.add_argument("--dense", type=float, default=0.3, help="share of blocks that are not empty")
    parser.add_argument("--student", type=float, help="[voxel/s] of one rank; none: a CPU thread")
    parser.add_argument("--costs", choices=("measured", "stated"), default="measured")
    args = parser.parse_args()

    costs = UnitCosts() if args.costs == "stated" else measure_costs(UnitCosts())
    if args.student:
        costs = replace(costs, student=1 / args.student)

    site = Site(
        args.ranks, args.limit, args.latency, args.metadata_rate, args.ranks_per_node, args.node_hours, args.queue
    )

    stages, startup = plan_brain(args.voxels, args.dense, costs, site)
    outcome = simulate(stages, site, startup, again=count_again(stages, costs, site))
    print("\n".join(describe(outcome, stages, costs, site)))
    print(json.dumps(summarize(outcome, stages, costs, site)))


def summarize(outcome: Outcome, stages: list[Stage], costs: UnitCosts, site: Site) -> dict[str, Any]:
    """The figures of a run as plain data."""
    blocks = len(stages[0].seconds)
    return {
        "hours": outcome.wall / 3600,
        "core_hours": outcome.allocated * site.ranks / 3600,
        "busy_core_hours": sum(float(stage.seconds.sum()) for stage in stages) / 3600,
        "starts": outcome.starts,
        "node_failures": outcome.failures,
        "files": outcome.files,
        "metadata_operations_per_second": outcome.operations / max(outcome.allocated, 1e-9),
        "metadata_operations_per_block": outcome.operations / blocks,
        "reads_per_block": outcome.reads / blocks,
        "serial_share": outcome.serial / max(outcome.allocated, 1e-9),
        "serial_shares": {name: s / max(outcome.allocated, 1e-9) for name, s in outcome.serial_stages.items()},
        "longest_serial_hours": outcome.longest_serial / 3600,
        "longest_serial": outcome.longest_serial_name,
        "never_end": outcome.too_long,
        "stage_hours": {name: seconds / 3600 for name, seconds in outcome.stages.items()},
        "costs": asdict(costs),
    }


def describe(outcome: Outcome, stages: list[Stage], costs: UnitCosts, site: Site) -> Iterator[str]:
    """Lines for people."""
    facts = summarize(outcome, stages, costs, site)
    for name, value in asdict(costs).items():
        yield f"{name:>18} {value:10.3g}"

    yield ""
    for stage in stages:
        kind = "one rank" if stage.is_serial else f"{site.ranks} ranks"
        hours, share = outcome.stages[stage.name] / 3600, facts["serial_shares"].get(stage.name)
        serial = "" if share is None else f"{100 * share:7.2f} % of the time"
        yield f"{stage.name:>18} {len(stage.seconds):9,} tasks on {kind:>10} {hours:9.3f} h{serial}"

    yield ""
    yield f"{facts['hours']:.2f} hours in {outcome.starts} starts ({outcome.failures} ended by a node)"
    yield f"{facts['core_hours']:,.0f} core-hours, {facts['busy_core_hours']:,.0f} of them at work"
    yield f"{outcome.files:,} files at the end"

    rate, per_block = facts["metadata_operations_per_second"], facts["metadata_operations_per_block"]
    reads = facts["reads_per_block"]
    yield f"{rate:,.0f} metadata operations per second, {per_block:.1f} per block, {reads:.1f} of them to read data"
    yield (
        f"one rank works and the others wait for {100 * facts['serial_share']:.1f} % of the time; "
        f"longest: {outcome.longest_serial_name}, {outcome.longest_serial / 3600:.2f} h"
    )
    for name in outcome.too_long:
        yield f"{name}: a task is longer than the time limit and would never end; counted as if it had no limit"


if __name__ == "__main__":
    main()
