"""The frozen 2D teacher: any timm ViT, from the package, a local file or the hub. The only importer of timm."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import math
import pickle
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.models import huggingface, teacher_folder
from hpc_neuro.models.config import BUNDLED, TeacherConfig

# A fragment's schemas vanish with the object, so that it lives as long as the process.
_schemas: list[torch.library.Library] = []
_MAX_BLACK = 16
"""Sizes of images whose black features a teacher keeps."""
_MAX_DEPTH = 128
"""Blocks of the deepest teacher that a card may describe."""
_MAX_SIDE = 4096
"""[pixel] Largest image that a card may describe."""
_WANT_FOLDER = "give the folder that `hpc-neuro teacher train` or `teacher continue` wrote as teacher.weights"
ASSETS = Path(str(resources.files("hpc_neuro"))) / "assets"


@functools.cache
def timm() -> Any:
    """timm, imported at the first call as that takes seconds, also where torchvision's operators cannot load.

    Beside a CPU torch a CUDA build of torchvision dies on the missing schema of `nms`. Declaring the schemas is enough,
    for no ViT calls them. A working torchvision is left untouched: they are declared only after the import failed so.
    """
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise

        # The class has no types in torch.
        new_library: Any = torch.library.Library
        library = new_library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)

        # Half imported modules would be found again, and `import` would not run them a second time.
        for module in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "timm")]:
            del sys.modules[module]

        import timm

    return timm


class Teacher(nn.Module):
    """A frozen ViT in eval mode that maps gray slices to token maps."""

    def __init__(self, backbone: Any, identity: dict[str, str], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        # A feature cache must have been made with the same {"name", "sha256"}.
        self.identity = identity

        self.random = identity["name"].startswith("random")
        # Per RGB channel, for images in [0, 1].
        self.mean = tuple(float(v) for v in mean)
        self.std = tuple(float(v) for v in std)

        self.dim = int(backbone.embed_dim)
        self.depth = len(backbone.blocks)
        self.heads = int(backbone.blocks[0].attn.num_heads)
        self.patch = int(backbone.patch_embed.patch_size[0])
        # Features of black images by size and layers.
        self._black: dict[tuple[torch.Size, tuple[int, ...]], Tensor] = {}

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode whatever the caller's mode: a teacher has no dropout."""
        return super().train(False)

    @torch.no_grad()
    def features(self, gray: Tensor, layers: Sequence[int]) -> Tensor:
        """Token maps of `layers` (block indices from 0, in the order given) after the final norm.

        gray [N, H, W] in [0, 1], H and W multiples of the patch; repeated to RGB and normalized with the teacher's own
        mean and std -> [L, N, H/patch, W/patch, dim] in the dtype of the teacher's weights. Raises InputError.
        """
        if gray.ndim != 3 or any(n % self.patch or n == 0 for n in gray.shape[1:]):
            raise InputError(
                f"teacher images are {tuple(gray.shape)}, want [N, H, W] with H, W multiples of {self.patch}; pad them"
            )

        wrong = [i for i in layers if not 0 <= i < self.depth]
        if wrong or not layers:
            raise InputError(f"layers {list(layers)}: want one or more block indices 0 to {self.depth - 1}")

        dtype = next(self.backbone.parameters()).dtype
        mean, std = (torch.tensor(v, device=gray.device, dtype=dtype).view(1, 3, 1, 1) for v in (self.mean, self.std))
        rgb = (gray.to(dtype)[:, None] - mean) / std  # [N, 3, H, W]

        # timm gives maps in the order of depth, once each.
        order = sorted(set(layers))
        maps = self.backbone.forward_intermediates(rgb, order, norm=True, stop_early=True, intermediates_only=True)

        return torch.stack([maps[order.index(i)].permute(0, 2, 3, 1) for i in layers])

    def position_free_features(self, gray: Tensor, layers: Sequence[int]) -> Tensor:
        """`features` without those of a black image of the same size, so that what depends on the place alone is gone.

        A table of positions explains most of the features' variance and says nothing about the pixels.
        """
        key = (gray.shape[1:], tuple(layers))
        if key not in self._black:
            # Volumes of many sizes have border tiles of many sizes.
            if len(self._black) >= _MAX_BLACK:
                self._black.clear()
            self._black[key] = self.features(torch.zeros_like(gray[:1]), layers)
        return self.features(gray, layers) - self._black[key]


