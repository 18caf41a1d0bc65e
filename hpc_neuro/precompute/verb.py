"""`precompute` itself: what is missing is shared among the ranks, made, and listed in the manifest last."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from hpc_neuro.core import distributed, files, run_folder
from hpc_neuro.core.heartbeat import Heartbeat
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.data import feature_cache as cache
from hpc_neuro.data.feature_cache import encoding
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher, load_teacher
from hpc_neuro.precompute import compress, estimate
from hpc_neuro.precompute.build import build
from hpc_neuro.precompute.config import PrecomputeConfig

log = logging.getLogger(__name__)
_MAY_CHANGE = (
    "store",
    "batch",
    "silence",
    "teacher.weights",
)  # where things lie and how fast; contents are held by digests


@dataclass(frozen=True)
class Work:
    """All that a build is made from."""

    store: Store
    teacher: Teacher
    units: list[cache.Unit]
    digests: dict[str, str]  # of the volumes

    def key(self, cfg: PrecomputeConfig, unit: cache.Unit, coded: str) -> str:
        """Everything a shard's content depends on, hashed: a file with this key need not be made again."""
        knobs = [cache.FORMAT, cfg.layers, cfg.tile, cfg.halo, coded]
        facts = [asdict(unit), self.digests[unit.volume], self.teacher.identity, *knobs]
        return files.sha256_json(facts)

    def missing(self, cfg: PrecomputeConfig, again: Collection[str] = ()) -> list[cache.Unit]:
        """The shards that are not there, or belong to something else, or are to be made `again`."""
        coded, _ = compress.existing(cfg, self.store, self.teacher)
        if cfg.coded and not coded:
            return self.units
        return [
            unit
            for unit in self.units
            if unit.name in again or cache.read_shard_key(cfg.out / unit.name) != self.key(cfg, unit, coded)
        ]


def forecast(cfg: PrecomputeConfig) -> list[str]:
    """Check the store, the teacher and the space; say how many slices, shards and bytes, and the time of a probe.

    All MPI ranks call this, so that the time is theirs together; the first one gets the lines.
    """
    comm, main = _ranks()
    work, todo, space = _planned(cfg, comm, main)
    seconds = _probed(cfg, work, todo, comm)
    return estimate.lines(cfg, work.teacher, work.units, todo, space, seconds) if main else []


def run(cfg: PrecomputeConfig, again: Collection[str] = ()) -> int:
    """Build the cache, or what is missing of it. All MPI ranks call this; they succeed or fail together.

    again: files of shards that are there and are to be made anew; each is replaced when its successor is whole.
    """
    comm, main = _ranks()
    work, todo, space = _planned(cfg, comm, main, again)
    inputs = {f"volume {k}": d for k, d in work.digests.items()} | {"teacher": work.teacher.identity["sha256"]}
    with contextlib.ExitStack() as stack:
        start = run_folder.start("precompute", cfg, cfg.out, inputs, may_change=_MAY_CHANGE, main=main, whole=not todo)
        this = distributed.together(lambda: stack.enter_context(start), comm)
        if this.complete:
            return 0
        stack.enter_context(Heartbeat(cfg.out / ".ranks.part", comm, cfg.silence))
        begun = time.monotonic()
        seconds = _probed(cfg, work, todo, comm)
        distributed.together(lambda: _prepare(cfg, work, todo, space, seconds) if main else None, comm)
        coded = distributed.together(lambda: _coding(cfg), comm)
        distributed.together(lambda: _share(cfg, work, todo, comm, main, *coded), comm)
        distributed.together(lambda: _finish(cfg, work) if main else None, comm)
        if main:
            summary = {"shards": len(work.units), "seconds": round(time.monotonic() - begun, 3)}
            this.finish(summary, outputs=[cfg.out / cache.MANIFEST])
            size = sum((cfg.out / u.name).stat().st_size for u in work.units)
            log.info("wrote %d shards, %s, to %s", len(work.units), files.format_bytes(size), cfg.out)
    return 0


def open_all(cfg: PrecomputeConfig) -> Work:
    """Store, teacher and plan, checked. Raises ConfigError or InputError."""
    store = Store(cfg.store)
    for split in cfg.splits:
        store.split(split)
    teacher = load_teacher(cfg.teacher).to(distributed.device())
    if bad := [n for n in cfg.layers if not -teacher.depth <= n < teacher.depth]:
        raise ConfigError(f"layers: the teacher has blocks 0 to {teacher.depth - 1}, not {bad}")
    if cfg.tile % teacher.patch or cfg.halo % teacher.patch:
        near = [max(teacher.patch, round(n / teacher.patch) * teacher.patch) for n in (cfg.tile, cfg.halo)]
        raise ConfigError(
            f"tile={cfg.tile} halo={cfg.halo}: multiples of the teacher's patch, {teacher.patch}, are wanted, such as "
            f"tile={near[0]} halo={near[1]}"
        )
    if cfg.pca is not None and cfg.pca > teacher.dim:
        raise ConfigError(f"pca: the teacher has {teacher.dim} channels, {cfg.pca} components are more")
    units = estimate.planned(cfg, store, teacher.patch)
    return Work(store, teacher, units, {v: store[v].digest for v in sorted({u.volume for u in units})})


