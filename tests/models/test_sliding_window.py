"""models/sliding_window.py: blocks equal the whole, blending is exact, memory failures are survived."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpc_neuro.core.geometry import tile_volume
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import StudentOutput
from hpc_neuro.models import sliding_window
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import build_student

PATCH = (2, 4, 4)
WINDOW = (4, 8, 8)


class Fake(nn.Module):
    """A student of given logits; counts what it is asked, and runs out of memory above `limit` windows."""

    patch = PATCH

    def __init__(self, limit: int = 10**9, words: str = "") -> None:
        super().__init__()
        self.limit, self.words, self.batches = limit, words, []

    def forward(self, image: Tensor) -> StudentOutput:
        self.batches.append(len(image))
        if len(image) > self.limit:
            raise RuntimeError(self.words) if self.words else torch.OutOfMemoryError("CUDA out of memory")
        return StudentOutput(self.logits(image), {})

    def logits(self, image: Tensor) -> Tensor:
        return torch.logit(image, eps=1e-6)


class PositionBound(Fake):
    """Gives every voxel a value that depends on its window's content and its place in it."""

    def logits(self, image: Tensor) -> Tensor:
        place = torch.linspace(-1, 1, image[0].numel()).view_as(image[0])
        return image + place * image.mean((1, 2, 3, 4), keepdim=True)


