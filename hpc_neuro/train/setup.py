"""From a config to the parts of a run, everything checked; and what a run will need, in lines for people."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_neuro.core import distributed, files
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Batch
from hpc_neuro.data.crops import CropSampler, draw_validation_boxes
from hpc_neuro.data.dataset import CropDataset, read_volume_points
from hpc_neuro.data.feature_cache import FeatureCache, hash_manifest
from hpc_neuro.data.orientation import IDENTITY
from hpc_neuro.data.store import Store
from hpc_neuro.losses.distill import Distiller
from hpc_neuro.models import cost, inflate
from hpc_neuro.models.student import Student, blank_student, build_student
from hpc_neuro.models.teacher import Teacher, load_teacher
from hpc_neuro.models.tubular import tube_sum
from hpc_neuro.train import activation_memory, memory_plan
from hpc_neuro.train.config import TrainConfig
from hpc_neuro.train.deepspeed import engine, nvme, settings


class TrainModule(nn.Module):
    """Student and distiller as one module, so that all their parameters are sharded alike.

    What goes in and out is plain tensors and dicts, and the two are entered by `forward` rather than called: ZeRO-3
    finds the tensors it watches in nothing else.
    """

    def __init__(self, student: Student, distiller: Distiller | None, sharded: bool) -> None:
        """sharded: parameters are gathered by all ranks together (ZeRO-3), so all must pass the same layers."""
        super().__init__()
        self.student, self.distiller, self.sharded = student, distiller, sharded

    def forward(self, fields: dict[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Fields of a Batch -> logits, distillation loss (mean over the distilled samples; None without), its terms.

        The loss of a batch without distilled samples is to be given no weight.
        """
        batch = Batch(**fields)
        layers = () if self.distiller is None else self.distiller.student_layers
        prediction = self.student.forward(batch.image, layers)
        if self.distiller is None:
            return prediction.logits, None, {}
        if self.sharded and not bool(batch.distilled.any()):
            first = torch.zeros_like(batch.distilled).index_fill(0, torch.tensor([0]), True)
            batch = dataclasses.replace(batch, distilled=first)
        loss, terms = self.distiller.forward(prediction.features, batch)
        return prediction.logits, loss, terms


@dataclass(frozen=True)
class Parts:
    """What a run is made of. Nothing here has been written or moved to a device."""

    blank: TrainModule  # its student on meta: shapes, no numbers
    make: Callable[[], TrainModule]  # in float32, alike on all ranks
    values: dict[str, Tensor]  # of the module's parameters, the teacher's instead of those that `make` draws
    depth: int  # transformer blocks
    transferred: frozenset[str]  # parameters of the module that have a teacher's weights to keep
    transfer_lines: tuple[str, ...]
    crops: CropDataset
    store: Store
    boxes: list[tuple[str, Box]]  # of validation
    validates_on: str  # "val" or "train"
    dtype: torch.dtype
    micro: int  # crops per rank and pass
    passes: int  # per step
    inputs: dict[str, str]  # digests


def build_parts(cfg: TrainConfig, ranks: int | None = None) -> Parts:
    """Open, check and build everything, for `ranks` (none: those there are). Raises ConfigError or InputError."""
    dtype, micro, passes = engine.check(cfg.engine, cfg.optim.batch, ranks or distributed.world_size())
    if ranks is not None and cfg.engine.dtype == "auto":
        dtype = torch.bfloat16  # the machine that is planned for has GPUs
    store = Store(cfg.store)
    train = store.split("train")
    if not train:
        raise InputError(f"{cfg.store} has no volume in its `train` split; prepare it again with some")
    # opened before the teacher is loaded, which takes seconds: what is not there is said at once
    cache = FeatureCache(cfg.cache) if cfg.distill is not None and cfg.cache is not None else None
    teacher = load_teacher(cfg.teacher) if cfg.distill or cfg.transfer.rule != "scratch" else None
    if cfg.distill is not None and cache is not None and teacher is not None:
        cache.require_match({i: store[i].digest for i in train}, teacher.identity, cfg.distill.views)
    blank = blank_student(cfg.student)
    lines: tuple[str, ...] = ("transfer: none, the student starts from random weights",)
    values: dict[str, Tensor] = {}
    kept = frozenset[str]()
    if teacher is not None and cfg.transfer.rule != "scratch":
        values, report = inflate.transferred(teacher, blank, cfg.transfer)
        lines = tuple(str(report).splitlines())
        kept = report.kept if cfg.transfer.blocks else kept
    distiller = _distiller(cfg, blank, cache)
    patch = cfg.student.patch
    fraction = cfg.distill_fraction if distiller is not None else 0.0
    turns = (IDENTITY,) if cache is None else cache.select_orientations(cfg.augment.distilled)
    sampler = CropSampler(cfg.crop, read_volume_points(store, train), cfg.seed, patch, fraction, turns)
    views = () if distiller is None else distiller.views
    split = "val" if store.split("val") else "train"
    boxes = draw_validation_boxes(
        read_volume_points(store, store.split(split)), cfg.crop, patch, cfg.validate.crops, cfg.seed
    )
    store.close()
    return Parts(
        blank=TrainModule(blank, distiller, sharded=cfg.engine.stage == 3),
        make=functools.partial(build_train_module, cfg, cache),
        values={f"student.{name}": value for name, value in values.items()},
        depth=blank.vit.depth,
        transferred=frozenset(f"student.{name}" for name in kept),
        transfer_lines=lines,
        crops=CropDataset(store, sampler, patch, cache, views),
        store=store,
        boxes=boxes,
        validates_on=split,
        dtype=dtype,
        micro=micro,
        passes=passes,
        inputs=_inputs(store, teacher, cache),
    )


