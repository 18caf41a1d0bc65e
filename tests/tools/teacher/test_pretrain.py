"""The teacher's pre-training: timm accepts the result, a killed run ends with the same bits, batches need no state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hpc_neuro.core import files
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import load_teacher
from tools.teacher import masked_autoencoder, masked_structure, photos, pretrain, probe, structure
from tools.teacher.recipe import Recipe

ROOT = Path(__file__).resolve().parents[3]

TINY = ["--steps", "12", "--depth", "2", "--width", "32", "--decoder", "1", "--batch", "4", "--side", "64"]
TINY += ["--part", "3", "--crop", "32", "--held", "4", "--log", "2", "--every", "0", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of smooth stripes, not square, one of them gray."""
    path = tmp_path_factory.mktemp("photos")
    y, x = np.mgrid[:70, :90]
    for number in range(10):
        stripe = np.sin(x / (3 + number) + y / 5)
        pixels = np.stack([stripe, stripe * 0.5, -stripe], -1) * 100 + 128
        picture = Image.fromarray(pixels.astype(np.uint8))
        (picture.convert("L") if number == 3 else picture).save(path / f"{number}.jpg")
    return path


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, with one worker; the killed one has two until it is killed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain.main([str(folder), str(out), *TINY])
    return out


def test_timm_loads_the_weights_strictly(finished: Path) -> None:
    masked_autoencoder.import_timm()
    import timm

    weights = load_file(finished / "teacher.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    vit.load_state_dict(weights, strict=True)
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    mine = masked_autoencoder.encoder(16).state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in whole.state_dict().items()}
    eight = timm.create_model("vit_tiny_patch16_224", patch_size=8, num_classes=0)
    eight.load_state_dict(masked_autoencoder.encoder(8).state_dict(), strict=True)


def test_the_package_takes_the_folder_as_a_teacher(finished: Path) -> None:
    teacher = load_teacher(TeacherConfig(model="trained", weights=finished))
    assert (teacher.patch, teacher.depth) == (16, 2)
    assert teacher.identity["sha256"] == files.sha256(finished / "teacher.safetensors")


