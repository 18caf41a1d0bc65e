"""From a config to the parts of a run, everything checked; and what a run needs, in lines for people."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_neuro.core import distributed, files
from hpc_neuro.core.files import format_count
from hpc_neuro.core.geometry import Box, VoxelSize
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Contrast
from hpc_neuro.data.crops import CropSampler, draw_validation_boxes
from hpc_neuro.data.dataset import CropDataset, read_volume_points
from hpc_neuro.data.feature_cache import FeatureCache, hash_manifest
from hpc_neuro.data.neurite_width import WidthQuartiles, has_square_voxels, measure_widths, summarize_widths
from hpc_neuro.data.orientation import IDENTITY
from hpc_neuro.data.store import Store
from hpc_neuro.losses.distill import Distiller
from hpc_neuro.models import cost, inflate
from hpc_neuro.models.student import Student, blank_student
from hpc_neuro.models.teacher import Teacher, load_teacher
from hpc_neuro.train import activation_memory, memory_plan
from hpc_neuro.train.config import TrainConfig
from hpc_neuro.train.deepspeed import nvme
from hpc_neuro.train.deepspeed.engine import Workload, check_engine
from hpc_neuro.train.deepspeed.settings import bucket_size, build_deepspeed_settings
from hpc_neuro.train.optim import lr_scale
from hpc_neuro.train.start_weights import (
    InitialStudent,
    StartWeights,
    add_initial_student,
    freeze_parts,
    open_initial_student,
)
from hpc_neuro.train.train_module import STUDENT, TrainModule, build_distiller, build_train_module

_MOST_WIDTH_VOLUMES = 64
"""Training volumes in which widths of neurites are measured, at most."""


@dataclass(frozen=True)
class RunParts:
    """The parts of a run. Nothing has been written or moved to a device."""

    blank: TrainModule
    """Its student is on meta: shapes without numbers."""
    make: Callable[[], TrainModule]
    """Builds the module in float32, alike on all ranks."""
    values: dict[str, Tensor]
    """Of the module's parameters, the values of `init` and the teacher that replace those that `make` draws."""
    lr_scales: dict[str, float]
    """Learning rates relative to that of a new parameter, of the module's parameters that are not new."""
    start_lines: tuple[str, ...]
    """Where the weights come from, for people."""
    crops: CropDataset
    store: Store
    boxes: list[tuple[str, Box]]
    """Of validation."""
    contrast: Contrast
    """How the volumes' brightness becomes [0, 1]."""
    voxel_sizes: tuple[VoxelSize, VoxelSize]
    """[um] Smallest and largest sides of the voxels, z y x."""
    neurite_widths: WidthQuartiles | None
    """[voxel] Of the neurites in the training volumes; None where they cannot be measured."""
    validates_on: str
    """Split of the boxes: val, or train if val is empty."""
    workload: Workload
    inputs: dict[str, str]
    """Name -> digest of everything besides the config that decides the result."""


