"""The distillation loss: the formula, its gradients, and what it does to tubes and to a small student."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.core.types import Batch
from hpc_neuro.losses import Distill
from hpc_neuro.losses.distill import Distiller
from hpc_neuro.models.tubular import gather, tube_sum

GRID = (3, 4, 5)
C, D = 6, 7
FAN_IN = math.sqrt(27 * C)


def statistics(seed: int = 0, layers: int = 2, dim: int = D) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    mean = {v: torch.randn(layers, dim, generator=g) for v in "zyx"}
    return mean, {v: torch.rand(layers, dim, generator=g) + 0.5 for v in "zyx"}


def build(dim: int = D, student_dim: int = C, plain: bool = False, **changes: Any) -> Distiller:
    torch.manual_seed(0)
    mean, std = statistics(dim=dim)
    if plain:
        mean, std = ({v: torch.full_like(s, float(n)) for v, s in mean.items()} for n in (0, 1))
    cfg = Distill(**changes)
    return cfg.build(
        student_dim=student_dim, student_depth=4, teacher_layers=[5, 11], mean=mean, std=std, tube_sum=tube_sum
    )


def features(seed: int = 1, batch: int = 3, blocks: tuple[int, ...] = (1, 3)) -> dict[int, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {b: torch.randn(batch, C, *GRID, generator=g).requires_grad_() for b in blocks}


def batch(distilled: tuple[bool, ...] = (True, False, True), dim: int = D, seed: int = 2) -> Batch:
    g = torch.Generator().manual_seed(seed)
    voxels = (len(distilled), 1, 6, 12, 20)  # blocks of 2, 3, 4 voxels
    mask = (torch.rand(voxels, generator=g) < 0.2).to(torch.uint8)
    mask[..., :2] = 255
    maps = {v: torch.randn(len(distilled), 2, dim, *GRID, generator=g).half() for v in "zyx"}
    return Batch(torch.zeros(voxels), mask, mask, maps, torch.tensor(distilled), torch.arange(len(distilled)))


def by_the_book(distiller: Distiller, student: dict[int, Tensor], given: Batch, bends: list[Tensor]) -> Tensor:
    """The loss of method section 4 (before smoothness), token by token, in float64."""
    cfg, (mean, std) = distiller.cfg, statistics()
    half = cfg.taps // 2
    window = torch.tensor([1.0 + half - abs(k) if cfg.window == "triangular" else 1.0 for k in range(-half, half + 1)])
    window = (window / window.sum()).double()

    def lines(maps: Tensor, axis: int) -> Tensor:
        if cfg.axes == "none":
            return maps
        return torch.einsum("bckzyx,k->bczyx", gather(maps, bends[axis].double(), axis), window)

    terms = []
    axes = range(1 if cfg.axes == "none" else 3)
    for (i, (s, t)), v, axis in itertools.product(enumerate(distiller.pairs), cfg.views, axes):
        goals = (given.features[v][:, t].double() - mean[v][t].view(-1, 1, 1, 1)) / std[v][t].view(-1, 1, 1, 1)
        source, goals = lines(student[s].double(), axis), lines(goals, axis)
        head = distiller.heads[f"{v}_{i}"].double()
        for b, z, y, x in itertools.product(given.distilled.nonzero().flatten().tolist(), *map(range, GRID)):
            block = given.mask[b, 0, 2 * z : 2 * z + 2, 3 * y : 3 * y + 3, 4 * x : 4 * x + 4]
            block = block[block != 255]
            share = float((block == 1).double().mean()) if len(block) else 0.0
            guess, goal = head.weight @ source[b, :, z, y, x] + head.bias, goals[b, :, z, y, x]
            term = cfg.cosine * (1 - F.cosine_similarity(guess, goal, dim=0))
            term = term + (1 - cfg.cosine) * F.smooth_l1_loss(guess, goal)
            terms.append((1.0 if share > 0 else cfg.floor) * term)
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    "changes",
    [
        {"axes": "none", "views": ("x",), "cosine": 0.6, "floor": 0.3},
        {"axes": "straight", "views": ("z", "y"), "window": "uniform", "taps": 3},
        {"axes": "deformable", "views": ("y",), "layers": ((1, 5), (-1, -1)), "floor": 0.0},
    ],
    ids=lambda c: c["axes"],
)
def test_the_loss_is_the_formula(changes: dict[str, Any]) -> None:
    distiller, student, given = build(smoothness=0.0, weight=3.0, **changes), features(), batch()
    bends = [torch.zeros(3, 2 * (distiller.cfg.taps - 1), *GRID)] * 3
    if changes["axes"] == "deformable":  # offsets from a bias alone, so that the book can know them
        assert len(distiller.offsets) == 2
        raw = torch.linspace(-1, 1, 3 * 8)
        for conv in distiller.offsets:
            with torch.no_grad():
                conv.bias.copy_(raw * FAN_IN)
        bends = [b.view(1, 8, 1, 1, 1).expand(3, -1, *GRID) for b in torch.tanh(raw).chunk(3)]
    loss, terms = distiller(student, given)
    want = by_the_book(distiller, student, given, bends)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), 3 * want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["distill"].double(), want.detach(), rtol=1e-5, atol=1e-6)
    if changes["axes"] == "deformable":
        torch.testing.assert_close(terms["distill_bend"], torch.tanh(raw).abs().mean())


@pytest.mark.parametrize("axes", ["none", "straight", "deformable"])
def test_the_loss_is_zero_when_the_student_is_the_teacher(axes: str) -> None:
    distiller = build(dim=C, axes=axes, layers=((3, 11),), plain=True)
    for head in distiller.heads.values():
        with torch.no_grad():
            head.weight.copy_(torch.eye(C))
            head.bias.zero_()
    for conv in distiller.offsets:
        nn.init.normal_(conv.weight, std=3.0)
    given = batch(dim=C)
    same = given.features["z"]
    given.features.update({"y": same, "x": same})
    loss, terms = distiller({3: same[:, 1].float()}, given)
    rough = float(loss.detach()) / distiller.cfg.weight
    if axes == "deformable":  # only the price of bending is left
        assert float(terms["distill_bend"]) > 0.1
        straightened = build(dim=C, axes=axes, layers=((3, 11),), plain=True, smoothness=0.0)
        straightened.load_state_dict(distiller.state_dict())
        rough = float(straightened({3: same[:, 1].float()}, given)[0].detach())
    assert rough == pytest.approx(0, abs=1e-6)
    for v in "zyx":
        assert float(terms[f"distill_cosine_{v}"]) == pytest.approx(1, abs=1e-5)


def test_tubes_are_straight_at_the_start_and_bend_at_most_the_extent() -> None:
    distiller, student = build(axes="deformable", extent=0.5), features(blocks=(3,))[3]
    start = distiller.bends(0, student.detach())
    assert start is not None
    assert not any(d.any() for d in start)
    straight = build(axes="straight", smoothness=0.0)
    straight.heads.load_state_dict(distiller.heads.state_dict())
    loss = distiller({3: student}, batch())[0]
    torch.testing.assert_close(loss, straight({3: student}, batch())[0])
    nn.init.normal_(distiller.offsets[0].weight, std=5.0)
    bent, scaled = (distiller.bends(0, factor * student.detach()) for factor in (1, 1000))
    assert bent is not None
    assert scaled is not None
    assert 0.4 < float(torch.stack(bent).detach().abs().max()) <= 0.5
    torch.testing.assert_close(torch.stack(scaled), torch.stack(bent), atol=1e-3, rtol=0)  # blocks differ in scale


def test_offsets_learn_from_the_student_side_only() -> None:
    seen: list[tuple[bool, bool]] = []

    def spy(x: Tensor, offsets: Tensor, window: Tensor, axis: int) -> Tensor:
        seen.append((x.requires_grad, offsets.requires_grad))
        return tube_sum(x, offsets, window, axis)

    mean, std = statistics()
    cfg = Distill(axes="deformable")
    distiller = cfg.build(student_dim=C, student_depth=4, teacher_layers=[5, 11], mean=mean, std=std, tube_sum=spy)
    distiller(features(blocks=(3,)), batch())[0].backward()
    assert seen == [(True, True), (False, False)] * 3  # student, teacher, for each axis
    assert distiller.offsets[0].weight.grad.any()


def test_smoothness_prices_changes_of_direction_only() -> None:
    """A straight but slanted tube is free; a zigzag costs."""
    both = {"axes": "deformable", "weight": 1.0, "layers": ((1, 5), (3, 11))}
    distiller, free = build(smoothness=2.0, **both), build(smoothness=0.0, **both)
    slanted = torch.tensor([-1.0, -1, 1, 1]).repeat(2)  # steps point away from the center
    zigzag = torch.tensor([-1.0, 1, 1, -1]).repeat(2)
    for raw, price in ((slanted, 0.0), (zigzag, 2.0 * 2 * (2 * math.tanh(1)) ** 2)):
        for conv in (*distiller.offsets, *free.offsets):
            with torch.no_grad():
                conv.bias.copy_(raw.repeat(3) * FAN_IN)
        (loss, terms), (without, _) = distiller(features(), batch()), free(features(), batch())
        assert float((loss - without).detach()) == pytest.approx(price, abs=1e-4)
        assert float(terms["distill_bend"]) == pytest.approx(math.tanh(1), abs=1e-5)


def test_samples_that_are_not_distilled_do_not_count() -> None:
    distiller, student, given = build(), features(blocks=(3,)), batch()
    loss = distiller(student, given)[0]
    loss.backward()
    gradient = student[3].grad
    assert gradient is not None
    assert not gradient[1].any()
    assert gradient[0].any()
    given.features["z"][1] = 100
    student[3].data[1] = -100
    torch.testing.assert_close(distiller(student, given)[0], loss)


@pytest.mark.parametrize("axes", ["none", "straight", "deformable"])
@pytest.mark.parametrize("empty", [True, False])
def test_every_parameter_gets_a_gradient_also_when_nothing_is_distilled(axes: str, empty: bool) -> None:
    """A rank that skips a parameter would let the others wait for ever."""
    distiller = build(axes=axes, layers=((1, 5), (3, 11)))
    given = batch((False, False, False) if empty else (True, True, False))
    if empty:
        given.features.clear()
    loss, terms = distiller(features(), given)
    loss.backward()
    grads = {name: p.grad for name, p in distiller.named_parameters()}
    assert [name for name, g in grads.items() if g is None] == []
    assert all(bool(g.any()) != empty for g in grads.values() if g is not None)
    assert set(terms) == {"distill", "distill_bend", *(f"distill_cosine_{v}" for v in "zyx")}
    assert all(math.isnan(float(t)) == empty and not t.requires_grad for t in terms.values())
    if empty:
        assert float(loss.detach()) == 0


def test_half_precision_modules_and_features_sum_in_float32() -> None:
    exact, rounded = build(), build().bfloat16()
    given, student = batch(), features(blocks=(3,))
    low = {3: student[3].detach().bfloat16()}
    loss, terms = rounded(low, given)
    assert loss.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in terms.values())
    wide = exact({3: low[3].float()}, given)[0]
    torch.testing.assert_close(loss, wide, rtol=0.02, atol=0.01)
    torch.testing.assert_close(exact(low, given)[0], wide, rtol=0, atol=0)


def test_the_share_of_neurite_ignores_unlabelled_voxels() -> None:
    distiller, given = build(), batch()
    given.mask.fill_(0)
    given.mask[0, 0, :2, :3, :4] = 255
    given.mask[0, 0, 0, 0, :2] = 1
    given.mask[0, 0, 1, 0, :2] = 0
    share = distiller._measure_neurite_share(features(blocks=(3,)), given)
    assert share[0, 0, 0, 0] == 0.5
    given.mask[0, 0, :2, :3, :4] = 255
    assert not distiller._measure_neurite_share(features(blocks=(3,)), given).any()


def test_pairs_of_layers_are_counted_from_either_end() -> None:
    assert build().pairs == ((3, 1),)
    distiller = build(layers=((1, 5), (-2, 11), (0, -2)))
    assert distiller.pairs == ((1, 0), (2, 1), (0, 0))
    assert distiller.student_layers == (0, 1, 2)
    assert distiller.views == ("z", "y", "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": 4}, "taps is 4"),
        ({"views": ()}, "views is"),
        ({"views": ("z", "z")}, "views is"),
        ({"views": ("w",)}, "views"),
        ({"layers": ()}, "layers is"),
        ({"axes": "bent"}, "axes"),
        ({"floor": 1.5}, "floor"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Distill(**changes)


def test_what_the_cache_or_the_student_lacks_is_named_all_at_once() -> None:
    mean, std = statistics()
    del mean["x"]
    cfg = Distill(layers=((9, 5), (0, 7)))
    with pytest.raises(ConfigError) as caught:
        cfg.build(student_dim=C, student_depth=4, teacher_layers=[5, 11], mean=mean, std=std, tube_sum=tube_sum)
    text = str(caught.value)
    assert "distill.views: the cache holds the views ['y', 'z'], not 'x'" in text
    assert "the student has blocks 0 to 3, not 9" in text
    assert "the cache holds layers [5, 11], not 7" in text


def test_missing_features_and_other_grids_are_named() -> None:
    distiller, given = build(), batch()
    with pytest.raises(InputError, match=r"lacks student blocks \[3\]"):
        distiller(features(blocks=(1,)), given)
    with pytest.raises(InputError, match="different grids"):
        distiller({3: torch.zeros(3, C, 3, 4, 4)}, given)
    del given.features["y"]
    with pytest.raises(InputError, match=r"teacher views \['y'\]"):
        distiller(features(blocks=(3,)), given)


def test_broken_statistics_are_named() -> None:
    mean, std = statistics()
    std["y"][0, 0] = 0
    with pytest.raises(InputError, match="std above 0"):
        Distill().build(student_dim=C, student_depth=4, teacher_layers=[5, 11], mean=mean, std=std, tube_sum=tube_sum)
