"""The verb `train` and its loop, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hpc_neuro.core import distributed, run_folder
from hpc_neuro.core.constants import EXIT_DONE, EXIT_STOPPED
from hpc_neuro.core.liveness import TorchRankWatch
from hpc_neuro.core.stop_signals import StopSignals
from hpc_neuro.core.types import StudentOutput
from hpc_neuro.data.augment import augment
from hpc_neuro.data.feature_cache import record_use
from hpc_neuro.losses import sum_losses
from hpc_neuro.train.batches import DevicePrefetcher, read_batches, share_step
from hpc_neuro.train.checkpoint.folder import is_milestone
from hpc_neuro.train.config import TrainConfig
from hpc_neuro.train.deepspeed.engine import join_group
from hpc_neuro.train.optim import decay_at, lr_at
from hpc_neuro.train.profiler import StepProfiler
from hpc_neuro.train.setup import build_parts, describe_memory, describe_run
from hpc_neuro.train.training_run import TrainingRun

log = logging.getLogger(__name__)

_MAY_CHANGE = (
    *("optim.steps", "store", "cache", "workers", "tracker", "plan"),
    *(f"checkpoint.{key}" for key in ("every", "minutes", "keep", "milestone", "margin", "background", "walltime")),
    # How the work is spread does not decide the result.
    "engine",
)
"""Keys that may differ when a run is resumed."""
_AGREEMENT_SECONDS = 1.0
"""[s] About how often ranks agree whether to stop, and whether a checkpoint is due by the clock."""


def forecast(cfg: TrainConfig) -> list[str]:
    """Check everything that the run needs and describe what it will do, in lines. Writes nothing."""
    ranks = cfg.plan.ranks or distributed.world_size()
    parts = build_parts(cfg, cfg.plan.ranks)
    return [*describe_run(cfg, parts, ranks), *describe_memory(cfg, parts, ranks)]


def run(cfg: TrainConfig) -> int:
    """Train, or resume training. EXIT_STOPPED: a signal or the clock stopped it, saved; the same command resumes it.

    When a rank is lost the others name it and raise SystemExit(1); the last checkpoint is kept.
    """
    with StopSignals(cfg.checkpoint.margin, cfg.checkpoint.walltime) as stop_signals:
        # Everything is checked before anything is written.
        parts = build_parts(cfg)
        forecast_lines = list(describe_run(cfg, parts, distributed.world_size()))

        with run_folder.start("train", cfg, cfg.out, parts.inputs, may_change=_MAY_CHANGE) as record:
            if record.complete:
                return EXIT_DONE

            for line in forecast_lines:
                log.info("train: %s", line)
            if parts.crops.cache is not None and distributed.is_main():
                record_use(parts.crops.cache.path, cfg.out)

            join_group(cfg.engine)
            with (
                TorchRankWatch(cfg.engine.silence) as watch,
                _explain_lost_rank(watch),
                contextlib.closing(TrainingRun(cfg, parts)) as training,
            ):
                if train(training, stop_signals, watch):
                    reason = stop_signals.reason or "another rank"
                    log.warning(
                        "train: stopped by %s after step %d; the same command resumes it", reason, training.step
                    )
                    record.record["exit"] = EXIT_STOPPED
                    return EXIT_STOPPED
                record.finish(training.finish(record.damaged), outputs=sorted((cfg.out / "weights").glob("*/*.*")))
    return EXIT_DONE


@contextlib.contextmanager
def _explain_lost_rank(watch: TorchRankWatch) -> Iterator[None]:
    """Turn a collective that broke because a rank is gone into a sentence that names the rank, and exit code 1."""
    try:
        yield
    except RuntimeError as error:
        lost = watch.explain(error)

        # Other errors have nothing to do with a lost rank, and keep their traceback.
        if not lost:
            raise
        log.error("train: %s; the others stop. The same command resumes from the last checkpoint", lost)
        raise SystemExit(1) from error


def train(run: TrainingRun, stop_signals: StopSignals, watch: TorchRankWatch) -> bool:
    """Do all steps that are left. Returns True when stopped before the last one, with everything saved."""
    cfg, last_step = run.cfg, run.cfg.optim.steps
    checkpoint = cfg.checkpoint

    # A signal may have come while everything was built; what is saved already need not be saved again.
    if distributed.any_rank(stop_signals.is_requested)[0]:
        return run.step < last_step

    batches = read_batches(cfg, run.parts.crops, run.parts.workload.micro, run.step, run.device)
    profiler = StepProfiler(cfg.tracker.profile, cfg.out / "profile", run.device)
    with contextlib.closing(batches), contextlib.closing(profiler):
        prefetcher = DevicePrefetcher(batches, run.device)

        # Validate the start of the run, or what the last stop left undone.
        with run.meter.pause():
            watch.activity = f"the validation of step {run.step}"
            run.validate_if_due()

        agreement = distributed.PacedAgreement(_AGREEMENT_SECONDS)
        while run.step < last_step:
            watch.activity = f"step {run.step + 1}"
            profiler.begin_step(run.step + 1)
            train_step(run, prefetcher)
            profiler.end_step(run.step)
            is_last = run.step == last_step

            # Signals and clocks differ between ranks, so all ranks agree on them, about once per second.
            minutes_since_save = (time.monotonic() - run.saved_time) / 60
            is_overdue = 0 < checkpoint.minutes < minutes_since_save
            answers = agreement.agree(run.step, stop_signals.is_requested, is_overdue, not run.saver.is_idle)
            # Where they did not ask one another, nothing is done that all must do.
            stop, is_overdue, is_writing = answers or (False, False, True)

            # Log before saving: this raises when the loss is not finite, and such weights must not be saved.
            is_due = checkpoint.every > 0 and run.step % checkpoint.every == 0
            save = is_overdue or stop or is_last or is_due or is_milestone(run.step, checkpoint)
            if save or run.step % cfg.tracker.every == 0:
                run.log_steps()

            with run.meter.pause():
                # A stop leaves validation to the next start: there may be little time.
                if is_last or not stop:
                    watch.activity = f"the validation of step {run.step}"
                    run.validate_if_due()

                if save:
                    watch.activity = f"the checkpoint of step {run.step}"
                    run.save(wait=stop or is_last)
                elif not is_writing:
                    # Move a checkpoint that was written in the background to its place.
                    run.saver.complete()

            if stop and not is_last:
                return True
    return False


def train_step(run: TrainingRun, prefetcher: DevicePrefetcher) -> None:
    """One optimizer step of all ranks."""
    cfg, engine, workload = run.cfg, run.engine, run.parts.workload

    lr = cfg.optim.lr * lr_at(run.step, cfg.optim)
    engine.set_lr(lr)
    engine.module.train()
    run.meter.new_step()
    norm: Tensor | float = math.nan

    for first, stop in share_step(cfg.optim.batch, workload.micro):
        with run.meter.measure_wait():
            batch = prefetcher.take()
        batch = augment(batch, cfg.augment, cfg.seed)

        # Drop path draws from torch's own generator: seeded by the content of the pass, not by rank and time.
        torch.manual_seed(_seed_of_pass(cfg.seed, run.step, first))
        logits, distillation, distill_terms = engine(dict(vars(batch)))
        loss, terms = sum_losses(cfg.losses, StudentOutput(logits, {}), batch)

        # The distillation loss is a mean over the distilled samples of a pass. Weighted so, the step's is one over all
        # its distilled samples, however ranks and passes share them.
        distilled = int(batch.distilled.sum())
        if distillation is not None:
            loss = loss + distillation * (distilled / (len(batch.index) * cfg.distill_fraction))

        # DeepSpeed averages over ranks and passes: each counts by its crops, one that only repeats a crop not at all.
        count = stop - first
        engine.backward(loss * (count * distributed.world_size() * workload.passes / cfg.optim.batch))

        # While the device works on the backward pass, the next batch is copied.
        with run.meter.measure_wait():
            prefetcher.fetch()
        norm = engine.step()

        weights = dict.fromkeys(["loss", *terms], float(count))
        weights |= dict.fromkeys(distill_terms, float(distilled if count else 0))
        run.meter.add({"loss": loss, **terms, **distill_terms}, weights)

    # The weights change with the last pass of a step only, so the average moves once a step.
    if run.ema is not None:
        run.ema.update(decay_at(run.step, cfg.optim.steps, cfg.ema.window))

    run.step += 1
    run.meter.end_step(norm, {"step": run.step, "kind": "train", "lr": lr})


def _seed_of_pass(seed: int, step: int, first: int) -> int:
    """A seed of 64 bits. first: index of the pass's first sample in its step."""
    return int(np.random.SeedSequence([seed, step, first]).generate_state(1, np.uint64)[0])
