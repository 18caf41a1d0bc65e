"""`infer` from config to predictions.json, alone or on all ranks of an MPI job."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from hpc_neuro.core import distributed, files, run_folder
from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.geometry import Block
from hpc_neuro.core.liveness import MpiRankWatch
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.data import ome_zarr
from hpc_neuro.infer import status_page
from hpc_neuro.infer.block_pipeline import Work, predict_blocks
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.done_markers import by_deaths, where
from hpc_neuro.infer.model import Job, lines, weights_folder
from hpc_neuro.infer.progress import Meter
from hpc_neuro.infer.shared_tasks import KILLED, drawn, is_main
from hpc_neuro.infer.trees import Entry
from hpc_neuro.infer.volume_stages import pyramid, traced
from hpc_neuro.infer.volumes import Source, known, sources

log = logging.getLogger(__name__)
INDEX = "predictions.json"
_BELOW = ("blocks", "entries", "failed", "proofread", "swc")  # folders of OUT whose files are written one by one
# which no probability depends on; trees know what they depend on
_MAY_CHANGE = ("page", "tries", "deaths", "batch", "silence", "flips", "trees", "trace")


def forecast(cfg: InferConfig) -> list[str]:
    """Check the weights, the volumes and the space; say how much there is to do, timed by one window."""
    return lines(cfg, Job(cfg), list(sources(cfg)))


def run(cfg: InferConfig) -> int:
    """Predict and trace every volume. Exit code 3 when something failed; the same command tries that again.

    All MPI ranks call this. A rank that dies takes the others with it, and the same command goes on.
    """
    comm = distributed.mpi_comm()
    main, ranks = is_main(comm), 1 if comm is None else comm.Get_size()
    if not main:
        logging.getLogger("hpc_neuro").setLevel(logging.WARNING)
    distributed.share_threads(comm)
    job = distributed.together(lambda: Job(cfg), comm)
    volumes = _opened(cfg, comm, main)
    inputs = {"weights": job.digest, **{f"volume {v.id}": v.digest for v in volumes}}
    inputs[run_folder.input_name("volumes", cfg.share)] = files.sha256_json([v.id for v in volumes])
    inputs |= {f"image {v.id}": v.content for v in volumes if v.file}
    behind = {"weights": weights_folder(cfg) / "model.safetensors"}
    behind |= {f"image {v.id}": v.file for v in volumes if v.file}
    folder, whole = run_folder.share_folder(cfg.out, cfg.share), cfg.share is not None or (cfg.out / INDEX).exists()
    with contextlib.ExitStack() as stack:
        start = run_folder.start("infer", cfg, folder, inputs, _MAY_CHANGE, main=main, whole=whole, sources=behind)
        this = distributed.together(lambda: stack.enter_context(start), comm)
        if this.complete:
            return 0
        stack.enter_context(MpiRankWatch(folder / ".ranks.part", Ranks(comm), cfg.silence))
        begun, failures = time.monotonic(), list[str]()
        if main and volumes:  # a share may be empty
            log.info("\n".join(lines(cfg, job, volumes, ranks)))
        if cfg.share is None:  # other shares may be at work, and what one of them leaves goes when they are gathered
            distributed.together(lambda: _remove_parts(cfg.out) if main else None, comm)
        works = distributed.together(lambda: _works(job, volumes) if volumes else [], comm)
        good = []
        for work in works:
            lost = _predict(work, comm, main)
            failures += lost
            if not lost and work.source.part is None:
                good.append(work)
        index, lost = traced(job, good, comm)
        failures += lost
        seconds = round(time.monotonic() - begun, 1)
        distributed.together(lambda: _finish(cfg, this, works, index, failures, seconds) if main else None, comm)
    return 3 if failures else 0


def _remove_parts(out: Path) -> None:
    """Remove what killed writers left beside their targets below `out`; `runs.start` does so in `out` itself."""
    for kind in _BELOW:
        for folder in [out / kind, *(p for p in (out / kind).glob("*") if p.is_dir())]:
            files.remove_parts(folder)


def _finish(
    cfg: InferConfig,
    this: run_folder.Run,
    works: list[Work],
    index: dict[str, Entry],
    failures: list[str],
    seconds: float,
) -> None:
    """Write what is written once. Only the first rank does."""
    for work in works:
        work.marks.tidy()
    if cfg.share is None:
        files.write_json(cfg.out / INDEX, index)
        if cfg.page:
            status_page.write(cfg.out, works)
    for line in failures:
        log.error("failed: %s", line)
    outputs = [cfg.out / INDEX] if cfg.share is None else []
    this.finish({"volumes": len(index), "seconds": seconds}, failures, outputs)
    log.info("wrote %d volumes and their trees to %s", len(index), cfg.out)


def _opened(cfg: InferConfig, comm: Any, main: bool) -> list[Source]:
    """The volumes; only the first rank reads whole files to measure them."""
    found = distributed.together(lambda: list(sources(cfg)) if main else [], comm)
    if comm is None:
        return found
    measured = comm.bcast(known(found))
    return found if main else list(sources(cfg, measured))


def _works(job: Job, volumes: list[Source]) -> list[Work]:
    empty = job.cfg.empty
    if empty.level is not None and (dark := job.dark()) >= job.threshold:
        log.warning("the student sees neurite in a black image (probability %.2f), so no block is skipped", dark)
        empty = dataclasses.replace(empty, level=None)
    return [job.work(source, empty) for source in volumes]


def _predict(work: Work, comm: Any, main: bool) -> list[str]:
    """Make the missing blocks and the pyramid of one volume; a line for each block that failed."""
    blocks = work.plan.share(work.plan.blocks(work.source.shape), work.source.part)
    groups = distributed.together(
        lambda: (
            by_deaths(_todo(work, blocks), lambda b: work.marks.deaths(b.index), work.deaths) if main else ([], [], [])
        ),
        comm,
    )
    fresh, suspects, last = groups if comm is None else comm.bcast(groups)
    todo = [*fresh, *suspects, *last]
    ranks = 1 if comm is None else comm.Get_size()
    windows = sum(map(work.plan.cost, todo)) // ranks
    label = work.source.id if ranks == 1 else f"{work.source.id}, rank 0 of {ranks}"

    def make(some: list[Block], alone: bool) -> None:
        with drawn(len(some), comm) as mine:
            predict_blocks(work, (some[i] for i in mine), meter, alone)

    with Meter(label, windows, show=main) as meter:
        distributed.together(lambda: make(fresh, alone=False), comm)
        distributed.together(lambda: make(suspects, alone=True), comm)
        # with nobody else at work, for when a rank dies, all die, and who was it?
        distributed.together(lambda: predict_blocks(work, last if main else [], meter, alone=True), comm)
        if todo and main:
            log.debug("%s: waiting: %s", work.source.id, meter.shares())
    failures = distributed.together(lambda: _failures(work, blocks) if main else [], comm)
    failures = failures if comm is None else comm.bcast(failures)
    if not failures and work.source.part is None:
        return pyramid(work, comm)
    return failures


def _todo(work: Work, blocks: list[Block]) -> list[Block]:
    """What is missing of a volume, whose folder is made if need be; the dearest blocks first."""
    if not work.fresh():
        if work.folder.exists():
            if ome_zarr.read_record(work.folder) is None:
                raise ConfigError(f"{work.folder} is there, and no result; choose another `out`, or move it away")
            if work.source.part is not None:
                raise ConfigError(
                    f"{work.folder} holds results of other settings, which a share cannot replace while others may be "
                    "at work; choose another `out`, or remove it"
                )
            ome_zarr.remove(work.folder)
        if work.source.part is None:
            work.marks.clear()
        work.create()
    todo = work.marks.todo(blocks)
    for block in todo:
        if (deaths := work.marks.deaths(block.index)) >= work.deaths:
            work.marks.park(block.index, where(block), KILLED.format(deaths), "", deaths)
    todo = [block for block in todo if work.marks.deaths(block.index) < work.deaths]
    return sorted(todo, key=lambda b: (-work.plan.cost(b), b.index))


def _failures(work: Work, blocks: list[Block]) -> list[str]:
    """A line for each block that is parked, and for each that shows the rule of what is empty to be wrong."""
    name = work.source.id
    missing = {block.index for block in work.marks.todo(blocks)}
    parked = [p for p in work.marks.parked() if tuple(p["index"]) in missing]
    found = [f"{name} block {tuple(p['index'])} at {tuple(p['start'])}: {p['error']}" for p in parked]
    for mark in work.marks.all(blocks):
        if mark.wrong and mark.proof is not None:
            found.append(
                f"{name} block {mark.index} would have been skipped (brightest cell {mark.proof.brightest:.3g}, level "
                f"{mark.proof.level:.3g}), but holds {mark.foreground} voxels of neurite; lower empty.level in a new "
                "`out`"
            )
    return found
