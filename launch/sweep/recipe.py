"""From a point of the search space to the configs of a trial, everything checked before the first one starts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hpc_neuro import train
from hpc_neuro.core import files, schema
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.pipeline import STAGES
from hpc_neuro.search import space as spaces
from hpc_neuro.search.config import SearchConfig, StageConfig
from hpc_neuro.search.space import SEED, Point


class Recipe:
    """The verbs of a trial and their configs."""

    def __init__(self, cfg: SearchConfig) -> None:
        """Raises ConfigError with every value of the space that TrainConfig refuses, by dotted key."""
        self.cfg = cfg
        faults = [
            f"{verb}: {key} is filled in for each trial; leave it out"
            for verb, stage in self._stages()
            for key in stage.keys
            if key.partition("=")[0] in self._folders(cfg.out, verb)
        ]
        faults += [f"space.{name}: filled in for each trial; leave it out" for name in cfg.space if name == "out"]
        if not faults:
            every_point = cfg.sampler.kind == "grid"
            faults = spaces.check(cfg.space, every_point, lambda keys: self._load(cfg.out, keys))
        if faults:
            raise ConfigError(f"{cfg.out.name} is not a usable search:\n" + "\n".join(f"  {f}" for f in faults))
        self.steps = int(self._load(cfg.out, spaces.keys(cfg.space, self.samples()[0]))["train"].optim.steps)
        if cfg.asha is not None and cfg.asha.first >= self.steps:
            raise ConfigError(
                f"asha.first is {cfg.asha.first}, but a trial has {self.steps} steps: no trial would ever be stopped; "
                "lower it, or set asha=null"
            )

    def samples(self) -> list[Point]:
        """Points that show every value once."""
        return spaces.covering(self.cfg.space)

    def trainings(self) -> list[train.TrainConfig]:
        """Train configs that show every value once, those that differ in the seed alone left out."""
        points = [{k: v for k, v in point.items() if k != SEED} for point in self.samples()]
        distinct = {str(keys): keys for keys in (spaces.keys(self.cfg.space, point) for point in points)}
        return [self._load(self.cfg.out / "trials" / "check", keys)["train"] for keys in distinct.values()]

    @property
    def digest(self) -> str:
        """Hash of the configs that trials are made from; changes when the files behind them do."""
        text = "".join(str(stage.config and stage.config.read_bytes()) + str(stage.keys) for _, stage in self._stages())
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, folder: Path, number: int, point: Point) -> None:
        """The YAML file of every verb into a trial's folder; paths are absolute, so they run from anywhere."""
        name = self.cfg.out.resolve().name
        keys = [f"tracker.group={spaces.text(name)}", f"tracker.name={spaces.text(f'{name}-{number:04d}')}"]
        for verb, config in self._load(folder, [*keys, *spaces.keys(self.cfg.space, point)]).items():
            text = yaml.safe_dump(schema.to_plain(absolute(config)), sort_keys=False, width=120)
            files.write_text(folder / f"{verb}.yaml", text)

    def _load(self, folder: Path, keys: Sequence[str]) -> dict[str, Any]:
        """verb -> config of a trial in `folder` with `keys` of the train config. Raises ConfigError."""
        configs: dict[str, Any] = {}

        for verb, stage in self._stages():
            values: dict[str, Any] = {**self._folders(folder, verb)}
            if verb != "train" and not _names(stage, "store"):
                values["store"] = configs["train"].store

            overrides = [*stage.keys, *(keys if verb == "train" else ())]
            configs[verb] = schema.load(STAGES[verb].load_config_class(), stage.config, overrides, values)

        return configs

    def _folders(self, folder: Path, verb: str) -> dict[str, Path]:
        """Keys of a verb's config that name folders of the trial: `out`, and what earlier verbs of the recipe write."""
        folders = {"out": folder / str(STAGES[verb].folder)}
        for item in STAGES[verb].inputs:
            if item.in_chain != "never" and item.verb in self.cfg.recipe:
                folders[item.key] = folder / str(STAGES[item.verb].folder)
        return folders

    def _stages(self) -> list[tuple[str, StageConfig]]:
        return [(verb, getattr(self.cfg, verb)) for verb in self.cfg.recipe]


def absolute(value: Any) -> Any:
    """A config as plain values with every path absolute."""
    if isinstance(value, Path):
        return str(value.absolute())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: absolute(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: absolute(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [absolute(v) for v in value]
    return value


def _names(stage: StageConfig, key: str) -> bool:
    """Whether a stage says this key itself."""
    held = yaml.safe_load(stage.config.read_text(encoding="utf-8")) if stage.config else None
    return key in (held or {}) or any(k.partition("=")[0] in (key, "inputs") for k in stage.keys)
