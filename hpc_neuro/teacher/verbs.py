"""Run `teacher train` and `teacher continue`: check the input, train, then probe and judge what was learned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_neuro.core import distributed, files, run_folder
from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data.store import Store
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import Teacher, load_teacher, make_untrained_copy, read_card
from hpc_neuro.models.teacher_folder import NOTE
from hpc_neuro.precompute.gate_table import HEADER, TeacherGate
from hpc_neuro.teacher import frozen_features
from hpc_neuro.teacher.card import WEIGHTS, Origin, list_stages, write_teacher
from hpc_neuro.teacher.config import MIN_HELD, TeacherContinueConfig, TeacherTrainConfig
from hpc_neuro.teacher.masked_autoencoder import PixelObjective
from hpc_neuro.teacher.masked_structure import StructureObjective
from hpc_neuro.teacher.objective import Objective
from hpc_neuro.teacher.photographs import PhotographFolder, list_photographs, open_tiles
from hpc_neuro.teacher.slices import UnlabeledVolume, cut_windows, list_volumes
from hpc_neuro.teacher.tiles import Source, Tiles
from hpc_neuro.teacher.trainer import Recipe, Training, build_network, open_workers

log = logging.getLogger(__name__)

_MAY_CHANGE = ("optim.minutes", "optim.steps", "judge", "every", "log", "threads", "about", "license")
"""Keys that may differ when a run is resumed."""
OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (StructureObjective(), PixelObjective())}
"""Every objective by its name."""


@dataclass(frozen=True)
class Plan:
    """A training with everything that it needs."""

    recipe: Recipe
    make_start: Callable[[], nn.Module]
    """The ViT that training begins with."""
    sources: tuple[Source, ...]
    origin: Origin
    shown: Tiles
    """Images that the probes at the end are measured on."""
    start: Teacher | None = None
    """The teacher that is continued."""
    failures: tuple[str, ...] = ()
    """A sentence on each volume that was left out."""


# --- teacher train ---


def forecast_training(cfg: TeacherTrainConfig) -> list[str]:
    """Count the photographs and check the store; -> lines. Raises InputError."""
    photographs = list_photographs(cfg.photos, cfg.held)
    _check_judge(cfg, [])
    return [_describe_photographs(photographs, cfg.held, cfg.side), *_describe_budget(cfg)]


def train(cfg: TeacherTrainConfig) -> int:
    """Train a new teacher, or resume. Returns the exit code. Raises InputError."""
    photographs = list_photographs(cfg.photos, cfg.held)
    judged = _check_judge(cfg, [])

    def plan() -> Plan:
        tiles = open_tiles(photographs, cfg.out / "cache", cfg.side, cfg.held)
        objective = OBJECTIVES[cfg.objective]
        recipe = Recipe(objective, cfg.patch, cfg.task, cfg.optim)
        data = {"photographs": _count_photographs(photographs, cfg.held, cfg.about)}
        return Plan(
            recipe,
            lambda: _make_new(cfg),
            (Source(tiles, cfg.optim.batch, is_photographs=True),),
            Origin("train", data, cfg.license),
            tiles,
        )

    inputs = {"photographs": photographs.digest}
    return _run("teacher train", cfg, inputs, plan, judged)


def _make_new(cfg: TeacherTrainConfig) -> nn.Module:
    """A new ViT; the same at every start of a run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.optim.seed)
        return OBJECTIVES[cfg.objective].make_encoder(cfg.patch, cfg.depth)


# --- teacher continue ---


def choose_objective(teacher: Teacher) -> Objective:
    """The objective by which a teacher can go on learning. Raises InputError where there is none."""
    obstacles = []
    for objective in OBJECTIVES.values():
        obstacle = objective.find_obstacle(teacher)
        if obstacle is None:
            return objective
        obstacles.append(obstacle)
    raise InputError(
        f"the teacher {teacher.identity['name']} cannot be continued: {'; '.join(obstacles)}; give one that "
        "`hpc-neuro teacher train` made, or a DINOv3"
    )


def forecast_continuation(cfg: TeacherContinueConfig) -> list[str]:
    """Open the teacher and every volume; -> lines. Raises InputError and ConfigError."""
    teacher, volumes, photographs = _open_continuation(cfg)
    _check_judge(cfg, volumes)
    lines = [
        f"{teacher.identity['name']}: {teacher.depth} blocks of {teacher.dim} channels, patch {teacher.patch}, "
        f"objective {choose_objective(teacher).name}",
        f"{files.format_count(len(volumes), 'volume')}, {max(1, cfg.windows // len(volumes))} windows of "
        f"{cfg.side} x {cfg.side} pixels from each",
        *(f"  {volume.name}: {' x '.join(map(str, volume.shape))} voxels" for volume in volumes),
    ]
    if photographs:
        lines.append(_describe_photographs(photographs, cfg.held, cfg.side))
    return [*lines, *_describe_budget(cfg)]


