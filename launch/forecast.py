"""What a verb's own forecast says of a config, within seconds; and for training, memory and time against the site."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hpc_neuro.core.files import format_bytes
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.pipeline import VERBS
from launch.site import Resources, Site

PATIENCE = 6.0  # [s] a forecast that takes longer is left to the job


def of(verb: str, cfg: Any, asked: Resources, site: Site, made: Iterable[Path] = ()) -> tuple[list[str], list[str]]:
    """(faults, lines) of a verb. Inputs in `made` will be written by jobs before it and are not opened."""
    faults: list[str] = []
    lines: list[str] = []
    if verb == "train":
        faults, lines = _training(cfg, asked, site)
    keys = [item.key for item in VERBS[verb].inputs if item.in_chain != "never"]
    later = [key for key in keys if (path := getattr(cfg, key)) and Path(path).resolve() in set(made)]
    if later:
        if verb == "train" and asked.tasks > cfg.optim.batch:
            faults.append(f"optim.batch: {cfg.optim.batch} crops leave some of the {asked.tasks} ranks without any")
        return faults, [*lines, f"{', '.join(later)} will be there when it starts"]
    found, said = within(PATIENCE, lambda: _own(verb, cfg, asked), asked.tasks)
    return faults + found, lines + said


def within(seconds: float, work: Callable[[], list[str]], ranks: int) -> tuple[list[str], list[str]]:
    """(faults, lines) of `work`, done in a process of its own that is ended when it takes too long."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, work, ranks))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return [], [f"the whole check takes longer than {seconds:.0f} s and is left to the job"]
        answer: tuple[list[str], list[str]] = ours.recv()
        return answer
    except EOFError:
        return ["its check ended without an answer; try the verb itself with --dry-run"], []
    finally:
        process.kill()
        process.join()


def _work(pipe: Connection, work: Callable[[], list[str]], ranks: int) -> None:
    os.environ["WORLD_SIZE"] = str(ranks)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # a fork would wait for the other threads of a pool, which it has not
    try:
        pipe.send(([], work()))
    except (ConfigError, InputError, OSError) as error:
        pipe.send(([str(error)], []))


def _own(verb: str, cfg: Any, asked: Resources) -> list[str]:
    """What the verb says itself. Raises ConfigError or InputError."""
    if verb != "train":
        return list(VERBS[verb].load_module().forecast(cfg))
    from hpc_neuro.train.setup import build_parts, describe_run

    if asked.gpus_per_task:  # here there may be none: without what only a GPU can do
        engine = dataclasses.replace(
            cfg.engine, dtype="auto", offload_optimizer=False, offload_parameters="none", nvme=None
        )
        cfg = dataclasses.replace(cfg, engine=engine)
    return list(describe_run(cfg, build_parts(cfg), asked.tasks))  # without its tables of memory, which take seconds


def _training(cfg: Any, asked: Resources, site: Site) -> tuple[list[str], list[str]]:
    """Memory and time of a training. Raises nothing."""
    from hpc_neuro.models import cost
    from hpc_neuro.train import activation_memory, memory_plan
    from hpc_neuro.train.deepspeed import settings

    ranks = asked.tasks
    each = -(-cfg.optim.batch // ranks)
    micro = min(cfg.engine.micro_batch or each, each)
    half = asked.gpus_per_task > 0 and cfg.engine.dtype != "fp32"
    parts = cost.costs(cfg.student, cfg.crop.size, micro, 2 if half else 4)
    kept, parameters = sum(p.kept for p in parts), sum(p.parameters for p in parts)
    work = memory_plan.StepWork(
        parameters=parameters,
        largest=0,
        averaged=parameters if cfg.ema.window > 0 else 0,
        ranks=ranks,
        passes=-(-each // micro),
        value_bytes=2 if half else 4,
        bucket=settings.bucket_size(parameters),
        offload=cfg.engine.offload_optimizer,
        events=[
            activation_memory.BackwardEvent(parameters, kept, 0)
        ],  # all gradients at once: no run through the student
    )
    stages = memory_plan.plan_memory(work)
    need = stages[cfg.engine.stage].total
    faults = []
    line = (
        f"about {format_bytes(need)} per rank ({format_bytes(kept)} kept for backward, "
        f"{format_bytes(need - kept)} of weights, optimizer)"
    )
    if asked.gpus_per_task and site.gpu_memory_gb and need > 0.9e9 * site.gpu_memory_gb:
        faults.append(
            f"memory: {line}, and a GPU here has {site.gpu_memory_gb:g} GB; take a smaller crop.size or "
            "engine.micro_batch, student.checkpointing=true, or a higher engine.stage"
        )
    if not asked.gpus_per_task and asked.memory_gb and asked.tasks_per_node * (need + 0.7e9) > 1e9 * asked.memory_gb:
        faults.append(f"memory: {line}, for {asked.tasks_per_node} ranks on a node of memory_gb {asked.memory_gb:g}")
    seconds = _seconds(cfg, site, sum(p.step for p in parts) * -(-each // micro))
    if seconds is None:
        return faults, [line]
    whole = seconds * cfg.optim.steps / 60
    starts = 1 + site.max_requeue
    if whole > asked.minutes * starts:
        faults.append(
            f"time: {cfg.optim.steps} steps of {seconds:.2f} s take {whole:.0f} min, but {starts} starts of "
            f"{asked.minutes} min are all it gets; give more minutes, nodes or cluster.max_requeue"
        )
    return faults, [
        line,
        f"about {seconds:.2f} s per step, {whole:.0f} min in all, {-(-whole // asked.minutes):.0f} start(s)",
    ]


def _seconds(cfg: Any, site: Site, operations: float) -> float | None:
    """Seconds per step: as this run folder measured, else by the site's `teraflops`, else unknown."""
    path = cfg.out / "metrics.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    speeds = [s for row in rows[-20:] if row.endswith("}") and (s := json.loads(row).get("crops_per_s"))]
    if speeds:
        return float(cfg.optim.batch / speeds[-1])
    return operations / (1e12 * site.teraflops) if site.teraflops else None
