"""Quality per compute: our student, nnU-Net's residual U-Net and MONAI's UNETR, on neurons held out.

    python -m tools.bench.quality --store STORE --out OUT [--seconds 600] [--seeds 0 1] [--only ID ...]
                                  [--networks student convolutions residual_unet unetr] [--crop 16 96 96] [--batch 2]

Every neuron of the store (or those of --only) is held out in turn, and for every seed. All networks get the same crops
in the same order, the same augmentation and the same losses (Dice and cross entropy), for the same CPU seconds of
training steps (reading is not counted; on a GPU: seconds of the clock). Each has the optimizer of its own recipe:

    student         AdamW at the rate of `hpc-neuro train`, warm-up and cosine; from random weights
    convolutions    the student without its transformer: what the transformer earns for its share of the seconds
    residual_unet   dynamic_network_architectures' ResidualEncoderUNet as nnU-Net plans it for the crop, with
                    --unet-width channels at full resolution (nnU-Net: 32; 8 does eleven times the steps on a CPU);
                    AdamW or, with --unet-optimizer sgd, nnU-Net's SGD with Nesterov momentum and polynomial decay
    unetr           MONAI's UNETR of the student's width; AdamW at 1e-4 x --unetr-rate

One more neuron, the next in the store, is left out of training: its best Dice chooses the threshold. Printed per
network: Dice, clDice, average precision, and F1 of the cable at 4 voxels with and without links along the image, with
95 % intervals over neurons, and the differences to the student neuron by neuron. OUT keeps a file for each training;
the same command goes on where it was. OUT/quality.json and OUT/quality.svg hold all of it. Last line: JSON.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import UNETR
from torch import nn

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Batch, StudentOutput
from hpc_neuro.data.augment import augment
from hpc_neuro.data.config import AugmentConfig, CropConfig
from hpc_neuro.data.crops import CropSampler
from hpc_neuro.data.dataset import CropDataset, read_volume_points
from hpc_neuro.data.store import Store
from hpc_neuro.losses import sum_losses
from hpc_neuro.losses.segmentation import CrossEntropy, Dice
from hpc_neuro.metrics.statistics import mean_interval, paired_difference
from hpc_neuro.models.config import SIZES, StudentConfig
from hpc_neuro.models.student import build_student
from hpc_neuro.report.charts import draw_pairs
from hpc_neuro.train.config import OptimConfig
from hpc_neuro.train.optim import lr_at
from tools.bench.held_out import (
    METRICS,
    Scores,
    StudentLogits,
    Windows,
    average_over_seeds,
    describe,
    format_scores,
    read_training,
    require_names,
    run_bench,
    score_held_out,
)

_MOST_STEPS = 10**7
_UNET_RATE, _UNETR_RATE = 1e-3, 1e-4


@dataclass(frozen=True, kw_only=True)
class Budget(Windows):
    """What a training may use."""

    batch: int
    """Crops of a step."""
    seconds: float
    """Of training steps."""


@dataclass(frozen=True, kw_only=True)
class Settings(Budget):
    """What all trainings share."""

    size: Any
    """Of the student (see SIZES)."""
    depth: int | None
    """Blocks of the student's transformer; None: those of the size."""
    unet_optimizer: str
    unetr_rate: float
    unet_width: int
    """Channels at full resolution."""


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained."""

    network: nn.Module
    """[B, 1, Z, Y, X] -> logits of the same shape."""
    optimizer: torch.optim.Optimizer
    rate_at: Callable[[float], float]
    """Share of the budget that is used -> factor on the rate."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do the trainings that are missing, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="folder that `prepare` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--only", nargs="+", default=[], help="hold out these only (the others are still trained on)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seconds", type=float, default=600.0, help="CPU seconds of training per network")
    parser.add_argument("--crop", type=int, nargs=3, default=(16, 96, 96), help="[voxel] multiples of 16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", default="tiny", choices=list(SIZES), help="of the student, and UNETR's width")
    parser.add_argument("--depth", type=int, help="blocks of the student's transformer, in place of the size's")
    parser.add_argument("--unet-optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--unet-width", type=int, default=32, help="channels of residual_unet at full resolution")
    parser.add_argument("--unetr-rate", type=float, default=1.0, help="factor on UNETR's rate of 1e-4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return run_bench(parser, argv, compare)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train and score what is missing; the figures of all trainings, printed and drawn."""
    store = Store(args.store)
    require_names("--only", args.only, store.ids)
    if len(store.ids) < 3:
        raise InputError(
            f"{store.path} has {len(store.ids)} volumes; one is held out and one chooses the threshold, so at least 3 "
            "are needed; prepare a store with more"
        )

    z, y, x = args.crop
    settings = Settings(
        crop=(z, y, x), device=args.device, batch=args.batch, seconds=args.seconds, size=args.size,
        depth=args.depth, unet_optimizer=args.unet_optimizer, unetr_rate=args.unetr_rate, unet_width=args.unet_width,
    )  # fmt: skip

    scores: Scores = {}
    for held_out in args.only or store.ids:
        for seed in args.seeds:
            for network in args.networks:
                result = train_and_score(store, held_out, seed, network, settings, args.out)
                for metric in METRICS:
                    neurons = scores.setdefault(network, {}).setdefault(metric, {})
                    neurons.setdefault(held_out, []).append(result[metric])

    facts = summarize(scores)
    print("\n".join(describe(facts)))
    facts["settings"] = asdict(settings)
    files.write_json(args.out / "quality.json", facts)
    files.write_text(args.out / "quality.svg", draw_dice(scores))
    return facts


def train_and_score(
    store: Store, held_out: str, seed: int, network: str, settings: Settings, out: Path
) -> dict[str, Any]:
    """The scores of one training, from its file where it has been done."""
    path = out / "trainings" / f"{held_out}_{seed}_{network}.json"
    facts = {**asdict(settings), "crop": list(settings.crop), "store": str(store.path.resolve())}
    if (earlier := read_training(path, facts)) is not None:
        return earlier

    ids = list(store.ids)
    validated = ids[(ids.index(held_out) + 1) % len(ids)]
    trained = [name for name in ids if name not in (held_out, validated)]

    torch.manual_seed(seed)
    recipe = NETWORKS[network](settings)
    steps = train(recipe, store, trained, seed, settings)
    parameters = sum(p.numel() for p in recipe.network.parameters())

    scores = score_held_out(recipe.network, store, held_out, validated, settings)
    result = {"settings": facts, "steps": steps, "parameters": parameters, **scores}
    files.write_json(path, result)
    print(f"{held_out:<16} seed {seed} {network:<14} {steps:6d} steps  {format_scores(scores)}", flush=True)
    return result


def train(recipe: Recipe, store: Store, ids: Sequence[str], seed: int, budget: Budget) -> int:
    """Train for the seconds of the budget; the number of steps."""
    network, optimizer = recipe.network.train(), recipe.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]

    seconds, steps = 0.0, 0
    for batch in iterate_batches(store, ids, seed, budget):
        if seconds >= budget.seconds:
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * recipe.rate_at(seconds / budget.seconds)

        start = _read_clock(budget.device)
        logits = network(batch.image)
        loss, _ = sum_losses((Dice(), CrossEntropy()), StudentOutput(logits, {}), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        seconds += _read_clock(budget.device) - start
        steps += 1
    return steps


def iterate_batches(store: Store, ids: Sequence[str], seed: int, budget: Budget) -> Iterator[Batch]:
    """The augmented batches of a seed; they do not depend on the network."""
    crops = CropConfig(size=budget.crop)

    # The grid matters to distilled crops alone, and there are none.
    sampler = CropSampler(crops, read_volume_points(store, ids), seed, (1, 1, 1))
    dataset = CropDataset(store, sampler, (1, 1, 1))

    for step in range(_MOST_STEPS):
        numbers = range(step * budget.batch, (step + 1) * budget.batch)
        batch = dataset.collate([dataset[number] for number in numbers]).to(torch.device(budget.device))
        yield augment(batch, AugmentConfig(), seed)


def _read_clock(device: str) -> float:
    """Seconds of CPU, or of the clock where a GPU does the work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def build_student_recipe(settings: Settings, transformer: bool = True) -> Recipe:
    """The student from random weights."""
    cfg = StudentConfig(size=settings.size, depth=settings.depth, transformer=transformer)
    network = StudentLogits(build_student(cfg)).to(settings.device)

    optim = OptimConfig(steps=1000)
    # The first layers of a transformer without a teacher's weights learn at the rate of transferred ones.
    in_transformer = [p for name, p in network.named_parameters() if ".vit." in name]
    others = [p for name, p in network.named_parameters() if ".vit." not in name]
    groups = [{"params": others, "lr": optim.lr}, {"params": in_transformer, "lr": optim.lr * optim.vit_lr}]

    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=optim.weight_decay)
    return Recipe(network, optimizer, lambda share: lr_at(min(int(share * optim.steps), optim.steps - 1), optim))


def build_residual_unet_recipe(settings: Settings) -> Recipe:
    """nnU-Net's residual encoder U-Net as its planner lays it out for the crop."""
    try:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    except ImportError:
        raise InputError(
            "residual_unet needs nnU-Net's networks; pip install --no-deps dynamic-network-architectures einops"
        ) from None

    strides, kernels = plan_stages(settings.crop)
    stages, width = len(strides), settings.unet_width
    network = ResidualEncoderUNet(
        1, stages, [min(width * 2**n, 10 * width) for n in range(stages)], nn.Conv3d, kernels, strides,
        [(1, 3, 4, 6, 6, 6, 6, 6)[n] for n in range(stages)], 1, [1] * (stages - 1), conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    ).to(settings.device)  # fmt: skip

    if settings.unet_optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            network.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5
        )
    else:
        optimizer = torch.optim.AdamW(network.parameters(), _UNET_RATE, weight_decay=3e-5)
    return Recipe(network, optimizer, compute_polynomial_rate)


