"""`hpc-neuro cache verify|info OUT`: check a feature cache against the teacher, or describe what it holds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, with_config
from torch import Tensor
from typing_extensions import TypedDict

from hpc_neuro.core import files, schema, yaml_text
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data.feature_cache import (
    CODING,
    MANIFEST,
    RAW,
    ShardSpec,
    is_shard_sound,
    list_uses,
    read_manifest,
    read_shard_record,
    read_shard_values,
)
from hpc_neuro.data.feature_cache.encoding import load_codings
from hpc_neuro.precompute import compress, verb
from hpc_neuro.precompute.build import run_teacher
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import TeacherBatch, read_pixels

_NOTHING = 1e-2
"""Norm below which features have no direction that could be compared."""
MIN_COSINE = 0.999
"""Lowest cosine of a sound token to the live teacher's."""

HELP = """usage: hpc-neuro cache verify|info OUT [key=value ...]

verify  read every shard against its checksum, compute a sample of slices again with the live teacher, list the shards
        that are damaged, missing or different, and rebuild those
            slices=32       how many slices are computed again
            seed=0          which ones
            rebuild=true    false: only list
        further keys are those of precompute, for a store or weights that moved: store=FOLDER teacher.weights=FILE
info    what the cache holds, its size, its compression, and the trainings that read it
Exit code: 0 sound (or sound again), 2 not a cache, 3 shards are bad and were not rebuilt."""

_OWN_KEYS = {"slices": 32, "seed": 0, "rebuild": True}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadShard:
    """One shard that is damaged, missing or different."""

    file: str
    reason: str