def _ranks() -> tuple[Any, bool]:
    """The MPI communicator (None: alone), and whether this is the rank that speaks and writes what is written once."""
    comm = distributed.mpi_comm()
    main = comm is None or comm.Get_rank() == 0
    if not main:
        logging.getLogger("hpc_neuro").setLevel(logging.WARNING)
    distributed.share_threads(comm)
    return comm, main


def _planned(
    cfg: PrecomputeConfig, comm: Any, main: bool, again: Collection[str] = ()
) -> tuple[Work, list[cache.Unit], str]:
    """The work, the shards that are to be made, and the space for them. Nothing is written yet.

    A config that does not fit is refused here, so that a milder one may use the same folder.
    """
    work = distributed.together(lambda: open_all(cfg), comm)
    todo = distributed.together(lambda: work.missing(cfg, again) if main else [], comm)
    if comm is not None:
        todo = comm.bcast(todo)  # ranks that start late would miss what the early ones already made
    return (
        work,
        todo,
        distributed.together(lambda: estimate.space(cfg, work.store, work.teacher, todo) if main else "", comm),
    )


def _probed(cfg: PrecomputeConfig, work: Work, todo: list[cache.Unit], comm: Any) -> list[float]:
    """What the probe says on each rank."""
    mine = distributed.together(lambda: estimate.probe(cfg, work.store, work.teacher, todo), comm)
    return [mine] if comm is None else list(comm.allgather(mine))


def _prepare(cfg: PrecomputeConfig, work: Work, todo: list[cache.Unit], space: str, seconds: list[float]) -> None:
    """Say what it will take and fit the coding, before anything is made. Only the first rank does."""
    log.info("\n".join(estimate.lines(cfg, work.teacher, work.units, todo, space, seconds)))
    if cfg.coded and not compress.existing(cfg, work.store, work.teacher)[0]:
        compress.fitted(cfg, work.store, work.teacher, work.units)


def _coding(cfg: PrecomputeConfig) -> tuple[str, dict[str, cache.Coding]]:
    """Digest and codings by view of the file that the first rank made; nothing for plain float16."""
    path = cfg.out / cache.CODING
    return (files.sha256(path), encoding.load(path)) if cfg.coded else ("", {})


def _share(
    cfg: PrecomputeConfig,
    work: Work,
    todo: list[cache.Unit],
    comm: Any,
    main: bool,
    coded: str,
    codings: dict[str, cache.Coding],
) -> None:
    """This rank's share of the shards: it takes the next one that nobody has."""
    turns, ranks = distributed.turns(len(todo), comm), 1 if comm is None else comm.Get_size()
    label = "teacher features" if ranks == 1 else f"teacher features, rank 0 of {ranks}"
    shown = run_folder.track_progress(turns, label, total=-(-len(todo) // ranks), unit="slab") if main else turns
    try:
        units = (todo[i] for i in shown)
        build(cfg, work.store, work.teacher, units, lambda unit: work.key(cfg, unit, coded), codings)
    finally:
        for _ in turns:  # after a failure: drawn unbuilt, so that the other ranks stop soon
            pass


def _finish(cfg: PrecomputeConfig, work: Work) -> None:
    teacher, ordered = work.teacher, sorted(work.units, key=lambda u: u.name)
    coded, quality = compress.existing(cfg, work.store, teacher)
    facts = {
        "teacher": teacher.identity,
        "random_teacher": teacher.random,
        "dim": teacher.dim,
        "patch": teacher.patch,
        "layers": [n % teacher.depth for n in cfg.layers],
        "views": list(cfg.views),
        "stride_v": cfg.stride_v,
        "scale": cfg.scale,
        "isotropic": cfg.isotropic,
        "augment_views": list(cfg.augment_views),
        "dtype": cfg.dtype,
        "pca": cfg.pca,
        "coding": coded or None,
        "coding_quality": quality,
        "volumes": work.digests,
        "store": str(cfg.store.resolve()),
        "code": run_folder.code_version(),
    }
    records = [cache.read_shard_record(cfg.out / u.name, u) for u in ordered]
    cache.write_manifest(cfg.out, facts, records)
    if clipped := sum(r["clipped"] for r in records):
        values = sum(u.tokens for u in ordered) * len(cfg.layers) * (cfg.pca or teacher.dim)
        log.warning("int8: %d of %d values were beyond its range and were clipped", clipped, values)