def plan_stages(crop: Shape) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernels of each stage: axes are halved while they keep 4 voxels; a coarse axis begins later."""
    size, strides, kernels = list(crop), [[1, 1, 1]], list[list[int]]()
    spacing = [max(crop) / n for n in crop]

    while True:
        # As nnU-Net's planner: only axes within twice the finest spacing are convolved and halved.
        kernels.append([3 if value <= 2 * min(spacing) else 1 for value in spacing])
        axes = list(zip(size, spacing, strict=True))
        can_halve = [n // 2 >= 4 and n % 2 == 0 and value < 2 * min(spacing) for n, value in axes]
        if not any(can_halve) or len(strides) == 6:
            return strides, kernels

        strides.append([2 if halve else 1 for halve in can_halve])
        size = [n // 2 if halve else n for n, halve in zip(size, can_halve, strict=True)]
        spacing = [2 * value if halve else value for value, halve in zip(spacing, can_halve, strict=True)]


def build_unetr_recipe(settings: Settings) -> Recipe:
    """MONAI's UNETR with the width of the student."""
    dim, _, heads = SIZES[settings.size]
    network = UNETR(
        1, 1, settings.crop, feature_size=16, hidden_size=dim, mlp_dim=4 * dim, num_heads=heads, qkv_bias=True
    ).to(settings.device)

    rate = _UNETR_RATE * settings.unetr_rate
    return Recipe(network, torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-5), compute_cosine_rate)


