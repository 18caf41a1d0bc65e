"""Settings compared over neurons and seeds, from the evaluations of a study's trials: the table of an ablation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core.schema import InputError
from hpc_neuro.metrics import list_metrics
from hpc_neuro.metrics.metric import Metric, read_tolerance, tolerance_key
from hpc_neuro.metrics.score_file import SCORE_FILE, read_scores
from hpc_neuro.metrics.statistics import Interval, crossed_interval
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import SEED, format_value
from hpc_neuro.search.trial import Trial

Setting = tuple[str, str]
"""The value of the first dimension, and those of the others together ("" when there are none)."""
Metrics = Mapping[str, float]
NeuronScores = dict[str, Metrics]
"""Neuron -> metric -> value."""


@dataclass(frozen=True)
class Comparison:
    """Scores of every setting, seed and held-out neuron."""

    dimensions: tuple[str, str]
    """Names of the two parts of a setting."""
    neurons: tuple[str, ...]
    scores: Mapping[Setting, Mapping[str, Mapping[str, Metrics]]]
    """Setting -> seed -> neuron -> metric -> value."""
    baseline: Mapping[str, Metrics]
    """Otsu's, neuron -> metric -> value; {} when it was not scored."""

    @property
    def metrics(self) -> list[str]:
        """Every metric that evaluate wrote."""
        seeds = next(iter(self.scores.values()))
        volumes = next(iter(seeds.values()))
        return list(volumes[self.neurons[0]])

    def list_columns(self) -> list[Metric]:
        """The metrics of the table: one each of masks, surfaces, distances of trees, and cable."""
        # The key of F1 names the tolerance of these evaluations.
        rows = {metric.key: metric for metric in list_metrics(read_tolerance(self.metrics))}
        f1_key = tolerance_key("f1", read_tolerance(self.metrics))
        return [rows[key] for key in ("dice", "hd95_um", "esa", f1_key)]

    def collect_values(self, setting: Setting, metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[seeds, neurons] of one metric."""
        # Seeds are the rows, as the bootstrap draws both rows and columns.
        seeds = self.scores[setting].values()
        return np.array([[volumes[neuron][metric] for neuron in self.neurons] for volumes in seeds])

    def compute_interval(self, setting: Setting, metric: str, draws: int) -> Interval:
        """Mean over neurons and seeds with its bootstrap interval."""
        return crossed_interval(self.collect_values(setting, metric), draws)

    def compute_difference(self, setting: Setting, base: Setting, metric: str, draws: int) -> Interval | None:
        """Mean of what `setting` scores above `base` on the same seed and neuron; None without a common seed.

        What neurons and seeds have in common drops out, so the interval is narrower than that of `compute_interval`.
        """
        differences = self.list_differences(setting, base, metric)
        return None if differences is None else crossed_interval(differences, draws)

    def list_differences(
        self, setting: Setting, base: Setting, metric: str
    ) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """[seeds, neurons] of what `setting` scores above `base` on the same seed; None without a common seed."""
        scores, base_scores = self.scores[setting], self.scores[base]
        # Trials may have failed under some seeds.
        common_seeds = [seed for seed in scores if seed in base_scores]
        if not common_seeds:
            return None

        rows = [
            [scores[seed][neuron][metric] - base_scores[seed][neuron][metric] for neuron in self.neurons]
            for seed in common_seeds
        ]
        return np.array(rows)

    def list_parts(self, index: int) -> list[str]:
        """The different values of one part of the settings, in order."""
        return list(dict.fromkeys(setting[index] for setting in self.scores))


def read_comparison(cfg: SearchConfig, trials: Sequence[Trial]) -> Comparison | None:
    """Read the evaluations of all finished trials; None when there is none.

    Raises InputError when two trials scored different neurons.
    """
    # Seeds repeat a setting: they are no part of it.
    names = [name for name in cfg.space if name != SEED]
    scores: dict[Setting, dict[str, NeuronScores]] = {}
    baseline: NeuronScores = {}
    neurons: tuple[str, ...] = ()

    for t in trials:
        if t.state != "done":
            continue
        # All trials must have scored the same neurons, or their means could not be compared.
        volumes = _read_volumes(t.folder, neurons)
        neurons = neurons or tuple(volumes)
        seeds = scores.setdefault(_name_setting(t, names), {})
        # Without a dimension of this name, every trial is a repetition.
        seed = format_value(t.values.get(SEED, len(seeds)))
        seeds[seed] = {neuron: volumes[neuron]["model"] for neuron in neurons}
        # Otsu's baseline is the same for every trial.
        baseline = {neuron: volumes[neuron]["otsu"] for neuron in neurons if "otsu" in volumes[neuron]}

    if not scores:
        return None

    # The first dimension groups the charts, the others together are their colors.
    dimensions = (names[0] if names else "setting", ", ".join(names[1:]))
    return Comparison(dimensions, neurons, _sort_settings(scores), baseline)


def _read_volumes(folder: Path, neurons: tuple[str, ...]) -> dict[str, Any]:
    """Read the scores of a trial by volume. neurons: those of the other trials, () for the first one."""
    path = folder / "evaluate" / SCORE_FILE
    volumes: dict[str, Any] = read_scores(path.parent, f"remove {folder} to run the trial again")["volumes"]
    if without_model := [neuron for neuron, scores in volumes.items() if "model" not in scores]:
        raise InputError(f"{path} has no scores of the model of {without_model[0]}; remove {folder} to run it again")
    if neurons and set(volumes) != set(neurons):
        raise InputError(f"{path} scores {sorted(volumes)}, other trials {sorted(neurons)}; compare on one split")
    return volumes


def _name_setting(t: Trial, names: Sequence[str]) -> Setting:
    """A trial's setting; a dash stands for a dimension that does not apply."""
    # Numbers and words alike are named as in the config.
    values = [str(t.values[name]) if name in t.values else "\N{EN DASH}" for name in names]
    return (values[0] if values else "all", ", ".join(values[1:]))


def _sort_settings(scores: dict[Setting, dict[str, NeuronScores]]) -> dict[Setting, dict[str, NeuronScores]]:
    """Settings by the first part, then by the second, each in the order in which its values first occurred."""
    first, second = (list(dict.fromkeys(setting[i] for setting in scores)) for i in (0, 1))
    # Trials end in any order; the table follows the order of the space.
    order = sorted(scores, key=lambda setting: (first.index(setting[0]), second.index(setting[1])))
    return {setting: scores[setting] for setting in order}


def format_csv(comparison: Comparison) -> str:
    """One line per setting, seed and neuron, with every metric that evaluate wrote."""
    # A study of one dimension has no second column.
    metrics, has_second_part = comparison.metrics, bool(comparison.dimensions[1])
    dimensions = comparison.dimensions if has_second_part else comparison.dimensions[:1]

    with io.StringIO(newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*dimensions, "seed", "neuron", *metrics])
        for setting, seeds in comparison.scores.items():
            parts = setting if has_second_part else setting[:1]
            for seed, volumes in seeds.items():
                for neuron in comparison.neurons:
                    writer.writerow([*parts, seed, neuron, *(volumes[neuron][metric] for metric in metrics)])
        return out.getvalue()