def build_train_module(cfg: TrainConfig, cache: FeatureCache | None) -> TrainModule:
    """Student and distiller (none without `cache` or `distill`) as a run begins with them, in float32 on the CPU."""
    torch.manual_seed(cfg.seed)
    student = build_student(cfg.student)
    return TrainModule(student, _distiller(cfg, student, cache), sharded=cfg.engine.stage == 3)


def _distiller(cfg: TrainConfig, student: Student, cache: FeatureCache | None) -> Distiller | None:
    if cfg.distill is None or cache is None:
        return None
    torch.manual_seed(cfg.seed + 1)  # heads start alike whatever student was drawn before them
    return cfg.distill.build(
        student_dim=student.vit.dim,
        student_depth=student.vit.depth,
        teacher_layers=cache.layers,
        mean=cache.mean,
        std=cache.std,
        tube_sum=tube_sum,
    )


def _inputs(store: Store, teacher: Teacher | None, cache: FeatureCache | None) -> dict[str, str]:
    """Digests of all that decides the result besides the config."""
    found = {i: store[i].digest for i in store.ids if store[i].split in ("train", "val")}
    found["split"] = files.sha256_json({split: sorted(store.split(split)) for split in ("train", "val")})
    if teacher is not None:
        found["teacher"] = str(teacher.identity["sha256"])
    if cache is not None:
        found["cache"] = hash_manifest(cache.manifest)
    return found


def describe_run(cfg: TrainConfig, parts: Parts, ranks: int) -> Iterator[str]:
    """What the run needs and does on so many ranks. Raises InputError when a disk is full, ConfigError for `nvme`."""
    student = sum(p.numel() for p in parts.blank.student.parameters())
    every = sum(p.numel() for p in parts.blank.parameters())
    train, held = parts.store.split("train"), parts.store.split("val")
    points = sum(len(p.points["skeleton"]) for p in parts.crops.sampler.volumes)
    yield (
        f"train on {len(train)} volumes ({points} centreline voxels), validate on {len(parts.boxes)} fixed crops of "
        + (
            f"{len(held)} other volumes"
            if parts.validates_on == "val"
            else "the same volumes, as `val` is empty: optimistic"
        )
    )
    yield from parts.transfer_lines
    heads = f", {(every - student) / 1e6:.2f} M for distillation" if every > student else ", no distillation"
    yield f"student: {student / 1e6:.2f} M parameters{heads}; ZeRO stage {cfg.engine.stage}, {parts.dtype}"
    tokens = [n // p for n, p in zip(cfg.crop.size, cfg.student.patch, strict=True)]
    yield (
        f"{cfg.optim.steps} steps of {cfg.optim.batch} crops of {list(cfg.crop.size)} voxels ({tokens} tokens): "
        f"{ranks} rank(s) x {parts.micro} crops x {parts.passes} pass(es)"
    )
    per_crop, crop_operations = memory_plan.count_operations(cfg.student, cfg.crop.size)
    yield (
        f"a step: {per_crop * cfg.optim.batch} tokens, {crop_operations * cfg.optim.batch / 1e12:.3g} TFLOP of the "
        f"student over {ranks} rank(s), recomputation not counted"
    )
    # master weights, two Adam moments, the average; the same for every stage and number of ranks
    state = 4 * (3 * every + student * (cfg.ema.window > 0))
    needed = state * (cfg.checkpoint.keep + 2) + 2 * 4 * student
    files.require_space(cfg.out, needed, "training")
    yield f"disk: {files.format_bytes(needed)} at most ({files.format_bytes(state)} per checkpoint)"
    if cfg.engine.nvme is not None and ranks == distributed.world_size():  # else planned for nodes that are not here
        sizes = [p.numel() for p in parts.blank.parameters()]
        own = nvme.folder(cfg.engine.nvme, cfg.out)
        told = settings.build_deepspeed_settings(cfg.engine, cfg.optim, parts.dtype, parts.micro, parts.passes, sizes)
        yield nvme.require(own, sizes, parts.dtype.itemsize, told["zero_optimization"]["offload_param"])


def describe_memory(cfg: TrainConfig, parts: Parts, ranks: int) -> Iterator[str]:
    """What it computes and holds, by part of the student and by ZeRO stage; takes some seconds to find out."""
    value_bytes = parts.dtype.itemsize
    yield from cost.summary(cfg.student, cfg.crop.size, parts.micro, value_bytes)
    sizes = {name: p.numel() for name, p in parts.blank.named_parameters()}
    grid, cache = [n // p for n, p in zip(cfg.crop.size, cfg.student.patch, strict=True)], parts.crops.cache
    features = {} if cache is None else {v: (*cache.mean[v].shape, *grid) for v in parts.crops.views}
    work = memory_plan.StepWork(
        parameters=sum(sizes.values()),
        largest=max(sizes.values()),
        averaged=sum(n for name, n in sizes.items() if name.startswith("student.")) if cfg.ema.window > 0 else 0,
        ranks=ranks,
        passes=parts.passes,
        value_bytes=value_bytes,
        bucket=settings.bucket_size(sum(sizes.values())),
        offload=cfg.engine.offload_optimizer,
        events=activation_memory.trace_backward(
            parts.blank, cfg.losses, cfg.crop.size, parts.micro, parts.dtype, features
        ),
    )
    yield from memory_plan.format_memory_table(
        memory_plan.plan_memory(work), 1e9 * cfg.plan.memory if cfg.plan.ranks else None
    )