def load_teacher(cfg: TeacherConfig) -> Teacher:
    """Build the teacher `cfg` names, on the CPU in float32.

    Raises InputError for an unknown model, an unsupported family, a missing, broken or changed weights file, and for
    hub weights that are neither cached nor reachable (found out within seconds; HF_HUB_OFFLINE is honored).
    """
    if cfg.model == "random":
        # The caller's random numbers must not depend on the teacher that it loads.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            vit = create_vit(cfg.arch)

        mean, std = vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"]
        # There is no file, so that the tensors themselves identify the teacher to a feature cache.
        digest = _tensor_digest(vit.state_dict())
        return Teacher(vit, {"name": f"random {cfg.arch} seed {cfg.seed}", "sha256": digest}, mean, std)

    if cfg.model in BUNDLED:
        return _load_bundled(cfg)
    if cfg.model == "trained" and cfg.weights:
        return _load_by_card(cfg, cfg.weights / teacher_folder.NOTE, _WANT_FOLDER)

    vit = create_vit(cfg.model)
    path, pinned = teacher_folder.weights_of(
        cfg.weights or huggingface.weights(cfg.model, vit.pretrained_cfg), cfg.model
    )

    # A fetched folder states the digest of its weights. The config may state one too.
    digest = _checked_digest(path, cfg.sha256, advice=teacher_folder.advice(cfg.model))
    _checked_digest(path, pinned, digest)

    _fill(vit, path)
    return Teacher(vit, {"name": cfg.model, "sha256": digest}, vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])


def read_card(cfg: TeacherConfig) -> dict[str, Any]:
    """How the teacher that `cfg` names was made; {} for one without a card of ours. Raises InputError."""
    if cfg.model in BUNDLED:
        return dict(files.read_json(ASSETS / f"{BUNDLED[cfg.model]}.json", "reinstall the package"))
    if cfg.model == "trained" and cfg.weights:
        return dict(files.read_json(cfg.weights / teacher_folder.NOTE, _WANT_FOLDER))
    return {}


def make_untrained_copy(teacher: Teacher, seed: int = 0) -> Teacher:
    """The same architecture with timm's random start of every weight: what the teacher's training is measured against.

    A table of positions is copied, because it holds no image: the two differ in what they learned from pixels.
    """
    trained = teacher.backbone
    shape = {
        "patch_size": teacher.patch,
        "img_size": int(trained.patch_embed.img_size[0]),
        "depth": teacher.depth,
    }

    # The caller's random numbers must not depend on the gate.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = create_vit(str(trained.pretrained_cfg["architecture"]), **shape)

    if getattr(trained, "pos_embed", None) is not None:
        vit.pos_embed.data.copy_(trained.pos_embed)
    device, dtype = trained.patch_embed.proj.weight.device, trained.patch_embed.proj.weight.dtype
    identity = {"name": f"random copy of {teacher.identity['name']}", "sha256": _tensor_digest(vit.state_dict())}
    return Teacher(vit.to(device, dtype), identity, teacher.mean, teacher.std)


