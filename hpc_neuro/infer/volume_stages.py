"""What follows the blocks of a volume: its pyramid, its trees, and their confidence in mirrors. Shared by all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hpc_neuro.core import stop_signals
from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.task_queue import Task, TaskFailure, TaskReport, do_each, plan_tasks, run_tasks
from hpc_neuro.data import ome_zarr
from hpc_neuro.data.run_journal import name_block
from hpc_neuro.infer import flip_tta, forest_files, super_blocks
from hpc_neuro.infer.block_pipeline import VolumeRun
from hpc_neuro.infer.flip_tta import SampledBlock
from hpc_neuro.infer.predictor import Predictor
from hpc_neuro.infer.progress import WindowProgress
from hpc_neuro.infer.tiling import MASK
from hpc_neuro.infer.trees import PredictionEntry, VolumeTrees, describe_volume

_REMOVED_AT_ONCE = 512
"""Files that one task removes."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class VolumeStep:
    """One step that volumes take, divided into tasks."""

    list_tasks: Callable[[VolumeTrees], Sequence[Task[Any]]]
    """What is missing of a volume; only the first rank asks."""
    make: Callable[[VolumeTrees, Task[Any]], Any]
    """Does one task; a result other than None goes into the report."""


@dataclass(frozen=True)
class _ShardWork:
    """One shard of the pyramid that is to be made."""

    shard: ome_zarr.LevelShard
    is_zero: bool
    """Whether all that it is computed from is zero."""


def build_pyramid(volume: VolumeRun, ranks: Ranks, is_fresh: bool = False) -> list[TaskFailure]:
    """Build the shards above level 0 that are not marked done, level by level, each level on all ranks. Collective.

    is_fresh: no shard of the pyramid is there yet.
    """
    source = volume.source
    levels = ome_zarr.plan_shards(source.shape, source.voxel_size, volume.tiling.write, MASK)
    builder = ome_zarr.PyramidBuilder(volume.folder, source.shape, source.voxel_size)
    # Only the first rank lists what is missing.
    checksums = ranks.run(lambda: volume.markers.read_levels() if ranks.is_main and levels else {})
    written = ranks.run(lambda: set(volume.markers.list_shards()) if ranks.is_main and levels else set())

    for shards in levels:
        list_tasks = functools.partial(_list_shard_tasks, volume, shards, checksums, written, is_fresh)
        make = functools.partial(_build_shard, volume, builder, is_fresh)
        report = _run_on_volumes(list_tasks, make, [volume], ranks)

        # A level is built from the one below, which must be whole.
        if report.failures:
            return report.failures
        written |= {path for path, checksum in report.results if checksum}
    return []


def _list_shard_tasks(
    volume: VolumeRun,
    shards: Sequence[ome_zarr.LevelShard],
    checksums: Mapping[str, str],
    written: set[str],
    is_fresh: bool,
) -> list[Task[_ShardWork]]:
    """The missing shards of a level; those of zeros are marked here where nothing can lie in their places."""
    source = volume.source
    levels = ome_zarr.plan_levels(source.shape, source.voxel_size)
    tasks = []
    for shard in shards:
        if shard.path in checksums:
            continue
        _, box = ome_zarr.locate_fine_box(levels, shard)
        below = ome_zarr.list_shards_in(box, volume.tiling.write, shard.level - 1, shard.label)
        is_zero = written.isdisjoint(below)
        if is_zero and is_fresh:
            volume.markers.write_shard(shard.path, "")
        else:
            tasks.append(_make_shard_task(_ShardWork(shard, is_zero), source.id))
    return tasks


