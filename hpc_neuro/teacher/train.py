"""The verb `teacher train`: a 2D teacher from a folder of photographs, where no model hub can be reached.

Importing the module does not import torch.
"""

from __future__ import annotations

from hpc_neuro.teacher.config import TeacherTrainConfig

__all__ = ["TeacherTrainConfig", "forecast", "run"]


def forecast(cfg: TeacherTrainConfig) -> list[str]:
    """Check everything that the run needs and describe what it will do, in lines. Writes nothing."""
    from hpc_neuro.teacher import verbs

    return verbs.forecast_training(cfg)


def run(cfg: TeacherTrainConfig) -> int:
    """Train a teacher, or resume. Returns the exit code."""
    from hpc_neuro.teacher import verbs

    return verbs.train(cfg)
