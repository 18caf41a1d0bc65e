"""A training run in progress: what lives from step to step, and how it is said, scored, saved and exported."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hpc_neuro.core import distributed, files, schema
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Batch
from hpc_neuro.models.student import save_student
from hpc_neuro.train import memory_plan
from hpc_neuro.train.checkpoint import saver
from hpc_neuro.train.config import TrainConfig
from hpc_neuro.train.deepspeed import nvme
from hpc_neuro.train.deepspeed.engine import Engine
from hpc_neuro.train.deepspeed.settings import build_deepspeed_settings
from hpc_neuro.train.ema import Ema
from hpc_neuro.train.optim import group_parameters
from hpc_neuro.train.setup import Parts
from hpc_neuro.train.step_metrics import Diverged, Meter
from hpc_neuro.train.tracker import METRICS, MetricsFile, WandbLogger
from hpc_neuro.train.validate import Score, Validator, Volumes
from hpc_neuro.train.validation_pictures import Shown

log = logging.getLogger(__name__)
_STUDENT = "student."  # what the names of the student's parameters begin with in TrainModule

_ALARM_SHARE = 0.3
"""Share of the steps after which a model that predicts next to no foreground raises an alarm."""


class Training:
    """The engine, the average, what was said and what was best."""

    def __init__(self, cfg: TrainConfig, parts: Parts) -> None:
        self.cfg, self.parts, self.main = cfg, parts, distributed.is_main()
        sizes = [p.numel() for p in parts.blank.parameters() if p.requires_grad]
        own = None if cfg.engine.nvme is None else nvme.folder(cfg.engine.nvme, cfg.out)
        spread = dataclasses.replace(cfg.engine, nvme=own)
        settings = build_deepspeed_settings(spread, cfg.optim, parts.dtype, parts.micro, parts.passes, sizes)
        if self.main:
            files.write_json(cfg.out / "deepspeed.json", settings)
        wanted = group_parameters(parts.blank.named_parameters(), cfg.optim, parts.depth, parts.transferred)
        self.engine = Engine(parts.make, parts.values, wanted, settings, parts.dtype)
        parts.values.clear()  # the teacher's memory
        self.device = self.engine.device
        self.student: Any = self.engine.module.student
        shards = self.engine.shards
        averaged = {i: s.weight for i, s in enumerate(shards.items) if s.name.startswith(_STUDENT)}
        self.ema = Ema(averaged, shards.refresh) if cfg.ema.window > 0 else None
        self._tokens, self._operations = memory_plan.count_operations(cfg.student, cfg.crop.size)  # per crop
        self._peak = memory_plan.peak_flops(self.device)
        if self._peak is None:
            log.info("train: model FLOPs utilisation is not logged: the peak of this device is not known")
        self.step, self.seconds, self.begun = 0, 0.0, time.monotonic()
        self.best: dict[str, Any] = {"score": -1.0, "step": -1}
        self.score: Score | None = None  # of the latest validation,
        self.scored = self.volumes_scored = -1  # after these steps
        held = saver.find_newest(cfg.out / "checkpoints")
        if held is not None:
            self._resume(held)
        self.saved = time.monotonic()
        self.saver = saver.Saver(cfg.out / "checkpoints", cfg.checkpoint)
        self.validator = Validator(parts.store, parts.boxes)
        self.meter = Meter(self.device)
        self.metrics = MetricsFile(cfg.out / METRICS)
        if self.main:
            files.remove_parts(cfg.out / "checkpoints")
            done = {"val": self.scored == self.step, "volumes": self.volumes_scored == self.step}
            self.metrics.resume(
                self.step if held is not None else -1, {kind for kind, is_done in done.items() if not is_done}
            )
        off = dataclasses.replace(cfg.tracker, wandb="disabled")
        self.wandb = WandbLogger(cfg.tracker if self.main else off, cfg.out, schema.to_plain(cfg), parts.inputs)

    def flush(self) -> None:
        """Write the rows since the last time, and say a line. Raises Diverged before anything bad is saved."""
        left = self.cfg.optim.steps - self.step
        try:
            rows = self.meter.rows(self.cfg.optim.batch, left, check_norm=self.parts.dtype != torch.float16)
        except Diverged:  # on all ranks
            self.saver.complete()
            raise
        if rows:
            # utilisation: what the student must compute, without recomputation and distiller, of what the GPU could
            rate = rows[-1]["crops_per_s"] / distributed.world_size()
            rows[-1]["tokens_per_s"] = rows[-1]["crops_per_s"] * self._tokens
            if self._peak is not None:
                rows[-1]["mfu"] = rate * self._operations / self._peak
        self._write(rows)
        if rows:
            log.info("train: %s", said(rows[-1], self.cfg.optim.steps))

    def score_due(self) -> None:
        """Do the validations that this step asks for and that are not done: a stop leaves them to the next start."""
        cfg, step = self.cfg, self.step
        if self.scored != step and (step % cfg.validate.every == 0 or step == cfg.optim.steps):
            self.validate()
        if cfg.validate.volumes and self.volumes_scored != step and saver.is_milestone(step, cfg.checkpoint):
            self.validate_volumes()

    def validate(self) -> None:
        """Score the averaged weights on the fixed crops; export them when they are the best so far."""
        self.engine.module.eval()
        shown = Shown(self.wandb.pictures)
        predict = shown.watching(self._predict)
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            score = self.score = self.validator(predict, self.device)
        self.wandb.show(self.step, shown.pictures)
        self.scored = self.step
        if self.main:
            saver.note_score(self.cfg.out / "checkpoints", self.step, self._value(score))
        row = {"step": self.step, "kind": "val", **asdict(score), "split": self.parts.validates_on}
        self._write([row | {"collapsed": score.collapsed}])
        log.info(
            "train: step %d: validation Dice %.4f (%.4f at threshold %.3f), precision %.3f, recall %.3f",
            *(self.step, score.dice, score.dice_best, score.threshold, score.precision, score.recall),
        )
        if self.main and score.collapsed and self.step > _ALARM_SHARE * self.cfg.optim.steps:
            log.warning(
                "train: ALARM at step %d: next to no foreground is predicted (%.2g of the true amount); "
                "lower optim.lr or raise the weight of Dice",
                *(self.step, score.foreground),
            )
        if self.step > 0 and self._value(score) > self.best["score"] and self._export("best", score):
            self.best = {"score": self._value(score), "step": self.step}

    def validate_volumes(self) -> None:
        """Score the averaged weights on each whole volume of `val`, at a milestone."""
        ids = self.parts.store.split("val")
        if not ids:
            return
        self.engine.module.eval()
        begun = time.monotonic()
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            mean, own = Volumes(self.parts.store, ids, self.cfg.crop.size)(self._predict, self.device)
        self.volumes_scored, seconds = self.step, time.monotonic() - begun
        row = {"step": self.step, "kind": "volumes", **asdict(mean), "volumes": len(ids), "seconds": seconds}
        self._write([row | {"by_volume": {volume: asdict(score) for volume, score in own.items()}}])
        log.info(
            "train: step %d: %d whole volume(s) in %.0f s: mean Dice %.4f (%.4f at threshold %.3f); %s",
            *(self.step, len(ids), seconds, mean.dice, mean.dice_best, mean.threshold),
            ", ".join(f"{volume} {score.dice:.4f}" for volume, score in own.items()),
        )

    def save(self, wait: bool) -> None:
        """Begin a checkpoint of this step, on all ranks; wait: until it is there."""
        marker = saver.Marker(
            step=self.step,
            world_size=distributed.world_size(),
            stage=self.cfg.engine.stage,
            dtype=str(self.parts.dtype),
            score=self._value(self.score) if self.score is not None and self.scored == self.step else None,
        )
        state = {
            "step": self.step,
            "seconds": self.seconds + time.monotonic() - self.begun,
            "best": self.best,
            "score": None if self.score is None else asdict(self.score),
            "scored": self.scored,
            "volumes_scored": self.volumes_scored,
            # for tools/export_weights.py, which needs nothing but the folder of a checkpoint
            "student": schema.to_plain(self.cfg.student),
            "window": list(self.cfg.crop.size),
            "mirrored": self.parts.crops.sampler.has_mirrored_crops(self.cfg.augment.flip),
            "shapes": self.engine.shapes,
        }

        wait = wait or not self.cfg.checkpoint.background
        write_tensors, held = self.engine.saving(self._averages(), copied=not wait)

        def write(part: Path) -> None:
            write_tensors(part)
            if self.main:
                files.write_json(part / saver.TRAINING, {**state, "engine": held})

        self.saver.begin(marker, write)
        if wait:
            self.saver.complete()
        self.saved = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Export the last weights; what the run came to."""
        if self.score is None or self.scored != self.step:
            self.validate()
        if self.score is None or not self._export("last", self.score):
            raise InputError(
                f"the trained weights could not be written to {self.cfg.out / 'weights'}; "
                "make room, then give the same command again"
            )
        if self.best["step"] < 0 and self._export("best", self.score):
            self.best = {"score": self._value(self.score), "step": self.step}
        seconds = self.seconds + time.monotonic() - self.begun
        log.info(
            "train: %d steps in %.1f min; wrote %s, best (step %d, validation %s %.4f) and last, for infer model=%s",
            *(self.step, seconds / 60, self.cfg.out / "weights", self.best["step"]),
            *(self.cfg.checkpoint.metric.removesuffix("_best"), self.best["score"], self.cfg.out),
        )
        return {
            "steps": self.step,
            f"best_val_{self.cfg.checkpoint.metric.removesuffix('_best')}": self.best["score"],
            "best_step": self.best["step"],
            "last_val_dice": self.score.dice_best,
            "validated_on": self.parts.validates_on,
            "seconds": round(seconds, 1),
            "crops_per_s": round(self.step * self.cfg.optim.batch / seconds, 3),
        }

    def close(self) -> None:
        """Let go of the tracker and the engine."""
        self.saver.close()
        self.wandb.close()
        self.engine.close()

    def _resume(self, held: Path) -> None:
        state = files.read_json(held / saver.TRAINING, f"remove {held}; the one before it is then taken")
        if state["step"] > self.cfg.optim.steps:
            raise InputError(
                f"{held} is beyond optim.steps={self.cfg.optim.steps}, and a run cannot be made shorter; give at least "
                f"optim.steps={state['step']}, or another `out`"
            )
        self.engine.load(held, state["engine"], self._averages())
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.score, self.scored = None if state["score"] is None else Score(**state["score"]), state["scored"]
        self.volumes_scored = state["volumes_scored"]
        log.info("train: going on after step %d of %s%s", self.step, held, self._layout(saver.read_marker(held)))

    def _layout(self, then: saver.Marker) -> str:
        """How the work is spread now, where the checkpoint was saved by a run spread otherwise."""
        before = (f"{then.world_size} rank(s)", f"ZeRO stage {then.stage}", then.dtype)
        now = (f"{distributed.world_size()} rank(s)", f"ZeRO stage {self.cfg.engine.stage}", str(self.parts.dtype))
        other = [f"{a} -> {b}" for a, b in zip(before, now, strict=True) if a != b]
        return f" ({', '.join(other)})" if other else ""

    def _averages(self) -> dict[str, dict[int, torch.Tensor]]:
        return {} if self.ema is None else {"average": self.ema.average}

    def _predict(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self.student.forward(batch.image).logits
        return logits

    def _value(self, score: Score) -> float:
        return float(getattr(score, self.cfg.checkpoint.metric))

    def _export(self, name: str, score: Score) -> bool:
        """Write OUT/weights/`name` in plain float32; all ranks call this. False, and said, where it cannot be."""
        state = self.engine.whole(_STUDENT, None if self.ema is None else self.ema.average)
        extra = {
            "window": list(self.cfg.crop.size),
            "mirrored": self.parts.crops.sampler.has_mirrored_crops(self.cfg.augment.flip),
            "threshold": score.threshold,
            "step": self.step,
            "val_dice": score.dice_best,
        }
        failed = False
        if self.main:
            try:
                save_student(self.cfg.out / "weights" / name, self.cfg.student, state, extra)
            except (OSError, SafetensorError) as error:
                failed = True
                log.warning(
                    "train: weights/%s of step %d could not be written (%s); training goes on", name, self.step, error
                )
        return distributed.reduce_scalar(float(failed), "max", torch.device("cpu")) == 0

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self.main:
            self.metrics.write(rows)
            self.wandb.write(rows)


def said(row: dict[str, Any], steps: int) -> str:
    """The console line of a row."""
    fixed = {"step", "kind", "lr", "loss", "grad_norm", "crops_per_s", "tokens_per_s", "mfu", "data_wait_share"}
    fixed |= {"memory_bytes", "memory_bytes_by_rank", "eta_s"}
    terms = ", ".join(f"{k} {v:.3f}" for k, v in row.items() if k not in fixed and math.isfinite(v))
    used = f", {row['mfu']:.1%} of the GPU's peak" if "mfu" in row else ""
    parts = [
        f"step {row['step']}/{steps}",
        f"loss {row['loss']:.4f} ({terms})",
        f"lr {row['lr']:.2e}",
        f"gradient {row['grad_norm']:.2f}",
        f"{row['crops_per_s']:.2f} crops/s ({row['tokens_per_s']:.0f} tokens/s{used})",
        f"data wait {row['data_wait_share']:.0%}",
        files.format_bytes(row["memory_bytes"]),
        f"{row['eta_s'] / 60:.1f} min left",
    ]
    return "  ".join(parts)
