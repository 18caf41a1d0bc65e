"""Several verbs, each a job that waits for the one before: the folders they hand on are filled in here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core.schema import ConfigError
from launch import jobs

# verb -> the keys that name what an earlier verb wrote
_WIRES: dict[str, dict[str, str]] = {
    "prepare": {},
    "precompute": {"store": "prepare"},
    "train": {"store": "prepare", "cache": "precompute"},
    "infer": {"store": "prepare", "model": "train"},
    "evaluate": {"store": "prepare", "predictions": "infer", "train": "train"},
}
FOLDERS = {"prepare": "store", "precompute": "cache", "train": "train", "infer": "infer", "evaluate": "evaluate"}


def plan(verbs: Sequence[str], configs: Path | None, keys: Sequence[str]) -> list[tuple[str, Any]]:
    """(verb, its config), in order.

    verbs: in the order of the pipeline. configs: a folder with VERB.yaml or VERB/default.yaml; none: defaults. keys:
    `out=ROOT`, under which each verb has a folder, and `VERB.key=value`. A verb's inputs are the folders of the others
    under ROOT, whether they are in this chain or were made before. ROOT's name is the tracker's group. Raises
    ConfigError.
    """
    if unknown := [v for v in verbs if v not in FOLDERS]:
        raise ConfigError(f"--chain: {', '.join(unknown)} cannot stand in a chain; choose from {','.join(FOLDERS)}")
    if list(verbs) != sorted(set(verbs), key=list(FOLDERS).index):
        raise ConfigError(f"--chain: {','.join(verbs)} is not in the order of the pipeline, {','.join(FOLDERS)}")
    roots = [k.partition("=")[2] for k in keys if k.startswith("out=")]
    if len(roots) != 1:
        raise ConfigError("--chain wants out=FOLDER once; each verb gets a folder under it")
    stray = [k for k in keys if not k.startswith("out=") and k.partition(".")[0] not in verbs]
    if stray:
        raise ConfigError(f"--chain: {stray[0]} is of no verb of the chain; write VERB.key=value")
    root = Path(roots[0])
    stages = [(v, jobs.load(v, _config(configs, v), _keys(v, verbs, root, keys))) for v in verbs]
    return [(v, _grouped(cfg, root.resolve().name) if v == "train" else cfg) for v, cfg in stages]


def _grouped(cfg: Any, name: str) -> Any:
    """A training in the tracker's group of the chain, unless its config names another."""
    if cfg.tracker.group is not None:
        return cfg
    return dataclasses.replace(cfg, tracker=dataclasses.replace(cfg.tracker, group=name))


def _config(configs: Path | None, verb: str) -> Path | None:
    if configs is None:
        return None
    found = [p for p in (configs / f"{verb}.yaml", configs / verb / "default.yaml") if p.exists()]
    if not found:
        raise ConfigError(f"{configs} has neither {verb}.yaml nor {verb}/default.yaml")
    return found[0]


def _keys(verb: str, verbs: Sequence[str], root: Path, keys: Sequence[str]) -> list[str]:
    own = [k.partition(".")[2] for k in keys if k.startswith(f"{verb}.")]
    wires = {key: root / FOLDERS[maker] for key, maker in _WIRES[verb].items()}
    if "distill=null" in own:
        wires.pop("cache", None)
    if verb == "evaluate" and "train" not in verbs and not wires["train"].exists():
        wires.pop("train")
    return [f"out={root / FOLDERS[verb]}", *(f"{key}={folder}" for key, folder in wires.items()), *own]
