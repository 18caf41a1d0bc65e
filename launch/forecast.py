"""What a verb's own forecast says of a config, within seconds; for training also memory and time against the site."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hpc_neuro.core import metric_rows
from hpc_neuro.core.files import format_bytes, format_count
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.pipeline import VERBS
from launch.site import Resources, Site

PATIENCE = 6.0
"""[s] A forecast that takes longer is left to the job."""
_GPU_SHARE = 0.9
"""Share of a GPU's memory that a training may fill."""
_PROCESS_BYTES = 0.7e9
"""[bytes] Memory of a rank before it holds any weights: Python, torch, DeepSpeed."""
_RECENT_ROWS = 20
"""Rows at the end of metrics.jsonl from which the speed is read."""

Forecast = tuple[list[str], list[str]]
"""(faults, which refuse the submission; lines for people)."""


def forecast_verb(verb: str, cfg: Any, resources: Resources, site: Site, written: Iterable[Path] = ()) -> Forecast:
    """Forecast a verb. written: folders that jobs before it will write, which are not opened as inputs."""
    faults, lines = forecast_training(cfg, resources, site) if verb == "train" else ([], [])
    if verb == "train" and resources.tasks > cfg.optim.batch:
        # Nothing more can be forecast of a run that has more ranks than crops.
        return [
            *faults,
            f"optim.batch: {cfg.optim.batch} crops leave some of the {resources.tasks} ranks without any",
        ], lines

    # Inputs that do not exist yet cannot be opened.
    keys = [item.key for item in VERBS[verb].inputs if item.in_chain != "never"]
    folders = set(written)
    later = [key for key in keys if (path := getattr(cfg, key)) and Path(path).resolve() in folders]
    if later:
        # The verb's own forecast would open them.
        return faults, [*lines, f"{', '.join(later)} will be there when it starts"]

    own_faults, own_lines = run_limited(PATIENCE, lambda: _run_own_forecast(verb, cfg, resources), resources.tasks)
    return faults + own_faults, lines + own_lines


def run_limited(seconds: float, work: Callable[[], list[str]], ranks: int) -> Forecast:
    """Run `work` in a process of its own, which is killed when it takes longer than `seconds`."""
    # A fork inherits the loaded modules and starts in milliseconds.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_forecast, args=(sender, work, ranks))
    process.start()
    sender.close()

    # A check of a large store may take minutes on a slow file system.
    try:
        if not receiver.poll(seconds):
            return [], [f"the whole check takes longer than {seconds:.0f} s and is left to the job"]
        forecast: Forecast = receiver.recv()
        return forecast
    except EOFError:
        return ["its check ended without an answer; try the verb itself with --dry-run"], []
    finally:
        process.kill()
        process.join()


def _send_forecast(pipe: Connection, work: Callable[[], list[str]], ranks: int) -> None:
    os.environ["WORLD_SIZE"] = str(ranks)
    # A fork has one thread: torch would wait for the others of its pool.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)

    try:
        pipe.send(([], work()))
    except (ConfigError, InputError, OSError) as error:
        pipe.send(([str(error)], []))


def _run_own_forecast(verb: str, cfg: Any, resources: Resources) -> list[str]:
    """Run the forecast of the verb itself. Raises ConfigError or InputError."""
    if verb != "train":
        return list(VERBS[verb].load_module().forecast(cfg))

    from hpc_neuro.train.setup import build_parts, describe_run

    # This machine may have no GPU: check without what only a GPU can do.
    if resources.gpus_per_task:
        engine = dataclasses.replace(
            cfg.engine, dtype="auto", offload_optimizer=False, offload_parameters="none", nvme=None
        )
        cfg = dataclasses.replace(cfg, engine=engine)

    # The tables of memory of the verb's own forecast take seconds; `forecast_training` is enough here.
    return list(describe_run(cfg, build_parts(cfg), resources.tasks))


# ------------------------------------------------------------------------------------------- memory and time of train


@dataclass(frozen=True)
class TrainingCost:
    """What one rank of a training needs."""

    memory: float
    """[bytes] In all."""
    activations: float
    """[bytes] Of it, kept for the backward pass."""
    operations: float
    """Floating-point operations per step."""

    def __str__(self) -> str:
        return (
            f"about {format_bytes(self.memory)} per rank ({format_bytes(self.activations)} kept for backward, "
            f"{format_bytes(self.memory - self.activations)} of weights, optimizer)"
        )


