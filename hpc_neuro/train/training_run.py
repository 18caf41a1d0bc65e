"""A training run in progress: what lives from step to step, and how it is logged, validated, saved and exported."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hpc_neuro.core import distributed, files, schema
from hpc_neuro.core.files import format_count
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Batch
from hpc_neuro.data.neurite_width import list_widths
from hpc_neuro.models.student import save_student
from hpc_neuro.train import memory_plan
from hpc_neuro.train.checkpoint import folder, saver
from hpc_neuro.train.checkpoint.folder import BestScore, Marker, TrainingState
from hpc_neuro.train.checkpoint.student_weights import open_weights
from hpc_neuro.train.config import TrainConfig
from hpc_neuro.train.deepspeed import nvme
from hpc_neuro.train.deepspeed.engine import Engine
from hpc_neuro.train.deepspeed.settings import build_deepspeed_settings
from hpc_neuro.train.optim import Ema, group_parameters
from hpc_neuro.train.setup import RunParts
from hpc_neuro.train.step_metrics import DivergedError, Meter
from hpc_neuro.train.tracker import METRICS, MetricsFile, WandbLogger
from hpc_neuro.train.train_module import STUDENT
from hpc_neuro.train.validate import CropValidator, PictureRecorder, ValidationScore, VolumeValidator

log = logging.getLogger(__name__)

_ALARM_SHARE = 0.3
"""Share of the steps after which a model that predicts next to no foreground raises an alarm."""


class TrainingRun:
    """Engine, running average, progress and logs of a run. Resumes from the newest checkpoint of its folder."""

    def __init__(self, cfg: TrainConfig, parts: RunParts) -> None:
        self.cfg = cfg
        self.parts = parts
        self.is_main = distributed.is_main()
        self.checkpoints = cfg.out / "checkpoints"

        # A checkpoint that cannot be used is refused before anything is built.
        newest = folder.find_newest(self.checkpoints)
        state = None if newest is None else self._read_state(newest)

        self.engine = _build_engine(cfg, parts)
        self.device = self.engine.device
        self.student: Any = self.engine.module.student
        self.ema = _build_ema(cfg, self.engine)

        self.step = 0
        self.best = BestScore()
        # The latest validation of crops, and the steps after which crops and volumes were last validated.
        self.score: ValidationScore | None = None
        self.scored_step = self.volumes_scored_step = -1

        # A resumed run reports the time of all its starts.
        self._earlier_seconds, self._begin = 0.0, time.monotonic()
        if newest is not None and state is not None:
            self._resume(newest, state)

        # The clock of the checkpoints starts here, as what was read needs no saving.
        self.saved_time = time.monotonic()
        self.saver = saver.Saver(self.checkpoints, cfg.checkpoint)
        self.validator = CropValidator(parts.store, parts.boxes)

        self.meter = Meter(self.device)
        self._tokens, self._operations = memory_plan.count_operations(cfg.student, cfg.crop.size)
        self._peak = memory_plan.peak_flops(self.device)
        if self._peak is None:
            log.info("train: model FLOPs utilization is not logged: the peak of this device is not known")

        self.metrics = MetricsFile(cfg.out / METRICS)

        # A kill may leave parts of checkpoints. One rank removes them, since all share the folder.
        if self.is_main:
            files.remove_parts(self.checkpoints)
            self._resume_metrics(is_resumed=newest is not None)
        # One rank logs for all.
        tracker = cfg.tracker if self.is_main else dataclasses.replace(cfg.tracker, wandb="disabled")
        self.wandb = WandbLogger(tracker, cfg.out, schema.to_plain(cfg), parts.inputs)

    # --- Resuming ---

    def _read_state(self, checkpoint: Path) -> TrainingState:
        """What is no tensor of a checkpoint. Raises InputError where the run cannot go on from it."""
        self._require_intact(checkpoint)
        state = folder.read_training_state(checkpoint)
        if state.step > self.cfg.optim.steps:
            raise InputError(
                f"{checkpoint} is beyond optim.steps={self.cfg.optim.steps}, and a run cannot be made shorter; give at "
                f"least optim.steps={state.step}, or another `out`"
            )
        return state

    def _resume(self, checkpoint: Path, state: TrainingState) -> None:
        saver.restore_snapshot(checkpoint, self.engine.state, state.engine, self._averages())

        self.step = state.step
        self._earlier_seconds = state.seconds
        self.best = state.best
        self.score = state.score
        self.scored_step, self.volumes_scored_step = state.scored, state.volumes_scored

        changes = self._describe_changes(folder.read_marker(checkpoint))
        log.info("train: resumed after step %d of %s%s", self.step, checkpoint, changes)

    def _require_intact(self, checkpoint: Path) -> None:
        """Raise InputError on all ranks when one finds a damaged file; each reads a share of the checkpoint."""
        damaged = folder.list_damaged(checkpoint, distributed.rank(), distributed.world_size())
        if distributed.any_rank(bool(damaged))[0]:
            raise InputError(folder.describe_damage(checkpoint, damaged[0] if damaged else "a file of another rank"))

    def _describe_changes(self, marker: Marker) -> str:
        """How the work is spread now, where the checkpoint was saved by a run spread otherwise."""
        ranks, stage = distributed.world_size(), self.cfg.engine.stage
        before = (format_count(marker.world_size, "rank"), f"ZeRO stage {marker.stage}", marker.dtype)
        now = (format_count(ranks, "rank"), f"ZeRO stage {stage}", str(self.parts.workload.dtype))
        changes = [f"{old} -> {new}" for old, new in zip(before, now, strict=True) if old != new]
        return f" ({', '.join(changes)})" if changes else ""

    def _resume_metrics(self, is_resumed: bool) -> None:
        """Drop the rows that will be written again, among them validations of this step that a stop left undone."""
        again = set()
        if self.scored_step != self.step:
            again.add("val")
        if self.volumes_scored_step != self.step:
            again.add("volumes")
        self.metrics.resume(self.step if is_resumed else -1, again)

    # --- Logging ---

    def log_steps(self) -> None:
        """Write the rows since the last call, and a line. Raises DivergedError before anything bad is saved."""
        steps_left = self.cfg.optim.steps - self.step

        # In fp16 a step whose gradient overflows is skipped, so that is no failure.
        check_norm = self.parts.workload.dtype != torch.float16
        try:
            rows = self.meter.collect_rows(self.cfg.optim.batch, steps_left, check_norm)
        except DivergedError:
            # Raised on all ranks: a checkpoint of an earlier step is completed by all of them.
            self.saver.complete()
            raise
        if not rows:
            return

        last = rows[-1]
        last["tokens_per_s"] = last["crops_per_s"] * self._tokens
        # Utilization: operations of the student, without recomputation and distiller, relative to those of the GPU.
        if self._peak is not None:
            last["mfu"] = last["crops_per_s"] / distributed.world_size() * self._operations / self._peak

        self._write_rows(rows)
        log.info("train: %s", format_progress(last, self.cfg.optim.steps))

    def _write_rows(self, rows: list[dict[str, Any]]) -> None:
        if self.is_main:
            self.metrics.write(rows)
            self.wandb.write(rows)

    # --- Validation ---

    def validate_if_due(self) -> None:
        """Do the validations that are due at this step and not done: a stop leaves them to the next start."""
        cfg, step = self.cfg, self.step
        is_due = step % cfg.validate.every == 0 or step == cfg.optim.steps
        if is_due and self.scored_step != step:
            self.validate_crops()
        if cfg.validate.volumes and folder.is_milestone(step, cfg.checkpoint) and self.volumes_scored_step != step:
            self.validate_volumes()

    def validate_crops(self) -> None:
        """Score the averaged weights on the fixed crops; export them when they are the best so far."""
        self.engine.module.eval()

        # The average is what is exported, so it is what is validated.
        recorder = PictureRecorder(self.wandb.pictures)
        with self._use_average():
            score = self.validator(recorder.wrap(self._predict), self.device)

        # On volumes that it was trained on, a student is best at a threshold that is too low for others.
        if self.parts.validates_on == "train":
            score = score.keep_half()
        self.wandb.show(self.step, recorder.pictures)

        self.score, self.scored_step = score, self.step
        if self.is_main:
            folder.note_score(self.checkpoints, self.step, self._metric_of(score))

        row = {"step": self.step, "kind": "val", **asdict(score), "split": self.parts.validates_on}
        self._write_rows([row | {"collapsed": score.is_collapsed}])
        log.info(
            "train: step %d: validation Dice %.4f (%.4f at threshold %.3f), precision %.3f, recall %.3f",
            *(self.step, score.dice, score.dice_best, score.threshold, score.precision, score.recall),
        )

        # A model that predicts nothing is normal early in a run.
        if self.is_main and score.is_collapsed and self.step > _ALARM_SHARE * self.cfg.optim.steps:
            log.warning(
                "train: ALARM at step %d: next to no foreground is predicted (%.2g of the true amount); "
                "lower optim.lr or raise the weight of Dice",
                *(self.step, score.foreground),
            )

        if self.step > 0 and self._metric_of(score) > self.best.score and self._export("best", score):
            self.best = BestScore(self._metric_of(score), self.step)

    def validate_volumes(self) -> None:
        """Score the averaged weights on each whole volume of `val`, at a milestone."""
        ids = self.parts.store.split("val")
        if not ids:
            return

        self.engine.module.eval()
        begin = time.monotonic()

        validator = VolumeValidator(self.parts.store, ids, self.cfg.crop.size)
        with self._use_average():
            mean, by_volume = validator(self._predict, self.device)
        self.volumes_scored_step, seconds = self.step, time.monotonic() - begin

        row = {"step": self.step, "kind": "volumes", **asdict(mean), "volumes": len(ids), "seconds": seconds}
        self._write_rows([row | {"by_volume": {id_: asdict(score) for id_, score in by_volume.items()}}])
        log.info(
            "train: step %d: %s in %.0f s: mean Dice %.4f (%.4f at threshold %.3f); %s",
            *(self.step, format_count(len(ids), "whole volume"), seconds),
            *(mean.dice, mean.dice_best, mean.threshold),
            ", ".join(f"{id_} {score.dice:.4f}" for id_, score in by_volume.items()),
        )

    def _use_average(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.swap_in()

    def _predict(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self.student.forward(batch.image).logits
        return logits

    def _metric_of(self, score: ValidationScore) -> float:
        return float(getattr(score, self.cfg.checkpoint.metric))

    # --- Saving ---

    def save(self, wait: bool) -> None:
        """Begin a checkpoint of this step, on all ranks; with `wait` return once it is complete."""
        is_scored = self.score is not None and self.scored_step == self.step
        marker = Marker(
            step=self.step,
            world_size=distributed.world_size(),
            stage=self.cfg.engine.stage,
            dtype=str(self.parts.workload.dtype),
            score=self._metric_of(self.score) if self.score is not None and is_scored else None,
        )

        # Training changes the weights while a thread writes, so the thread gets a copy.
        wait = wait or not self.cfg.checkpoint.background
        snapshot = saver.take_snapshot(self.engine.state, self._averages(), copy=not wait)

        # The state is taken now: it changes with the next step.
        state = asdict(self._training_state(snapshot.engine))

        def write(part: Path) -> None:
            snapshot.write(part)
            if self.is_main:
                files.write_json(part / folder.TRAINING, state)

        self.saver.begin(marker, write)
        if wait:
            self.saver.complete()
        self.saved_time = time.monotonic()

    def _training_state(self, engine: folder.OptimizerState) -> TrainingState:
        return TrainingState(
            step=self.step,
            seconds=self._total_seconds(),
            best=self.best,
            score=self.score,
            scored=self.scored_step,
            volumes_scored=self.volumes_scored_step,
            student=schema.to_plain(self.cfg.student),
            window=self.cfg.crop.size,
            contrast=self.parts.contrast,
            voxel_sizes=self.parts.voxel_sizes,
            neurite_widths=self.parts.neurite_widths,
            mirrored=self._has_mirrored_crops(),
            shapes=self.engine.shapes,
            engine=engine,
        )

    def _averages(self) -> dict[int, torch.Tensor] | None:
        return None if self.ema is None else self.ema.average

    def _total_seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._begin

    def _has_mirrored_crops(self) -> bool:
        return self.parts.crops.sampler.has_mirrored_crops(self.cfg.augment.flip)

    def _export(self, name: str, score: ValidationScore) -> bool:
        """Write OUT/weights/`name` in float32; all ranks call this. Returns False, after a warning, on failure."""
        # The master weights are gathered by all ranks together, though only one of them writes.
        weights = self.engine.gather_weights(STUDENT, self._averages())
        extra = {
            "window": list(self.cfg.crop.size),
            "contrast": self.parts.contrast,
            "voxel_sizes": [list(size) for size in self.parts.voxel_sizes],
            "neurite_widths": list_widths(self.parts.neurite_widths),
            "mirrored": self._has_mirrored_crops(),
            "threshold": score.threshold,
            "step": self.step,
            "val_dice": score.dice_best,
        }

        # A full disk must not end the training: a later export may succeed. All ranks have to agree on the result.
        has_failed = False
        if self.is_main:
            try:
                save_student(self.cfg.out / "weights" / name, self.cfg.student, weights, extra)
            except (OSError, SafetensorError) as error:
                has_failed = True
                log.warning(
                    "train: weights/%s of step %d could not be written (%s); training goes on", name, self.step, error
                )
        return not distributed.any_rank(has_failed)[0]

    # --- The end ---

    def finish(self, damaged: Sequence[str] = ()) -> dict[str, Any]:
        """Export the last weights. Returns the summary of the run.

        damaged: files below `out` that an earlier start had written and that are not as they were written.
        """
        if self.score is None or self.scored_step != self.step:
            self.validate_crops()

        # Without exported weights the run is not done, and the same command tries again.
        if self.score is None or not self._export("last", self.score):
            raise InputError(
                f"the trained weights could not be written to {self.cfg.out / 'weights'}; "
                "make room, then give the same command again"
            )
        # No validation of a later step than 0 could be exported as the best.
        if self.best.step < 0 and self._export("best", self.score):
            self.best = BestScore(self._metric_of(self.score), self.step)

        best = self.cfg.out / "weights" / "best"
        is_damaged = any(name.startswith("weights/best/") for name in damaged)
        if distributed.any_rank(is_damaged or not (best / "model.safetensors").is_file())[0]:
            self._restore_best(best)

        seconds = self._total_seconds()
        metric = self.cfg.checkpoint.metric.removesuffix("_best")
        log.info(
            "train: %d steps in %.1f min; wrote %s, best (step %d, validation %s %.4f) and last, for infer model=%s",
            *(self.step, seconds / 60, self.cfg.out / "weights", self.best.step),
            *(metric, self.best.score, self.cfg.out),
        )
        return {
            "steps": self.step,
            f"best_val_{metric}": self.best.score,
            "best_step": self.best.step,
            "last_val_dice": self.score.dice_best,
            "validated_on": self.parts.validates_on,
            "seconds": round(seconds, 1),
            "crops_per_s": round(self.step * self.cfg.optim.batch / seconds, 3),
        }

    def _restore_best(self, best: Path) -> None:
        """Write OUT/weights/best again, from the checkpoint of its step. Raises InputError when that is gone."""
        if self.score is not None and self.best.step == self.step and self._export("best", self.score):
            return

        checkpoint = folder.path_of_step(self.checkpoints, self.best.step)
        weights = open_weights(checkpoint) if (checkpoint / folder.MARKER).exists() else None
        if weights is None or not weights.is_scored:
            raise InputError(
                f"{best} is missing or damaged, and the checkpoint of its step, {self.best.step}, is gone; copy it "
                "from a backup, or train again in another `out`"
            )
        if self.is_main:
            tensors = dict(zip(weights.shapes, weights.stream(), strict=True))
            save_student(best, self.cfg.student, tensors, weights.make_extra())
        log.warning("train: %s was written again from %s", best, checkpoint)
        distributed.barrier()

    def close(self) -> None:
        """Release saver, logger and engine."""
        self.saver.close()
        self.wandb.close()
        self.engine.close()


def _build_engine(cfg: TrainConfig, parts: RunParts) -> Engine:
    """The engine with the module at its start; writes OUT/deepspeed.json."""
    workload = parts.workload

    # DeepSpeed removes what it finds in its folder, so each run has its own.
    nvme_folder = None if cfg.engine.nvme is None else nvme.folder_of_run(cfg.engine.nvme, cfg.out)
    sizes = [p.numel() for p in parts.blank.parameters() if p.requires_grad]
    settings = build_deepspeed_settings(
        dataclasses.replace(cfg.engine, nvme=nvme_folder),
        cfg.optim,
        workload.dtype,
        workload.micro,
        workload.passes,
        sizes,
    )
    if distributed.is_main():
        files.write_json(cfg.out / "deepspeed.json", settings)

    groups = group_parameters(parts.blank.named_parameters(), cfg.optim.weight_decay, parts.lr_scales)
    engine = Engine(parts.make, parts.values, groups, settings, workload.dtype)
    # Releases the teacher's memory.
    parts.values.clear()
    return engine


def _build_ema(cfg: TrainConfig, engine: Engine) -> Ema | None:
    """The running average of the student's weights; the distiller's are dropped in the end."""
    if cfg.ema.window == 0:
        return None

    weights = {index: shard.weight for index, shard in enumerate(engine.state.shards) if shard.name.startswith(STUDENT)}
    return Ema(weights, engine.state.refresh_parameters)


def format_progress(row: dict[str, Any], steps: int) -> str:
    """The console line of a row."""
    own_place = {"step", "kind", "lr", "loss", "grad_norm", "crops_per_s", "tokens_per_s", "mfu", "data_wait_share"}
    own_place |= {"memory_bytes", "memory_bytes_by_rank", "eta_s"}

    # A term that no sample of the step had is nan and not worth a place.
    terms = ", ".join(f"{key} {v:.3f}" for key, v in row.items() if key not in own_place and math.isfinite(v))
    utilization = f", {row['mfu']:.1%} of the GPU's peak" if "mfu" in row else ""
    columns = [
        f"step {row['step']}/{steps}",
        f"loss {row['loss']:.4f} ({terms})",
        f"lr {row['lr']:.2e}",
        f"gradient {row['grad_norm']:.2f}",
        f"{row['crops_per_s']:.2f} crops/s ({row['tokens_per_s']:.0f} tokens/s{utilization})",
        f"data wait {row['data_wait_share']:.0%}",
        files.format_bytes(row["memory_bytes"]),
        f"{row['eta_s'] / 60:.1f} min left",
    ]
    return "  ".join(columns)
