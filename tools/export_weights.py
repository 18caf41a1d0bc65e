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
from hpc_neuro.train.checkpoint.student_weights import open_weights
from hpc_neuro.train.checkpoint.tensor_files import write_tensors


def export_student(source: Path, out: Path, plain: bool = False) -> dict[str, Any]:
    """Write the student of a checkpoint, or of a run's newest one. Returns `extra` of student.yaml.

    Raises InputError when there is no complete checkpoint, or its files lack something.
    """
    checkpoint = _find_checkpoint(source)
    weights = open_weights(checkpoint, plain)
    extra = weights.make_extra() | {"averaged": weights.is_averaged}
    content = {"student": weights.state.student, "code": run_folder.code_version(), "extra": extra}

    if out.exists() and not (out / "student.yaml").is_file():
        raise InputError(f"{out} exists and holds no exported student; give a new folder")

    with files.atomic(out) as part:
        part.mkdir()
        digest = write_tensors(part / "model.safetensors", weights.shapes, weights.stream(), {"format": "pt"})
        saved = TypeAdapter(SavedStudent).validate_python(content | {"sha256": digest})
        (part / "student.yaml").write_text(schema.dump(saved), encoding="utf-8")
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


def main() -> int:
    """Command line; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint or a run")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--plain", action="store_true", help="the weights themselves, not their running average")
    args = parser.parse_args()

    try:
        extra = export_student(args.source, args.out, args.plain)
    except (InputError, ConfigError) as error:
        sys.stderr.write(f"export_weights: {error}\n")
        return EXIT_BAD_INPUT

    sys.stdout.write(f"{args.out}: step {extra['step']}, {'averaged' if extra['averaged'] else 'plain'} weights\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