def trace_volumes(
    predictor: Predictor, volumes: Sequence[VolumeRun], ranks: Ranks
) -> tuple[dict[str, PredictionEntry], list[TaskFailure]]:
    """Entries of volumes by id, complete on the first rank, and the tasks that failed. Collective.

    A volume with a failed task takes no further step, and its entry names no trees.
    """
    # What the first rank has read in the journal spares the others a look for each shard.
    shards = ranks.run_on_main(
        lambda: {volume.source.id: volume.markers.list_written(volume.list_blocks()) for volume in volumes}
    )
    all_trees = {volume.source.id: VolumeTrees(predictor.cfg, volume, shards[volume.source.id]) for volume in volumes}
    failures, entries = list[TaskFailure](), dict[str, PredictionEntry]()

    with WindowProgress("mirrored views", 0, show=ranks.is_main) as progress:
        steps = [
            PACK_SHARDS,
            SKELETONIZE_BLOCKS,
            TRACE_SUPER_BLOCKS,
            LINK_SUPER_BLOCKS,
            GROUP_PIECES,
            FINISH_PIECES,
            TRACE_FOREST,
        ]
        if predictor.cfg.flips:
            steps += [SAMPLE_TREES, _predict_views_step(predictor, progress, ranks)]

        # Each step is taken by all volumes before the next, so that ranks share all of its tasks.
        for step in [
            *steps,
            WRITE_BATCHES,
            PLAN_FILES,
            WRITE_RUNS,
            WRITE_RANGES,
            HASH_RANGES,
            WRITE_FILES,
            REMOVE_SCRATCH,
        ]:
            # A step needs what the one before it wrote.
            failed_ids = {failure.group for failure in failures}
            remaining = {name: trees for name, trees in all_trees.items() if name not in failed_ids}

            report = _take_step(step, remaining, ranks)
            failures += report.failures
            # Only the step that writes the files returns entries.
            entries |= dict(report.results)

    failed_ids = {failure.group for failure in failures}
    if ranks.is_main:
        entries |= {name: describe_volume(all_trees[name].volume) for name in failed_ids}
    ranks.run_on_main(lambda: _clean_up([trees for name, trees in all_trees.items() if name not in failed_ids]))

    # In the order of the volumes, whichever ended first.
    return {name: entries[name] for name in all_trees if name in entries}, failures


def _take_step(step: VolumeStep, all_trees: Mapping[str, VolumeTrees], ranks: Ranks) -> TaskReport[Any]:
    """Do a step's missing tasks of several volumes on all ranks. Collective."""
    return _run_on_volumes(
        lambda: [task for trees in all_trees.values() for task in step.list_tasks(trees)],
        lambda task: step.make(all_trees[task.group], task),
        [trees.volume for trees in all_trees.values()],
        ranks,
    )


def _run_on_volumes(
    list_tasks: Callable[[], Sequence[Task[T]]],
    make: Callable[[Task[T]], R | None],
    volumes: Sequence[VolumeRun],
    ranks: Ranks,
) -> TaskReport[R]:
    """Do tasks of volumes, which only the first rank lists, on all ranks. Collective."""
    if not volumes:
        return TaskReport()
    journals = {volume.source.id: volume.markers for volume in volumes}

    # The limits come from the config, so they are the same for all volumes.
    limits = volumes[0].limits
    plan = ranks.run_on_main(lambda: plan_tasks(list_tasks(), journals, limits))
    return run_tasks(plan, do_each(make), journals, limits, ranks)


def _make_shard_task(work: _ShardWork, volume: str) -> Task[_ShardWork]:
    path = work.shard.path
    return _make_task(f"pyramid_{path.replace('/', '_')}", f"shard {path} of the pyramid", work, volume)


def _build_shard(
    volume: VolumeRun, builder: ome_zarr.PyramidBuilder, is_fresh: bool, task: Task[_ShardWork]
) -> tuple[str, str]:
    """Build one shard of a level and mark it done; its path and the checksum of its bytes, "" for zeros."""
    shard = task.payload.shard
    # What an earlier run left here may be torn, or of other values.
    if not is_fresh:
        ome_zarr.remove_shard(volume.folder, shard.path)

    checksum = "" if task.payload.is_zero else builder.build(shard)[0]
    volume.markers.write_shard(shard.path, checksum)
    return shard.path, checksum


def _list_pack_tasks(trees: VolumeTrees) -> list[Task[list[Shape]]]:
    name = trees.volume.source.id
    return [
        _make_task(f"pack_{'_'.join(map(str, shards[0]))}", f"pack of shards from {shards[0]}", shards, name)
        for shards in trees.list_shards_to_pack()
    ]


