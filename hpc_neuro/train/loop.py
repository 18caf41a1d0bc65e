"""The verb `train` and its loop, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import signal
import threading
import time
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor

from hpc_neuro.core import distributed, run_folder
from hpc_neuro.core.constants import EXIT_STOPPED
from hpc_neuro.core.liveness import TorchRankWatch
from hpc_neuro.core.stop_signals import StopSignals
from hpc_neuro.core.types import Batch, StudentOutput
from hpc_neuro.data.augment import augment
from hpc_neuro.data.dataset import load_batches
from hpc_neuro.data.feature_cache import record_use
from hpc_neuro.losses import sum_losses
from hpc_neuro.train.checkpoint.saver import is_milestone
from hpc_neuro.train.config import TrainConfig
from hpc_neuro.train.deepspeed.engine import join_group
from hpc_neuro.train.ema import decay_at
from hpc_neuro.train.optim import lr_at
from hpc_neuro.train.prefetch import OnDevice
from hpc_neuro.train.run_state import Training
from hpc_neuro.train.setup import build_parts, describe_memory, describe_run

log = logging.getLogger(__name__)
_PATIENCE = 5  # deaths of reading processes without a batch in between
_MAY_CHANGE = (
    *("optim.steps", "store", "cache", "workers", "ahead", "tracker", "plan"),
    *(f"checkpoint.{key}" for key in ("every", "minutes", "keep", "milestone", "margin", "background", "walltime")),
    "engine",  # how the work is spread does not decide the result
)


def forecast(cfg: TrainConfig) -> list[str]:
    """Check all that the run needs; what it will do and take, in lines. Writes nothing."""
    parts, ranks = build_parts(cfg, cfg.plan.ranks), cfg.plan.ranks or distributed.world_size()
    return [*describe_run(cfg, parts, ranks), *describe_memory(cfg, parts, ranks)]


def run(cfg: TrainConfig) -> int:
    """Train, or go on training. 0: done; 75: stopped by a signal or the clock, saved, the same command goes on.

    When a rank is lost the others say which and raise SystemExit(1); what the last checkpoint holds is kept.
    """
    with StopSignals(cfg.checkpoint.margin, cfg.checkpoint.walltime) as stop_signals:
        parts = build_parts(cfg)
        needs = list(describe_run(cfg, parts, distributed.world_size()))
        with run_folder.start("train", cfg, cfg.out, parts.inputs, may_change=_MAY_CHANGE) as this:
            if this.complete:
                return 0
            for line in needs:
                log.info("train: %s", line)
            if parts.crops.cache is not None and distributed.is_main():
                record_use(parts.crops.cache.path, cfg.out)
            join_group(cfg.engine)
            with TorchRankWatch(cfg.engine.silence) as watch:
                try:
                    state = Training(cfg, parts)
                    with contextlib.closing(state):
                        if train(state, stop_signals, watch):
                            why = stop_signals.reason or "another rank"
                            log.warning("train: stopped by %s after step %d; the same command goes on", why, state.step)
                            this.record["exit"] = EXIT_STOPPED
                            return EXIT_STOPPED
                        this.finish(state.finish(), outputs=sorted((cfg.out / "weights").glob("*/*.*")))
                except RuntimeError as error:
                    if lost := watch.explain(error):
                        log.error("train: %s; the others stop. The same command goes on from the last checkpoint", lost)
                        raise SystemExit(1) from error
                    raise
    return 0


def train(state: Training, stop_signals: StopSignals, watch: TorchRankWatch) -> bool:
    """All steps that are left; True when stopped before the last, with everything saved."""
    cfg, steps = state.cfg, state.cfg.optim.steps
    if distributed.any_rank(stop_signals.is_requested)[0]:
        return state.step < steps
    with contextlib.closing(reading(state)) as read:
        ready = OnDevice(read, state.device)
        with state.meter.paused():
            watch.activity = f"the validation of step {state.step}"
            state.score_due()
        while state.step < steps:
            watch.activity = f"step {state.step + 1}"
            one_step(state, ready)
            last = state.step == steps
            overdue = 0 < cfg.checkpoint.minutes < (time.monotonic() - state.saved) / 60
            stop, overdue, writing = distributed.any_rank(stop_signals.is_requested, overdue, not state.saver.written)
            milestone = is_milestone(state.step, cfg.checkpoint)
            due = cfg.checkpoint.every > 0 and state.step % cfg.checkpoint.every == 0
            save = overdue or stop or last or milestone or due
            if save or state.step % cfg.tracker.every == 0:
                state.flush()  # raises when the loss is not finite, before that is saved
            with state.meter.paused():
                if last or not stop:
                    watch.activity = f"the validation of step {state.step}"
                    state.score_due()
                if save:
                    watch.activity = f"the checkpoint of step {state.step}"
                    state.save(wait=stop or last)
                elif not writing:
                    state.saver.complete()
            if stop and not last:
                return True
    return False


def reading(state: Training) -> Generator[Batch, None, None]:
    """This rank's batches from the present step on. A reading process that is killed is replaced, and nothing lost."""
    cfg, gpu = state.cfg, state.device.type == "cuda"
    workers = cfg.workers if cfg.workers is not None else 4 * gpu
    first, taken, failed, times = state.step, 0, -1, 0
    while True:
        chunks = rank_chunks(first, cfg.optim.steps, cfg.optim.batch, state.parts.micro)
        rest = itertools.islice(chunks, taken, None)
        try:
            with load_batches(state.parts.crops, rest, workers, cfg.ahead, pin=gpu) as ready:
                _deaf_to_readers()
                for batch in ready:
                    taken += 1
                    yield batch
            return
        except RuntimeError as error:
            times = times + 1 if failed == taken else 1
            failed = taken
            if "DataLoader worker" not in str(error) or times == _PATIENCE:  # always at the same batch: it is the batch
                raise
            log.warning("train: a process that reads crops was killed (%s); others take its place", error)