def continue_teacher(cfg: TeacherContinueConfig) -> int:
    """Continue a teacher on volumes, or resume. Returns the exit code: 3 when volumes were left out.

    Raises InputError and ConfigError.
    """
    teacher, volumes, photographs = _open_continuation(cfg)
    judged = _check_judge(cfg, volumes)

    def plan() -> Plan:
        return _plan_continuation(cfg, teacher, volumes, photographs)

    inputs = {"teacher": teacher.identity["sha256"], **{volume.name: volume.digest for volume in volumes}}
    if photographs:
        inputs["photographs"] = photographs.digest
    return _run("teacher continue", cfg, inputs, plan, judged)


def _open_continuation(
    cfg: TeacherContinueConfig,
) -> tuple[Teacher, list[UnlabeledVolume], PhotographFolder | None]:
    """The teacher, the volumes and the photographs, checked. Raises InputError and ConfigError."""
    teacher = load_teacher(cfg.teacher)
    choose_objective(teacher)
    if fault := cfg.task.find_fault(teacher.patch):
        raise ConfigError(fault)
    photographs = list_photographs(cfg.photos, cfg.held) if cfg.photos else None
    return teacher, list_volumes(cfg), photographs


def _plan_continuation(
    cfg: TeacherContinueConfig,
    teacher: Teacher,
    volumes: Sequence[UnlabeledVolume],
    photographs: PhotographFolder | None,
) -> Plan:
    cache = cfg.out / "cache"
    windows = cut_windows(volumes, cfg.windows, cfg.side, cfg.task.crop, cfg.optim.seed, cache)
    card = read_card(cfg.teacher)
    data: dict[str, Any] = {
        "volumes": list(windows.volumes),
        "left_out": list(windows.failures),
        "windows": len(windows.tiles.train),
        "held_out_windows": len(windows.tiles.held),
        "about": cfg.about,
    }

    sources = []
    beside = round(cfg.photo_share * cfg.optim.batch) if photographs else 0
    if photographs and beside:
        tiles = open_tiles(photographs, cache, cfg.side, cfg.held)
        sources.append(Source(tiles, beside, is_photographs=True))
        data["photographs"] = {**_count_photographs(photographs, cfg.held, ""), "share": beside / cfg.optim.batch}
    sources.append(Source(windows.tiles, cfg.optim.batch - beside, is_photographs=False))

    recipe = Recipe(
        choose_objective(teacher), teacher.patch, cfg.task, cfg.optim, teacher.mean, teacher.std, is_continued=True
    )
    terms = cfg.license or str(card.get("license") or f"that of {teacher.identity['name']}")
    return Plan(
        recipe,
        lambda: load_teacher(cfg.teacher).backbone.requires_grad_(True),
        tuple(sources),
        Origin("continue", data, terms, list_stages(card, teacher), teacher.identity),
        windows.tiles,
        teacher,
        windows.failures,
    )


# --- Both ---


def _run(
    verb: str,
    cfg: TeacherTrainConfig | TeacherContinueConfig,
    inputs: Mapping[str, str],
    plan_training: Callable[[], Plan],
    judged: Sequence[str],
) -> int:
    """Train in a run folder, or resume; returns the exit code. judged: ids of the volumes of `judge.store`."""
    weights, card_path = cfg.out / WEIGHTS, cfg.out / NOTE
    is_whole = weights.exists() and card_path.exists()
    with run_folder.start(verb, cfg, cfg.out, inputs, may_change=_MAY_CHANGE, whole=is_whole) as record:
        if record.complete:
            return EXIT_DONE

        files.remove_parts(cfg.out / "cache")
        plan, device = plan_training(), distributed.device()
        for line in plan.failures:
            log.error("left out: %s", line)

        sources = [Source(source.tiles.on(device), source.count, source.is_photographs) for source in plan.sources]
        training = Training(plan.recipe, plan.make_start(), sources, cfg.out, device)
        vit = training.network.vit
        with open_workers(device, cfg.threads) as pool:
            training.run(
                pool,
                cfg.every,
                cfg.log,
                lambda: write_teacher(cfg.out, plan.recipe, vit, training.progress, plan.origin),
            )

        failures = [*plan.failures, *_finish(cfg, plan, training, judged)]
        summary = {"steps": training.progress.step, "sha256": files.sha256(weights)}
        record.finish(summary, failures, [card_path], [weights])
    log.info("use it with  teacher.model=trained teacher.weights=%s", cfg.out)
    return EXIT_FAILURES if failures else EXIT_DONE


