"""`infer` from config to predictions.json, in one process or on all ranks of an MPI job."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.geometry import Block
from hpc_neuro.core.liveness import MpiRankWatch
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.core.task_queue import Task, plan_tasks, run_tasks
from hpc_neuro.data import ome_zarr
from hpc_neuro.data.predictions import INDEX
from hpc_neuro.data.run_journal import RunJournal, describe_damage, require_current_form
from hpc_neuro.infer import status_page
from hpc_neuro.infer.block_pipeline import BlockPipeline, VolumeRun
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.done_markers import DoneMarkers, make_block_task
from hpc_neuro.infer.grid import describe_grid
from hpc_neuro.infer.predictor import Predictor, describe_run, predict_black
from hpc_neuro.infer.progress import WindowProgress
from hpc_neuro.infer.trees import PredictionEntry, entry_path
from hpc_neuro.infer.volume_stages import build_pyramid, trace_volumes
from hpc_neuro.infer.volumes import InputVolume, UnusableVolume, list_measurements, open_inputs, split_usable
from hpc_neuro.models.student_folder import find_student

log = logging.getLogger(__name__)
_RESULT_FOLDERS = ("entries", "journal", "proofread", "swc")
"""Folders of OUT whose files are written one by one."""
_MAY_CHANGE = ("page", "deaths", "batch", "silence", "flips", "trees", "trace")
"""Settings that no probability depends on. Trees record the settings that they depend on."""


def forecast(cfg: InferConfig) -> list[str]:
    """Check the weights, the volumes and the space; how much there is to do, timed by one window."""
    predictor = Predictor(cfg)
    volumes = open_inputs(cfg, contrast=predictor.contrast, choose_grid=predictor.choose_grid)
    sources, failures = _require_usable(cfg, volumes)
    resampled = [line for source in sources if (line := _describe_resampling(source))]
    return [*resampled, *describe_run(cfg, predictor, sources), *(f"left out: {line}" for line in failures)]


def run(cfg: InferConfig) -> int:
    """Predict and trace every volume. Exit code 3 when a task or a volume failed; the same command tries it again.

    All MPI ranks call this. A rank that dies takes the others with it, and the same command resumes.
    """
    ranks = Ranks.join()

    # All ranks would log the same, so the first one speaks for all.
    if not ranks.is_main:
        logging.getLogger("hpc_neuro").setLevel(logging.WARNING)

    # Some launchers leave every rank all cores of its node.
    ranks.share_threads()

    # Where a step fails on one rank all must end, or the others would wait for it for ever.
    predictor = ranks.run(lambda: Predictor(cfg))
    sources, unusable = _require_usable(cfg, _open_on_all_ranks(cfg, predictor, ranks))
    folder = run_folder.share_folder(cfg.out, cfg.share)
    ranks.run_on_main(lambda: require_current_form(cfg.out))
    is_whole = _is_whole(cfg, predictor, sources, ranks)

    with contextlib.ExitStack() as stack:
        record = ranks.run(lambda: stack.enter_context(_start_record(cfg, folder, predictor, sources, ranks, is_whole)))
        if record.complete:
            return EXIT_DONE

        # A rank that hangs raises nothing, so silence is watched for.
        stack.enter_context(MpiRankWatch(files.part_path_of_all(folder / "ranks"), ranks, cfg.silence))
        journal = stack.enter_context(contextlib.closing(_open_journal(cfg, ranks)))
        return _predict_and_trace(cfg, predictor, sources, unusable, record, journal, ranks)


def _predict_and_trace(
    cfg: InferConfig,
    predictor: Predictor,
    sources: list[InputVolume],
    unusable: list[str],
    record: run_folder.Run,
    journal: RunJournal,
    ranks: Ranks,
) -> int:
    """Do what is missing of all volumes. `unusable`: sentences on volumes that cannot be predicted."""
    started_at = time.monotonic()

    # A share may be empty.
    if sources:
        resampled = [line for source in sources if (line := _describe_resampling(source))]
        lines = ranks.run_on_main(lambda: [*resampled, *describe_run(cfg, predictor, sources, ranks.size)])
        log.info("%s", "\n".join(lines))

    # Other shares may be writing, so what killed writers left of them is removed when they are gathered.
    if cfg.share is None:
        ranks.run_on_main(lambda: _remove_parts(cfg.out))

    empty_level = ranks.run(lambda: _check_empty_level(predictor) if sources else None)
    volumes = [predictor.open_volume(source, empty_level, journal) for source in sources]

    failures = list(unusable)
    whole_volumes = list[VolumeRun]()

    for volume in volumes:
        volume_failures = predict_volume(volume, ranks)
        failures += volume_failures

        # A share of a volume's blocks is traced by the run that gathers the shares.
        if not volume_failures and volume.source.share is None:
            whole_volumes.append(volume)

    # All volumes at once: a rank that has no task left of one takes a task of the next.
    entries, task_failures = trace_volumes(predictor, whole_volumes, ranks)
    failures += [failure.line for failure in task_failures]

    changes = ranks.run_on_main(lambda: [change for source in sources if (change := source.find_change())])
    failures += changes

    # The first rank writes all logs as one, so no other may append any more.
    ranks.run(journal.close)
    seconds = round(time.monotonic() - started_at, 1)
    ranks.run_on_main(lambda: _finish(cfg, record, volumes, journal, entries, failures, seconds))
    return EXIT_FAILURES if failures else EXIT_DONE


def predict_volume(volume: VolumeRun, ranks: Ranks) -> list[str]:
    """Predict the missing blocks of one volume and build its pyramid; a line for each task that failed. Collective."""
    name, blocks = volume.source.id, volume.list_blocks()
    journals = {name: volume.markers}

    # One rank decides what is missing: the others have not read the journal.
    is_fresh = ranks.run_on_main(lambda: _prepare_folder(volume))
    if not is_fresh:
        _forget_damaged(volume, ranks)
    plan = ranks.run_on_main(lambda: plan_tasks(_list_block_tasks(volume, blocks), journals, volume.limits))

    # Only the first rank shows progress, and it does about its share.
    windows = sum(volume.tiling.count_windows(task.payload) for task in plan.tasks) // ranks.size
    label = name if ranks.size == 1 else f"{name}, rank 0 of {ranks.size}"

    with WindowProgress(label, windows, show=ranks.is_main) as progress:
        pipeline = BlockPipeline(volume, progress, is_fresh)
        run_tasks(plan, pipeline.run, journals, volume.limits, ranks)

        if plan.tasks and ranks.is_main:
            log.debug("%s: waiting: %s", name, progress.describe_waits())

    failures = ranks.run_on_main(lambda: _list_failures(volume, blocks))

    # A pyramid needs all blocks, which neither a failure nor a share leaves.
    if failures or volume.source.share is not None:
        return failures
    return [failure.line for failure in build_pyramid(volume, ranks, is_fresh)]


def _require_usable(
    cfg: InferConfig, volumes: Iterable[InputVolume | UnusableVolume]
) -> tuple[list[InputVolume], list[str]]:
    """The volumes that can be predicted, and a sentence on each other one. InputError where none can."""
    sources, unusable = split_usable(volumes)
    # A share may hold none of the volumes that can.
    if unusable and not sources and cfg.share is None:
        raise InputError("\n".join(unusable))
    return sources, unusable


def _describe_resampling(source: InputVolume) -> str:
    """A line on a volume that is resampled; "" for others."""
    return "" if source.resampling is None else f"{source.id}: {describe_grid(source.resampling)}"


def _open_on_all_ranks(cfg: InferConfig, predictor: Predictor, ranks: Ranks) -> list[InputVolume | UnusableVolume]:
    """The volumes; only the first rank reads whole files to measure them."""
    contrast, grid = predictor.contrast, predictor.choose_grid
    volumes = ranks.run(lambda: list(open_inputs(cfg, None, contrast, grid)) if ranks.is_main else [])
    measurements = ranks.run_on_main(lambda: list_measurements(volumes))
    return ranks.run(lambda: volumes if ranks.is_main else list(open_inputs(cfg, measurements, contrast, grid)))


def _start_record(
    cfg: InferConfig,
    folder: Path,
    predictor: Predictor,
    sources: list[InputVolume],
    ranks: Ranks,
    is_whole: bool,
) -> contextlib.AbstractContextManager[run_folder.Run]:
    """The record of this run, with its inputs and their files. is_whole: nothing of its results is missing."""
    inputs = {"weights": predictor.digest}
    inputs |= {f"volume {source.id}": source.digest for source in sources}

    # The list itself is an input: with a volume more or less, the run is another.
    inputs[run_folder.input_name("volumes", cfg.share)] = files.sha256_json([source.id for source in sources])
    inputs |= {f"image {source.id}": source.content for source in sources if source.file}

    input_files = {"weights": find_student(cfg.model, cfg.weights) / "model.safetensors"}
    input_files |= {f"image {source.id}": source.file for source in sources if source.file}

    return run_folder.start(
        "infer", cfg, folder, inputs, _MAY_CHANGE, main=ranks.is_main, whole=is_whole, sources=input_files
    )


def _is_whole(cfg: InferConfig, predictor: Predictor, sources: list[InputVolume], ranks: Ranks) -> bool:
    """Whether all results are there: without its index, or a shard, a run goes on, however complete its record is.

    Collective.
    """
    if cfg.share is not None:
        return True

    def read() -> tuple[bool, list[tuple[Path, dict[str, int | None]]]]:
        if not (cfg.out / INDEX).exists():
            return False, []
        journal = RunJournal(cfg.out)
        journal.refresh()
        shards = []
        for source in sources:
            markers = DoneMarkers(cfg.out, source.id, predictor.hash_settings(source), journal)
            if markers.journal.damaged_lines or markers.list_missing(predictor.tile(source).list_blocks(source.shape)):
                return False, []
            shards.append((cfg.out / f"{source.id}.ome.zarr", markers.list_shards()))
        return True, shards

    is_whole, shards = ranks.run_on_main(read)
    return is_whole and not any(_list_damaged_shards(image, sizes, ranks) for image, sizes in shards)


def _list_damaged_shards(image: Path, sizes: Mapping[str, int | None], ranks: Ranks) -> list[str]:
    """The shards that are missing below `image` or have other sizes [bytes] than these. Collective.

    Each rank looks at its part: one rank would ask the file system for minutes.
    """
    own = sorted(sizes)[ranks.rank :: ranks.size]
    damaged = ranks.run(lambda: [shard for shard in own if not _is_intact(image / shard, sizes[shard])])
    return sorted(shard for shards in ranks.gather(damaged) for shard in shards)


def _is_intact(shard: Path, size: int | None) -> bool:
    try:
        actual = shard.stat().st_size
    except OSError:
        return False
    return actual > 0 if size is None else actual == size


def _open_journal(cfg: InferConfig, ranks: Ranks) -> RunJournal:
    """The journal of this start, read by the first rank alone. Collective."""

    def read() -> RunJournal:
        journal = RunJournal(cfg.out, cfg.share)
        journal.refresh()
        # Shares may be appending, so their logs are written as one by the run that gathers them.
        if cfg.share is None:
            _forget_damaged_records(cfg.out, journal)
            journal.compact()
        return journal

    journal = ranks.run(lambda: read() if ranks.is_main else None)
    generation = ranks.gather(journal.log.generation if journal else 0)[0]
    return journal or RunJournal(cfg.out, cfg.share, generation)


def _forget_damaged_records(out: Path, journal: RunJournal) -> None:
    """Let all that may belong to a record that cannot be read be made again."""
    for line in journal.damaged_lines:
        log.warning("%s: %s; what it recorded is done again", journal.log.folder / line.log, describe_damage(line))
    if journal.damaged_lines:
        for name in journal.list_volumes():
            entry_path(out, name).unlink(missing_ok=True)
        journal.forget_damage()


def _remove_parts(out: Path) -> None:
    """Remove what killed writers left beside their targets below `out`; `run_folder.start` does so in `out` itself."""
    for name in _RESULT_FOLDERS:
        # Results of a volume may lie in a folder of its own, one level deeper.
        for folder in [out / name, *(path for path in (out / name).glob("*") if path.is_dir())]:
            files.remove_parts(folder)


def _check_empty_level(predictor: Predictor) -> float | None:
    """The empty level of the config; None where the student sees neurite in a black image."""
    # Skipping is sound only if the student finds nothing where there is nothing.
    level = predictor.cfg.empty_level
    if level is None or predictor.skips_black:
        return level

    probability = predict_black(predictor.student, predictor.tiling.window, predictor.device)
    log.warning("the student sees neurite in a black image (probability %.2f), so nothing is skipped", probability)
    return None


def _prepare_folder(volume: VolumeRun) -> bool:
    """Make the folder of a volume's image, unless it is there and of this run; whether no shard can be in it.

    Raises ConfigError for a folder of something else.
    """
    if volume.has_folder():
        # Another share may have made it a moment ago.
        return volume.source.share is not None and volume.markers.is_untouched()

    if volume.folder.exists():
        # What is not ours may be somebody's data, and is never removed.
        if ome_zarr.read_record(volume.folder) is None:
            raise ConfigError(f"{volume.folder} is there, and no result; choose another `out`, or move it away")

        if volume.source.share is not None:
            raise ConfigError(
                f"{volume.folder} holds results of other settings, which a share cannot replace while others may be "
                "at work; choose another `out`, or remove it"
            )
        ome_zarr.remove(volume.folder)

    # Other shares may have marked blocks of this volume already.
    if volume.source.share is None:
        volume.markers.clear()
    volume.create_folder()
    return volume.markers.is_untouched()


def _forget_damaged(volume: VolumeRun, ranks: Ranks) -> None:
    """Let the blocks be predicted again whose shards are gone or were cut short, and with them what they lead to.

    Collective.
    """
    # Shares may be at work on other blocks; the run that gathers them looks at all.
    if volume.source.share is not None:
        return

    sizes = ranks.run_on_main(volume.markers.list_shards)
    damaged = _list_damaged_shards(volume.folder, sizes, ranks)

    def forget() -> None:
        if damaged:
            log.warning("%s: %s missing or cut short, made again", volume.source.id, ", ".join(damaged[:3]))
        if damaged or volume.markers.has_unreadable():
            entry_path(volume.folder.parent, volume.source.id).unlink(missing_ok=True)
            volume.markers.forget_faulty(damaged)

    ranks.run_on_main(forget)


def _list_block_tasks(volume: VolumeRun, blocks: list[Block]) -> list[Task[Block]]:
    """The missing blocks; the dearest first, so that ranks end together."""
    missing = volume.markers.list_missing(blocks)
    ordered = sorted(missing, key=lambda block: (-volume.tiling.count_windows(block), block.index))
    return [make_block_task(block, volume.source.id) for block in ordered]


def _list_failures(volume: VolumeRun, blocks: list[Block]) -> list[str]:
    """A line for each missing block that failed, and for each that shows the empty rule to be wrong."""
    name = volume.source.id
    missing = {block.index for block in volume.markers.list_missing(blocks)}

    # A failure stays on record, and counts while its block is missing.
    lines = [
        f"{name} block {tuple(failure['index'])} at {tuple(failure['start'])}: {failure['error']}"
        for failure in volume.markers.read_failed_blocks()
        if tuple(failure["index"]) in missing
    ]

    # Neurite in a block of the sample means that blocks outside it may have lost some.
    for marker in volume.markers.read_all(blocks):
        if marker.contradicts_rule and marker.proof is not None:
            lines.append(
                f"{name} block {marker.index} would have been skipped (brightest cell {marker.proof.brightest:.3g}, "
                f"level {marker.proof.level:.3g}), but holds {marker.foreground} voxels of neurite; lower empty_level "
                "in a new `out`"
            )
    return lines


def _finish(
    cfg: InferConfig,
    record: run_folder.Run,
    volumes: list[VolumeRun],
    journal: RunJournal,
    entries: dict[str, PredictionEntry],
    failures: list[str],
    seconds: float,
) -> None:
    """Write what is written once. Only the first rank does."""
    if cfg.share is None:
        journal.finish()

    # The index and the page show all volumes, which a share does not know.
    if cfg.share is None:
        files.write_json(cfg.out / INDEX, entries)
        if cfg.page:
            status_page.write_page(cfg.out, volumes)

    for line in failures:
        log.error("failed: %s", line)

    # The record is finished last, because with it the run counts as complete.
    outputs = [cfg.out / INDEX] if cfg.share is None else []
    record.finish({"volumes": len(entries), "seconds": seconds}, failures, outputs)
    log.info("wrote %s with trees to %s", files.format_count(len(entries), "volume"), cfg.out)