def test_the_card_tells_what_was_done(finished: Path) -> None:
    card = json.loads((finished / "teacher.json").read_text())
    assert card["sha256"] == files.sha256(finished / "teacher.safetensors")
    assert (card["steps"], card["images_seen"], card["license"]) == (12, 48, "Apache-2.0")
    assert card["data"]["photographs"] == 10
    assert [step for step, _ in card["loss_curve"]] == [2, 4, 6, 8, 10, 12]
    scores = card["probes"]["frozen_features"]
    for task in ("orientation", "edges", "neighbors", "curves"):
        assert set(scores[task]) == {"pixels", "trained", "random_weights", "random_weights_timm"}
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert not list(finished.rglob(".*.part"))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "tools.teacher.pretrain", str(folder), str(out), *TINY, "--threads", "2"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while child.poll() is None and not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert (out / "checkpoint.pt").exists()
    interrupted = torch.load(out / "checkpoint.pt", weights_only=True)["at"]["step"]
    assert interrupted % 2 == 0
    (out / ".checkpoint.pt.00000000.part").write_bytes(b"half")  # what a kill inside a save leaves
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 99, "loss"')  # and inside a line
    pretrain.main([str(folder), str(out), *TINY])
    one, two = load_file(finished / "teacher.safetensors"), load_file(out / "teacher.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)
    losses = [
        [(r["step"], r["loss"]) for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
        for run in (finished, out)
    ]
    assert losses[0] == losses[1]
    assert not list(out.rglob(".*.part"))


def test_other_options_do_not_continue_a_run(folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pretrain.main([str(folder), str(finished), *TINY, "--lr", "0.01"])
    assert stop.value.code == 2
    assert "was made with lr=0.001; use the same options, or another OUT" in capsys.readouterr().err


def test_other_photographs_do_not_continue_a_run(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    Image.new("RGB", (70, 70)).save(more / "new.jpg")
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        pretrain.main([str(more), str(tmp_path / "run"), *TINY])
    assert stop.value.code == 2
    assert "was made with other photographs than are in the folder now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --steps N or --minutes N"),
        (["--steps", "1", "--minutes", "1"], "give either --steps N or --minutes N"),
        (["--steps", "1", "--crop", "100"], "must be a multiple of --patch 16"),
        (["--steps", "1", "--patch", "14", "--crop", "112"], "wanted: --patch 8, 16, 28 or 32"),
        (["--steps", "1", "--held", "10"], "fewer than the 10 to hold out and one more"),
    ],
)
def test_bad_options_say_what_to_do(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        pretrain.main([str(folder), str(tmp_path), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_broken_picture_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "photos"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 50 if file.name == "5.jpg" else None])
    with pytest.raises(SystemExit):
        pretrain.main([str(copy), str(tmp_path / "out"), *TINY])
    assert "5.jpg cannot be read as a picture" in capsys.readouterr().err
    assert not (tmp_path / "out" / "cache" / "tiles64.json").exists()


def test_batches_depend_on_the_step_alone_and_never_on_held_out_photographs(folder: Path, finished: Path) -> None:
    pictures = photos.load(folder, finished / "cache", 64, 4)
    assert not set(pictures.held) & set(pictures.train)
    cpu = torch.device("cpu")
    recipe = Recipe(batch=4, crop=32, patch=16)
    first = photos.batch(pictures, 3, recipe, cpu)
    photos.batch(pictures, 7, recipe, cpu)
    again = photos.batch(pictures, 3, recipe, cpu)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.order, again.order)
    assert not torch.equal(first.target, photos.batch(pictures, 4, recipe, cpu).target)
    assert first.target.min() >= -1
    assert first.target.max() <= 1


def test_crops_are_turned_and_mirrored_but_never_sheared() -> None:
    """Every output of a smooth ramp is again a ramp along one axis: a quarter turn, nothing between."""
    ramp = torch.linspace(0, 1, 64).expand(32, 3, 64, 64)
    turned = photos.augment(ramp, 32, torch.Generator().manual_seed(0))  # [32, 3, 32, 32]
    along_y = (turned[:, :, 1:] - turned[:, :, :-1]).abs().amax((1, 2, 3))
    along_x = (turned[..., 1:] - turned[..., :-1]).abs().amax((1, 2, 3))
    assert torch.minimum(along_y, along_x).max() < 1e-4
    assert (along_y > 1e-3).any()
    assert (along_x > 1e-3).any()


def test_tokens_of_training_are_those_of_timm() -> None:
    """All patches visible at timm's own positions: the training path is exactly timm's forward pass."""
    torch.manual_seed(0)
    vit = masked_autoencoder.encoder(16, depth=2).eval()
    mae = masked_autoencoder.MaskedAutoencoder(vit, 16, 32, 1).eval()
    image = torch.randn(1, 3, 224, 224)
    axis = torch.arange(14.0)
    y, x = (c.flatten()[None] for c in torch.meshgrid(axis, axis, indexing="ij"))
    with torch.no_grad():
        torch.testing.assert_close(
            mae.encode(masked_autoencoder.patchify(image, 16), y, x), vit.forward_features(image), rtol=1e-4, atol=1e-4
        )


def test_coordinates_stay_on_the_table() -> None:
    y, x = photos.coordinates(torch.Generator().manual_seed(0), 200, 8, 14)
    assert min(y.min(), x.min()) >= 0
    assert max(y.max(), x.max()) <= 13 + 1e-4
    spacing = (x.view(200, 8, 8)[:, 0, 1:] - x.view(200, 8, 8)[:, 0, :-1]).mean(1)
    assert ((spacing - 1).abs() < 1e-5).float().mean() > 0.4
    assert spacing.min() >= 0.5 - 1e-5


def test_the_rate_follows_progress() -> None:
    recipe = Recipe(minutes=10)
    assert recipe.progress(0, 300) == 0.5
    assert recipe.rate(0.05) == pytest.approx(1e-3)
    assert recipe.rate(0.525) == pytest.approx(0.5e-3)
    assert recipe.rate(1) == pytest.approx(1e-6)
    assert Recipe(steps=10).progress(5, 1e9) == 0.5


def test_orientation_of_stripes() -> None:
    x = torch.arange(224.0)
    vertical = (x / 3).sin().expand(1, 3, 224, 224)
    torch.testing.assert_close(probe.orientation(vertical, 16)[0, 20], torch.tensor([1.0, 0.0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(probe.orientation(vertical.mT, 16)[0, 20], torch.tensor([-1.0, 0.0]), atol=1e-2, rtol=0)


STRUCTURE = ["--objective", "structure", "--steps", "6", "--depth", "2", "--batch", "4", "--side", "64", "--part", "3"]
STRUCTURE += ["--patch", "8", "--crop", "32", "--held", "4", "--log", "2", "--every", "0", "--threads", "1"]


def test_a_teacher_of_structure_is_taken_by_the_package(folder: Path, tmp_path: Path) -> None:
    pretrain.main([str(folder), str(tmp_path), *STRUCTURE])

    teacher = load_teacher(TeacherConfig(model="trained", weights=tmp_path))
    assert (teacher.patch, teacher.depth, teacher.dim) == (8, 2, 192)
    assert teacher.features(torch.rand(1, 48, 64), [-1 % 2]).shape == (1, 1, 6, 8, 192)

    card = json.loads((tmp_path / "teacher.json").read_text())
    assert card["arch"] == masked_structure.ARCH
    assert "structure" in card["method"]


def test_structure_is_learned_from_one_batch(folder: Path, finished: Path) -> None:
    recipe = Recipe(objective="structure", patch=8, crop=32, side=64, batch=8, depth=1, held=4)
    pictures = photos.load(folder, finished / "cache", 64, 4)
    network = pretrain.build(recipe, pictures, torch.device("cpu"))
    batch = photos.batch(pictures, 0, recipe, torch.device("cpu"))

    losses = []
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(20):
        loss = network(batch, recipe.visible)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_a_teacher_of_structure_trains_as_timm_runs_it() -> None:
    """All patches visible at the coordinates of a whole image: the training path is timm's forward pass."""
    torch.manual_seed(0)
    vit = masked_structure.make_encoder(8, depth=2).eval()
    network = masked_structure.MaskedStructure(vit, 8, 0.5, torch.rand(2, 3, 64, 64)).eval()
    image = torch.randn(2, 3, 64, 64)
    axis = 2 * (torch.arange(8) + 0.5 - 4) / 8
    y, x = (c.flatten().expand(2, -1) for c in torch.meshgrid(axis, axis, indexing="ij"))
    batch = photos.Batch(image, image, torch.arange(64).expand(2, -1), y, x)

    with torch.no_grad():
        expected = vit.forward_features(image)[:, -64:]
        torch.testing.assert_close(network.encode(batch, 64), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(network.encode(batch, 40), expected)


def test_ridges_are_bright_lines_of_their_scale() -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    line = (-((x - 32) ** 2) / (2 * 2.0**2)).exp()[None, None]

    bright, dark = structure.measure_ridges(line, 2.0), structure.measure_ridges(1 - line, 2.0)
    assert bright[0, 0, 32, 32] > 0.8
    assert bright[0, 0, 32, 10] < 0.01
    assert dark[0, 0, 32, 32] < 0.01
    # A ramp has no ridge but where it is reflected.
    assert structure.measure_ridges((y + x)[None, None] / 128, 1.0)[..., 8:-8, 8:-8].max() < 0.01


def test_the_directions_of_a_token_are_those_of_its_pixels() -> None:
    """Vertical stripes left, horizontal ones right: the groups differ there, and in nothing else."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.where(x < 32, (x * 1.5).sin(), (y * 1.5).sin())[None, None] / 2 + 0.5
    groups = structure.describe_structure(image, 8)
    assert [group.shape for group in groups] == [(1, 64, n) for n in (16, 16, 16, 4, 32, 8)]

    histograms = groups[4].view(8, 8, structure.HISTOGRAM_BINS, 4).mean(-1)
    assert histograms[4, 1].argmax() == 0
    assert histograms[4, 6].argmax() == structure.HISTOGRAM_BINS // 2
    directions = groups[5].view(8, 8, 2, 4).mean(-1)
    assert directions[4, 1, 0] > 0.8
    assert directions[4, 6, 0] < -0.8


def test_a_dark_field_is_black_but_for_its_brightest_part() -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 32, 32, generator=draws) * 2 - 1
    darkened = photos.darken_field(images, draws)
    black = (darkened == -1).float().mean((1, 2, 3))
    assert 16 < int((black > 0.25).sum()) < 48
    assert float(black.max()) < 0.95
    assert torch.equal(darkened[:, 0], darkened[:, 1])
