"""Run `precompute`: the ranks share the missing shards, and the manifest is written last."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hpc_neuro.core import distributed, files, run_folder
from hpc_neuro.core.distributed import Ranks
from hpc_neuro.core.liveness import MpiRankWatch
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.core.task_queue import draw_indices
from hpc_neuro.data import feature_cache
from hpc_neuro.data.feature_cache import CODING, MANIFEST, FeatureCoding, ShardSpec
from hpc_neuro.data.feature_cache.encoding import load_codings
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher, load_teacher
from hpc_neuro.precompute import compress, estimate
from hpc_neuro.precompute.build import build_shards
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.gate_table import HEADER, TeacherGate, Verdict, explain_failure

log = logging.getLogger(__name__)

# Where things lie, and how fast; the digests in the record check the contents.
_MAY_CHANGE = ("store", "batch", "silence", "teacher.weights", "gate")


@dataclass(frozen=True)
class CachePlan:
    """Everything a cache is built from."""

    store: Store
    teacher: Teacher
    shards: list[ShardSpec]
    digests: dict[str, str]  # of the volumes

    def make_key(self, cfg: PrecomputeConfig, shard: ShardSpec, coding_digest: str) -> str:
        """SHA-256 of everything a shard's content depends on. A file with this key need not be built again."""
        # Where the shard lies and who built it has no influence on it.
        settings = [feature_cache.FORMAT, cfg.layers, cfg.tile, cfg.halo, cfg.position_free, coding_digest]
        return files.sha256_json([shard.to_json(), self.digests[shard.volume], self.teacher.identity, *settings])

    def list_missing(self, cfg: PrecomputeConfig, rebuild: Collection[str] = ()) -> list[ShardSpec]:
        """The shards that are missing, were built from something else, or are named in `rebuild`."""
        # A new coding changes the bytes of every shard.
        coding_digest, _ = compress.read_coding_note(cfg, self.store, self.teacher)
        if cfg.is_compressed and not coding_digest:
            return self.shards

        sizes = _read_sizes(cfg)
        missing = []
        for shard in self.shards:
            path = cfg.out / shard.name
            is_built = feature_cache.read_shard_key(path) == self.make_key(cfg, shard, coding_digest)
            if (
                shard.name in rebuild
                or not is_built
                or path.stat().st_size != sizes.get(shard.name, path.stat().st_size)
            ):
                missing.append(shard)
        return missing


def _read_sizes(cfg: PrecomputeConfig) -> dict[str, int]:
    """[bytes] The shards' sizes by the manifest; {} without a readable one, which is then written again."""
    if (cfg.out / MANIFEST).exists():
        with contextlib.suppress(InputError):
            return {entry["file"]: entry["bytes"] for entry in feature_cache.read_manifest(cfg.out, "")["shards"]}
    return {}


@dataclass(frozen=True)
class _Todo:
    """What is left to build."""

    plan: CachePlan
    shards: list[ShardSpec]
    space: str  # for people: what is free
    verdict: Verdict | None  # None: not judged


def forecast(cfg: PrecomputeConfig) -> list[str]:
    """Check the store, the teacher and the space; describe the slices, shards, bytes and the time of a probe.

    All MPI ranks call this, so that the time is the one they take together. The first rank gets the lines.
    """
    ranks = _join_ranks()
    todo = _plan(cfg, ranks)
    seconds = _measure_speed(cfg, todo, ranks)
    return _describe(cfg, todo, seconds) if ranks.is_main else []


