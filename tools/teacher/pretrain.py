"""Pre-train a small natural-image ViT teacher from a folder of photographs by masked image modeling.

For machines and institutes that reach no model hub. The result is a timm ViT-Tiny without a head, which predicts the
pixels of hidden patches (`vit_tiny_patch16_224`), or the ridges, gradients and brightness of hidden and visible ones
(`--objective structure`, `vit_tiny_patch16_dinov3_qkvb`: rotary positions, for slices of thin bright structures):

    python -m tools.teacher.pretrain PHOTOS OUT --minutes 70
    python -m tools.teacher.pretrain PHOTOS OUT --steps 20000 --patch 8 --crop 96
    python -m tools.teacher.pretrain PHOTOS OUT --minutes 60 --objective structure --patch 8 --crop 64 --side 128 \
        --depth 6 --mask 0.4 --batch 32

A killed run goes on with the same command. In OUT: teacher.safetensors (float16, timm's names) and teacher.json (its
card), written with every checkpoint, so that a teacher can be judged while it trains, and with probes at the end;
metrics.jsonl, checkpoint.pt, cache/. With --steps a resumed run ends with the same bits as an
uninterrupted one on the same CPU; with --minutes the learning rate follows the minutes trained, so it cannot.
Then, for precompute and train:  teacher.model=trained teacher.weights=OUT
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hpc_neuro.core import files
from tools.teacher import masked_autoencoder, masked_structure, photos, probe
from tools.teacher.recipe import DATA, METHOD, STRUCTURE_METHOD, BadInput, Progress, Recipe

Network = masked_autoencoder.MaskedAutoencoder | masked_structure.MaskedStructure
"""The encoder, `vit`, and what predicts from it."""

OBJECTIVES = ("pixels", "structure")


def make_encoder(recipe: Recipe) -> nn.Module:
    """The recipe's ViT as timm starts it."""
    if recipe.objective == "structure":
        return masked_structure.make_encoder(recipe.patch, depth=recipe.depth)
    return masked_autoencoder.encoder(recipe.patch, depth=recipe.depth)


def build(recipe: Recipe, pictures: photos.Photos, device: torch.device) -> Network:
    """The network with the recipe's initial weights."""
    torch.manual_seed(recipe.seed)
    vit = make_encoder(recipe)
    sample = photos.batch(pictures, 0, replace(recipe, batch=256), torch.device("cpu")).target

    network: Network
    if recipe.objective == "structure":
        network = masked_structure.MaskedStructure(vit, recipe.patch, recipe.visible_weight, sample)
    else:
        network = masked_autoencoder.MaskedAutoencoder(vit, recipe.patch, recipe.width, recipe.decoder)

    masked_autoencoder.whiten(vit, masked_autoencoder.patchify(sample, recipe.patch).flatten(0, 1))
    return network.to(device)


