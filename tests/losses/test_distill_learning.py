"""What the distillation loss does in training: tubes find the neurite, and a student comes nearer to a teacher."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.types import Batch
from hpc_neuro.data.formats import open_volume
from hpc_neuro.losses import Distill
from hpc_neuro.models.config import StudentConfig, TeacherConfig
from hpc_neuro.models.student import build_student
from hpc_neuro.models.teacher import Teacher, load_teacher
from hpc_neuro.models.tubular import gather, tube_sum


def bent_neurite(shape: tuple[int, int, int], phase: float, amplitude: float) -> tuple[Tensor, Tensor]:
    """A sine in the plane y x: its centreline [N, 3] and the distance of every token to it, [z, y, x]."""
    x = torch.linspace(-2, shape[2] + 1, 400)
    y = shape[1] / 2 + amplitude * torch.sin(2 * math.pi * x / shape[2] + phase)
    line = torch.stack([torch.full_like(x, shape[0] // 2), y, x], 1)
    points = torch.cartesian_prod(*(torch.arange(float(n)) for n in shape))
    return line, torch.cdist(points, line).min(1).values.view(shape)


def tap_distance(offsets: Tensor, line: Tensor, distance: Tensor) -> float:
    """Mean distance to the centreline of the taps of the tubes along x whose token lies on it."""
    shape = distance.shape
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))[None]
    taps = gather(grid, offsets, 2)[0]  # [3, K, z, y, x]: positions
    inside = distance < 0.5
    inside[..., :3] = inside[..., -3:] = False  # there straight tubes end at the face
    at = taps[:, :, inside].flatten(1).T
    return float(torch.cdist(at, line).min(1).values.mean())


@pytest.mark.slow
def test_tubes_learn_to_follow_a_bent_neurite() -> None:
    """On the neurite both sides tell what it is, a phase that differs from crop to crop; beside it each is noise.

    So a tube learns most where it stays on the neurite; the student also feels which way the neurite lies.
    """
    torch.manual_seed(0)
    shape, dim = (3, 18, 24), 6
    says, mixing = torch.randn(2, dim), torch.randn(5, 8)

    def sample(phase: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        line, distance = bent_neurite(shape, phase, 3.0)
        profile, wide = torch.exp(-(distance**2) / 2), torch.exp(-(distance**2) / 8)
        turn = 2 * math.pi * torch.rand(())
        code = torch.stack([turn.cos(), turn.sin()])
        slope = torch.stack(torch.gradient(wide, dim=(1, 2)))
        channels = torch.cat([code.view(2, 1, 1, 1) * profile, wide[None], 4 * slope])  # [5, z, y, x]
        rough = torch.randn(8 + dim, *shape)
        for _ in range(2):  # smooth, as features are
            rough = F.avg_pool3d(F.pad(rough, [1] * 6, mode="replicate"), 3, 1)
        noise = (1 - profile) * rough / rough.std()
        student = torch.einsum("izyx,ij->jzyx", channels, mixing) + 3 * noise[:8]
        teacher = (code @ says).view(-1, 1, 1, 1) * profile + 0.3 * noise[8:]
        return student, teacher, line, distance

    distiller = Distill(views=("z",), floor=0.0).build(
        student_dim=8,
        student_depth=1,
        teacher_layers=[0],
        mean={"z": torch.zeros(1, dim)},
        std={"z": torch.ones(1, dim)},
        tube_sum=tube_sum,
    )
    optimiser = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    losses = []
    for step in range(120):
        two = [sample(2 * math.pi * 0.381966 * (2 * step + i)) for i in (0, 1)]
        student, teacher = (torch.stack([parts[i] for parts in two]) for i in (0, 1))
        mask = torch.stack([parts[3] < 0.8 for parts in two])[:, None].to(torch.uint8)
        both = torch.ones(2, dtype=torch.bool)
        given = Batch(mask.float(), mask, mask, {"z": teacher[:, None]}, both, torch.arange(2))
        loss = distiller({0: student}, given)[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    straight, bent = [], []
    for phase in (0.3, 2.0, 4.4):  # not seen in training
        student, _, line, distance = sample(phase)
        with torch.no_grad():
            bends = distiller.bends(0, student[None])
        assert bends is not None
        straight.append(tap_distance(torch.zeros_like(bends[2]), line, distance))
        bent.append(tap_distance(bends[2], line, distance))
    assert all(b < s for b, s in zip(bent, straight, strict=True))
    assert sum(bent) < 0.8 * sum(straight)


CROP, TOKENS = (16, 64, 64), (2, 4, 4)


def made_crops(count: int) -> Tensor:
    """Bright bent lines in smooth noise, [N, 1, Z, Y, X] in [0, 1]."""
    g = torch.Generator().manual_seed(5)
    cosines = []
    for _ in range(count):
        _, distance = bent_neurite(
            CROP, float(6 * torch.rand((), generator=g)), float(20 * torch.rand((), generator=g))
        )
        cosines.append(torch.exp(-(distance**2) / 8) + 0.2 * torch.rand(CROP, generator=g))
    return torch.stack(cosines)[:, None].clamp(0, 1)


def real_crops(folder: Path, count: int) -> Tensor:
    """The same from a real neuron: the crops of its stack with the most bright voxels."""
    volume = open_volume(folder / "diadem_op" / "OP_1.tif")
    whole = torch.from_numpy(volume[Box.whole(volume.shape)].astype("float32"))
    whole = (whole / whole.quantile(0.999) if whole.numel() < 2**24 else whole / whole.max()).clamp(0, 1)
    starts = itertools.product(*(range(0, n - c + 1, c) for n, c in zip(whole.shape, CROP, strict=True)))
    crops = [whole[z : z + CROP[0], y : y + CROP[1], x : x + CROP[2]] for z, y, x in starts]
    crops.sort(key=lambda crop: -float((crop > 0.5).sum()))
    return torch.stack(crops[:count])[:, None]


def teacher_maps(teacher: Teacher, crops: Tensor, layer: int) -> dict[str, Tensor]:
    """Token maps of the views z and x on the student's token grid, view -> [N, 1, D, *TOKENS]."""
    n, d = len(crops), teacher.dim
    flat = teacher.features(crops.flatten(0, 2), [layer])[0]  # [N*16, 4, 4, D]
    along_z = flat.view(n, 2, 8, 4, 4, d).mean(2)
    flat = teacher.features(crops.movedim(-1, 1).flatten(0, 2), [layer])[0]  # [N*64, 1, 4, D]
    along_x = flat.view(n, 4, 16, 4, d).mean(2).transpose(1, 2)[:, None].expand(-1, 2, -1, -1, -1)
    return {v: t.permute(0, 4, 1, 2, 3)[:, None].contiguous() for v, t in (("z", along_z), ("x", along_x))}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "axes"), [("made", "none"), ("real", "deformable")])