def run(cfg: PrecomputeConfig, again: Collection[str] = ()) -> int:
    """Build the cache, or its missing shards. All MPI ranks call this; they succeed or fail together.

    again: file names of shards to rebuild; each is replaced when its successor is complete.
    """
    ranks = _join_ranks()
    todo = _plan(cfg, ranks, again)
    plan = todo.plan
    inputs = {f"volume {id_}": digest for id_, digest in plan.digests.items()}
    inputs["teacher"] = plan.teacher.identity["sha256"]

    with contextlib.ExitStack() as stack:
        start = run_folder.start(
            "precompute",
            cfg,
            cfg.out,
            inputs,
            may_change=_MAY_CHANGE,
            main=ranks.is_main,
            whole=not todo.shards,
        )

        # Every rank enters, so that an error on the first one ends them all.
        record = ranks.run(lambda: stack.enter_context(start))
        if record.complete:
            return 0
        stack.enter_context(MpiRankWatch(files.part_path_of_all(cfg.out / "ranks"), ranks, cfg.silence))
        begin = time.monotonic()

        seconds = _measure_speed(cfg, todo, ranks)
        ranks.run_on_main(lambda: _log_plan_and_fit(cfg, todo, seconds))

        # The coding exists before any rank encodes with it.
        coding_digest, codings = ranks.run(lambda: _load_codings(cfg))
        queue_store = ranks.open_store()
        ranks.run(lambda: _build_share(cfg, todo, ranks, queue_store, coding_digest, codings))

        # The manifest comes last: a cache without it is not complete.
        ranks.run_on_main(lambda: _write_manifest(cfg, plan, todo.verdict))

        if ranks.is_main:
            summary = {"shards": len(plan.shards), "seconds": round(time.monotonic() - begin, 3)}
            coding_paths = [cfg.out / CODING] if cfg.is_compressed else []
            shard_paths = [cfg.out / shard.name for shard in plan.shards]
            record.finish(summary, outputs=[cfg.out / MANIFEST, *coding_paths], large_outputs=shard_paths)
            size = sum((cfg.out / shard.name).stat().st_size for shard in plan.shards)
            count = files.format_count(len(plan.shards), "shard")
            log.info("wrote %s, %s, to %s", count, files.format_bytes(size), cfg.out)
    return 0


def open_plan(cfg: PrecomputeConfig) -> CachePlan:
    """Open and check the store and the teacher, and list the shards. Raises ConfigError or InputError."""
    store = Store(cfg.store)

    # A wrong split is reported before the teacher is loaded, which takes seconds.
    for split in cfg.splits:
        store.split(split)

    teacher = load_teacher(cfg.teacher).to(distributed.device())
    _require_fit(cfg, teacher)

    shards = estimate.plan_all_shards(cfg, store, teacher.patch)
    volumes = sorted({shard.volume for shard in shards})
    return CachePlan(store, teacher, shards, {volume: store[volume].digest for volume in volumes})


def _require_fit(cfg: PrecomputeConfig, teacher: Teacher) -> None:
    """Raise ConfigError where the config asks for what the teacher does not have."""
    if bad := [n for n in cfg.layers if not -teacher.depth <= n < teacher.depth]:
        raise ConfigError(f"layers: the teacher has blocks 0 to {teacher.depth - 1}, not {bad}")

    if cfg.tile % teacher.patch or cfg.halo % teacher.patch:
        # Nearest multiples, to be copied into the command.
        tile, halo = (max(teacher.patch, round(n / teacher.patch) * teacher.patch) for n in (cfg.tile, cfg.halo))
        raise ConfigError(
            f"tile={cfg.tile} halo={cfg.halo}: multiples of the teacher's patch, {teacher.patch}, are wanted, such as "
            f"tile={tile} halo={halo}"
        )

    if cfg.pca is not None and cfg.pca > teacher.dim:
        raise ConfigError(f"pca: the teacher has {teacher.dim} channels, {cfg.pca} components are more")


def _join_ranks() -> Ranks:
    """The MPI ranks of this run; only the first one logs more than warnings."""
    ranks = Ranks.join()
    if not ranks.is_main:
        logging.getLogger("hpc_neuro").setLevel(logging.WARNING)
    ranks.share_threads()
    return ranks


def _plan(cfg: PrecomputeConfig, ranks: Ranks, again: Collection[str] = ()) -> _Todo:
    """Plan the build. Nothing is written yet.

    A config that does not fit the disk is refused here, so that a smaller one may use the same folder.
    """
    plan = ranks.run(lambda: open_plan(cfg))

    # All ranks get the first rank's list: a rank that starts late would miss what the early ones have already built.
    missing = ranks.run_on_main(lambda: plan.list_missing(cfg, again))
    space = ranks.run_on_main(lambda: estimate.check_space(cfg, plan.store, plan.teacher, missing))
    verdict = ranks.run_on_main(lambda: _judge_teacher(cfg, plan) if missing else None)
    return _Todo(plan, missing, space, verdict)


