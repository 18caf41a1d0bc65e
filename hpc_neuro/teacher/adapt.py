"""The verb `teacher continue`: a teacher goes on learning on unlabeled microscope volumes, without labels.

Importing the module does not import torch.
"""

from __future__ import annotations

from hpc_neuro.teacher.config import TeacherContinueConfig

__all__ = ["TeacherContinueConfig", "forecast", "run"]


def forecast(cfg: TeacherContinueConfig) -> list[str]:
    """Open the teacher and every volume and describe what a run will do, in lines. Writes nothing."""
    from hpc_neuro.teacher import verbs

    return verbs.forecast_continuation(cfg)


def run(cfg: TeacherContinueConfig) -> int:
    """Continue a teacher, or resume. Returns the exit code."""
    from hpc_neuro.teacher import verbs

    return verbs.continue_teacher(cfg)