def test_a_small_student_comes_nearer_to_the_teacher_on_unseen_slices(
    source: str, axes: Any, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    crops = made_crops(8) if source == "made" else real_crops(request.getfixturevalue("real_data"), 8)
    maps = teacher_maps(load_teacher(TeacherConfig(model="random")), crops, 3)
    seen, unseen = slice(0, 6), slice(6, 8)
    mean = {v: t[seen].float().mean((0, 3, 4, 5)) for v, t in maps.items()}
    std = {v: t[seen].float().std((0, 3, 4, 5)) + 1e-3 for v, t in maps.items()}
    student = build_student(StudentConfig(depth=2))
    cfg = Distill(axes=axes, views=("z", "x"), floor=1.0, weight=1.0, taps=3)
    distiller = cfg.build(student_dim=192, student_depth=2, teacher_layers=[3], mean=mean, std=std, tube_sum=tube_sum)

    def look(which: slice | list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        image = crops[which]
        blank = torch.zeros(image.shape, dtype=torch.uint8)
        given = Batch(
            image, blank, blank, {v: t[which] for v, t in maps.items()},
            torch.ones(len(image), dtype=torch.bool), torch.arange(len(image)),
        )  # fmt: skip
        features = student.vit(student.tokenizer(image), distiller.student_layers)[1]  # without stem and decoder
        loss, terms = distiller(features, given)
        return loss, terms

    with torch.no_grad():
        before = look(unseen)[1]
    parameters = [*student.tokenizer.parameters(), *student.vit.parameters(), *distiller.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=5e-4)
    for step in range(30):
        loss = look([step % 6, (step + 1) % 6])[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        after = look(unseen)[1]
    for v in ("z", "x"):
        assert float(after[f"distill_cosine_{v}"]) > float(before[f"distill_cosine_{v}"]) + 0.1