def _judge_teacher(cfg: PrecomputeConfig, plan: CachePlan) -> Verdict | None:
    """Log what the gate says of the teacher on some of the volumes. InputError where it fails and has to pass.

    A random teacher is a control, and known to know nothing.
    """
    if cfg.gate == "skip" or plan.teacher.random:
        return None

    log.info("is the teacher worth anything on these volumes? (docs/method.md; gate=skip leaves this out)")
    log.info(HEADER)
    gate = TeacherGate(plan.teacher, cfg.teacher.model, plan.store, log.info, layer=cfg.layers[-1])
    verdict = gate.judge_some(list(plan.digests))

    if not verdict.judgments:
        log.info("not judged: %s", "; ".join(verdict.unjudged))
    elif verdict.fails and cfg.gate == "require":
        raise InputError(
            f"{explain_failure(verdict)}: its features know hardly more about neurites than those of random weights; "
            "choose another teacher.model, or set gate=report to use it all the same"
        )
    elif verdict.fails:
        log.warning("%s, and is used all the same (gate=report)", explain_failure(verdict))
    return verdict


def _measure_speed(cfg: PrecomputeConfig, todo: _Todo, ranks: Ranks) -> list[float]:
    """Seconds that each rank would take alone."""
    plan = todo.plan
    return ranks.gather(ranks.run(lambda: estimate.measure_speed(cfg, plan.store, plan.teacher, todo.shards)))


def _describe(cfg: PrecomputeConfig, todo: _Todo, seconds: list[float]) -> list[str]:
    return estimate.describe_plan(cfg, todo.plan.teacher, todo.plan.shards, todo.shards, todo.space, seconds)


def _log_plan_and_fit(cfg: PrecomputeConfig, todo: _Todo, seconds: list[float]) -> None:
    """Log the forecast and fit the coding, before anything is built. Only on the first rank."""
    log.info("\n".join(_describe(cfg, todo, seconds)))
    plan = todo.plan
    if cfg.is_compressed and not compress.read_coding_note(cfg, plan.store, plan.teacher)[0]:
        compress.fit_codings(cfg, plan.store, plan.teacher, plan.shards)


def _load_codings(cfg: PrecomputeConfig) -> tuple[str, dict[str, FeatureCoding]]:
    """Digest and codings by view of the file that the first rank wrote; nothing for plain float16."""
    path = cfg.out / CODING
    return (files.sha256(path), load_codings(path)) if cfg.is_compressed else ("", {})


def _build_share(
    cfg: PrecomputeConfig,
    todo: _Todo,
    ranks: Ranks,
    queue_store: Any,
    coding_digest: str,
    codings: dict[str, FeatureCoding],
) -> None:
    """Build this rank's share of the shards: the rank takes the next shard that no rank has taken."""
    plan = todo.plan
    label = "teacher features" if ranks.size == 1 else f"teacher features, rank 0 of {ranks.size}"
    total = -(-len(todo.shards) // ranks.size)

    with draw_indices(queue_store, len(todo.shards)) as indices:
        if ranks.is_main:
            indices = run_folder.track_progress(indices, label, total=total, unit="slab")
        build_shards(
            cfg,
            plan.store,
            plan.teacher,
            (todo.shards[index] for index in indices),
            lambda shard: plan.make_key(cfg, shard, coding_digest),
            codings,
        )


def _write_manifest(cfg: PrecomputeConfig, plan: CachePlan, verdict: Verdict | None) -> None:
    teacher = plan.teacher

    # Sorted, so that the manifest does not depend on the order of building.
    shards = sorted(plan.shards, key=lambda shard: shard.name)
    coding_digest, quality = compress.read_coding_note(cfg, plan.store, teacher)

    facts = {
        "teacher": teacher.identity,
        "random_teacher": teacher.random,
        "gate": verdict.to_json() if verdict else None,
        "dim": teacher.dim,
        "patch": teacher.patch,
        "layers": [n % teacher.depth for n in cfg.layers],
        "views": list(cfg.views),
        "stride_v": cfg.stride_v,
        "scale": cfg.scale,
        "isotropic": True,
        "position_free": cfg.position_free,
        "augment_views": list(cfg.augment_views),
        "dtype": cfg.dtype,
        "pca": cfg.pca,
        "coding": coding_digest or None,
        "coding_quality": quality,
        "volumes": plan.digests,
        "store": str(cfg.store.resolve()),
        "code": run_folder.code_version(),
    }
    records = [feature_cache.read_shard_record(cfg.out / shard.name, shard) for shard in shards]
    feature_cache.write_manifest(cfg.out, facts, records)

    if clipped := sum(record["clipped"] for record in records):
        values = sum(shard.tokens for shard in shards) * len(cfg.layers) * (cfg.pca or teacher.dim)
        log.warning("int8: %d of %d values were beyond its range and were clipped", clipped, values)