def optimizer_of(network: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, norms and single tokens are not decayed."""
    groups = [
        {"params": [p for p in trained(network) if p.squeeze().ndim > 1], "weight_decay": recipe.decay},
        {"params": [p for p in trained(network) if p.squeeze().ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def gradients(network: nn.Module, batch: photos.Batch, keep: int, share: float) -> tuple[float, tuple[Tensor, ...]]:
    """Loss of a part of a batch and the gradients, both times the part's share of the batch.

    bfloat16 on CUDA only: CPUs without AMX are slower with it.
    """
    kind = batch.image.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        loss = share * network(batch, keep)
    return loss.item(), torch.autograd.grad(loss, trained(network))


def trained(network: nn.Module) -> list[nn.Parameter]:
    """Everything but the position table."""
    return [p for p in network.parameters() if p.requires_grad]


@contextlib.contextmanager
def workers(device: torch.device, threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool for the parts of a batch: on CPU one single-threaded worker per core, on CUDA one worker.

    Torch's own threads wait for one another in every operation, so a core that others use slows all of them; workers
    that take the next part when they are done do not wait. Parts are summed in order: the result is the same.
    """
    before = torch.get_num_threads()
    count = (threads or before) if device.type == "cpu" else 1
    torch.set_num_threads(1)  # in this thread too: its sums must not depend on the number of cores either
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def train(
    recipe: Recipe,
    pictures: photos.Photos,
    out: Path,
    device: torch.device,
    every: float,
    log: int,
    pool: ThreadPoolExecutor,
    what: str,
) -> Progress:
    """Train to the end of the budget, with a line each `log` steps and a checkpoint each `every` seconds.

    what: what the photographs are, for the card.
    """
    network = build(recipe, pictures, device)
    optimizer = optimizer_of(network, recipe)
    at = restore(recipe, pictures.digest, network, optimizer, out, device)
    started, before = time.monotonic(), at.seconds
    saved = logged = started
    first, losses = at.step, []
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:

        def batch(step: int) -> photos.Batch:
            return photos.batch(pictures, step, recipe, device)

        following = pool.submit(batch, at.step)
        while (progress := recipe.progress(at.step, at.seconds)) < 1:
            parts = following.result().split(recipe.part)
            shares = [len(part.image) / recipe.batch for part in parts]
            jobs = [
                pool.submit(gradients, network, part, recipe.visible, share)
                for part, share in zip(parts, shares, strict=True)
            ]
            following = pool.submit(batch, at.step + 1)
            loss = 0.0
            optimizer.zero_grad()
            for job in jobs:  # in order, so that the sum is always the same
                value, slopes = job.result()
                loss += value
                for parameter, slope in zip(trained(network), slopes, strict=True):
                    parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)
            if not math.isfinite(loss):
                raise BadInput(f"loss {loss} at step {at.step}; start again in a new OUT with a lower --lr")
            nn.utils.clip_grad_norm_(trained(network), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(progress)
            optimizer.step()
            losses.append(loss)
            at.step += 1
            now = time.monotonic()
            at.seconds = before + now - started
            if at.step % log == 0 or recipe.progress(at.step, at.seconds) >= 1:
                at.curve.append((at.step, sum(losses) / len(losses)))
                speed = (at.step - first) * recipe.batch / (now - logged)
                report(recipe, at, speed, metrics)
                logged, first, losses = now, at.step, []
                # only here, where the running mean is empty, so that a resumed curve equals an uninterrupted one
                if now - saved > every:
                    save(recipe, network, optimizer, at, out)
                    write_teacher(recipe, network, pictures, at, out, what)
                    saved = time.monotonic()
    save(recipe, network, optimizer, at, out)
    return at


def report(recipe: Recipe, at: Progress, speed: float, metrics: Any) -> None:
    """One line for people, one for machines."""
    done = recipe.progress(at.step, at.seconds)
    left = at.seconds * (1 - done) / max(done, 1e-9)
    loss, rate = at.curve[-1][1], recipe.rate(done)
    share, minutes = f"{100 * done:5.1f} %", f"{left / 60:.1f} min"
    print(f"step {at.step} {share}  loss {loss:.4f}  lr {rate:.2e}  {speed:.0f} img/s  eta {minutes}", flush=True)
    line = {"step": at.step, "loss": loss, "lr": rate, "images_per_s": speed, "seconds": at.seconds}
    metrics.write(json.dumps(line) + "\n")
    metrics.flush()


def save(recipe: Recipe, network: nn.Module, optimizer: torch.optim.Optimizer, at: Progress, out: Path) -> None:
    """Write the checkpoint, whole or not at all."""
    tensors = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    state = {"recipe": asdict(recipe), "at": asdict(at), **tensors}
    with files.atomic(out / "checkpoint.pt") as part:
        torch.save(state, part)


def restore(
    recipe: Recipe, seen: str, network: nn.Module, optimizer: torch.optim.Optimizer, out: Path, device: torch.device
) -> Progress:
    """Load OUT's checkpoint if there is one, and cut metrics.jsonl back to it."""
    path, log = out / "checkpoint.pt", out / "metrics.jsonl"
    if not path.exists():
        log.unlink(missing_ok=True)
        return Progress(photos=seen)
    state = torch.load(path, map_location=device, weights_only=True)
    asked = {k: v for k, v in asdict(recipe).items() if k not in ("steps", "minutes")}  # the budget may be changed
    changed = sorted(k for k, v in asked.items() if state["recipe"].get(k) != v)
    if changed:
        was = ", ".join(f"{k}={state['recipe'].get(k)}" for k in changed)
        raise BadInput(f"{path} was made with {was}; use the same options, or another OUT")
    if state["at"]["photos"] != seen:
        raise BadInput(f"{path} was made with other photographs than are in the folder now; give another OUT")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    at = Progress(**state["at"])
    if log.exists():  # lines after the checkpoint belong to steps that will be done again; the last may be half a line
        lines = [line for line in log.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= at.step]
        files.write_text(log, "".join(line + "\n" for line in kept))
    print(f"going on from step {at.step} of {path}", flush=True)
    return at


def export(
    recipe: Recipe, pictures: photos.Photos, at: Progress, out: Path, device: torch.device, what: str
) -> dict[str, Any]:
    """Write teacher.safetensors and its model card with probes; returns the card."""
    network = build(recipe, pictures, device)
    untrained = build(recipe, pictures, device)
    network.load_state_dict(torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)["network"])
    # Probe what is shipped, rounded.
    network.vit.load_state_dict({k: v.half().float() for k, v in network.vit.state_dict().items()})
    encoders = {
        "trained": network.vit,
        "random_weights": untrained.vit,  # as training began
        "random_weights_timm": make_encoder(recipe).to(device),  # smaller: nearly linear
    }
    probes: dict[str, Any] = {"frozen_features": probe.frozen_features(encoders, pictures, recipe.patch)}
    mae = masked_autoencoder.MaskedAutoencoder
    if isinstance(network, mae) and isinstance(untrained, mae):
        probes["reconstruction"] = probe.reconstruction(network, untrained, pictures, recipe.visible, recipe.crop)
    return write_teacher(recipe, network, pictures, at, out, what, probes)


