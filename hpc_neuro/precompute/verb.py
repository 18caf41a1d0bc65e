"""`precompute` itself: what is missing is shared among the ranks, made, and listed in the manifest last."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass

from hpc_neuro.core import distributed, files, run_folder
from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.liveness import MpiRankWatch
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
    ranks = _join_ranks()
    work, todo, space = _planned(cfg, ranks)
    seconds = _probed(cfg, work, todo, ranks)
    return estimate.lines(cfg, work.teacher, work.units, todo, space, seconds) if ranks.is_main else []


def run(cfg: PrecomputeConfig, again: Collection[str] = ()) -> int:
    """Build the cache, or what is missing of it. All MPI ranks call this; they succeed or fail together.

    again: files of shards that are there and are to be made anew; each is replaced when its successor is whole.
    """
    ranks = _join_ranks()
    main = ranks.is_main
    work, todo, space = _planned(cfg, ranks, again)
    inputs = {f"volume {k}": d for k, d in work.digests.items()} | {"teacher": work.teacher.identity["sha256"]}
    with contextlib.ExitStack() as stack:
        start = run_folder.start("precompute", cfg, cfg.out, inputs, may_change=_MAY_CHANGE, main=main, whole=not todo)
        this = ranks.run(lambda: stack.enter_context(start))
        if this.complete:
            return 0
        stack.enter_context(MpiRankWatch(cfg.out / ".ranks.part", ranks, cfg.silence))
        begun = time.monotonic()
        seconds = _probed(cfg, work, todo, ranks)
        ranks.run_on_main(lambda: _prepare(cfg, work, todo, space, seconds))
        coded = ranks.run(lambda: _coding(cfg))
        ranks.run(lambda: _share(cfg, work, todo, ranks, *coded))
        ranks.run_on_main(lambda: _finish(cfg, work))
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


def _join_ranks() -> Ranks:
    """The MPI ranks of this run; only the first one logs more than warnings."""
    ranks = Ranks.join()
    if not ranks.is_main:
        logging.getLogger("hpc_neuro").setLevel(logging.WARNING)
    ranks.share_threads()
    return ranks


def _planned(cfg: PrecomputeConfig, ranks: Ranks, again: Collection[str] = ()) -> tuple[Work, list[cache.Unit], str]:
    """The work, the shards that are to be made, and the space for them. Nothing is written yet.

    A config that does not fit is refused here, so that a milder one may use the same folder.
    """
    work = ranks.run(lambda: open_all(cfg))
    # All ranks get the first rank's list: a rank that starts late would miss what the early ones already made.
    todo = ranks.run_on_main(lambda: work.missing(cfg, again))
    return work, todo, ranks.run_on_main(lambda: estimate.space(cfg, work.store, work.teacher, todo))


def _probed(cfg: PrecomputeConfig, work: Work, todo: list[cache.Unit], ranks: Ranks) -> list[float]:
    """What the probe says on each rank."""
    return ranks.gather(ranks.run(lambda: estimate.probe(cfg, work.store, work.teacher, todo)))


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
    ranks: Ranks,
    coded: str,
    codings: dict[str, cache.Coding],
) -> None:
    """This rank's share of the shards: it takes the next one that nobody has."""
    turns = distributed.turns(len(todo), ranks.comm)
    label = "teacher features" if ranks.size == 1 else f"teacher features, rank 0 of {ranks.size}"
    total = -(-len(todo) // ranks.size)
    shown = run_folder.track_progress(turns, label, total=total, unit="slab") if ranks.is_main else turns
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