def build_parts(cfg: TrainConfig, ranks: int | None = None) -> RunParts:
    """Open, check and build everything for `ranks` (none: those of this start). Raises ConfigError or InputError."""
    workload = check_engine(cfg.engine, cfg.optim.batch, ranks or distributed.world_size())
    # The machine that is planned for has GPUs.
    if ranks is not None and cfg.engine.dtype == "auto":
        workload = dataclasses.replace(workload, dtype=torch.bfloat16)

    store = Store(cfg.store)
    train_ids = store.split("train")
    if not train_ids:
        raise InputError(f"{cfg.store} has no volume in its `train` split; prepare it again with some")

    contrast = _find_contrast(store, train_ids)
    voxel_sizes = _find_voxel_sizes(store, train_ids)

    # The cache is opened before the teacher is loaded, which takes seconds: a missing cache is reported at once.
    cache = FeatureCache(cfg.cache) if cfg.distill is not None and cfg.cache is not None else None
    start = None if cfg.init is None else open_initial_student(cfg.init)
    is_transferred = cfg.transfer.rule != "scratch" and _needs_transfer(cfg, start)
    teacher = load_teacher(cfg.teacher) if cfg.distill or is_transferred else None
    if cfg.distill is not None and cache is not None and teacher is not None:
        digests = {id_: store[id_].digest for id_ in train_ids}
        cache.require_match(digests, teacher.identity, cfg.distill.views)

    # Shapes are enough for all checks, and a student without numbers takes no memory.
    blank = blank_student(cfg.student)
    if start is not None:
        start.require_contrast(contrast)
    weights = _collect_weights(cfg, start, teacher, blank)
    distiller = build_distiller(cfg, blank, cache)

    crops = _build_crops(cfg, store, cache, distiller)

    # A small data set may have no volume to spare. The forecast then says that the score is optimistic.
    validates_on = "val" if store.split("val") else "train"
    points = read_volume_points(store, store.split(validates_on))
    boxes = draw_validation_boxes(points, cfg.crop, cfg.student.patch, cfg.validate.crops, cfg.seed)

    neurite_widths = measure_store_widths(store, train_ids)

    # Each process opens handles of its own when it reads, so none is kept open here.
    store.close()

    return RunParts(
        blank=TrainModule(blank, distiller, sharded=cfg.engine.stage == 3),
        make=functools.partial(build_train_module, cfg, cache),
        values={f"{STUDENT}{name}": value for name, value in weights.values.items()},
        lr_scales={f"{STUDENT}{name}": scale for name, scale in weights.lr_scales.items()},
        start_lines=weights.lines,
        crops=crops,
        store=store,
        boxes=boxes,
        contrast=contrast,
        voxel_sizes=voxel_sizes,
        neurite_widths=neurite_widths,
        validates_on=validates_on,
        workload=workload,
        inputs=_hash_inputs(store, start, teacher, cache),
    )


def _find_contrast(store: Store, ids: Sequence[str]) -> Contrast:
    """The contrast of all volumes. Raises InputError where they differ."""
    contrasts = {store[id_].contrast: id_ for id_ in ids}
    if len(contrasts) > 1:
        examples = " and ".join(f"{name} ({id_})" for name, id_ in sorted(contrasts.items()))
        raise InputError(f"{store.path} has volumes of the contrasts {examples}; prepare all of them with one")
    return next(iter(contrasts))


def _find_voxel_sizes(store: Store, ids: Sequence[str]) -> tuple[VoxelSize, VoxelSize]:
    """[um] The smallest and the largest sides of all voxels, z y x."""
    sides = list(zip(*(store[id_].voxel_size for id_ in ids), strict=True))
    (z, y, x), (top_z, top_y, top_x) = map(min, sides), map(max, sides)
    return (z, y, x), (top_z, top_y, top_x)