def _list_skeleton_tasks(trees: VolumeTrees) -> list[Task[list[Box]]]:
    name = trees.volume.source.id
    tasks = []
    for boxes in trees.list_groups_to_skeletonize():
        start = boxes[0].start
        label = f"block of tracing at {start}" if len(boxes) == 1 else f"{len(boxes)} blocks of tracing from {start}"
        tasks.append(_make_task(f"strands_{'_'.join(map(str, start))}", label, boxes, name))
    return tasks


def _list_super_block_tasks(trees: VolumeTrees) -> list[Task[Box]]:
    name = trees.volume.source.id
    return [
        _make_task(f"lines_{'_'.join(map(str, core.start))}", f"super-block of tracing at {core.start}", core, name)
        for core in super_blocks.list_super_blocks_to_trace(trees)
    ]


def _list_link_tasks(trees: VolumeTrees) -> list[Task[int]]:
    name = trees.volume.source.id
    return [
        _make_task(f"links_{number}", f"borders of super-block {number} of tracing", number, name)
        for number in super_blocks.list_super_blocks_to_link(trees)
    ]


def _list_group_task(trees: VolumeTrees) -> list[Task[None]]:
    name = trees.volume.source.id
    return [_make_task("groups", "its pieces", None, name)] if super_blocks.needs_groups(trees) else []


def _list_batch_tasks(trees: VolumeTrees) -> list[Task[int]]:
    name = trees.volume.source.id
    return [
        _make_task(f"trees_{batch}", f"batch {batch} of its trees", batch, name)
        for batch in super_blocks.list_batches_to_finish(trees)
    ]


def _trace_forest(trees: VolumeTrees) -> None:
    """The trees of a volume; those of a large one are made already, in batches."""
    if trees.is_large:
        forest_files.order(trees)
    else:
        trees.trace()


def _list_batch_file_tasks(trees: VolumeTrees) -> list[Task[int]]:
    name = trees.volume.source.id
    return [
        _make_task(f"files_{batch}", f"files of batch {batch} of its trees", batch, name)
        for batch in forest_files.list_batches_to_write(trees)
    ]


def _list_plan_tasks(trees: VolumeTrees) -> list[Task[str]]:
    names = forest_files.list_streams_to_plan(trees)
    return [_make_task(f"plan_{name}", f"order of its {name}", name, trees.volume.source.id) for name in names]


def _list_range_tasks(
    kind: str, list_ranges: Callable[[VolumeTrees], list[tuple[str, int]]], trees: VolumeTrees
) -> list[Task[tuple[str, int]]]:
    return [
        _make_task(f"{kind}_{name}_{number}", f"{kind} {number} of its {name}", (name, number), trees.volume.source.id)
        for name, number in list_ranges(trees)
    ]


def _list_forest_task(trees: VolumeTrees) -> list[Task[None]]:
    return [_make_task("trees", "its trees", None, trees.volume.source.id)] if trees.needs_tracing() else []


def _list_files_task(trees: VolumeTrees) -> list[Task[None]]:
    return [_make_task("files", "its files", None, trees.volume.source.id)]


def _write_files(trees: VolumeTrees, task: Task[None]) -> tuple[str, PredictionEntry]:
    write = functools.partial(trees.write_files, functools.partial(flip_tta.load_views, trees))
    if trees.cfg.trees and trees.is_large:
        write = functools.partial(forest_files.finish, trees)
    return task.group, trees.finish(write)


def _list_removal_tasks(trees: VolumeTrees) -> list[Task[list[Path]]]:
    """A brain leaves millions of files, which one rank would need an hour to remove."""
    paths, name = trees.list_scratch() if trees.read_entry() is not None else [], trees.volume.source.id
    parts = [paths[begin : begin + _REMOVED_AT_ONCE] for begin in range(0, len(paths), _REMOVED_AT_ONCE)]
    return [
        _make_task(f"remove_{number}", "files that it needs no more", part, name) for number, part in enumerate(parts)
    ]


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _clean_up(finished: Sequence[VolumeTrees]) -> None:
    """Remove the scratch of volumes, and the counts of deaths, which mean nothing once the last task has ended."""
    for trees in finished:
        trees.remove_scratch()
        trees.volume.markers.end_all()


