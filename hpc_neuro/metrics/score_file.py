"""metrics.json: the scores of an evaluation, and its checked reader, which all verbs use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from hpc_neuro.core import files

SCORE_FILE = "metrics.json"
"""Name of the file in the folder of an evaluation."""


@with_config(ConfigDict(extra="allow"))
class _ScoresForm(TypedDict):
    """The parts that other verbs read; evaluate writes more."""

    volumes: dict[str, dict[str, dict[str, float | None]]]
    mean: dict[str, dict[str, float | None]]


def read_scores(folder: Path, hint: str) -> dict[str, Any]:
    """`volumes`: volume -> method -> metric -> value; `mean`: method -> metric -> value; and more.

    Raises InputError, which ends with `hint`.
    """
    return dict(files.read_json(folder / SCORE_FILE, hint, _ScoresForm))
