"""models/student.py: shapes, features, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hpc_neuro.core import schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.models.config import SIZES, BlockTokens, FeatureTubesConfig, StudentConfig, TubularTokens
from hpc_neuro.models.student import build_student, load_student, save_student
from hpc_neuro.models.teacher import timm

SMALL = StudentConfig(depth=2, patch=(4, 8, 8), channels=(4, 6, 8), grid=(2, 4, 4))


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_timms(size: str) -> None:
    dim, depth, heads = SIZES[size]
    with torch.device("meta"):
        vit = timm().create_model(f"vit_{size}_patch16_224", num_classes=0)
        ours = build_student(StudentConfig(size=size)).vit
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (dim, depth, heads)
    timm_shapes = {k: v.shape for k, v in vit.blocks.state_dict().items()}
    assert {k: v.shape for k, v in ours.blocks.state_dict().items()} == timm_shapes


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 2), st.tuples(*[st.integers(1, 3)] * 3), st.sets(st.integers(0, 1)))
def test_any_multiple_of_the_patch_works(batch: int, grid: tuple[int, int, int], layers: set[int]) -> None:
    student = build_student(SMALL)
    shape = tuple(n * p for n, p in zip(grid, SMALL.patch, strict=True))
    prediction = student(torch.rand(batch, 1, *shape), tuple(layers))
    assert prediction.logits.shape == (batch, 1, *shape)
    assert {k: tuple(v.shape) for k, v in prediction.features.items()} == dict.fromkeys(layers, (batch, 192, *grid))


@pytest.mark.parametrize("shape", [(1, 1, 4, 8, 9), (1, 2, 4, 8, 8), (1, 4, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="patch"):
        build_student(SMALL)(torch.rand(shape))


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="0 to 1"):
        build_student(SMALL)(torch.rand(1, 1, 4, 8, 8), (2,))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch": (8, 16, 16), "depth": 4, "tubes": FeatureTubesConfig(taps=3)},
        {"positions": "rotary", "registers": 2},
        {"transformer": False},
        {"layer_scale": True, "class_token": False, "checkpointing": True},
        {"tokenizer": TubularTokens(taps=5, keep_block=True)},
        {"tokenizer": TubularTokens(taps=5, deformable=False, fuse="concat", keep_block=False)},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(changes: dict[str, object]) -> None:
    """A parameter without one breaks distributed training, and is a knob that does nothing."""
    torch.manual_seed(0)
    student = build_student(StudentConfig(**{"patch": (4, 8, 8), "depth": 2, **changes})).train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    student(torch.rand(2, 1, 8, 16, 16)).logits.square().sum().backward()
    assert not [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]


def test_all_parts_of_a_crop_are_seen() -> None:
    """A voxel of the far corner acts on the logits of the near one: attention spans the window."""
    student = build_student(SMALL).eval()
    image = torch.rand(1, 1, 8, 24, 24, requires_grad=True)
    student(image).logits[0, 0, 0, 0, 0].backward()
    assert image.grad is not None
    assert image.grad[0, 0, -1, -8:, -8:].any()


def test_halo_covers_the_reach_of_the_convolutions() -> None:
    """Without the transformer, voxels farther than the halo do not act."""
    student = build_student(StudentConfig(transformer=False, patch=(4, 8, 8), channels=(4, 6, 8)))
    at = (64, 128, 128)
    image = torch.rand(1, 1, 128, 256, 256, requires_grad=True)
    student(image).logits[0, 0, *at].backward()
    assert image.grad is not None
    for axis, (reach, center) in enumerate(zip(student.halo, at, strict=True)):
        acting = image.grad[0, 0].movedim(axis, 0).flatten(1).any(1).nonzero()
        assert center - reach <= acting.min() < center < acting.max() <= center + reach


def test_the_transformer_orders_slices_from_the_first_step() -> None:
    """Tokens in reversed order along z give other features, and not only reversed ones."""
    torch.manual_seed(0)
    student = build_student(SMALL).eval()
    tokens = torch.randn(1, student.dim, 2, 3, 3)
    assert student.vit is not None
    with torch.inference_mode():
        forward, backward = student.vit(tokens)[0], student.vit(tokens.flip(2))[0].flip(2)
    assert (forward - backward).abs().mean() > 1e-3


def test_a_transferred_transformer_first_sees_the_image_alone() -> None:
    """The projection of the encoder's features onto the tokens starts at zero."""
    student = build_student(SMALL).eval()
    assert not student.to_tokens.linear.weight.any()
    assert not student.to_tokens.linear.bias.any()


def test_half_precision_runs() -> None:
    student = build_student(SMALL).to(torch.bfloat16)
    prediction = student(torch.rand(1, 1, 4, 8, 8), (0,))
    assert prediction.logits.dtype == prediction.features[0].dtype == torch.bfloat16


