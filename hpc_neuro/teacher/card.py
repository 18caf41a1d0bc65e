"""The folder of a trained teacher: its weights, and the card that says how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.models.teacher_folder import NOTE
from hpc_neuro.teacher.trainer import Progress, Recipe

WEIGHTS = "teacher.safetensors"
"""Name of the weights in the folder of a teacher."""
CURVE_POINTS = 50
"""Points of the loss curve that the card keeps, about."""
OLD_STAGE_KEYS = ("data", "method", "recipe", "steps", "images_seen", "training_seconds", "loss_curve")
"""What cards held of the one stage of training before they had a list of stages."""


@dataclass(frozen=True)
class Origin:
    """What is known of a teacher before its training, or its last stage of it, begins."""

    verb: str
    """`train` or `continue`."""
    data: Mapping[str, Any]
    """What this stage learns from."""
    license: str
    stages: Sequence[Mapping[str, Any]] = ()
    """Cards of the stages before this one."""
    teacher: Mapping[str, str] | None = None
    """Name and sha256 of the teacher that this stage began with; None: random weights."""


def list_stages(card: Mapping[str, Any], teacher: Teacher) -> list[dict[str, Any]]:
    """The stages of training that a card lists; of a teacher without a card of ours, its name and digest."""
    if "stages" in card:
        return list(card["stages"])
    if card:
        return [{"verb": "train", **{key: card[key] for key in OLD_STAGE_KEYS if key in card}}]
    return [{"verb": "published weights", "teacher": dict(teacher.identity)}]


def write_teacher(
    out: Path,
    recipe: Recipe,
    vit: nn.Module,
    progress: Progress,
    origin: Origin,
    probes: Mapping[str, Any] | None = None,
    gate: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the weights (float16) and their card into `out`; returns the card.

    probes, gate: figures of the finished teacher; None while it trains, or where nothing was measured.
    """
    card = {
        **_write_weights(out, vit, recipe.patch, (recipe.mean, recipe.std), origin.license),
        "recipe": {"objective": recipe.objective.name, "depth": len(vit.blocks)},  # type: ignore[arg-type]
        "stages": [*origin.stages, _describe_stage(recipe, progress, origin)],
        "probes": probes,
        "gate": gate,
    }
    files.write_json(out / NOTE, card)
    return card


def write_copy(out: Path, teacher: Teacher) -> None:
    """Write a teacher that was not trained here, such as the untrained copy of one, as `trained` reads it."""
    out.mkdir(parents=True, exist_ok=True)
    head = _write_weights(out, teacher.backbone, teacher.patch, (teacher.mean, teacher.std), "not stated")
    stages = list_stages({}, teacher)
    files.write_json(out / NOTE, {**head, "recipe": {"objective": "none", "depth": teacher.depth}, "stages": stages})


def _write_weights(
    out: Path, vit: nn.Module, patch: int, input_moments: tuple[Sequence[float], Sequence[float]], license_: str
) -> dict[str, Any]:
    """Write the weights (float16); the part of the card that says how they are loaded."""
    arch = str(vit.pretrained_cfg["architecture"])  # type: ignore[index]
    weights = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in vit.state_dict().items()}
    with files.atomic(out / WEIGHTS) as part:
        save_file(weights, part, metadata={"arch": arch, "patch": str(patch), "license": license_})

    mean, std = input_moments
    return {
        "name": "trained",
        "arch": arch,
        "patch": patch,
        "file": WEIGHTS,
        "sha256": files.sha256(out / WEIGHTS),
        "dtype": "float16",
        "license": license_,
        "input": {
            "mean": list(mean),
            "std": list(std),
            "range": "0..1 before normalization",
            "size": int(vit.patch_embed.img_size[0]),  # type: ignore[union-attr,index]
        },
    }


def _describe_stage(recipe: Recipe, progress: Progress, origin: Origin) -> dict[str, Any]:
    # It ends with the last point.
    curve = progress.curve[:: -max(1, len(progress.curve) // CURVE_POINTS)][::-1]
    return {
        "verb": origin.verb,
        **({"teacher": dict(origin.teacher)} if origin.teacher else {}),
        "data": dict(origin.data),
        "objective": recipe.objective.name,
        "method": recipe.objective.method,
        "task": asdict(recipe.task),
        "optim": schema.to_plain(recipe.optim),
        "steps": progress.step,
        "images_seen": progress.step * recipe.optim.batch,
        "training_seconds": round(progress.seconds, 1),
        "loss_curve": [[step, round(loss, 4)] for step, loss in curve],
        "code": run_folder.code_version(),
    }