def _finish(
    cfg: TeacherTrainConfig | TeacherContinueConfig, plan: Plan, training: Training, judged: Sequence[str]
) -> list[str]:
    """Write the weights, measure what they know, and write the card with the figures; sentences on what failed."""
    recipe, vit, progress = plan.recipe, training.network.vit, training.progress
    write_teacher(cfg.out, recipe, vit, progress, plan.origin)

    # What is measured is what lies in the folder, rounded.
    finished = load_teacher(TeacherConfig(model="trained", weights=cfg.out))
    finished.to(training.device)
    probes = _probe(plan, training, finished)
    gate, failures = None, []
    if cfg.judge.store is not None:
        # A volume that cannot be judged must not cost the training.
        try:
            gate = _judge(finished, cfg.judge.store, judged, bool(cfg.judge.volumes))
        except InputError as error:
            failures.append(f"not judged: {error}")
            log.error("%s", failures[-1])
    write_teacher(cfg.out, recipe, vit, progress, plan.origin, probes, gate)
    return failures


def _probe(plan: Plan, training: Training, finished: Teacher) -> dict[str, Any] | None:
    """What the teacher knows beside how it began and beside random weights; None without held-out images."""
    if len(plan.shown.held) < MIN_HELD:
        log.warning("too few windows are held out (%d) for the probes of the card", len(plan.shown.held))
        return None

    log.info("probing what it knows, beside other weights: some minutes on a CPU")
    device = training.device
    teachers = {"trained": finished, "random_weights_timm": make_untrained_copy(finished, plan.recipe.optim.seed)}
    if plan.start is not None:
        teachers["before"] = plan.start.to(device)
        return {"frozen_features": frozen_features.probe_features(teachers, plan.shown)}

    # A new teacher begins with more than timm's random weights: a start of the patch embedding and of the blocks.
    network = build_network(plan.recipe, plan.make_start(), plan.sources, device)
    teachers["random_weights"] = Teacher(
        network.vit, {"name": "random weights", "sha256": ""}, finished.mean, finished.std
    )
    images = plan.shown.show(plan.shown.held, frozen_features.SIZE)
    extra = plan.recipe.objective.measure_extra(training.network, network, images, plan.recipe.task)
    return {"frozen_features": frozen_features.probe_features(teachers, plan.shown), **extra}


def _judge(teacher: Teacher, folder: Path, volumes: Sequence[str], must_judge_all: bool) -> dict[str, Any]:
    """The gate's figures of the teacher on some volumes of a store, with the printed table."""
    log.info(HEADER)
    gate = TeacherGate(teacher, "trained", Store(folder), log.info)
    verdict = gate.judge(volumes) if must_judge_all else gate.judge_some(volumes)
    return {"store": str(folder), "samples": gate.samples, "copies": gate.copies, **verdict.to_json()}


def _check_judge(cfg: TeacherTrainConfig | TeacherContinueConfig, volumes: Sequence[UnlabeledVolume]) -> list[str]:
    """Ids of the volumes that will judge the teacher. Raises ConfigError and InputError."""
    folder = cfg.judge.store
    if folder is None:
        if cfg.judge.volumes:
            raise ConfigError("judge.volumes names volumes of judge.store, which is not given; give both or neither")
        return []

    store = Store(folder)
    used = {volume.id for volume in volumes if volume.store and volume.store.resolve() == folder.resolve()}
    if unknown := [id_ for id_ in cfg.judge.volumes if id_ not in store.ids]:
        raise InputError(f"{folder} has no volume {', '.join(unknown)}; name some of {', '.join(store.ids)}")
    if seen := [id_ for id_ in cfg.judge.volumes if id_ in used]:
        raise ConfigError(
            f"the teacher would be judged on {', '.join(seen)}, which it learns from; name others with judge.volumes, "
            "or leave its split out of `splits`"
        )

    judged = list(cfg.judge.volumes or (id_ for id_ in store.ids if id_ not in used))
    if not judged:
        raise ConfigError(
            f"the teacher learns from every volume of {folder}, and none is left to judge it; give another judge.store"
        )
    return judged


def _count_photographs(photographs: PhotographFolder, held: int, about: str) -> dict[str, Any]:
    counts = {"count": len(photographs.names), "held_out": held}
    return {**counts, "about": about} if about else counts


def _describe_photographs(photographs: PhotographFolder, held: int, side: int) -> str:
    size = files.format_bytes(photographs.tile_bytes(side))
    return f"{len(photographs.names)} photographs, {held} of them held out; {size} decoded"


def _describe_budget(cfg: TeacherTrainConfig | TeacherContinueConfig) -> list[str]:
    optim = cfg.optim
    budget = files.format_count(optim.steps, "step") if optim.steps else f"{optim.minutes:g} minutes"
    return [f"{budget} of {optim.batch} crops of {cfg.task.crop} x {cfg.task.crop} pixels, in {cfg.out}"]