def main(argv: Sequence[str]) -> int:
    """Run one `cache` command. ConfigError for an unknown command or key, InputError when OUT is not a cache."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return EXIT_DONE if argv else EXIT_BAD_INPUT

    # Keys may stand anywhere among the words.
    words = [argument for argument in argv if "=" not in argument]
    keys = [argument for argument in argv if "=" in argument]
    if len(words) != 2 or words[0] not in ("verify", "info"):
        raise ConfigError(f"cache {' '.join(words)}: want `cache verify OUT` or `cache info OUT`")
    out = Path(words[1])

    if words[0] == "info":
        if keys:
            raise ConfigError(f"cache info has no key {keys[0]}")
        sys.stdout.write("\n".join(describe_cache(out)) + "\n")
        return EXIT_DONE

    # All other keys go to the config of `precompute`, which checks them.
    own = _parse_own_keys(keys)
    overrides = [key for key in keys if key.partition("=")[0] not in _OWN_KEYS]
    return verify_cache(out, overrides, int(own["slices"]), int(own["seed"]), bool(own["rebuild"]))


def _parse_own_keys(keys: Sequence[str]) -> dict[str, Any]:
    """The keys of `verify` itself. Raises ConfigError for a value of the wrong type."""
    own: dict[str, Any] = dict(_OWN_KEYS)
    for text in keys:
        name, _, value = text.partition("=")
        if name not in _OWN_KEYS:
            continue

        # A bool is an int in Python, so the types are compared exactly.
        own[name] = yaml_text.parse(value)
        if type(own[name]) is not type(_OWN_KEYS[name]) or (name == "slices" and own[name] < 1):
            wanted = type(_OWN_KEYS[name]).__name__
            raise ConfigError(f"{text}: want a {wanted}, such as {name}={_OWN_KEYS[name]}")
    return own


def verify_cache(
    out: Path, overrides: Sequence[str] = (), slices: int = 32, seed: int = 0, rebuild: bool = True
) -> int:
    """Check the cache in `out` and rebuild its bad shards. -> 0 sound, 3 bad and not rebuilt.

    overrides: keys of precompute for what moved. Raises InputError when `out` holds no finished cache.
    """
    manifest = read_manifest(out, "an unfinished cache is finished by the same `hpc-neuro precompute` command")

    # The cache's own config decides what its shards should hold.
    cfg = schema.load(PrecomputeConfig, out / "config.yaml", [*overrides, f"out={out}"])
    plan = verb.open_plan(cfg)
    if manifest["teacher"] != plan.teacher.identity:
        raise InputError(
            f"{out} holds features of the teacher {manifest['teacher']}, but the given one is {plan.teacher.identity}; "
            "give the cache's teacher with teacher.weights, or build a cache of the other one in another folder"
        )

    bad_shards = _find_bad_shards(cfg, plan, slices, seed)
    for bad in bad_shards:
        log.warning("%s: %s", bad.file, bad.reason)
    if not bad_shards:
        return EXIT_DONE
    if not rebuild:
        log.warning(
            "%d of %d shards are bad; without rebuild=false they are built again", len(bad_shards), len(plan.shards)
        )
        return EXIT_FAILURES

    if verb.run(cfg, again={bad.file for bad in bad_shards}) != 0:
        return EXIT_FAILURES

    # A rebuilt shard is checked like any other.
    still_bad = _find_bad_shards(cfg, plan, slices, seed)
    for bad in still_bad:
        log.warning("%s, built again: %s", bad.file, bad.reason)
    log.info("built again: %s; bad now: %d", files.format_count(len(bad_shards), "shard"), len(still_bad))
    return EXIT_FAILURES if still_bad else EXIT_DONE


def _find_bad_shards(cfg: PrecomputeConfig, plan: verb.CachePlan, slices: int, seed: int) -> list[BadShard]:
    """Shards that fail their own checksum or the manifest's, then shards that differ from the live teacher."""
    manifest = read_manifest(cfg.out, "run precompute")
    checksums = {entry["file"]: entry["sha256"] for entry in manifest["shards"]}

    # The key in a shard covers teacher, volume and settings.
    stale = {shard.name for shard in plan.list_missing(cfg)}

    bad_shards, sound = [], []
    for shard in sorted(plan.shards, key=lambda shard: shard.name):
        path = cfg.out / shard.name
        if not path.exists():
            bad_shards.append(BadShard(shard.name, "missing"))
        elif shard.name in stale:
            bad_shards.append(BadShard(shard.name, "of another teacher, image or config, or not readable"))
        elif not is_shard_sound(path) or read_shard_record(path, shard)["sha256"] != checksums.get(shard.name):
            bad_shards.append(BadShard(shard.name, "its features do not have the checksum they were written with"))
        else:
            sound.append(shard)

    log.info("%d of %d shards are there and have their checksums", len(sound), len(plan.shards))
    return bad_shards + (_find_different_shards(cfg, plan, sound, slices, seed) if sound else [])


def _find_different_shards(
    cfg: PrecomputeConfig, plan: verb.CachePlan, shards: Sequence[ShardSpec], slices: int, seed: int
) -> list[BadShard]:
    """Shards of which a sampled slice differs from what the live teacher gives for it, compressed in the same way."""
    codings = load_codings(cfg.out / CODING) if cfg.is_compressed else {}
    sample = compress.sample_slices(cfg, shards, plan.teacher.patch, slices, seed)
    bad_shards: dict[str, BadShard] = {}
    lowest, lowest_raw = 1.0, 1.0

    for shard, batch in sample:
        # Compression changes features far more than a sound recomputation does, so both sides get it.
        coding = codings.get(shard.view, RAW)
        window = (batch.slices, batch.rows, batch.columns)
        cached = read_shard_values(cfg.out / shard.name, window, coding)[0]  # [L, h, w, D]
        live = _compute_features(cfg, plan, shard, batch)
        cosine = _lowest_cosine(cached, coding.decode(coding.encode(live)[0]))
        lowest = min(lowest, cosine)
        lowest_raw = min(lowest_raw, _lowest_cosine(cached, live))

        # The negation also catches NaN.
        if not cosine >= MIN_COSINE:
            first = shard.first + batch.slices.start * shard.stride
            reason = f"cosine {cosine:.4f} to the live teacher in the slice from {first} on"
            bad_shards[shard.name] = BadShard(shard.name, reason)

    uncompressed = f", uncompressed {lowest_raw:.4f}" if cfg.is_compressed else ""
    log.info(
        "%s computed again: lowest cosine of a token to the live teacher %.6f (wanted %g)%s",
        files.format_count(len(sample), "slice"),
        lowest,
        MIN_COSINE,
        uncompressed,
    )
    return list(bad_shards.values())


