"""`hpc-neuro teacher probe`: whether a teacher is worth anything on the volumes of a store, by the gate."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.precompute.config import GateConfig

HELP = """\
hpc-neuro teacher probe teacher.model=NAME store=STORE
    Whether a teacher is worth anything on the volumes of a store: its features against those of random weights.
    teacher=NAME is short for teacher.model=NAME. `hpc-neuro doctor` with the same keys does the same.
    More keys: teacher.weights=FOLDER volumes=[ID,ID] layer=N samples=N copies=N.
    Exit code: 0 it passes, 3 it fails.
"""


def main(argv: Sequence[str]) -> int:
    """Print the gate's table for one teacher and its verdict; returns the exit code. ConfigError and InputError."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP)
        return EXIT_DONE

    keys = [f"teacher.model={text.partition('=')[2]}" if text.startswith("teacher=") else text for text in argv]
    if not any(text.startswith("store=") for text in keys) or any("=" not in text for text in keys):
        raise ConfigError(f"{' '.join(argv) or 'no key'} is not understood; usage:\n{HELP}")

    # Bad keys are refused before torch is imported.
    cfg = load(GateConfig, None, keys)
    from hpc_neuro.precompute import gate_table

    verdict = gate_table.run_gate(cfg, _write_line)
    if not verdict.judgments:
        raise InputError(f"{verdict.teacher} cannot be judged: {'; '.join(verdict.unjudged)}")

    _write_line(f"{verdict.teacher} passes" if verdict.passes else gate_table.explain_failure(verdict))
    return EXIT_DONE if verdict.passes else EXIT_FAILURES


def _write_line(text: str) -> None:
    # A volume takes up to half a minute: its rows are not held back.
    print(text, flush=True)
