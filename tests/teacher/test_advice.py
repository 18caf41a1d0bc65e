"""What a refused teacher advises, done to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher

pytestmark = pytest.mark.slow


def test_a_trained_teacher_is_given_its_folder(teacher_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="needs `weights`, the folder that `hpc-neuro teacher` wrote"):
        TeacherConfig(model="trained")
    with pytest.raises(InputError, match="give the folder that `hpc-neuro teacher train` or `teacher continue` wrote"):
        load_teacher(TeacherConfig(model="trained", weights=tmp_path))
    assert load_teacher(TeacherConfig(model="trained", weights=teacher_run)).identity["name"] == "trained"


def test_the_file_of_a_trained_teacher_is_given_as_its_folder(teacher_run: Path) -> None:
    (file,) = teacher_run.glob("*.safetensors")
    with pytest.raises(InputError) as caught:
        load_teacher(TeacherConfig(model="vit_tiny_patch16_224.augreg_in21k", weights=file))
    assert "if `hpc-neuro teacher` made it, teacher.model=trained teacher.weights=FOLDER" in str(caught.value)
    assert load_teacher(TeacherConfig(model="trained", weights=file.parent)).identity["name"] == "trained"