def make_shuffled_copy(teacher: Teacher, seed: int = 0) -> Teacher:
    """The teacher with the numbers of every tensor in random order: the scale of its weights without what they say.

    A table of positions stays as it is. Source: Raghu et al., Transfusion, NeurIPS 2019, who draw from the moments.
    """
    vit = copy.deepcopy(teacher.backbone)
    draws = torch.Generator().manual_seed(seed)
    for name, tensor in vit.named_parameters():
        if name != "pos_embed":
            order = torch.randperm(tensor.numel(), generator=draws).to(tensor.device)
            tensor.data.copy_(tensor.data.flatten()[order].view_as(tensor))

    identity = {"name": f"shuffled copy of {teacher.identity['name']}", "sha256": _tensor_digest(vit.state_dict())}
    return Teacher(vit, identity, teacher.mean, teacher.std)


def fetch(name: str, out: Path) -> list[str]:
    """Put the weights of a timm ViT, tried on the model, into the folder `out`; lines for people. Raises InputError.

    Where they are already there, the hub is not asked.
    """
    vit = create_vit(name)

    if already := teacher_folder.find_weights(out, name):
        return already

    # Weights are tried before they are kept: a folder that cannot be loaded helps nobody.
    path = huggingface.weights(name, vit.pretrained_cfg)
    _fill(vit, path)
    return teacher_folder.keep(out, name, path, vit.pretrained_cfg)


def _load_bundled(cfg: TeacherConfig) -> Teacher:
    """A teacher inside the package; its card says how it was made and what its file's digest must be."""
    path, card_path = (ASSETS / f"{BUNDLED[cfg.model]}.{kind}" for kind in ("safetensors", "json"))

    if not path.exists() or not card_path.exists():
        raise InputError(
            f"this installation has no bundled teacher ({path} is missing); "
            "use teacher.model=random or a timm name such as vit_small_patch16_224.dino"
        )

    return _load_by_card(cfg, card_path, "reinstall the package, or use teacher.model=random")


def _load_by_card(cfg: TeacherConfig, path: Path, hint: str) -> Teacher:
    """The teacher whose card is `path`, its weights beside it, built as the card says: timm knows no name for it."""
    card = files.read_json(path, hint)

    # The note of a fetched teacher has the same file name, but no recipe.
    try:
        weights, card_digest, arch = path.parent / str(card["file"]), str(card["sha256"]), str(card["arch"])
        size, depth = int(card["input"]["size"]), int(card["recipe"]["depth"])
        shape = {"patch_size": int(card["patch"]), "img_size": size, "depth": depth}
        mean, std = ([float(v) for v in card["input"][key]] for key in ("mean", "std"))
        is_sound = len(mean) == len(std) == 3 and min(std) > 0 and all(map(math.isfinite, (*mean, *std)))
        if not is_sound or not 0 < depth <= _MAX_DEPTH or not 0 < shape["patch_size"] <= size <= _MAX_SIDE:
            raise ValueError("a number of the card is out of range")
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(
            f"{path} is no card of `hpc-neuro teacher`; for a teacher that was fetched set teacher.model to its name"
        ) from None

    # The card's digest finds a damaged file, the config's digest finds another teacher.
    digest = _checked_digest(weights, card_digest)
    _checked_digest(weights, cfg.sha256, digest)

    vit = create_vit(arch, **shape)
    _fill(vit, weights)
    return Teacher(vit, {"name": cfg.model, "sha256": digest}, mean, std)


def create_vit(name: str, **overrides: int) -> Any:
    """An untrained timm ViT without a head that takes any image size in multiples of its patch."""
    # To timm a colon or a slash belongs to a place to load from, not to the name of an architecture.
    if "/" in name or ":" in name or not timm().is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm().list_models("vit_*"), n=3, cutoff=0.1)
        raise InputError(f"timm {timm().__version__} has no model {name!r}; close to it are {', '.join(near)}")

    # Other families have windows, pyramids or convolutions, which the student's blocks do not have.
    families = timm().models
    plain = (families.vision_transformer.__name__, families.eva.__name__)
    if timm().model_entrypoint(name.partition(".")[0]).__module__ not in plain:
        raise InputError(
            f"{name} is not a plain ViT; want one of timm's VisionTransformer or Eva classes "
            "(supervised, DINO, DINOv2, DINOv3, MAE), e.g. vit_small_patch16_224.dino"
        )

    try:
        return timm().create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **overrides)
    except (RuntimeError, ValueError) as error:
        # A known architecture may still have an unknown tag after the dot.
        raise InputError(f"timm cannot build {name!r}: {error}") from None