def write_teacher(
    recipe: Recipe,
    network: Network,
    pictures: photos.Photos,
    at: Progress,
    out: Path,
    what: str,
    probes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write teacher.safetensors (float16) and teacher.json, its card; returns the card."""
    arch = masked_structure.ARCH if recipe.objective == "structure" else masked_autoencoder.ARCH
    weights = {k: v.to("cpu", torch.float16).contiguous() for k, v in network.vit.state_dict().items()}
    with files.atomic(out / "teacher.safetensors") as part:
        save_file(weights, part, metadata={"arch": arch, "patch": str(recipe.patch), "license": "Apache-2.0"})

    kept = at.curve[:: -max(1, len(at.curve) // 50)][::-1]  # ends with the last
    card = {
        "name": "trained",
        "arch": arch,
        "patch": recipe.patch,
        "file": "teacher.safetensors",
        "sha256": files.sha256(out / "teacher.safetensors"),
        "dtype": "float16",
        "license": "Apache-2.0",
        "input": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "range": "0..1 before normalization", "size": 224},
        "data": {
            "photographs": len(pictures.train) + len(pictures.held),
            "held_out": len(pictures.held),
            "what": what,
        },
        "method": STRUCTURE_METHOD if recipe.objective == "structure" else METHOD,
        "recipe": asdict(recipe),
        "steps": at.step,
        "images_seen": at.step * recipe.batch,
        "training_seconds": round(at.seconds, 1),
        "loss_curve": [[step, round(loss, 4)] for step, loss in kept],
        "probes": probes,
    }
    files.write_json(out / "teacher.json", card)
    return card


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Recipe]:
    """Command line -> paths and recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of JPEG or PNG photographs")
    parser.add_argument("out", type=Path, metavar="OUT", help="run folder")
    parser.add_argument("--threads", type=int, default=0, help="CPU workers; 0: one per core")
    parser.add_argument("--every", type=float, default=120.0, help="seconds between checkpoints (default %(default)s)")
    parser.add_argument("--log", type=int, default=50, help="steps between progress lines (default %(default)s)")
    parser.add_argument("--data", default=DATA, help="what the photographs are, for the model card")
    default = asdict(Recipe())
    for name, value in default.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"(default {value})")
    found = parser.parse_args(arguments)
    recipe = Recipe(**{name: getattr(found, name) for name in default})
    if (recipe.steps > 0) == (recipe.minutes > 0):
        parser.error("give either --steps N or --minutes N")
    if recipe.crop % recipe.patch or 224 % recipe.patch or not recipe.patch <= recipe.crop <= 224:
        parser.error(
            f"--crop {recipe.crop} must be a multiple of --patch {recipe.patch}, which divides 224, at most 224"
        )
    if recipe.patch < 8 or recipe.patch % 4 or not 0 < recipe.mask < 1 or recipe.held < 4 or recipe.width % 32:
        parser.error("wanted: --patch 8, 16, 28 or 32, 0 < --mask < 1, --held 4 or more, --width a multiple of 32")
    if recipe.objective not in OBJECTIVES or recipe.visible_weight < 0:
        parser.error(f"wanted: --objective {' or '.join(OBJECTIVES)}, --visible_weight 0 or more")
    if not found.photos.is_dir():
        parser.error(f"{found.photos} is not a folder; give the folder of photographs")
    return found, recipe


def main(arguments: list[str] | None = None) -> None:
    """Decode, train, export, probe."""
    found, recipe = parse(arguments)
    if found.threads:
        torch.set_num_threads(found.threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found.out.mkdir(parents=True, exist_ok=True)
    files.remove_parts(found.out)
    try:
        pictures = photos.load(found.photos, found.out / "cache", recipe.side, recipe.held)
        with workers(device, found.threads) as pool:
            at = train(recipe, pictures.on(device), found.out, device, found.every, found.log, pool, found.data)
    except BadInput as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print("probing what it knows, beside untrained weights: some minutes on a CPU", flush=True)
    card = export(recipe, pictures, at, found.out, device, found.data)
    print(json.dumps(card["probes"], indent=1))
    print(f"{found.out / 'teacher.safetensors'}  sha256 {card['sha256']}")
    print(f"use it with  teacher.model=trained teacher.weights={found.out}")


if __name__ == "__main__":
    main()
