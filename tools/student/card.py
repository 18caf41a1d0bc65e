"""The weights as the package ships them: float16, with a card that says what they were trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.data.store import Store
from hpc_neuro.models.config import SavedStudent
from hpc_neuro.models.student import load_student
from hpc_neuro.models.student_folder import find_student

CARD = "card.json"
"""File of the folder that tells people what the weights are."""


def export_weights(runs: list[Path], store: Path, folder: Path, shapes: int) -> None:
    """Write the best weights of the last run as float16, student.yaml and the card into `folder`, whole or not at all.

    runs: the trainings in their order; store: the volumes of the last one; shapes: reconstructions that lent the scenes
    their shapes.
    """
    source = find_student(runs[-1])
    student, extra = load_student(source)
    code = extra.pop("code")
    half = {name: value.to(torch.float16).contiguous() for name, value in student.state_dict().items()}

    with files.atomic(folder) as part:
        part.mkdir(parents=True)
        save_file(half, part / "model.safetensors")
        digest = files.sha256(part / "model.safetensors")
        saved = SavedStudent(student=student.cfg, code=code, extra=extra, sha256=digest)
        (part / "student.yaml").write_text(schema.dump(saved), encoding="utf-8")

        card = {
            "name": "bundled",
            "license": "Apache-2.0",
            "dtype": "float16",
            "sha256": digest,
            "parameters": sum(value.numel() for value in half.values()),
            "threshold": round(float(extra["threshold"]), 4),
            "data": {**_describe_data(Store(store)), "reconstructions_that_lent_shapes": shapes},
            "neurite_widths_voxels": extra.get("neurite_widths"),
            "trainings": [_describe_run(run) for run in runs],
            "code": run_folder.code_version(),
        }
        files.write_json(part / CARD, card)


def _describe_data(store: Store) -> dict[str, Any]:
    """What the last training saw. Scenes are counted, real volumes are named."""
    records = [store[name] for name in store.ids]
    real = [volume for volume in records if not volume.id.startswith("scene_")]
    ratios = [volume.voxel_size[0] / volume.voxel_size[2] for volume in records]
    return {
        "scenes": dict(Counter(volume.split for volume in records if volume.id.startswith("scene_"))),
        "real": {volume.id: {"shape": volume.shape, "voxel_size_um": volume.voxel_size} for volume in real},
        "voxel_z_over_xy": [round(min(ratios), 2), round(max(ratios), 2)],
        "rights": "the volumes are not distributed; weights learned from them are free to use",
    }


def _describe_run(run: Path) -> dict[str, Any]:
    """Settings and validation curve of a training."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"]: round(row["dice_best"], 4) for row in rows if row["kind"] == "val"}
    settings = files.read_json(run / "run.json", "train again", dict)
    return {"validation_dice": curve, "seconds": settings.get("summary", {}).get("seconds")}
