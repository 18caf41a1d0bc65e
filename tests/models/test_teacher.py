"""models/teacher.py: equal to timm, frozen, and clear when weights are missing, wrong or out of reach."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.models import teacher as module
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import Teacher, load_teacher, timm
from tests.helpers.tiny_teachers import family

ARCH = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def random_teacher() -> Teacher:
    return load_teacher(TeacherConfig(model="random"))


@pytest.mark.parametrize(
    ("arch", "patch"), [(ARCH, 16), ("vit_small_patch14_reg4_dinov2", 14), ("vit_tiny_patch16_dinov3_qkvb", 16)]
)
def test_features_are_timms_for_the_normalized_rgb_image(arch: str, patch: int) -> None:
    teacher = load_teacher(TeacherConfig(model="random", arch=arch))
    gray = torch.rand(2, 2 * patch, 3 * patch)
    got = teacher.features(gray, [11, 2, 11])
    rgb = torch.stack([(gray - m) / s for m, s in zip(teacher.mean, teacher.std, strict=True)], dim=1)
    with torch.no_grad():
        last = teacher.backbone.forward_features(rgb)[:, teacher.backbone.num_prefix_tokens :]
        third = teacher.backbone.forward_intermediates(rgb, indices=[2], norm=True, intermediates_only=True)[0]
    assert got.shape == (3, 2, 2, 3, teacher.dim)
    torch.testing.assert_close(got[0], last.view(2, 2, 3, -1))
    torch.testing.assert_close(got[2], got[0])
    torch.testing.assert_close(got[1], third.permute(0, 2, 3, 1))
    teacher.backbone.blocks[3].register_forward_hook(lambda *_: pytest.fail("a block beyond the last one wanted ran"))
    torch.testing.assert_close(teacher.features(gray, [2])[0], got[1])


def test_facts_are_the_backbones(random_teacher: Teacher) -> None:
    assert (random_teacher.dim, random_teacher.depth, random_teacher.heads, random_teacher.patch) == (192, 12, 3, 16)
    assert random_teacher.random
    assert random_teacher.mean == timm().create_model(ARCH).pretrained_cfg["mean"]


def test_teacher_stays_frozen_and_in_eval_mode(random_teacher: Teacher) -> None:
    torch.nn.Sequential(random_teacher).train()
    assert not any(m.training for m in random_teacher.modules())
    assert not any(p.requires_grad for p in random_teacher.parameters())
    assert not random_teacher.features(torch.rand(1, 16, 16, requires_grad=True), [0]).requires_grad


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone(random_teacher: Teacher) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = load_teacher(TeacherConfig(model="random"))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    other = load_teacher(TeacherConfig(model="random", seed=1))
    assert again.identity == random_teacher.identity
    assert other.identity["sha256"] != random_teacher.identity["sha256"]


@pytest.mark.parametrize("shape", [(1, 16), (1, 16, 17), (1, 0, 16), (1, 1, 16, 16)])
def test_images_of_another_shape_are_refused(random_teacher: Teacher, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples of 16; pad"):
        random_teacher.features(torch.rand(shape), [0])


@pytest.mark.parametrize("layers", [[12], [-1], []])
def test_layers_that_do_not_exist_are_refused(random_teacher: Teacher, layers: list[int]) -> None:
    with pytest.raises(InputError, match="0 to 11"):
        random_teacher.features(torch.rand(1, 16, 16), layers)


def _local(path: Path, **fields: str) -> TeacherConfig:
    return TeacherConfig(model=ARCH, weights=path, **fields)


def test_a_local_file_gives_its_weights_and_digest(random_teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = random_teacher.backbone.state_dict()
    save_file({**state, "head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    teacher = load_teacher(_local(path, sha256=digest.upper()))
    assert teacher.identity == {"name": ARCH, "sha256": digest}
    assert not teacher.random
    for name, tensor in teacher.backbone.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_a_training_checkpoint_is_unwrapped(random_teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    state = {f"module.backbone.{k}": v.half() for k, v in random_teacher.backbone.state_dict().items()}
    torch.save({"teacher": {**state, "module.head.mlp.0.weight": torch.zeros(3)}}, path)
    state = load_teacher(_local(path)).backbone.state_dict()
    wanted = random_teacher.backbone.state_dict()
    assert all(t.dtype == torch.float32 for t in state.values())
    torch.testing.assert_close(state["norm.weight"], wanted["norm.weight"].half().float())


def test_a_wrong_hash_names_both(random_teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(random_teacher.backbone.state_dict(), path)
    with pytest.raises(InputError) as caught:
        load_teacher(_local(path, sha256="ab" * 32))
    assert hashlib.sha256(path.read_bytes()).hexdigest() in str(caught.value)
    assert "ab" * 32 in str(caught.value)


def test_a_file_of_another_architecture_says_which_tensors_differ(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(timm().create_model(ARCH, num_classes=0, depth=11, embed_dim=384, num_heads=6).state_dict(), path)
    with pytest.raises(InputError, match=r"missing blocks\.11.* of another shape cls_token.*teacher\.model"):
        load_teacher(_local(path))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("w.safetensors", b"nonsense", "cannot be read as weights"),
        ("w.pth", b"nonsense", "not a plain file of tensors"),
        ("w.pth", b"", "cannot be read as weights"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        load_teacher(_local(path))


def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds no state dict"):
        load_teacher(_local(path))
    torch.save({"model": Path("x")}, path)
    with pytest.raises(InputError, match="not a plain file of tensors"):
        load_teacher(_local(path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_tiny_patch16_22", "no model 'vit_tiny_patch16_22'; close to it are vit_tiny_patch16_224"),
        ("resnet18", "not a plain ViT"),
        ("vit_tiny_patch16_224.nosuchtag", "nosuchtag"),
        ("someone/vit", "no model"),
    ],
)
def test_unknown_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_teacher(TeacherConfig(model=name))


def test_offline_hub_weights_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.huggingface.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module.huggingface, "try_to_load_from_cache", lambda *a, **k: None)
    name = "vit_tiny_patch16_224.augreg_in21k"
    command = f"hpc-neuro fetch-teacher {name} out=FOLDER"
    with pytest.raises(InputError, match=f"HF_HUB_OFFLINE is set; .*{command}.*bundled"):
        load_teacher(TeacherConfig(model=name))


@pytest.mark.parametrize("hangs", [True, False])
def test_an_unreachable_hub_does_not_hang(monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    release, answered = threading.Event(), list[bool]()

    def connect(*_: object, **__: object) -> None:
        if hangs:
            answered.append(release.wait(60))
        raise OSError("no route")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.huggingface.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module.huggingface, "SECONDS", 0.2)
    monkeypatch.setattr(module.huggingface, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(module.huggingface.socket, "create_connection", connect)
    with pytest.raises(InputError, match="did not answer" if hangs else "no route"):
        load_teacher(TeacherConfig(model="vit_tiny_patch16_224.augreg_in21k"))
    assert not answered  # the connection is still held
    release.set()


def test_cached_hub_weights_need_no_network(
    random_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "model.safetensors", []
    save_file(random_teacher.backbone.state_dict(), path)

    def find_cached(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file))
        return str(path)

    monkeypatch.setattr(module.huggingface, "try_to_load_from_cache", find_cached)
    monkeypatch.setattr(module.huggingface, "_unreachable", lambda: pytest.fail("the network was tried"))
    teacher = load_teacher(TeacherConfig(model="vit_tiny_patch16_224.augreg_in21k"))
    assert asked == [("timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors")]
    torch.testing.assert_close(teacher.backbone.norm.weight, random_teacher.backbone.norm.weight)


@pytest.mark.parametrize("fields", [["weights=x.pth"], ["model=random", "sha256=ab"], ["model=trained"]])
def test_contradictory_configs_are_refused(fields: list[str]) -> None:
    with pytest.raises(ConfigError):
        load(TeacherConfig, None, fields)


def test_an_unrelated_import_failure_is_not_swallowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('broken for another reason')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(module.sys.modules, "timm", raising=False)
    with pytest.raises(RuntimeError, match="another reason"):
        module.timm.__wrapped__()


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_an_untrained_copy_shares_the_shape_and_the_positions_only(arch: str) -> None:
    trained = family(arch)
    before = torch.random.get_rng_state()
    copy, again = (module.make_untrained_copy(trained, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)

    state, copied, repeated = (net.backbone.state_dict() for net in (trained, copy, again))
    assert {k: v.shape for k, v in copied.items()} == {k: v.shape for k, v in state.items()}
    assert all(torch.equal(copied[k], repeated[k]) for k in copied)
    assert [k for k in state if torch.equal(state[k], copied[k])] == [k for k in state if k == "pos_embed"]
    assert copy.identity != trained.identity
    assert (copy.mean, copy.std, copy.patch, copy.depth) == (trained.mean, trained.std, trained.patch, trained.depth)