def measure_store_widths(store: Store, ids: Sequence[str]) -> WidthQuartiles | None:
    """[voxel] Widths of the neurites along the trees of volumes, evenly spread over `ids`; None without any.

    Volumes of labels have no tree, and voxels that are no squares in the plane no width; they do not count.
    """
    fitting = [id_ for id_ in ids if store[id_].has_tree and has_square_voxels(store[id_].voxel_size)]
    every = max(1, -(-len(fitting) // _MOST_WIDTH_VOLUMES))
    volumes = [store[id_] for id_ in fitting[::every]]
    return summarize_widths([measure_widths(v.fitted_tree(), v.image, v.shape) for v in volumes])


def _needs_transfer(cfg: TrainConfig, start: InitialStudent | None) -> bool:
    """Whether the student has a transformer that `init` does not give: a trained one is not replaced."""
    return start is None or (cfg.student.transformer and not start.has_transformer)


def _collect_weights(
    cfg: TrainConfig, start: InitialStudent | None, teacher: Teacher | None, blank: Student
) -> StartWeights:
    """The weights that the student starts from, of a teacher and of `init`; those of `init` win."""
    weights = _transfer_weights(cfg, start, teacher, blank)
    if start is not None:
        weights = add_initial_student(weights, start, blank, cfg.optim.init_lr)
    return freeze_parts(weights, blank, cfg.freeze)


def _transfer_weights(
    cfg: TrainConfig, start: InitialStudent | None, teacher: Teacher | None, blank: Student
) -> StartWeights:
    """The weights that a teacher gives."""
    if not _needs_transfer(cfg, start):
        return StartWeights()
    if teacher is None or cfg.transfer.rule == "scratch":
        return StartWeights(lines=("transfer: none, the student starts from random weights",))

    values, report = inflate.map_weights(teacher, blank, cfg.transfer)

    # Without transferred blocks nothing is worth a slow learning rate.
    names = report.teacher_tensors if cfg.transfer.blocks else frozenset[str]()
    scales = {name: lr_scale(name, cfg.optim, blank.depth) for name in names}
    return StartWeights(values, scales, tuple(str(report).splitlines()))


def _build_crops(
    cfg: TrainConfig, store: Store, cache: FeatureCache | None, distiller: Distiller | None
) -> CropDataset:
    """The training crops."""
    fraction = cfg.distill_fraction if distiller is not None else 0.0

    # The cache has features of some orientations only, and a distilled crop must have one of them.
    orientations = (IDENTITY,) if cache is None else cache.select_orientations(cfg.augment.distilled)
    points = read_volume_points(store, store.split("train"))
    sampler = CropSampler(cfg.crop, points, cfg.seed, cfg.student.patch, fraction, orientations)
    views = () if distiller is None else distiller.views
    return CropDataset(store, sampler, cfg.student.patch, cache, views)


def _hash_inputs(
    store: Store, start: InitialStudent | None, teacher: Teacher | None, cache: FeatureCache | None
) -> dict[str, str]:
    """Name -> digest of everything besides the config that decides the result."""
    splits = {split: sorted(store.split(split)) for split in ("train", "val")}
    digests = {id_: store[id_].digest for id_ in store.ids if store[id_].split in splits}

    # A resumed run compares these, so another split counts as another input.
    digests["split"] = files.sha256_json(splits)
    if start is not None:
        digests["init"] = start.digest
    if teacher is not None:
        digests["teacher"] = str(teacher.identity["sha256"])
    if cache is not None:
        digests["cache"] = hash_manifest(cache.manifest)
    return digests


# --- What a run needs, in lines for people ---


def describe_run(cfg: TrainConfig, parts: RunParts, ranks: int) -> Iterator[str]:
    """What the run does and needs on `ranks` ranks. Raises InputError when a disk is full, ConfigError for `nvme`."""
    student = sum(p.numel() for p in parts.blank.student.parameters())
    total = sum(p.numel() for p in parts.blank.parameters())

    yield _describe_volumes(parts)
    yield from parts.start_lines

    heads = f", {(total - student) / 1e6:.2f} M for distillation" if total > student else ", no distillation"
    yield f"student: {student / 1e6:.2f} M parameters{heads}; ZeRO stage {cfg.engine.stage}, {parts.workload.dtype}"
    yield from _describe_steps(cfg, parts.workload, ranks)
    yield _describe_disk(cfg, student, total)

    # The nodes of another number of ranks are not this one.
    if cfg.engine.nvme is not None and ranks == distributed.world_size():
        yield _describe_nvme(cfg, parts)


def _describe_volumes(parts: RunParts) -> str:
    points = sum(len(volume.points["skeleton"]) for volume in parts.crops.sampler.volumes)
    train = format_count(len(parts.store.split("train")), "volume")
    others = format_count(len(parts.store.split("val")), "other volume")
    validated = others if parts.validates_on == "val" else "the same volumes, as `val` is empty: optimistic"
    return (
        f"train on {train} ({format_count(points, 'centerline voxel')}), validate on "
        f"{format_count(len(parts.boxes), 'fixed crop')} of {validated}"
    )


def _describe_steps(cfg: TrainConfig, workload: Workload, ranks: int) -> Iterator[str]:
    grid = [n // p for n, p in zip(cfg.crop.size, cfg.student.patch, strict=True)]
    crops = f"{format_count(cfg.optim.batch, 'crop')} of {list(cfg.crop.size)} voxels ({grid} tokens)"
    spread = (
        f"{format_count(ranks, 'rank')} x {format_count(workload.micro, 'crop')} x "
        f"{format_count(workload.passes, 'pass', 'passes')}"
    )
    yield f"{format_count(cfg.optim.steps, 'step')} of {crops}: {spread}"

    # Recomputation is no progress, so it is left out, as in the utilization that is logged.
    tokens, operations = memory_plan.count_operations(cfg.student, cfg.crop.size)
    yield (
        f"a step: {tokens * cfg.optim.batch} tokens, {operations * cfg.optim.batch / 1e12:.3g} TFLOP of the "
        f"student over {format_count(ranks, 'rank')}, recomputation not counted"
    )


def _describe_disk(cfg: TrainConfig, student: int, total: int) -> str:
    # Master weights, two Adam moments, the average; the same for every stage and number of ranks.
    checkpoint = 4 * (3 * total + student * (cfg.ema.window > 0))

    # The best and the last weights are exported, both in float32.
    weights = 2 * 4 * student

    # Besides those kept, there are the best one and one that is being written.
    needed = checkpoint * (cfg.checkpoint.keep + 2) + weights
    files.require_space(cfg.out, needed, "training")
    return f"disk: {files.format_bytes(needed)} at most ({files.format_bytes(checkpoint)} per checkpoint)"


def _describe_nvme(cfg: TrainConfig, parts: RunParts) -> str:
    assert cfg.engine.nvme is not None
    workload = parts.workload
    sizes = [p.numel() for p in parts.blank.parameters()]
    settings = build_deepspeed_settings(cfg.engine, cfg.optim, workload.dtype, workload.micro, workload.passes, sizes)
    buffers = settings["zero_optimization"]["offload_param"]
    folder = nvme.folder_of_run(cfg.engine.nvme, cfg.out)
    return nvme.require_room(folder, sizes, workload.dtype.itemsize, buffers)


def describe_memory(cfg: TrainConfig, parts: RunParts, ranks: int) -> Iterator[str]:
    """Operations and memory by part of the student, and memory by ZeRO stage; takes some seconds."""
    workload = parts.workload
    yield from cost.summarize_costs(cfg.student, cfg.crop.size, workload.micro, workload.dtype.itemsize)

    # Only the student is averaged: the distiller is dropped in the end.
    sizes = {name: p.numel() for name, p in parts.blank.named_parameters()}
    averaged = sum(size for name, size in sizes.items() if name.startswith(STUDENT))

    work = memory_plan.StepWork(
        parameters=sum(sizes.values()),
        largest=max(sizes.values()),
        averaged=averaged if cfg.ema.window > 0 else 0,
        ranks=ranks,
        passes=workload.passes,
        value_bytes=workload.dtype.itemsize,
        has_float32_sums=workload.dtype == torch.bfloat16,
        bucket=bucket_size(sum(sizes.values())),
        offload=cfg.engine.offload_optimizer,
        events=activation_memory.trace_backward(
            parts.blank, cfg.losses, cfg.crop.size, workload.micro, workload.dtype, _feature_shapes(cfg, parts.crops)
        ),
    )

    memory = 1e9 * cfg.plan.memory if cfg.plan.ranks else None
    yield from memory_plan.format_memory_table(memory_plan.plan_memory(work), memory)


def _feature_shapes(cfg: TrainConfig, crops: CropDataset) -> dict[str, tuple[int, ...]]:
    """View -> shape [L, D, z, y, x] of the cached features of a crop."""
    cache = crops.cache
    if cache is None:
        return {}
    grid = [n // p for n, p in zip(cfg.crop.size, cfg.student.patch, strict=True)]
    return {view: (*cache.mean[view].shape, *grid) for view in crops.views}
