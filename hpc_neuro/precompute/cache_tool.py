"""`hpc-neuro cache verify|info OUT`: whether a feature cache still holds what the teacher gives, and what it holds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hpc_neuro.core import files, schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import feature_cache as cache
from hpc_neuro.data.feature_cache import encoding
from hpc_neuro.precompute import compress, verb
from hpc_neuro.precompute.build import look
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import pixels

DONE, BAD = 0, 3
COSINE = 0.999
HELP = """usage: hpc-neuro cache verify|info OUT [key=value ...]

verify  read every shard against its checksum, let the live teacher look at a sample of slices again, list the shards
        that are damaged, missing or unlike it, and build those again
            slices=32       how many slices the teacher looks at again
            seed=0          which ones
            rebuild=true    false: only list
        further keys are those of precompute, for a store or weights that moved: store=FOLDER teacher.weights=FILE
info    what is held, how large it is, how it was compressed, and which trainings used it
Exit code: 0 sound (or sound again), 2 not a cache, 3 something is bad and was not built again."""
_OWN = {"slices": 32, "seed": 0, "rebuild": True}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One shard that is not as it should be."""

    file: str
    why: str


def main(argv: Sequence[str]) -> int:
    """Run one `cache` command. Raises ConfigError for an unknown command or key, InputError for what is no cache."""
    words = [a for a in argv if "=" not in a]
    if not words or {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return DONE if argv else 2
    if words[0] not in ("verify", "info") or len(words) != 2:
        raise ConfigError(f"cache {' '.join(words)}: want `cache verify OUT` or `cache info OUT`")
    out, keys = Path(words[1]), [a for a in argv if "=" in a]
    if words[0] == "info":
        if keys:
            raise ConfigError(f"cache info knows no {keys[0]}")
        sys.stdout.write("\n".join(info(out)) + "\n")
        return DONE
    own: dict[str, Any] = dict(_OWN)
    for text in [k for k in keys if k.partition("=")[0] in _OWN]:
        name, _, value = text.partition("=")
        own[name] = yaml.safe_load(value)
        if type(own[name]) is not type(_OWN[name]) or (name == "slices" and own[name] < 1):
            raise ConfigError(f"{text}: want a {type(_OWN[name]).__name__}, such as {name}={_OWN[name]}")
    overrides = [k for k in keys if k.partition("=")[0] not in _OWN]
    return verify(out, overrides, int(own["slices"]), int(own["seed"]), bool(own["rebuild"]))


def verify(out: Path, overrides: Sequence[str] = (), slices: int = 32, seed: int = 0, rebuild: bool = True) -> int:
    """Check the cache in `out` and build again what is bad. -> 0 sound, 3 bad and not built again.

    overrides: keys of precompute for what moved. Raises InputError when `out` holds no finished cache.
    """
    manifest = cache.read_manifest(out, "an unfinished cache is finished by the same `hpc-neuro precompute` command")
    cfg = schema.load(PrecomputeConfig, out / "config.yaml", [*overrides, f"out={out}"])
    work = verb.open_all(cfg)
    if manifest["teacher"] != work.teacher.identity:
        raise InputError(
            f"{out} holds features of the teacher {manifest['teacher']}, but what is given is {work.teacher.identity}; "
            "give that teacher's teacher.weights, or build a cache of the other one in another folder"
        )
    found = _findings(cfg, work, slices, seed)
    for finding in found:
        log.warning("%s: %s", finding.file, finding.why)
    if not found:
        return DONE
    if not rebuild:
        log.warning("%d of %d shards are bad; without rebuild=false they are built again", len(found), len(work.units))
        return BAD
    if verb.run(cfg, again={finding.file for finding in found}) != 0:
        return BAD
    left = _findings(cfg, work, slices, seed)
    for finding in left:
        log.warning("%s, built again: %s", finding.file, finding.why)
    log.info("%d shards were built again, %d are bad now", len(found), len(left))
    return BAD if left else DONE


def _findings(cfg: PrecomputeConfig, work: verb.Work, slices: int, seed: int) -> list[Finding]:
    """What is bad: shards by their own checksum and the manifest's, then by what the teacher gives now."""
    manifest = cache.read_manifest(cfg.out, "run precompute")
    wanted = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
    stale = {u.name for u in work.missing(cfg)}
    found, sound = [], []
    for unit in sorted(work.units, key=lambda u: u.name):
        path = cfg.out / unit.name
        if not path.exists():
            found.append(Finding(unit.name, "missing"))
        elif unit.name in stale:
            found.append(Finding(unit.name, "of another teacher, image or config, or not readable"))
        elif not cache.is_shard_sound(path) or cache.read_shard_record(path, unit)["sha256"] != wanted.get(unit.name):
            found.append(Finding(unit.name, "its features do not have the checksum they were written with"))
        else:
            sound.append(unit)
    log.info("%d of %d shards are there and have their checksums", len(sound), len(work.units))
    return found + (_unlike(cfg, work, sound, slices, seed) if sound else [])


def _unlike(
    cfg: PrecomputeConfig, work: verb.Work, units: Sequence[cache.Unit], slices: int, seed: int
) -> list[Finding]:
    """Shards of which a sampled slice is unlike what the live teacher gives for it, compressed in the same way."""
    layers = [n % work.teacher.depth for n in cfg.layers]
    codings = encoding.load(cfg.out / cache.CODING) if cfg.coded else {}
    found: dict[str, Finding] = {}
    lowest, lowest_raw = 1.0, 1.0
    picked = compress.sampled(cfg, units, work.teacher.patch, slices, seed)
    for unit, job in picked:
        how = codings.get(unit.view, cache.RAW)
        held = cache.read_shard_values(cfg.out / unit.name, (job.slices, job.rows, job.columns), how)[0]  # [L, h, w, D]
        values = look(work.teacher, pixels(work.store[unit.volume], unit, job), layers, unit.how)()[0]
        live = torch.from_numpy(values[:, job.inner_rows, job.inner_columns]).float()
        again = how.decode(how.encode(live)[0])
        worst = float(torch.cosine_similarity(held, again, dim=-1).min())
        lowest, lowest_raw = (
            min(lowest, worst),
            min(lowest_raw, float(torch.cosine_similarity(held, live, dim=-1).min())),
        )
        if not worst >= COSINE:  # nan counts as unlike
            where = unit.first + job.slices.start * unit.stride
            found[unit.name] = Finding(
                unit.name, f"cosine {worst:.4f} to the live teacher in the slice from {where} on"
            )
    log.info(
        "%d slices looked at again: lowest cosine of a token to the live teacher %.6f (wanted %g)%s",
        len(picked), lowest, COSINE, f", uncompressed {lowest_raw:.4f}" if cfg.coded else "",
    )  # fmt: skip
    return list(found.values())


def info(out: Path) -> list[str]:
    """What a cache holds, in lines for people. Raises InputError when there is none."""
    held = cache.read_manifest(out, "give the folder that `hpc-neuro precompute` wrote")
    shards = held["shards"]
    gone = [s["file"] for s in shards if not (out / s["file"]).exists()]
    size = sum(s["bytes"] for s in shards)
    turned = ", ".join(held["augment_views"]) or "none"
    kept = f"all {held['dim']} channels" if held["pca"] is None else f"{held['pca']} of {held['dim']} components"
    random = ", RANDOM WEIGHTS" if held["random_teacher"] else ""
    lines = [
        f"teacher {held['teacher']['name']}{random}, sha256 {held['teacher']['sha256']}",
        f"layers {held['layers']}, views {' '.join(held['views'])}, augment_views {turned}",
        f"every {held['stride_v']} voxels, scale {held['scale']}, {kept} as {held['dtype']}",
        f"{len(held['volumes'])} volumes: {', '.join(held['volumes'])}",
        f"{len(shards)} shards, {files.format_bytes(size)}" + (f"; MISSING {', '.join(gone)}" if gone else ""),
        f"made from {held['store']} by {held['code']}",
        *compress.said(held["coding_quality"]),
    ]
    for view in held["views"]:
        mine = [s for s in shards if s["unit"]["view"] == view]
        lines.append(f"view {view}: {len(mine)} shards, {files.format_bytes(sum(s['bytes'] for s in mine))}")
    used = [f"used by {use['out']} on {use['host']}, first {use['first']}" for use in cache.list_uses(out)]
    return lines + (used or ["used by no training yet"])
