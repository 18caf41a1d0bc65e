"""Photographs, volumes and one finished teacher, which the tests share: they read them, or change a copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from hpc_neuro.core.schema import load
from hpc_neuro.teacher import adapt, train
from hpc_neuro.teacher.config import TeacherContinueConfig, TeacherTrainConfig

SMALL = (
    *("side=64", "task.crop=32", "optim.batch=4", "optim.part=3", "optim.steps=12"),
    *("held=4", "log=2", "every=0", "threads=1"),
)
"""Keys of a training of seconds."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of smooth stripes, not square, one of them gray, one in a subfolder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    y, x = np.mgrid[:70, :90]
    for number in range(10):
        stripe = np.sin(x / (3 + number) + y / 5)
        pixels = np.stack([stripe, stripe * 0.5, -stripe], -1) * 100 + 128
        picture = Image.fromarray(pixels.astype(np.uint8))
        path = folder / ("more/9.webp" if number == 9 else f"{number}.jpg")
        (picture.convert("L") if number == 3 else picture).save(path)
    return folder


def write_stack(path: Path, shape: tuple[int, int, int] = (20, 70, 80), seed: int = 0) -> Path:
    """A noisy stack with one bright fiber."""
    image = np.random.default_rng(seed).integers(90, 110, shape, dtype=np.uint16)
    image[shape[0] // 3 : shape[0] // 3 + 3, 20:24, 5:-5] += 2000
    tifffile.imwrite(path, image, photometric="minisblack", metadata={"axes": "ZYX"})
    return path


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stack(tmp_path_factory.mktemp("stacks") / "fiber.tif")


def configure(photos: Path, out: Path, *keys: str) -> TeacherTrainConfig:
    return load(TeacherTrainConfig, None, [f"photos={photos}", f"out={out}", "depth=2", *SMALL, *keys])


def configure_continuation(volumes: object, teacher: Path, out: Path, *keys: str) -> TeacherContinueConfig:
    paths = [str(path) for path in volumes] if isinstance(volumes, list) else [str(volumes)]
    named = ["teacher.model=trained", f"teacher.weights={teacher}", f"out={out}", "windows=40", *SMALL]
    return load(TeacherContinueConfig, None, [*named, *keys], {"volumes": paths})


@pytest.fixture(scope="session")
def teacher_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("teachers") / "whole"
    assert train.run(configure(photos, out)) == 0
    return out


@pytest.fixture(scope="session")
def continued_run(teacher_run: Path, stack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished teacher, continued on a stack without interruption."""
    out = tmp_path_factory.mktemp("teachers") / "continued"
    assert adapt.run(configure_continuation(stack, teacher_run, out)) == 0
    return out
