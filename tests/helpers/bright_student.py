"""A student with random weights that calls bright voxels neurite: inference can be tested without training one."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import Student, build_student, save_student
from tests.helpers.small_volumes import WINDOW

CONFIG = StudentConfig(depth=1, patch=(4, 16, 16), channels=(4, 4, 4))


def build_bright_student(gain: float = 8.0, level: float = 0.3) -> Student:
    """The voxels pass through the finest level; context and transformer change them a little.

    gain: slope of the logit over the brightness; level: the brightness where it is zero.
    """
    torch.manual_seed(0)
    student = build_student(CONFIG)
    first, head = student.encoder.first.conv, student.decoder.head
    with torch.no_grad():
        for layer in student.decoder.blocks[0].layers:
            layer.conv.weight *= 0.1
        for up in student.decoder.up:
            up.weight *= 0.1

        for weight, center in ((first.weight, (1, 1, 1)), (head.weight, ())):
            weight *= 0.1
            for channel in range(4):
                weight[(channel, channel, *center)] = 1.0

        head.weight *= gain
        head.bias.fill_(-gain * level)
    return student


def save_bright_student(folder: Path, **more: object) -> None:
    """Write its weights with the window and the threshold that the tests of inference use; `more`: further notes."""
    extra = {"window": list(WINDOW), "threshold": 0.45, **more}
    save_student(folder, CONFIG, build_bright_student().state_dict(), extra)