def _compute_features(cfg: PrecomputeConfig, plan: verb.CachePlan, shard: ShardSpec, batch: TeacherBatch) -> Tensor:
    """[L, h, w, D] float32 of the batch's first slice, from the live teacher."""
    layers = [n % plan.teacher.depth for n in cfg.layers]
    pixels = read_pixels(plan.store[shard.volume], shard, batch)
    features = run_teacher(plan.teacher, pixels, layers, cfg.position_free, shard.layout)()[0]
    return torch.from_numpy(features[:, batch.inner_rows, batch.inner_columns]).float()


def _lowest_cosine(a: Tensor, b: Tensor) -> float:
    """The lowest cosine of two features of one token; 1 where both are nothing, as position-free ones of black are."""
    is_nothing = (a.float().norm(dim=-1) < _NOTHING) & (b.float().norm(dim=-1) < _NOTHING)
    cosine = torch.cosine_similarity(a, b, dim=-1)
    return float(torch.where(is_nothing, torch.ones_like(cosine), cosine).min())


@with_config(ConfigDict(extra="allow"))
class _DescriptionForm(TypedDict):
    """The parts of a manifest that only people need, and those that they see as they are."""

    teacher: dict[str, str]
    random_teacher: bool
    dim: int
    layers: list[int]
    views: list[str]
    stride_v: int
    scale: float
    augment_views: list[str]
    dtype: str
    pca: int | None
    coding_quality: compress.Quality
    volumes: dict[str, str]
    store: str
    code: str
    shards: list[dict[str, Any]]


def describe_cache(out: Path) -> list[str]:
    """The content of a cache in lines for people. Raises InputError when there is none."""
    hint = "give the folder that `hpc-neuro precompute` wrote"
    manifest = files.check_form(read_manifest(out, hint), _DescriptionForm, str(out / MANIFEST), hint)
    shards = manifest["shards"]
    missing = [entry["file"] for entry in shards if not (out / entry["file"]).exists()]
    orientations = ", ".join(manifest["augment_views"]) or "none"
    dim, components = manifest["dim"], manifest["pca"]
    channels = f"all {dim} channels" if components is None else f"{components} of {dim} components"
    random = ", RANDOM WEIGHTS" if manifest["random_teacher"] else ""

    lines = [
        f"teacher {manifest['teacher']['name']}{random}, sha256 {manifest['teacher']['sha256']}",
        f"layers {manifest['layers']}, views {' '.join(manifest['views'])}, augment_views {orientations}",
        f"every {manifest['stride_v']} voxels, scale {manifest['scale']}, {channels} as {manifest['dtype']}",
        f"{files.format_count(len(manifest['volumes']), 'volume')}: {', '.join(manifest['volumes'])}",
        f"{files.format_count(len(shards), 'shard')}, {_total_size(shards)}"
        + (f"; MISSING {', '.join(missing)}" if missing else ""),
        f"made from {manifest['store']} by {manifest['code']}",
        *compress.describe_quality(manifest["coding_quality"]),
    ]
    for view in manifest["views"]:
        view_shards = [entry for entry in shards if entry["unit"]["view"] == view]
        lines.append(f"view {view}: {files.format_count(len(view_shards), 'shard')}, {_total_size(view_shards)}")

    uses = [f"used by {use['out']} on {use['host']}, first {use['first']}" for use in list_uses(out)]
    return lines + (uses or ["used by no training yet"])


def _total_size(entries: Sequence[dict[str, Any]]) -> str:
    return files.format_bytes(sum(entry["bytes"] for entry in entries))
