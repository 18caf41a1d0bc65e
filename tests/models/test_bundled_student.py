"""The student that ships in the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core import files
from hpc_neuro.core.morphology import concatenate_trees
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.models.student import load_student
from hpc_neuro.models.student_folder import find_student
from hpc_neuro.trace_stacks.predictor import StackPredictor
from hpc_neuro.trace_stacks.tracer import trace_image
from tests.helpers.stacks import make_neuron, take_picture

FOLDER = find_student(Path("bundled"))


def test_the_weights_are_those_of_the_card_and_small() -> None:
    student, extra = load_student(FOLDER)
    card = json.loads((FOLDER / "card.json").read_text())
    assert card["parameters"] == sum(value.numel() for value in student.state_dict().values())
    assert card["sha256"] == files.sha256(FOLDER / "model.safetensors")
    assert card["license"] == "Apache-2.0"
    assert extra["contrast"] == "local"
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12e6


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_it_finds_neurons_under_noise(seed: int) -> None:
    """Neurons of another generator than that of its training."""
    gold = make_neuron(seed)
    image = take_picture(gold).astype(np.float32)
    image += np.random.default_rng(seed).normal(0, 0.35 * image.max(), image.shape).astype(np.float32)
    z, y, x = image.shape
    trace = trace_image(lambda box: image[box.slices], (z, y, x), None, predictor=StackPredictor(Path("bundled")))
    assert match_cable(concatenate_trees(trace.trees), gold, 4.0).f1 > 0.8
