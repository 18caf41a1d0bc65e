"""`infer` from config to predictions.json, alone or on all ranks of an MPI job."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from hpc_neuro import distributed, files, runs
from hpc_neuro.data import ome_zarr
from hpc_neuro.geometry import Block
from hpc_neuro.infer import page
from hpc_neuro.infer.blocks import MASK
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.engine import Work, predict_blocks
from hpc_neuro.infer.job import Job, lines, weights_folder
from hpc_neuro.infer.meter import Meter
from hpc_neuro.infer.sources import Source, known, sources
from hpc_neuro.infer.trees import Entry, finished, reduce, to_reduce
from hpc_neuro.schema import ConfigError

log = logging.getLogger(__name__)
INDEX = "predictions.json"
_MAY_CHANGE = ("page", "tries", "deaths", "batch")  # which no result depends on
_DEATHS = (
    "{} times the process that was at it was killed (out of memory, a crash in compiled code, or by somebody), so it "
    "is not tried again; a higher `deaths` tries it again"
)


def forecast(cfg: InferConfig) -> list[str]:
    """Check the weights, the volumes and the space; say how much there is to do, timed by one window."""
    return lines(cfg, Job(cfg), list(sources(cfg)))


def run(cfg: InferConfig) -> int:
    """Predict and trace every volume. Exit code 3 when something failed; the same command tries that again.

    All MPI ranks call this. A rank that dies takes the others with it, and the same command goes on.
    """
    comm = distributed.mpi_comm()
    main, ranks = (True, 1) if comm is None else (comm.Get_rank() == 0, comm.Get_size())
    if not main:
        logging.getLogger("hpc_neuro").setLevel(logging.WARNING)
    if ranks > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    job = distributed.together(lambda: Job(cfg), comm)
    volumes = _opened(cfg, comm, main)
    inputs = {"weights": job.digest, **{f"volume {v.id}": v.digest for v in volumes}}
    inputs |= {f"image {v.id}": v.content for v in volumes if v.file}
    behind = {"weights": weights_folder(cfg) / "model.safetensors"}
    behind |= {f"image {v.id}": v.file for v in volumes if v.file}
    folder, whole = runs.share_folder(cfg.out, cfg.share), cfg.share is not None or (cfg.out / INDEX).exists()
    with contextlib.ExitStack() as stack:
        start = runs.start("infer", cfg, folder, inputs, _MAY_CHANGE, main=main, whole=whole, sources=behind)
        this = distributed.together(lambda: stack.enter_context(start), comm)
        if this.complete:
            return 0
        begun, failures, index = time.monotonic(), list[str](), dict[str, Entry]()
        if main and volumes:  # a share may be empty
            log.info("\n".join(lines(cfg, job, volumes, ranks)))
        works = _works(job, volumes) if volumes else []
        good = []
        for work in works:
            lost = _predict(work, comm, main)
            failures += lost
            if not lost and work.source.part is None:
                good.append(work)
        for name, (entry, problems) in _traced(cfg, good, comm).items():
            index[name] = entry
            failures += problems
        if main:
            if cfg.share is None:
                files.write_json(cfg.out / INDEX, index)
                if cfg.page:
                    page.write(cfg.out, works)
            for line in failures:
                log.error("failed: %s", line)
            summary = {"volumes": len(index), "seconds": round(time.monotonic() - begun, 1)}
            this.finish(summary, failures, outputs=[cfg.out / INDEX] if cfg.share is None else [])
            log.info("wrote %d volumes and their trees to %s", len(index), cfg.out)
    return 3 if failures else 0


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
        lambda: work.marks.by_deaths(_todo(work, blocks), work.deaths) if main else ([], [], []), comm
    )
    fresh, suspects, last = groups if comm is None else comm.bcast(groups)
    todo = [*fresh, *suspects, *last]
    ranks = 1 if comm is None else comm.Get_size()
    windows = sum(map(work.plan.cost, todo)) // ranks
    label = work.source.id if ranks == 1 else f"{work.source.id}, rank 0 of {ranks}"

    def make(some: list[Block], alone: bool) -> None:
        with _drawn(len(some), comm) as drawn:
            predict_blocks(work, (some[i] for i in drawn), meter, alone)

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
        if main:
            work.marks.tidy()
        _pyramid(work, comm, main)
    return failures


def _todo(work: Work, blocks: list[Block]) -> list[Block]:
    """What is missing of a volume, whose folder is made if need be; the dearest blocks first."""
    if not work.fresh():
        if work.folder.exists():
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
            work.marks.park(block.index, block.write, _DEATHS.format(deaths), "", deaths)
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


def _pyramid(work: Work, comm: Any, main: bool) -> None:
    """Make the levels above 0 that are not marked done, each by all ranks."""
    source, folder = work.source, work.folder
    for number, level in enumerate(ome_zarr.pieces(source.shape, source.voxel_size, work.plan.write, MASK), start=1):
        held = work.marks.level(number)
        held = held if comm is None else comm.bcast(held)
        todo = [piece for piece in level if held is None or piece.path not in held]
        made: dict[str, str] = {}

        def make(todo: list[ome_zarr.Piece] = todo, made: dict[str, str] = made) -> None:
            with _drawn(len(todo), comm) as drawn:
                for i in drawn:
                    ome_zarr.build_piece(folder, source.shape, source.voxel_size, todo[i])
                    path = folder / todo[i].path
                    made[todo[i].path] = files.sha256(path) if path.exists() else ""

        if todo:
            distributed.together(make, comm)
            parts = [made] if comm is None else comm.allgather(made)
            if main:
                work.marks.write_level(number, {**(held or {}), **{k: v for part in parts for k, v in part.items()}})


def _traced(cfg: InferConfig, works: list[Work], comm: Any) -> dict[str, tuple[Entry, list[str]]]:
    """Entries and problems of whole volumes by id, on all ranks.

    Ranks share the blocks that are reduced to strands, then the volumes whose strands become trees.
    """
    found: dict[str, tuple[Entry, list[str]]] = {}
    mine = [[(i, box) for box in to_reduce(cfg, work)] for i, work in enumerate(works)] if _is_main(comm) else []
    todo = [item for items in mine for item in items]
    todo = todo if comm is None else comm.bcast(todo)

    def reduce_all() -> None:
        with _drawn(len(todo), comm) as drawn:
            for which, box in (todo[i] for i in drawn):
                reduce(cfg, works[which], box)

    def trace_all() -> None:
        with _drawn(len(works), comm) as drawn:
            for i in drawn:
                found[works[i].source.id] = finished(cfg, works[i])

    distributed.together(reduce_all, comm)
    distributed.together(trace_all, comm)
    for part in [] if comm is None else comm.allgather(found):
        found |= part
    return {work.source.id: found[work.source.id] for work in works}


def _is_main(comm: Any) -> bool:
    return comm is None or comm.Get_rank() == 0


@contextlib.contextmanager
def _drawn(count: int, comm: Any) -> Iterator[Iterator[int]]:
    """This rank's numbers below `count`. After a failure the rest is drawn but not done, so that others stop soon."""
    drawn = distributed.turns(count, comm)
    try:
        yield drawn
    finally:
        for _ in drawn:
            pass
