"""Weights that `infer` loads, from any checkpoint of a training run, saved by any number of ranks at any ZeRO stage.

    python -m tools.export_weights RUN/checkpoints/step_00001000 OUT [--plain]
    python -m tools.export_weights RUN OUT                                        the newest checkpoint of a run

Writes OUT/student.yaml and OUT/model.safetensors (float32), one tensor in memory at a time, in one process, without
DeepSpeed. The running average is taken where the run kept one; `--plain` takes the weights themselves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.models.config import SavedStudent
from hpc_neuro.train.checkpoint import saver
from hpc_neuro.train.checkpoint.tensor_files import list_kinds, stream_tensors, write_tensors

_PREFIX = "student."


def export(source: Path, out: Path, plain: bool = False) -> dict[str, Any]:
    """Write the student of a checkpoint, or of a run's newest one; what student.yaml says beside the config.

    Raises InputError when there is no complete checkpoint, or its files lack something.
    """
    folder = source if (source / saver.MARKER).exists() else saver.find_newest(source / "checkpoints")
    if folder is None:
        raise InputError(
            f"{source} is no complete checkpoint and has none in checkpoints/; give a folder that train wrote"
        )
    state = files.read_json(folder / saver.TRAINING, "take another checkpoint")
    average = not plain and "average" in list_kinds(folder)
    shapes = {name: shape for name, shape in state["shapes"].items() if name.startswith(_PREFIX)}
    score = state["score"] or {}
    extra = {
        "window": state["window"],
        "mirrored": state["mirrored"],
        "threshold": score.get("threshold", 0.5),
        "step": state["step"],
        "val_dice": score.get("dice_best") if state["scored"] == state["step"] else None,
        "averaged": average,
    }
    held = {"student": state["student"], "code": run_folder.code_version(), "extra": extra}
    saved = TypeAdapter(SavedStudent).validate_python(held)
    if out.exists() and not (out / "student.yaml").is_file():
        raise InputError(f"{out} exists and holds no exported student; give a new folder")
    with files.atomic(out) as part:
        part.mkdir()
        (part / "student.yaml").write_text(schema.dump(saved), encoding="utf-8")
        tensors = stream_tensors(folder, "average" if average else "weight", shapes)
        own = {name.removeprefix(_PREFIX): shape for name, shape in shapes.items()}
        write_tensors(part / "model.safetensors", own, tensors, {"format": "pt"})
    return extra


def main() -> int:
    """Command line; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint or a run")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--plain", action="store_true", help="the weights themselves, not their running average")
    args = parser.parse_args()
    try:
        extra = export(args.source, args.out, args.plain)
    except (InputError, ConfigError) as error:
        sys.stderr.write(f"export_weights: {error}\n")
        return 2
    sys.stdout.write(f"{args.out}: step {extra['step']}, {'averaged' if extra['averaged'] else 'plain'} weights\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
