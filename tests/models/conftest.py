"""Fixtures of the models' tests."""

from __future__ import annotations

import pytest

from hpc_neuro.models.teacher import Teacher
from tests.helpers.tiny_teachers import family


@pytest.fixture(scope="session")
def tiny() -> Teacher:
    """A shallow supervised ViT-tiny."""
    return family("vit_tiny_patch16_224")