def _image(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


sizes = st.tuples(st.integers(1, 13), st.integers(1, 27), st.integers(1, 27))
overlaps = st.sampled_from([0.0, 0.25, 0.5, 0.75])


@settings(deadline=None, max_examples=40)
@given(sizes, overlaps)
def test_blending_leaves_a_pointwise_prediction_alone(shape: tuple[int, int, int], overlap: float) -> None:
    image = _image(shape)
    probability = sliding_window.predict(Fake(), image, WINDOW, overlap)
    assert (probability.dtype, probability.shape) == (np.float32, shape)
    np.testing.assert_allclose(probability, np.clip(image, 1e-6, 1 - 1e-6), atol=2e-6)


@settings(deadline=None, max_examples=40)
@given(sizes, overlaps, st.tuples(*[st.integers(1, 3)] * 3))
def test_blocks_read_with_the_halo_equal_the_whole(
    shape: tuple[int, int, int], overlap: float, write: tuple[int, int, int]
) -> None:
    image, student = _image(shape), PositionBound()
    whole = sliding_window.predict(student, image, WINDOW, overlap)
    step, halo = (f(WINDOW, overlap, PATCH) for f in (sliding_window.step, sliding_window.halo))
    joined = np.zeros_like(whole)
    for block in tile_volume(shape, tuple(n * s for n, s in zip(write, step, strict=True)), halo):
        part = sliding_window.predict(student, image[block.read.slices], WINDOW, overlap)
        joined[block.write.slices] = part[block.write.relative_to(block.read.start).slices]
    np.testing.assert_allclose(joined, whole, atol=1e-6)


def test_blocks_of_a_real_student_equal_the_whole() -> None:
    torch.manual_seed(0)
    student = build_student(StudentConfig(depth=2, patch=(4, 8, 8), channels=(4, 6, 8)))
    nn.init.normal_(student.decoder.head.weight, std=2)
    image, window = _image((13, 24, 44)), (8, 16, 16)
    whole = sliding_window.predict(student, image, window, 0.5, batch=3)
    assert whole.std() > 0.01
    halo = sliding_window.halo(window, 0.5, student.patch)
    for block in tile_volume((13, 24, 44), (8, 16, 32), halo):
        part = sliding_window.predict(student, image[block.read.slices], window, 0.5)
        inner = part[block.write.relative_to(block.read.start).slices]
        assert np.abs(inner - whole[block.write.slices]).max() < 1e-4


def test_blending_is_the_weighted_mean_of_the_windows() -> None:
    """Against a direct sum over all windows with the Gaussian written out."""
    image, student = _image((8, 12, 16)), PositionBound()
    axes = [np.maximum(np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2), 1e-3) for n in WINDOW]
    gauss = axes[0][:, None, None] * axes[1][None, :, None] * axes[2]
    total, weight = np.zeros(image.shape), np.zeros(image.shape)
    starts = [range(0, n - w + 1, w // 2) for n, w in zip(image.shape, WINDOW, strict=True)]
    for corner in itertools.product(*starts):
        box = tuple(slice(a, a + w) for a, w in zip(corner, WINDOW, strict=True))
        logits = student.logits(torch.from_numpy(image[box])[None, None])
        total[box] += gauss * logits[0, 0].sigmoid().numpy()
        weight[box] += gauss
    np.testing.assert_allclose(sliding_window.predict(student, image, WINDOW, 0.5), total / weight, atol=1e-5)


@pytest.mark.parametrize("words", ["", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"])
def test_batches_are_halved_until_they_fit(words: str) -> None:
    image, student = _image((4, 8, 100)), Fake(limit=3, words=words)
    probability = sliding_window.predict(student, image, WINDOW, 0.5, batch=16)
    assert student.batches[:3] == [16, 8, 4]
    assert set(student.batches[3:]) == {2}
    np.testing.assert_allclose(probability, np.clip(image, 1e-6, 1 - 1e-6), atol=2e-6)


def test_a_window_that_never_fits_and_other_errors_are_told() -> None:
    with pytest.raises(InputError, match="use a smaller window"):
        sliding_window.predict(Fake(limit=0), _image((4, 8, 8)), WINDOW, batch=4)
    with pytest.raises(RuntimeError, match="a bug"):
        sliding_window.predict(Fake(limit=0, words="a bug"), _image((4, 8, 8)), WINDOW)


def test_tensors_and_training_mode_are_taken() -> None:
    student = build_student(StudentConfig(depth=1, patch=PATCH, channels=(4, 6, 8), drop_path=0.5)).train()
    image = _image((4, 8, 8))
    a, b = (sliding_window.predict(student, v, WINDOW) for v in (image, torch.from_numpy(image)))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("shape", "window", "overlap", "says"),
    [
        ((4, 8, 8), (4, 8, 9), 0.5, "multiple of the student's patch"),
        ((4, 8, 8), (0, 8, 8), 0.5, "multiple of the student's patch"),
        ((4, 8, 8), WINDOW, 1.0, "overlap"),
        ((4, 8), WINDOW, 0.5, "want a volume"),
        ((4, 0, 8), WINDOW, 0.5, "want a volume"),
    ],
)
def test_bad_arguments_are_refused(
    shape: tuple[int, ...], window: tuple[int, int, int], overlap: float, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        sliding_window.predict(Fake(), np.zeros(shape, np.float32), window, overlap)


def test_a_halved_batch_is_remembered_and_windows_are_counted() -> None:
    image, student, size, seen = _image((4, 8, 100)), Fake(limit=3), sliding_window.BatchSize(16), list[int]()
    sliding_window.predict(student, image, WINDOW, 0.5, batch=size, seen=seen.append)
    assert size.windows == 2
    assert sum(seen) == sum(n for n in student.batches if n <= 3) == 24
    before = len(student.batches)
    sliding_window.predict(student, image, WINDOW, 0.5, batch=size)
    assert set(student.batches[before:]) == {2}


@pytest.mark.parametrize("flip", [(2,), (0,), (1, 2), (0, 1, 2)])
def test_windows_are_mirrored_in_their_place(flip: tuple[int, ...]) -> None:
    """Mirroring the volume moves the windows of a lattice that fits; mirroring each window is then the same."""
    image = _image((8, 16, 24))  # whole steps, so that the mirrored lattice is the lattice
    student = PositionBound()
    whole = np.flip(sliding_window.predict(student, np.flip(image, flip), WINDOW, 0.5), flip)
    np.testing.assert_allclose(sliding_window.predict(student, image, WINDOW, 0.5, flip=flip), whole, atol=1e-5)
    assert np.abs(whole - sliding_window.predict(student, image, WINDOW, 0.5)).max() > 1e-3
    same = sliding_window.predict(Fake(), image, WINDOW, 0.5, flip=flip)
    np.testing.assert_allclose(same, image, atol=1e-5)


def test_only_windows_that_hold_a_wanted_voxel_are_looked_at() -> None:
    image, student = _image((9, 20, 27)), PositionBound()
    whole, everything = sliding_window.predict(student, image, WINDOW, 0.5), len(student.batches)
    where = np.zeros(image.shape, dtype=bool)
    where[5, 7, 3:9] = where[8, 19, 26] = True
    student.batches.clear()
    probability = sliding_window.predict(student, image, WINDOW, 0.5, where=where)
    np.testing.assert_array_equal(probability[where], whole[where])
    assert 0 < len(student.batches) < everything / 3
    none = sliding_window.predict(student, image, WINDOW, 0.5, where=np.zeros(image.shape, dtype=bool))
    assert not none.any()


def test_black_windows_are_not_run_and_count_as_background() -> None:
    image = np.zeros((4, 8, 40), dtype=np.float32)
    image[1, 2, 3] = 0.9
    student, windows = Fake(), []
    probability = sliding_window.predict(student, image, WINDOW, 0.5, 8, seen=windows.append, skip_black=True)

    # Voxel 3 lies in the first of nine windows alone; the others are reported without being run.
    assert sum(student.batches) == 1
    assert sum(windows) == 9
    np.testing.assert_allclose(probability[:, :, :4], image[:, :, :4], atol=1e-5)
    assert not probability[:, :, 8:].any()


@pytest.mark.parametrize("start", [0, 8, 16])
def test_a_block_skips_the_black_windows_that_the_whole_volume_skips(start: int) -> None:
    image = _image((4, 8, 40))
    image[:, :, 9:30] = 0
    whole = sliding_window.predict(PositionBound(), image, WINDOW, 0.5, skip_black=True)
    halo = sliding_window.halo(WINDOW, 0.5, PATCH)[2]
    first, stop = max(start - halo, 0), min(start + 8 + halo, 40)
    block = sliding_window.predict(PositionBound(), image[:, :, first:stop], WINDOW, 0.5, skip_black=True)
    np.testing.assert_allclose(
        block[:, :, start - first : start - first + 8], whole[:, :, start : start + 8], atol=1e-6
    )
