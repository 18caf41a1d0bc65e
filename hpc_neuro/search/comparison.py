"""Settings compared over neurons and seeds, from the evaluations of a study's trials: the table of an ablation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.metrics.bootstrap import Interval, crossed_interval
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import SEED, text
from hpc_neuro.search.trial import Trial

Setting = tuple[str, str]
"""The value of the first dimension, and those of the others together ("" when there are none)."""


@dataclass(frozen=True)
class Comparison:
    """Scores of every setting, seed and held-out neuron."""

    dimensions: tuple[str, str]  # what the two parts of a setting are
    neurons: tuple[str, ...]
    scores: Mapping[Setting, Mapping[str, Mapping[str, Mapping[str, float]]]]  # setting -> seed -> neuron -> metric
    baseline: Mapping[str, Mapping[str, float]]  # Otsu's: neuron -> metric; {} when it was not scored

    def values(self, setting: Setting, metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[seeds, neurons] of one metric."""
        seeds = self.scores[setting].values()
        return np.array([[seed[n][metric] for n in self.neurons] for seed in seeds])

    def interval(self, setting: Setting, metric: str, draws: int) -> Interval:
        """Mean over neurons and seeds with its bootstrap interval."""
        return crossed_interval(self.values(setting, metric), draws)

    def difference(self, setting: Setting, other: Setting, metric: str, draws: int) -> Interval | None:
        """Mean of what `setting` scores above `other` on the same seed and neuron; None without a seed that both have.

        What neurons and seeds have in common drops out, so that it shows less of a difference than `interval` does.
        """
        mine, theirs = self.scores[setting], self.scores[other]
        shared = [seed for seed in mine if seed in theirs]
        if not shared:
            return None
        apart = [[mine[s][n][metric] - theirs[s][n][metric] for n in self.neurons] for s in shared]
        return crossed_interval(np.array(apart), draws)

    def part(self, index: int) -> list[str]:
        """The different values of one part of the settings, in order."""
        return list(dict.fromkeys(s[index] for s in self.scores))


def read(cfg: SearchConfig, trials: list[Trial]) -> Comparison | None:
    """The evaluations of all finished trials; None when there is none.

    Raises InputError when two trials scored different neurons.
    """
    names = [n for n in cfg.space if n != SEED]
    scores: dict[Setting, dict[str, dict[str, dict[str, float]]]] = {}
    baseline: dict[str, dict[str, float]] = {}
    neurons: tuple[str, ...] = ()
    for t in trials:
        if t.state != "done":
            continue
        path = t.folder / "evaluate" / "metrics.json"
        volumes = files.read_json(path, "remove the trial's folder to run it again")["volumes"]
        neurons = neurons or tuple(volumes)
        if set(volumes) != set(neurons):
            raise InputError(f"{path} scores {sorted(volumes)}, other trials {sorted(neurons)}; compare on one split")
        values = [str(t.values[n]) if n in t.values else "\N{EN DASH}" for n in names]
        setting = (values[0] if values else "all", ", ".join(values[1:]))
        seeds = scores.setdefault(setting, {})
        seed = text(t.values.get(SEED, len(seeds)))
        seeds[seed] = {n: volumes[n]["model"] for n in neurons}
        baseline = {n: volumes[n]["otsu"] for n in neurons if "otsu" in volumes[n]}
    if not scores:
        return None
    lost = [m.key for m in cfg.table if m.key not in next(iter(next(iter(scores.values())).values()))[neurons[0]]]
    if lost:
        raise InputError(f"table: evaluate wrote no {lost[0]}; look into a trial's evaluate/metrics.json for the keys")
    order = sorted(scores, key=lambda s: [list(dict.fromkeys(k[i] for k in scores)).index(s[i]) for i in (0, 1)])
    first, rest = (names[0] if names else "setting"), ", ".join(names[1:])
    return Comparison((first, rest), neurons, {s: scores[s] for s in order}, baseline)


def as_csv(found: Comparison) -> str:
    """One line per setting, seed and neuron, with every metric that evaluate wrote."""
    metrics = list(next(iter(next(iter(found.scores.values())).values()))[found.neurons[0]])
    head = [found.dimensions[0], *([found.dimensions[1]] if found.dimensions[1] else []), "seed", "neuron"]
    with io.StringIO(newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*head, *metrics])
        for (a, b), seeds in found.scores.items():
            for seed, volumes in seeds.items():
                for neuron in found.neurons:
                    first = [a, *([b] if found.dimensions[1] else []), seed, neuron]
                    writer.writerow([*first, *(volumes[neuron][m] for m in metrics)])
        return out.getvalue()
