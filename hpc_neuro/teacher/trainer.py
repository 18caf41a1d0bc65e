"""The training loop of a teacher, its checkpoints and its lines of progress."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_neuro.core import files, stop_signals
from hpc_neuro.core.schema import InputError
from hpc_neuro.teacher.config import TaskConfig, TeacherOptimConfig
from hpc_neuro.teacher.objective import Batch, Network, Objective, patchify, uniform
from hpc_neuro.teacher.tiles import Source

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
"""Name of the checkpoint in the folder of a teacher."""
METRICS = "metrics.jsonl"
"""Name of the file with the loss by step."""
SAMPLE = 256
"""Crops from which targets are normalized and a patch embedding is started."""


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, apart from the images."""

    objective: Objective
    patch: int
    task: TaskConfig
    optim: TeacherOptimConfig
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """By which the teacher's images are normalized, per RGB channel."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    is_continued: bool = False
    """Whether the teacher has learned before: what predicts from it then learns first."""


@dataclass
class Progress:
    """What a checkpoint holds besides the tensors."""

    step: int = 0
    seconds: float = 0.0
    """[s] Spent training, over all starts."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss since the entry before)."""
    losses: list[float] = field(default_factory=list)
    """By step, since the last entry of the curve."""


def draw_batch(sources: Sequence[Source], step: int, recipe: Recipe, device: torch.device) -> Batch:
    """Batch number `step`: crops of every source, with noise; depends on nothing but the arguments."""
    objective, crop, seed = recipe.objective, recipe.task.crop, recipe.optim.seed
    draws = torch.Generator().manual_seed((seed << 32) + step)
    target = torch.cat([source.draw(step, seed, crop, objective, draws, device) for source in sources])
    size = len(target)

    # A third of the images stay clean.
    noise = uniform(draws, size, 0.0, 0.3).sub(0.1).clamp_min(0).view(-1, 1, 1, 1).to(device)
    grains = draws if device.type == "cpu" else torch.Generator(device).manual_seed((seed << 32) + step)
    grain = torch.randn(size, 1, crop, crop, generator=grains, device=device)
    image = objective.limit_noise(target + noise * grain)

    n = crop // recipe.patch
    order = torch.rand(size, n * n, generator=draws).argsort(1).to(device)
    y, x = objective.draw_coordinates(draws, size, n, recipe.patch)
    return Batch(normalize_input(image, recipe.mean, recipe.std), target, order, y.to(device), x.to(device))


