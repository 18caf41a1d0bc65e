"""Weights that `infer` loads, from any checkpoint of a training run, saved by any number of ranks at any ZeRO stage.

    python -m tools.export_weights RUN/checkpoints/step_00001000 OUT [--plain]
    python -m tools.export_weights RUN OUT                                        the newest checkpoint of a run

Writes OUT/student.yaml and OUT/model.safetensors (float32), one tensor in memory at a time, in one process, without
DeepSpeed. The running average is exported if the run kept one; with `--plain` the weights themselves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.models.config import SavedStudent
from hpc_neuro.train.checkpoint import folder
from hpc_neuro.train.checkpoint.folder import TrainingState
from hpc_neuro.train.checkpoint.tensor_files import list_kinds, stream_tensors, write_tensors

_PREFIX = "student."


def export(source: Path, out: Path, plain: bool = False) -> dict[str, Any]:
    """Write the student of a checkpoint, or of a run's newest one. Returns `extra` of student.yaml.

    Raises InputError when there is no complete checkpoint, or its files lack something.
    """
    checkpoint = _find_checkpoint(source)
    state = folder.read_training_state(checkpoint)
    is_averaged = not plain and "average" in list_kinds(checkpoint)
    extra = _make_extra(state, is_averaged)
    content = {"student": state.student, "code": run_folder.code_version(), "extra": extra}
    saved = TypeAdapter(SavedStudent).validate_python(content)

    if out.exists() and not (out / "student.yaml").is_file():
        raise InputError(f"{out} exists and holds no exported student; give a new folder")

    shapes = {name: shape for name, shape in state.shapes.items() if name.startswith(_PREFIX)}
    tensors = stream_tensors(checkpoint, "average" if is_averaged else "weight", shapes)
    with files.atomic(out) as part:
        part.mkdir()
        (part / "student.yaml").write_text(schema.dump(saved), encoding="utf-8")
        own_shapes = {name.removeprefix(_PREFIX): shape for name, shape in shapes.items()}
        write_tensors(part / "model.safetensors", own_shapes, tensors, {"format": "pt"})
    return extra


def _find_checkpoint(source: Path) -> Path:
    """The checkpoint at `source`, or the newest one of the run at `source`."""
    if (source / folder.MARKER).exists():
        return source
    newest = folder.find_newest(source / "checkpoints")
    if newest is None:
        raise InputError(
            f"{source} is no complete checkpoint and has none in checkpoints/; give a folder that train wrote"
        )
    return newest


def _make_extra(state: TrainingState, is_averaged: bool) -> dict[str, Any]:
    """What student.yaml has besides the config, as `train` writes it."""
    is_scored = state.score is not None and state.scored == state.step
    return {
        "window": list(state.window),
        "mirrored": state.mirrored,
        "threshold": 0.5 if state.score is None else state.score.threshold,
        "step": state.step,
        "val_dice": state.score.dice_best if state.score is not None and is_scored else None,
        "averaged": is_averaged,
    }


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
        return EXIT_BAD_INPUT

    sys.stdout.write(f"{args.out}: step {extra['step']}, {'averaged' if extra['averaged'] else 'plain'} weights\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