def _fill(vit: Any, path: Path) -> None:
    """Load a weights file into `vit`, strictly. timm's own filter converts foreign names and resizes positions."""
    families = timm().models
    family = families.eva if isinstance(vit, families.eva.Eva) else families.vision_transformer

    state = _read(path)
    # This check comes before timm's filter, which would resample the kernel without a word.
    _same_patch(state, vit, path)
    # It prints every bias of DINOv3 that it leaves out, all of which are zero.
    with contextlib.redirect_stdout(None):
        state = family.checkpoint_filter_fn(state, vit)

    # The head and the mask token serve pretraining alone.
    state = {k: v.float() for k, v in state.items() if not k.startswith("head.") and k != "mask_token"}

    # Torch's own error of a strict load does not say which setting to change.
    own = vit.state_dict()
    missing, left = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = {k: (tuple(state[k].shape), tuple(v.shape)) for k, v in own.items() if k in state}
    other = [f"{k} {stored} for {expected}" for k, (stored, expected) in shapes.items() if stored != expected]

    if missing or left or other:
        raise InputError(
            f"{path} does not hold the weights of {vit.pretrained_cfg['architecture']}: missing {_names(missing)}; "
            f"left over {_names(left)}; of another shape {_names(other)}; set teacher.model to the file's architecture"
        )

    vit.load_state_dict(state)


def _same_patch(state: Mapping[str, Tensor], vit: Any, path: Path) -> None:
    """InputError where the file's patch kernel has another size: timm would resample it without a word."""
    *channels, height, width = vit.patch_embed.proj.weight.shape

    # The kernel is found by its shape, because families name it differently and no other tensor has four axes.
    for kernel in state.values():
        if kernel.ndim == 4 and [*kernel.shape[:2]] == channels and kernel.shape[2:] != (height, width):
            raise InputError(
                f"{path} holds a teacher with patches of {kernel.shape[2]} x {kernel.shape[3]} pixels, but "
                f"{vit.pretrained_cfg['architecture']} has {height} x {width}; set teacher.model to what the file "
                "holds, or, if `hpc-neuro teacher` made it, teacher.model=trained teacher.weights=FOLDER"
            )


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, unwrapped from the containers training programs save them in."""
    try:
        plain = path.suffix == ".safetensors"
        # `weights_only` refuses pickles that run code.
        state: Any = load_file(path) if plain else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is not a plain file of tensors ({huggingface.line(error)}); save only its state dict"
        ) from None
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read as weights ({huggingface.line(error)}); want .safetensors or a torch file"
        ) from None

    # Training programs save the model beside their optimizer, under one of these names.
    for key in ("teacher", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]

    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state dict; save only the model's tensors by name")

    # Wrappers of the model, such as DistributedDataParallel, prefix the names.
    return {k.removeprefix("module.").removeprefix("backbone."): v for k, v in state.items()}


def _checked_digest(path: Path, wanted: str | None, digest: str | None = None, advice: str = "reinstall") -> str:
    if not path.is_file():
        raise InputError(f"the teacher's weights file {path} does not exist; {advice}")

    # Weights are large, so that a caller passes the digest that it has computed before.
    digest = digest or files.sha256(path)
    if wanted and digest != wanted.lower():
        raise InputError(
            f"{path} has sha256 {digest}, but {wanted.lower()} is wanted; "
            "fetch the file again, or set teacher.sha256 to what it has"
        )

    return digest


def _tensor_digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    # Names are sorted, because the order of a state dict is that of construction.
    for name, tensor in sorted(state.items()):
        # The same bytes in another shape are another tensor.
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _names(names: Sequence[str]) -> str:
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "nothing"