def normalize_input(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images [B, 3, S, S] in -1..1 as a teacher of this mean and deviation of images in 0..1 takes them."""
    if all(value == 0.5 for value in (*mean, *std)):
        return image
    center, width = (image.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return ((image + 1) / 2 - center) / width


def build_network(recipe: Recipe, vit: nn.Module, sources: Sequence[Source], device: torch.device) -> Network:
    """The network as training begins around `vit`; a new teacher starts from the patches of a sample."""
    cpu = torch.device("cpu")
    total = sum(source.count for source in sources)
    wide = [replace(source, count=max(1, SAMPLE * source.count // total)) for source in sources]
    sample = draw_batch(wide, 0, recipe, cpu).target

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.optim.seed)
        network = recipe.objective.make_network(vit, recipe.patch, recipe.task, sample)
    if not recipe.is_continued:
        recipe.objective.start_patches(vit, patchify(sample, recipe.patch).flatten(0, 1))
    return network.to(device)


def make_optimizer(network: Network, optim: TeacherOptimConfig) -> torch.optim.AdamW:
    """AdamW with groups of the ViT and of what predicts from it; biases, norms and single tokens are not decayed."""
    own = {id(parameter) for parameter in network.vit.parameters()}
    groups = []
    for is_encoder in (True, False):
        parameters = [p for p in list_trained(network) if (id(p) in own) == is_encoder]
        for is_matrix, decay in ((True, optim.decay), (False, 0.0)):
            chosen = [p for p in parameters if (p.squeeze().ndim > 1) == is_matrix]
            groups.append({"params": chosen, "weight_decay": decay, "is_encoder": is_encoder})
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(0.9, 0.95), fused=True)


def list_trained(network: nn.Module) -> list[nn.Parameter]:
    """Everything but a fixed table of positions."""
    return [p for p in network.parameters() if p.requires_grad]


def compute_gradients(network: nn.Module, batch: Batch, keep: int, share: float) -> tuple[float, tuple[Tensor, ...]]:
    """Loss of a part of a batch and the gradients, both times the part's share of the batch.

    bfloat16 on CUDA only: CPUs without AMX are slower with it.
    """
    kind = batch.image.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        loss = share * network(batch, keep)
    return loss.item(), torch.autograd.grad(loss, list_trained(network))


@contextlib.contextmanager
def open_workers(device: torch.device, threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool for the parts of a batch: on CPU one single-threaded worker per core, on CUDA one worker.

    Torch's own threads wait for one another in every operation, so a core that others use slows all of them; workers
    that take the next part when they are done do not wait. Parts are summed in order: the result is the same.
    """
    before = torch.get_num_threads()
    count = (threads or before) if device.type == "cpu" else 1
    # In this thread too: its sums must not depend on the number of cores either.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class Training:
    """A teacher that learns: network, optimizer and progress, saved in a folder.

    training = Training(recipe, vit, sources, out, device)
    training.run(pool, every=120, log_every=50, write_teacher=...)
    """

    def __init__(
        self, recipe: Recipe, vit: nn.Module, sources: Sequence[Source], out: Path, device: torch.device
    ) -> None:
        """Begin, or go on from the checkpoint in `out`. Raises InputError for a checkpoint that cannot be read."""
        self.recipe, self.sources, self.out, self.device = recipe, sources, out, device
        self.network = build_network(recipe, vit, sources, device)
        self.optimizer = make_optimizer(self.network, recipe.optim)
        self.progress = Progress()
        self._restore()

    @property
    def share(self) -> float:
        """Share of the budget that is spent."""
        return self.recipe.optim.progress(self.progress.step, self.progress.seconds)

    def run(self, pool: ThreadPoolExecutor, every: float, log_every: int, write_teacher: Any) -> None:
        """Train to the end of the budget, with a line each `log_every` steps and a checkpoint each `every` seconds.

        write_teacher: called without arguments beside every checkpoint. Raises Stopped, with everything saved.
        """
        progress = self.progress
        saved = logged = time.monotonic()
        first = progress.step
        following = pool.submit(self._draw, progress.step)
        while self.share < 1:
            if stop_signals.is_requested():
                self.save()
                stop_signals.check()

            began = time.monotonic()
            batch, following = following.result(), pool.submit(self._draw, progress.step + 1)
            progress.losses.append(self._step(batch, pool))
            progress.step += 1
            progress.seconds += time.monotonic() - began

            now = time.monotonic()
            if progress.step % log_every == 0 or self.share >= 1:
                progress.curve.append((progress.step, sum(progress.losses) / len(progress.losses)))
                progress.losses.clear()
                self._report((progress.step - first) * len(batch.image) / (now - logged))
                logged, first = now, progress.step
            if now - saved > every:
                self.save()
                write_teacher()
                saved = time.monotonic()
        self.save()

    def _draw(self, step: int) -> Batch:
        return draw_batch(self.sources, step, self.recipe, self.device)

    def _step(self, batch: Batch, pool: ThreadPoolExecutor) -> float:
        """One step of the optimizer; the loss. Raises InputError for one that is not finite."""
        recipe, size = self.recipe, len(batch.image)
        keep = recipe.task.count_visible(recipe.patch)
        jobs = [
            pool.submit(compute_gradients, self.network, part, keep, len(part.image) / size)
            for part in batch.split(recipe.optim.part)
        ]

        # In order, so that the sum is always the same.
        loss, trained = 0.0, list_trained(self.network)
        self.optimizer.zero_grad()
        for job in jobs:
            value, slopes = job.result()
            loss += value
            for parameter, slope in zip(trained, slopes, strict=True):
                parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {self.progress.step}; start again in a new `out` with a lower optim.lr"
            )

        nn.utils.clip_grad_norm_(trained, 1.0)
        self._set_rates()
        self.optimizer.step()
        return loss

    def _set_rates(self) -> None:
        optim = self.recipe.optim
        for group in self.optimizer.param_groups:
            waits = self.recipe.is_continued and group["is_encoder"]
            group["lr"] = optim.rate_after_head(self.share) if waits else optim.rate(self.share)

    def _report(self, speed: float) -> None:
        """One line for people, one for programs."""
        progress, share = self.progress, self.share
        loss, rate = progress.curve[-1][1], self.recipe.optim.rate(share)
        left = progress.seconds * (1 - share) / max(share, 1e-9)
        log.info(
            "step %d %5.1f %%  loss %.4f  lr %.2e  %.0f images/s  eta %.1f min",
            *(progress.step, 100 * share, loss, rate, speed, left / 60),
        )
        line = {"step": progress.step, "loss": loss, "lr": rate, "images_per_s": speed, "seconds": progress.seconds}
        with (self.out / METRICS).open("a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "progress": asdict(self.progress),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with files.atomic(self.out / CHECKPOINT) as part:
            torch.save(state, part)

    def _restore(self) -> None:
        """Load the checkpoint if there is one, and cut the metrics back to it."""
        path, metrics = self.out / CHECKPOINT, self.out / METRICS
        if not path.exists():
            metrics.unlink(missing_ok=True)
            return

        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
        except Exception as error:
            # A damaged file raises whatever the unpickler, the shapes or the fields do.
            line = " ".join(str(error).split())[:200]
            raise InputError(f"{path} cannot be read ({line}); remove it to train from the start") from error

        # Lines after the checkpoint belong to steps that will be done again; the last may be half a line.
        if metrics.exists():
            lines = [line for line in metrics.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= self.progress.step]
            files.write_text(metrics, "".join(line + "\n" for line in kept))
        log.info("going on from step %d", self.progress.step)