@pytest.mark.slow
def test_a_student_learns_a_thin_line() -> None:
    torch.manual_seed(0)
    student = build_student(SMALL)
    mask = torch.zeros(1, 1, 8, 24, 24)
    mask[..., 3, torch.arange(24), torch.arange(24)] = 1
    image = 0.3 * torch.rand_like(mask) + 0.7 * mask
    image[..., 5:, 16:, 3:8] = 1.0  # a bright blob that is no neurite
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(100):
        logits = student(image).logits
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, mask, pos_weight=torch.tensor(5.0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    predicted = logits > 0
    dice = 2 * (predicted & (mask > 0)).sum() / (predicted.sum() + mask.sum())
    assert dice > 0.9


def test_saved_students_come_back_exactly(tmp_path: Path) -> None:
    student = build_student(SMALL)
    save_student(tmp_path / "best", SMALL, student.to(torch.bfloat16).state_dict(), {"window": [8, 16, 16], "step": 7})
    loaded, meta = load_student(tmp_path / "best")
    assert (meta["window"], meta["step"]) == ([8, 16, 16], 7)
    assert meta["code"]
    assert not loaded.training
    assert loaded.cfg == SMALL
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.float(), rtol=0, atol=0)
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["model.safetensors", "student.yaml"]
    assert {t.dtype for t in load_file(tmp_path / "best" / "model.safetensors").values()} == {torch.float32}


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    student = build_student(SMALL)
    for step in (1, 2):
        save_student(tmp_path / "last", SMALL, student.state_dict(), {"step": step})
    assert load_student(tmp_path / "last")[1]["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_a_failed_save_keeps_the_old_one(tmp_path: Path) -> None:
    student = build_student(SMALL)
    save_student(tmp_path / "last", SMALL, student.state_dict(), {"step": 1})
    with pytest.raises(yaml.YAMLError):
        save_student(tmp_path / "last", SMALL, student.state_dict(), {"step": object()})
    assert load_student(tmp_path / "last")[1]["step"] == 1


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    student = build_student(SMALL)
    with pytest.raises(InputError, match="holds no trained student"):
        load_student(tmp_path)
    save_student(tmp_path, SMALL, student.state_dict(), {})
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    bias = state.pop("vit.norm.bias")
    save_file({**state, "extra": bias, "vit.norm.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="does not have the checksum"):
        load_student(tmp_path)

    # A file with the right checksum may still be that of another network.
    saved = yaml.safe_load((tmp_path / "student.yaml").read_text())
    (tmp_path / "student.yaml").write_text(yaml.safe_dump({k: v for k, v in saved.items() if k != "sha256"}))
    with pytest.raises(InputError, match=r"extra is left over, vit.norm.bias is missing, vit.norm.weight is \(3,\)"):
        load_student(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        load_student(tmp_path)
    (tmp_path / "student.yaml").write_text("student: {sise: tiny}\ncode: x\n")
    with pytest.raises(ConfigError, match="sise"):
        load_student(tmp_path)


def test_configs_come_back_from_yaml(tmp_path: Path) -> None:
    for cfg in (
        SMALL,
        StudentConfig(tokenizer=TubularTokens(fuse="mean"), tubes=FeatureTubesConfig(taps=5), size="large"),
    ):
        (tmp_path / "c.yaml").write_text(schema.dump(cfg))
        assert schema.load(StudentConfig, tmp_path / "c.yaml") == cfg
    assert schema.load(StudentConfig, None, ["tokenizer.kind=block"]).tokenizer == BlockTokens()
    with pytest.raises(ConfigError, match="drop_path"):
        schema.load(StudentConfig, None, ["drop_path=1"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("window", [24, None, 96]),
        ("window", [24, 96]),
        ("window", "24"),
        ("window", [0, 96, 96]),
        ("threshold", "high"),
        ("threshold", None),
        ("contrast", "loud"),
        ("voxel_sizes", [[1, 1, 1]]),
        ("voxel_sizes", [[1, 1, 1], [1, 1, 0]]),
        ("neurite_widths", [[1, 1], [2, 2]]),
        ("neurite_widths", [[1, None], [2, 2], [3, 3]]),
        ("neurite_widths", [[0, 1], [2, 2], [3, 3]]),
    ],
)
def test_notes_of_a_training_that_have_another_form_are_refused(key: str, value: object, tmp_path: Path) -> None:
    notes = {"window": [24, 96, 96], "threshold": 0.4, "contrast": "local", "voxel_sizes": [[1, 1, 1], [2, 2, 2]]}
    notes["neurite_widths"] = [[None, 1.0], [2, 2], [3, 3]]
    cfg = StudentConfig(transformer=False, patch=(4, 8, 8), channels=(8, 4, 4))
    save_student(tmp_path, cfg, build_student(cfg).state_dict(), {**notes, "step": 3})
    assert load_student(tmp_path)[1]["window"] == [24, 96, 96]
    saved = yaml.safe_load((tmp_path / "student.yaml").read_text())
    saved["extra"][key] = value
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match=rf"extra\.{key}.*train the student again"):
        load_student(tmp_path)