def _deaf_to_readers() -> None:
    """Take off torch's handler of SIGCHLD, which raises wherever the step is; the next batch notices a death, too."""
    handler = signal.getsignal(signal.SIGCHLD)
    of_torch = getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"
    if of_torch and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def one_step(state: Training, ready: OnDevice) -> None:
    """One optimizer step of all ranks."""
    cfg, parts, engine = state.cfg, state.parts, state.engine
    lr = cfg.optim.lr * lr_at(state.step, cfg.optim)
    engine.set_lr(lr)
    engine.module.train()
    state.meter.new_step()
    norm: Tensor | float = math.nan
    for first, stop in shares(cfg.optim.batch, parts.micro):
        with state.meter.waiting():
            batch = ready.take()
        batch = augment(batch, cfg.augment, cfg.seed)
        # drop path draws from torch's own generator: seeded by what is in the pass, not by who does it and when
        torch.manual_seed(_seed(cfg.seed, state.step, first))
        logits, distillation, distilled_terms = engine(dict(vars(batch)))
        loss, terms = sum_losses(cfg.losses, StudentOutput(logits, {}), batch)
        count, chosen = stop - first, int(batch.distilled.sum())
        if distillation is not None:
            # a mean over the distilled samples of the whole step, however ranks and passes share them out
            loss = loss + distillation * (chosen / (len(batch.index) * cfg.distill_fraction))
        # DeepSpeed takes the mean over ranks and passes: each counts by its crops, one that repeats a crop not at all
        engine.backward(loss * (count * distributed.world_size() * parts.passes / cfg.optim.batch))
        with state.meter.waiting():
            ready.fetch()
        norm = engine.step()
        chosen = chosen if count else 0
        weights = dict.fromkeys(["loss", *terms], float(count)) | dict.fromkeys(distilled_terms, float(chosen))
        state.meter.add({"loss": loss, **terms, **distilled_terms}, weights)
    if state.ema is not None:
        state.ema.update(decay_at(state.step, cfg.optim.steps, cfg.ema.window))
    state.step += 1
    state.meter.end_step(norm, {"step": state.step, "kind": "train", "lr": lr})


def shares(batch: int, micro: int) -> list[tuple[int, int]]:
    """[first, stop) of a step's samples in each of this rank's passes; empty where the others have the rest.

    All ranks have the same number of passes, as they meet in each of them.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    first = [start + rank * micro for start in range(0, batch, ranks * micro)]
    return [(min(start, batch), min(start + micro, batch)) for start in first]


def rank_chunks(first: int, steps: int, batch: int, micro: int) -> Iterator[list[int]]:
    """Global sample indices of this rank's passes from step `first` on; step s holds samples s * batch and the next.

    A pass without a share reads the step's first sample, which then counts for nothing.
    """
    for step in range(first * batch, steps * batch, batch):
        for start, stop in shares(batch, micro):
            yield list(range(step + start, step + stop)) or [step]


def _seed(seed: int, step: int, first: int) -> int:
    return int(np.random.SeedSequence([seed, step, first]).generate_state(1, np.uint64)[0])
