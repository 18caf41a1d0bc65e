"""The gate over the volumes of a store: which ones are judged, the table that people read, and the refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher, load_teacher
from hpc_neuro.precompute.config import COPIES, SAMPLES, GateConfig
from hpc_neuro.precompute.gate import MIN_GAIN, MIN_SHIFT, Figures, Judgment, judge_teacher

HEADER = f"{'teacher':12} {'volume':12} {'':9} {'probe':>7} {'shift':>7} {'position':>9}"
"""Head of the table; `describe_judgment` writes the rows."""

MAX_VOLUMES = 2
"""Volumes that are judged where nobody names any: each takes up to a minute of a core."""

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
                    "untrained": asdict(judgment.control),
                    "pixels": judgment.pixels,
                    "gain": judgment.gain,
                    "error": judgment.gain_error,
                    "gains": list(judgment.gains),
                    "passes": judgment.passes,
                }
                for judgment in self.judgments
            },
        }


@dataclass(frozen=True)
class TeacherGate:
    """A teacher, and how it is judged on volumes of a store."""

    teacher: Teacher
    name: str
    """Its name to people."""
    store: Store
    write: Callable[[str], object]
    """Takes lines of the table as soon as they are known."""
    layer: int = -1
    """The teacher's block; negative ones count from the end."""
    seed: int = 0
    """Of the first sample of tiles and of the first untrained copy."""
    samples: int = SAMPLES
    copies: int = COPIES

    def judge(self, volumes: Sequence[str]) -> Verdict:
        """Judge the teacher on every one of `volumes`.

        InputError for an unknown volume and for one that cannot be judged.
        """
        if unknown := [volume for volume in volumes if volume not in self.store.ids]:
            raise InputError(
                f"{self.store.path} has no volume {', '.join(unknown)}; name some of {', '.join(self.store.ids)}"
            )
        return Verdict(self.name, tuple(self._judge_volume(volume) for volume in volumes))

    def judge_some(self, volumes: Sequence[str]) -> Verdict:
        """Judge the teacher on up to MAX_VOLUMES of `volumes` that can be judged."""
        judgments: list[Judgment] = []
        unjudged: list[str] = []
        for volume in _list_candidates(volumes):
            try:
                judgments.append(self._judge_volume(volume))
            except InputError as error:
                # A volume without traces, or a small one, says nothing about the teacher.
                unjudged.append(str(error).partition(";")[0])

            if len(judgments) == MAX_VOLUMES:
                break
        return Verdict(self.name, tuple(judgments), tuple(unjudged))

    def _judge_volume(self, volume: str) -> Judgment:
        judgment = judge_teacher(self.teacher, self.store[volume], self.layer, self.seed, self.samples, self.copies)
        self.write("\n".join(describe_judgment(self.name, judgment)))
        return judgment


def run_gate(cfg: GateConfig, write: Callable[[str], object]) -> Verdict:
    """Judge the teacher that `cfg` names, with a printed table. Raises InputError and ConfigError."""
    store = Store(cfg.store)
    gate = TeacherGate(
        load_teacher(cfg.teacher), cfg.teacher.model, store, write, cfg.layer, samples=cfg.samples, copies=cfg.copies
    )

    write(HEADER)
    return gate.judge(cfg.volumes) if cfg.volumes else gate.judge_some(store.ids)


def _list_candidates(volumes: Sequence[str]) -> list[str]:
    """The first volume, the last one, and some of those between."""
    return list(dict.fromkeys([*volumes[:1], *volumes[-1:], *volumes[1:MAX_TRIES]]))


def describe_judgment(teacher: str, judgment: Judgment) -> list[str]:
    """The rows of the table: the teacher with its verdict, its untrained copies, the pixels; means over samples."""
    start = f"{teacher:12} {judgment.volume:12}"
    count = f"{len(judgment.teachers)} samples x {len(judgment.copies)} copies"
    gain = f"gain {judgment.gain:+.3f} +- {judgment.gain_error:.3f} over {count}"
    # More samples make the error smaller, and then the verdict is one of the teacher and not of the tiles.
    if judgment.is_close:
        gain += f"; too close to {MIN_GAIN} to be sure, samples={4 * len(judgment.teachers)} says more"
    return [
        f"{start} {'trained':9} {_format(judgment.teacher)}   {'passes' if judgment.passes else 'fails'}, {gain}",
        f"{start} {'untrained':9} {_format(judgment.control)}",
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