PACK_SHARDS = VolumeStep(_list_pack_tasks, lambda trees, task: trees.pack_shards(task.payload))
SKELETONIZE_BLOCKS = VolumeStep(_list_skeleton_tasks, lambda trees, task: trees.skeletonize(task.payload))
TRACE_SUPER_BLOCKS = VolumeStep(
    _list_super_block_tasks, lambda trees, task: super_blocks.trace_lines(trees, task.payload)
)
LINK_SUPER_BLOCKS = VolumeStep(_list_link_tasks, lambda trees, task: super_blocks.link(trees, task.payload))
GROUP_PIECES = VolumeStep(_list_group_task, lambda trees, task: super_blocks.group(trees))
FINISH_PIECES = VolumeStep(_list_batch_tasks, lambda trees, task: super_blocks.finish(trees, task.payload))
TRACE_FOREST = VolumeStep(_list_forest_task, lambda trees, task: _trace_forest(trees))
WRITE_BATCHES = VolumeStep(
    _list_batch_file_tasks,
    lambda trees, task: forest_files.write_batch(trees, task.payload, functools.partial(flip_tta.load_views, trees)),
)
PLAN_FILES = VolumeStep(_list_plan_tasks, lambda trees, task: forest_files.plan(trees, task.payload))
WRITE_RUNS = VolumeStep(
    functools.partial(_list_range_tasks, "run", forest_files.list_runs_to_write),
    lambda trees, task: forest_files.write_run(trees, *task.payload),
)
WRITE_RANGES = VolumeStep(
    functools.partial(_list_range_tasks, "range", forest_files.list_ranges_to_write),
    lambda trees, task: forest_files.write_range(trees, *task.payload),
)
HASH_RANGES = VolumeStep(
    functools.partial(_list_range_tasks, "hash", forest_files.list_ranges_to_hash),
    lambda trees, task: forest_files.hash_range(trees, *task.payload),
)
WRITE_FILES = VolumeStep(_list_files_task, _write_files)
REMOVE_SCRATCH = VolumeStep(_list_removal_tasks, lambda trees, task: _remove(task.payload))


def _list_sample_tasks(trees: VolumeTrees) -> list[Task[int]]:
    name = trees.volume.source.id
    return [
        _make_task(f"samples_{batch}", f"samples of batch {batch} of its trees", batch, name)
        for batch in flip_tta.list_batches_to_sample(trees)
    ]


SAMPLE_TREES = VolumeStep(_list_sample_tasks, lambda trees, task: flip_tta.keep_samples(trees, task.payload))


def _predict_views_step(predictor: Predictor, progress: WindowProgress, ranks: Ranks) -> VolumeStep:
    """Predict the blocks through which a tree runs once more, in mirrored views."""

    def list_tasks(trees: VolumeTrees) -> list[Task[SampledBlock]]:
        if not trees.has_forest():
            return []
        blocks = flip_tta.list_missing_blocks(trees)
        windows = sum(sampled.windows for sampled in blocks)

        # Only the first rank shows progress, and it does about its share.
        progress.expect(len(predictor.cfg.flips) * windows // ranks.size)

        name = trees.volume.source.id
        return [
            _make_task(
                f"view_{name_block(sampled.block.index)}", f"second look at block {sampled.block.index}", sampled, name
            )
            for sampled in blocks
        ]

    def count_windows(windows: int) -> None:
        progress.advance(windows)

        # A block takes long, so a request to stop is obeyed between two forwards.
        stop_signals.check()

    def predict_views(trees: VolumeTrees, task: Task[SampledBlock]) -> None:
        flip_tta.predict_views(trees, predictor, task.payload, count_windows)

    return VolumeStep(list_tasks, predict_views)


def _make_task(name: str, label: str, payload: T, volume: str) -> Task[T]:
    return Task(name, label, payload, volume, {"part": label})