def forecast_training(cfg: Any, resources: Resources, site: Site) -> Forecast:
    """Hold memory and time of a training against the site."""
    cost = estimate_cost(cfg, resources)
    faults, lines = _find_memory_faults(cost, resources, site), [str(cost)]

    # Without a measured or a stated speed, time cannot be foreseen.
    seconds = _estimate_step_seconds(cfg, site, cost.operations)
    if seconds is None:
        return faults, lines

    minutes = seconds * cfg.optim.steps / 60
    starts = 1 + site.max_requeue
    if minutes > resources.minutes * starts:
        faults.append(
            f"time: {cfg.optim.steps} steps of {seconds:.2f} s take {minutes:.0f} min, but {starts} starts of "
            f"{resources.minutes} min are all it gets; give more minutes, nodes or cluster.max_requeue"
        )

    needed_starts = format_count(int(-(-minutes // resources.minutes)), "start")
    return faults, [*lines, f"about {seconds:.2f} s per step, {minutes:.0f} min in all, {needed_starts}"]


def estimate_cost(cfg: Any, resources: Resources) -> TrainingCost:
    """Estimate what one rank of a training needs, without running the student."""
    from hpc_neuro.models import cost
    from hpc_neuro.train import activation_memory, memory_plan
    from hpc_neuro.train.deepspeed import settings

    # The same division of the batch as the training makes.
    crops_per_rank = -(-cfg.optim.batch // resources.tasks)
    micro_batch = min(cfg.engine.micro_batch or crops_per_rank, crops_per_rank)
    passes = -(-crops_per_rank // micro_batch)
    value_bytes = 2 if resources.gpus_per_task > 0 and cfg.engine.dtype != "fp32" else 4

    # Counted from the shapes of the layers.
    student = cost.estimate_costs(cfg.student, cfg.crop.size, micro_batch, value_bytes)
    activations, parameters = student.total.kept, student.total.parameters
    work = memory_plan.StepWork(
        parameters=parameters,
        largest=0,
        averaged=parameters if cfg.ema.window > 0 else 0,
        ranks=resources.tasks,
        passes=passes,
        value_bytes=value_bytes,
        has_float32_sums=value_bytes == 2 and cfg.engine.dtype != "fp16",
        bucket=settings.bucket_size(parameters),
        offload=cfg.engine.offload_optimizer,
        # All gradients at once: an upper bound that needs no run of the student.
        events=[activation_memory.BackwardEvent(parameters, activations, 0)],
    )
    memory = memory_plan.plan_memory(work)[cfg.engine.stage].total
    return TrainingCost(memory, activations, student.step * passes)


def _find_memory_faults(cost: TrainingCost, resources: Resources, site: Site) -> list[str]:
    if resources.gpus_per_task:
        if site.gpu_memory_gb and cost.memory > _GPU_SHARE * 1e9 * site.gpu_memory_gb:
            return [
                f"memory: {cost}, and a GPU here has {site.gpu_memory_gb:g} GB; take a smaller crop.size or "
                "engine.micro_batch, student.checkpointing=true, or a higher engine.stage"
            ]
        return []

    # CPU ranks share the memory of their node.
    needed = resources.tasks_per_node * (cost.memory + _PROCESS_BYTES)
    if resources.memory_gb and needed > 1e9 * resources.memory_gb:
        return [f"memory: {cost}, for {resources.tasks_per_node} ranks on a node of memory_gb {resources.memory_gb:g}"]

    return []


def _estimate_step_seconds(cfg: Any, site: Site, operations: float) -> float | None:
    """[s] Per step, as measured in this run folder, else by the site's `teraflops`, else unknown."""
    path = cfg.out / "metrics.jsonl"
    rows = metric_rows.list_rows(metric_rows.read_lines(path)[-_RECENT_ROWS:])
    speeds = [
        row["crops_per_s"] for row in rows if isinstance(row.get("crops_per_s"), float) and row["crops_per_s"] > 0
    ]

    # The latest speed, as the first steps include compilation and warm-up.
    if speeds:
        return float(cfg.optim.batch / speeds[-1])

    return operations / (1e12 * site.teraflops) if site.teraflops else None
