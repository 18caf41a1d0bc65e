"""What follows the blocks of a volume: its pyramid, its trees, and the second look at them. Shared by all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Block, Box
from hpc_neuro.data import ome_zarr
from hpc_neuro.infer import flip_tta, trees
from hpc_neuro.infer.block_pipeline import Work
from hpc_neuro.infer.model import Job
from hpc_neuro.infer.progress import Meter
from hpc_neuro.infer.shared_tasks import Part, is_main, made
from hpc_neuro.infer.tiling import MASK
from hpc_neuro.infer.trees import Entry

Step = Callable[[Callable[[int, Work], Iterable[Part[Any]]], Callable[[Part[Any]], None]], None]


def pyramid(work: Work, comm: Any) -> list[str]:
    """Make the levels above 0 that are not marked done, each by all ranks; a line for each shard that failed."""
    source, folder, main = work.source, work.folder, is_main(comm)
    for number, level in enumerate(
        ome_zarr.plan_shards(source.shape, source.voxel_size, work.plan.write, MASK), start=1
    ):
        held = work.marks.level(number) or {}
        todo = [
            Part(0, f"pyramid_{piece.path.replace('/', '_')}", f"shard {piece.path} of the pyramid", piece)
            for piece in level
            if piece.path not in held
        ]
        sums: dict[str, str] = {}

        def make(part: Part[ome_zarr.LevelShard], sums: dict[str, str] = sums) -> None:
            ome_zarr.build_shard(folder, source.shape, source.voxel_size, part.what)
            path = folder / part.what.path
            sums[part.what.path] = files.sha256(path) if path.exists() else ""

        failures = made([work], functools.partial(list, todo), make, comm)
        for part in [sums] if comm is None else comm.allgather(sums):
            held |= part
        if main and todo:
            work.marks.write_level(number, held)
        if failures:
            return [failure.line for failure in failures]
    return []


def traced(job: Job, works: list[Work], comm: Any) -> tuple[dict[str, Entry], list[str]]:
    """Entries of volumes by id, complete on the first rank, and a line for each part that failed.

    Ranks share the blocks that are reduced to strands, then the volumes whose strands become trees, then the blocks
    that are looked at again, then the volumes whose trees are written. A volume with a failure is not gone on with,
    and its entry names no trees.
    """
    cfg, lines, bad = job.cfg, list[str](), set[int]()
    found: dict[str, Entry] = {}

    def step(todo: Callable[[int, Work], Iterable[Part[Any]]], make: Callable[[Part[Any]], None]) -> None:
        good = [(i, work) for i, work in enumerate(works) if i not in bad]
        for failure in made(works, lambda: (part for i, work in good for part in todo(i, work)), make, comm):
            bad.add(failure.volume)
            lines.append(failure.line)

    def blocks(i: int, work: Work) -> Iterator[Part[Box]]:
        for box in trees.to_reduce(cfg, work):
            yield Part(i, f"strands_{'_'.join(map(str, box.start))}", f"block of tracing at {box.start}", box)

    def finish(part: Part[None]) -> None:
        work = works[part.volume]
        found[work.source.id] = trees.finished(cfg, work, lambda tree: flip_tta.looked(cfg, work, tree))
        work.marks.end_all()

    step(blocks, lambda part: trees.reduce(cfg, works[part.volume], part.what))
    step(
        lambda i, work: [Part(i, "trees", "its trees", None)] if trees.to_trace(cfg, work) else [],
        lambda part: trees.trace(cfg, works[part.volume]),
    )
    if cfg.flips:
        _look_again(job, works, step, comm)
    step(lambda i, work: [Part(i, "files", "its files", None)], finish)
    for part in [] if comm is None else comm.allgather(found):
        found |= part
    if is_main(comm):
        found |= {works[i].source.id: trees.untraced(works[i]) for i in bad}
    return {work.source.id: found[work.source.id] for work in works if work.source.id in found}, lines


def _look_again(job: Job, works: list[Work], step: Step, comm: Any) -> None:
    """Look again at all blocks through which a tree runs."""
    cfg, ranks = job.cfg, 1 if comm is None else comm.Get_size()
    held: tuple[int, flip_tta.Samples] | None = None  # those of one volume at a time

    def of(i: int) -> flip_tta.Samples:
        nonlocal held
        if held is None or held[0] != i:
            held = i, flip_tta.samples(cfg, works[i])
        return held[1]

    def todo(i: int, work: Work) -> list[Part[Block]]:
        blocks = flip_tta.to_look(cfg, work, of(i)) if trees.traced(cfg, work) else []
        meter.expect(len(cfg.flips) * sum(flip_tta.windows(of(i), work.plan, block) for block in blocks) // ranks)
        return [
            Part(i, f"view_{'_'.join(map(str, block.index))}", f"second look at block {block.index}", block)
            for block in blocks
        ]

    def make(part: Part[Block]) -> None:
        flip_tta.look(cfg, job, works[part.volume], of(part.volume), part.what, meter.add)

    with Meter("second look in mirrors", 0, show=is_main(comm)) as meter:
        step(todo, make)