def compute_polynomial_rate(share: float) -> float:
    """nnU-Net's schedule."""
    return float((1 - min(share, 1.0)) ** 0.9)


def compute_cosine_rate(share: float) -> float:
    """Linear over the first tenth, then a cosine to zero."""
    if share < 0.1:
        return 0.01 + share / 0.1 * 0.99
    return 0.5 * (1 + math.cos(math.pi * min((share - 0.1) / 0.9, 1.0)))


NETWORKS: dict[str, Callable[[Settings], Recipe]] = {
    "student": build_student_recipe,
    "convolutions": functools.partial(build_student_recipe, transformer=False),
    "residual_unet": build_residual_unet_recipe,
    "unetr": build_unetr_recipe,
}


def summarize(scores: Scores) -> dict[str, Any]:
    """Means over seeds per neuron, with intervals over neurons, and differences to the first network."""
    first = next(iter(scores))
    facts: dict[str, Any] = {"scores": scores, "mean": {}, "difference": {}}
    for network, metrics in scores.items():
        means = {metric: average_over_seeds(values) for metric, values in metrics.items()}
        facts["mean"][network] = {metric: asdict(mean_interval(values)) for metric, values in means.items()}
        if network != first:
            facts["difference"][f"{first} - {network}"] = {
                metric: asdict(paired_difference(average_over_seeds(scores[first][metric]), values))
                for metric, values in means.items()
            }
    return facts


def draw_dice(scores: Scores) -> str:
    """Dice per network, a line per neuron, as SVG."""
    by_network = [average_over_seeds(metrics["dice"]) for metrics in scores.values()]
    by_neuron = [list(values) for values in zip(*by_network, strict=True)]
    return draw_pairs("Held-out neurons, equal seconds of training", list(scores), by_neuron, "Dice")


if __name__ == "__main__":
    raise SystemExit(main())
