"""Fixtures all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # several workers share the cores
settings.register_profile("here", deadline=None, derandomize=True)  # first calls into torch are slow
settings.load_profile("here")

_LINEAR = torch.nn.functional.linear
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real neurons (HPC_NEURO_DATA, else shared/data beside the checkout); skips where there is none."""
    folder = Path(os.environ.get("HPC_NEURO_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real neurons at {folder}; set HPC_NEURO_DATA to run this test")
    return folder


@pytest.fixture(autouse=True)
def own_linear() -> Iterator[None]:
    """DeepSpeed's stage 3 replaces torch's linear function for the rest of the process; the next test gets torch's."""
    yield
    torch.nn.functional.linear = _LINEAR


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """What a test's command line logs to is closed after the test; the next test gets handlers of its own."""
    yield
    for name in (None, "hpc_neuro"):
        logger = logging.getLogger(name)
        # Those of pytest are of subclasses.
        for handler in [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]:
            logger.removeHandler(handler)
