"""From a point of the search space to the configs of a trial, everything checked before the first one starts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc_neuro import train
from hpc_neuro.core import files, schema
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.pipeline import STAGES
from hpc_neuro.search import space as spaces
from hpc_neuro.search.config import SearchConfig, StageConfig
from hpc_neuro.search.space import SEED, Point


class TrialRecipe:
    """The verbs of a trial and their configs."""

    def __init__(self, cfg: SearchConfig) -> None:
        """Raises ConfigError with every value of the space that a verb's config refuses, by dotted key."""
        self.cfg = cfg
        # Keys that the sweep fills in would make every value of the space look wrong.
        faults = self._find_key_faults() or spaces.find_value_faults(
            cfg.space, cfg.sampler.kind == "grid", lambda keys: self._load_configs(cfg.out, keys)
        )
        if faults:
            raise ConfigError(f"{cfg.out.name} is not a usable search:\n" + "\n".join(f"  {f}" for f in faults))

        # The number of steps is the same for all trials: rungs depend on it.
        first_point = spaces.cover_values(cfg.space)[0]
        configs = self._load_configs(cfg.out, spaces.format_keys(cfg.space, first_point))
        self.steps = int(configs["train"].optim.steps)
        """Optimizer steps of a trial."""
        if cfg.asha is not None and cfg.asha.first >= self.steps:
            raise ConfigError(
                f"asha.first is {cfg.asha.first}, but a trial has {self.steps} steps: no trial would ever be stopped; "
                "lower it, or set asha=null"
            )

    @property
    def digest(self) -> str:
        """Hash of the configs that trials are made from; changes when the files behind them do."""
        parts = [(stage.config and stage.config.read_bytes(), stage.keys) for _, stage in self._stages()]
        text = "".join(str(config) + str(keys) for config, keys in parts)
        return hashlib.sha256(text.encode()).hexdigest()

    def load_train_configs(self) -> list[train.TrainConfig]:
        """Load train configs that show every value once; those that differ in the seed alone count once."""
        space, folder = self.cfg.space, self.cfg.out / "trials" / "check"
        points = [{k: v for k, v in point.items() if k != SEED} for point in spaces.cover_values(space)]
        distinct = dict.fromkeys(tuple(spaces.format_keys(space, point)) for point in points)
        return [self._load_configs(folder, keys)["train"] for keys in distinct]

    def write_trial(self, folder: Path, number: int, point: Point) -> None:
        """Write the YAML file of every verb into a trial's folder; with absolute paths, they run from anywhere."""
        # Trials stand together in the tracker.
        name = self.cfg.out.resolve().name
        keys = [
            f"tracker.group={spaces.format_value(name)}",
            f"tracker.name={spaces.format_value(f'{name}-{number:04d}')}",
            *spaces.format_keys(self.cfg.space, point),
        ]

        for verb, config in self._load_configs(folder, keys).items():
            text = schema.dump(_make_paths_absolute(config))
            files.write_text(folder / f"{verb}.yaml", text)

    def _find_key_faults(self) -> list[str]:
        """Keys that each trial needs a value of its own for."""
        faults = [
            f"{verb}: {key} is filled in for each trial; leave it out"
            for verb, stage in self._stages()
            for key in stage.keys
            if key.partition("=")[0] in self._link_folders(self.cfg.out, verb)
        ]
        if "out" in self.cfg.space:
            faults.append("space.out: filled in for each trial; leave it out")

        return faults

    def _load_configs(self, folder: Path, keys: Sequence[str]) -> dict[str, Any]:
        """Load verb -> config of a trial in `folder`, with `keys` of the train config. Raises ConfigError."""
        configs: dict[str, Any] = {}

        for verb, stage in self._stages():
            # Verbs after train score the volumes of its store, unless their config says otherwise.
            values: dict[str, Any] = {**self._link_folders(folder, verb)}
            if verb != "train" and not _names_volumes(stage):
                values["store"] = configs["train"].store

            overrides = [*stage.keys, *(keys if verb == "train" else ())]
            configs[verb] = schema.load(STAGES[verb].load_config_class(), stage.config, overrides, values)

        return configs

    def _link_folders(self, folder: Path, verb: str) -> dict[str, Path]:
        """Keys of a verb's config that name folders of the trial: `out`, and what earlier verbs of the recipe write."""
        # As in a chain, but only for the verbs of this recipe.
        folders = {"out": folder / str(STAGES[verb].folder)}
        for item in STAGES[verb].inputs:
            if item.in_chain != "never" and item.verb in self.cfg.recipe:
                folders[item.key] = folder / str(STAGES[item.verb].folder)
        return folders

    def _stages(self) -> Iterator[tuple[str, StageConfig]]:
        for verb in self.cfg.recipe:
            yield verb, getattr(self.cfg, verb)


def _make_paths_absolute(value: Any) -> Any:
    """A config as plain values with every path absolute."""
    if isinstance(value, Path):
        return str(value.absolute())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _make_paths_absolute(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _make_paths_absolute(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_make_paths_absolute(item) for item in value]

    return value


def _names_volumes(stage: StageConfig) -> bool:
    """Whether a stage names its volumes itself, by a store or by inputs."""
    config = schema.read_yaml(stage.config) if stage.config else None
    return "store" in (config or {}) or any(key.partition("=")[0] in ("store", "inputs") for key in stage.keys)
