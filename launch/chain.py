"""Several verbs, each a job that waits for the one before: the folders that link them are filled in here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core.schema import ConfigError
from hpc_neuro.pipeline import STAGES
from launch import submit


def plan_chain(verbs: Sequence[str], configs: Path | None, keys: Sequence[str]) -> list[tuple[str, Any]]:
    """Load the configs of several verbs that run under one root; returns (verb, config), in order.

    verbs: in the order of the pipeline. configs: a folder with VERB.yaml or VERB/default.yaml; none: defaults. keys:
    `out=ROOT`, under which each verb has a folder, and `VERB.key=value`. A verb's inputs are the folders of the others
    under ROOT, whether they are in this chain or were written before. ROOT's name is the tracker's group. Raises
    ConfigError.
    """
    if unknown := [verb for verb in verbs if verb not in STAGES]:
        raise ConfigError(f"--chain: {', '.join(unknown)} cannot stand in a chain; choose from {','.join(STAGES)}")
    if list(verbs) != sorted(set(verbs), key=list(STAGES).index):
        raise ConfigError(f"--chain: {','.join(verbs)} is not in the order of the pipeline, {','.join(STAGES)}")

    # One root for all verbs: their folders follow from it.
    roots = [key.partition("=")[2] for key in keys if key.startswith("out=")]
    if len(roots) != 1:
        raise ConfigError("--chain wants out=FOLDER once; each verb gets a folder under it")

    stray = [key for key in keys if not key.startswith("out=") and key.partition(".")[0] not in verbs]
    if stray:
        raise ConfigError(f"--chain: {stray[0]} is of no verb of the chain; write VERB.key=value")

    root = Path(roots[0])
    return [(verb, _load_stage(verb, verbs, root, configs, keys)) for verb in verbs]


def _load_stage(verb: str, verbs: Sequence[str], root: Path, configs: Path | None, keys: Sequence[str]) -> Any:
    """Load the config of one verb of a chain, with the folders under `root` filled in."""
    # Keys of this verb, without its name.
    overrides = [key.partition(".")[2] for key in keys if key.startswith(f"{verb}.")]
    values: dict[str, Any] = {**STAGES[verb].folders_under(root, present=verbs)}
    cfg = submit.load_config(verb, _find_config(configs, verb), overrides, values)
    if verb != "train":
        return cfg

    # A training that does not distill reads no cache, and the chain may have none.
    if cfg.distill is None and cfg.cache == values["cache"]:
        cfg = dataclasses.replace(cfg, cache=None)

    # The trainings of one chain share a group in the tracker, unless the config names another.
    if cfg.tracker.group is None:
        cfg = dataclasses.replace(cfg, tracker=dataclasses.replace(cfg.tracker, group=root.resolve().name))

    return cfg


def _find_config(configs: Path | None, verb: str) -> Path | None:
    """The config file of a verb in a folder of configs."""
    if configs is None:
        return None

    candidates = (configs / f"{verb}.yaml", configs / verb / "default.yaml")
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise ConfigError(f"{configs} has neither {verb}.yaml nor {verb}/default.yaml")

    return path
