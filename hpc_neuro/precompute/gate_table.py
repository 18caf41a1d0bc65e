"""The gate over the volumes of a store: which ones are judged, the table that people read, and the refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher, load_teacher
from hpc_neuro.precompute.config import GateConfig
from hpc_neuro.precompute.gate import MIN_GAIN, MIN_SHIFT, Figures, Judgment, judge_teacher

HEADER = f"{'teacher':12} {'volume':12} {'':9} {'probe':>7} {'shift':>7} {'position':>9}"
"""Head of the table; `describe_judgment` writes the rows."""

MAX_VOLUMES = 2
"""Volumes that are judged where nobody names any: each takes some seconds of a core, up to half a minute."""

MAX_TRIES = 8
"""Volumes that are opened in search of some that can be judged."""


@dataclass(frozen=True)
class Verdict:
    """A teacher on some volumes of a store."""

    teacher: str
    judgments: tuple[Judgment, ...]
    unjudged: tuple[str, ...] = ()
    """Why volumes could not be judged, in sentences."""

    @property
    def passes(self) -> bool:
        """Whether the teacher passes on every volume that could be judged, and there is one."""
        return bool(self.judgments) and all(judgment.passes for judgment in self.judgments)

    @property
    def fails(self) -> bool:
        """Whether the teacher fails on a volume. A teacher that could not be judged neither passes nor fails."""
        return any(not judgment.passes for judgment in self.judgments)

    def to_json(self) -> dict[str, Any]:
        """Every figure, by volume."""
        return {
            "passes": self.passes,
            "unjudged": list(self.unjudged),
            "volumes": {
                judgment.volume: {
                    "trained": asdict(judgment.teacher),
                    "untrained": asdict(judgment.untrained),
                    "pixels": judgment.pixels,
                    "gain": judgment.gain,
                    "spread": judgment.spread,
                    "gains": list(judgment.gains),
                    "passes": judgment.passes,
                }
                for judgment in self.judgments
            },
        }


def run_gate(cfg: GateConfig, write: Callable[[str], object]) -> Verdict:
    """Judge the teacher that `cfg` names, with a printed table. Raises InputError and ConfigError."""
    store = Store(cfg.store)
    teacher = load_teacher(cfg.teacher)
    name = cfg.teacher.model

    write(HEADER)
    if cfg.volumes:
        return judge_volumes(teacher, name, store, cfg.volumes, cfg.layer, cfg.seed, (cfg.samples, cfg.copies), write)
    return judge_some(teacher, name, store, store.ids, cfg.layer, cfg.seed, (cfg.samples, cfg.copies), write)


def judge_volumes(
    teacher: Teacher,
    name: str,
    store: Store,
    volumes: Sequence[str],
    layer: int,
    seed: int,
    counts: tuple[int, int],
    write: Callable[[str], object],
) -> Verdict:
    """Judge a teacher, `name` to people, on every one of `volumes`, with lines of the table as they are known.

    counts: samples of tiles and untrained copies. InputError for an unknown volume and for one that cannot be judged.
    """
    if unknown := [volume for volume in volumes if volume not in store.ids]:
        raise InputError(f"{store.path} has no volume {', '.join(unknown)}; name some of {', '.join(store.ids)}")

    judgments = []
    for volume in volumes:
        judgments.append(judge_teacher(teacher, store[volume], layer, seed, *counts))
        write("\n".join(describe_judgment(name, judgments[-1])))
    return Verdict(name, tuple(judgments))


def judge_some(
    teacher: Teacher,
    name: str,
    store: Store,
    volumes: Sequence[str],
    layer: int,
    seed: int,
    counts: tuple[int, int],
    write: Callable[[str], object],
) -> Verdict:
    """Judge a teacher on up to MAX_VOLUMES of `volumes` that can be judged, as `judge_volumes` does."""
    judgments: list[Judgment] = []
    unjudged: list[str] = []
    for volume in _list_candidates(volumes):
        try:
            verdict = judge_volumes(teacher, name, store, [volume], layer, seed, counts, write)
        except InputError as error:
            # A volume without traces, or a small one, says nothing about the teacher.
            unjudged.append(str(error).partition(";")[0])
            continue

        judgments += verdict.judgments
        if len(judgments) == MAX_VOLUMES:
            break
    return Verdict(name, tuple(judgments), tuple(unjudged))


def _list_candidates(volumes: Sequence[str]) -> list[str]:
    """The first volume, the last one, and some of those between."""
    return list(dict.fromkeys([*volumes[:1], *volumes[-1:], *volumes[1:MAX_TRIES]]))


def describe_judgment(teacher: str, judgment: Judgment) -> list[str]:
    """The rows of the table: the teacher with its verdict, its untrained copies, the pixels; means over samples."""
    start = f"{teacher:12} {judgment.volume:12}"
    count = f"{len(judgment.teachers)} samples x {len(judgment.copies)} copies"
    gain = f"gain {judgment.gain:+.3f}, spread {judgment.spread:.3f} over {count}"
    return [
        f"{start} {'trained':9} {_format(judgment.teacher)}   {'passes' if judgment.passes else 'fails'}, {gain}",
        f"{start} {'untrained':9} {_format(judgment.untrained)}",
        f"{start} {'pixels':9} {judgment.pixels:7.3f}",
    ]


def _format(figures: Figures) -> str:
    return f"{figures.probe:7.3f} {figures.shift:7.3f} {figures.position:9.3f}"


def explain_failure(verdict: Verdict) -> str:
    """What a failing teacher lacks, for the message of a refusal."""
    faults = [
        f"{judgment.volume}: gain {judgment.gain:+.3f} (least {MIN_GAIN}), shift {judgment.teacher.shift:.2f} "
        f"(least {MIN_SHIFT})"
        for judgment in verdict.judgments
        if not judgment.passes
    ]
    return f"the teacher {verdict.teacher} fails the gate on {'; '.join(faults)}"
