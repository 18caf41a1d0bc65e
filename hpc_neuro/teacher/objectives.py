"""The table of objectives, and the one by which a given teacher goes on learning."""

from __future__ import annotations

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.teacher.masked_autoencoder import PixelObjective
from hpc_neuro.teacher.masked_structure import StructureObjective
from hpc_neuro.teacher.objective import Objective

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (StructureObjective(), PixelObjective())}
"""Every objective by its name."""


def choose_objective(teacher: Teacher) -> Objective:
    """The objective by which a teacher can go on learning. Raises InputError where there is none."""
    obstacles = []
    for objective in OBJECTIVES.values():
        obstacle = objective.find_obstacle(teacher)
        if obstacle is None:
            return objective
        obstacles.append(obstacle)
    raise InputError(
        f"the teacher {teacher.identity['name']} cannot be continued: {'; '.join(obstacles)}; give one that "
        "`hpc-neuro teacher train` made, or a DINOv3"
    )
