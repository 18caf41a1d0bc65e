"""A 2D teacher's weights become a 3D student's.

The patch kernel is folded to gray, then laid out in 3D by one of RULES; transformer blocks, norms, class and register
tokens are copied by name; positions are resampled in the plane and shared over depth, or become 3D rotary ones.

Average and center inflation: Carreira & Zisserman, CVPR 2017 (also arXiv 2405.02686); kernel resize: FlexiViT, CVPR
2023; tubular rules: ours, after the idea of arXiv 2410.22078, whose code is not public.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.config import Order, TransferConfig, TubularTokens
from hpc_neuro.models.student import Student
from hpc_neuro.models.teacher import Teacher, make_shuffled_copy, make_untrained_copy
from hpc_neuro.models.tensor_names import translate


@dataclasses.dataclass
class TransferReport:
    """What came from the teacher and what did not, by name; `str()` is a summary for people."""

    rule: str
    teacher: Mapping[str, str]
    # Student's tensor -> elements.
    copied: dict[str, int] = dataclasses.field(default_factory=dict)
    # Student's tensor -> elements, and what was done to them.
    resampled: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    # Student's tensor that was left at its start -> elements.
    initial: dict[str, int] = dataclasses.field(default_factory=dict)
    # Teacher's tensor -> why the student has no place for it.
    unused: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def teacher_tensors(self) -> frozenset[str]:
        """The student's tensors that hold the teacher's knowledge, or lie inside its transformer.

        The depth positions are added to the teacher's own, so that they belong here; a bending tube's offsets do not.
        """
        return frozenset({*self.copied, *self.resampled, *(name for name in self.initial if name.startswith("vit."))})

    def __str__(self) -> str:
        changed = sum(n for n, _ in self.resampled.values())
        copied, left = sum(self.copied.values()), sum(self.initial.values())
        share = (copied + changed) / max(copied + changed + left, 1)

        lines = [f"transfer: {share:.1%} of the student's weights come from {self.teacher['name']} (rule {self.rule})"]
        lines.append(f"  copied unchanged: {_million(copied)} in {len(self.copied)} tensors")

        # Tensors that were changed in the same way share a line, because every block has some.
        for how in dict.fromkeys(how for _, how in self.resampled.values()):
            names = [name for name, (_, h) in self.resampled.items() if h == how]
            lines.append(f"  {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {how}")

        parts = sorted({name.rpartition(".")[0].partition(".")[0] or name for name in self.initial})
        lines.append(f"  left at the start: {_million(left)} in {len(self.initial)} tensors ({', '.join(parts)})")

        # Reasons repeat over the tensors, so that they are counted.
        why: dict[str, int] = {}
        for reason in self.unused.values():
            why[reason] = why.get(reason, 0) + 1
        lines += [f"  not used of the teacher: {n} tensors, {reason}" for reason, n in why.items()]

        return "\n".join(lines)


def gray_kernel(weight: Tensor, bias: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Fold RGB and the teacher's normalization into one channel: weight [C, 3, h, w], bias [C] -> [C, h, w], [C].

    On a gray image in [0, 1] the result gives exactly what the teacher gives for it repeated to RGB and normalized.
    """
    # (image - mean) / std is linear, so that the kernel takes up the scale and the bias takes up the shift.
    scaled = weight / torch.tensor(std, dtype=weight.dtype).view(1, 3, 1, 1)
    shift = torch.tensor(mean, dtype=weight.dtype).view(1, 3, 1, 1)
    return scaled.sum(1), bias - (scaled * shift).sum((1, 2, 3))


def resize_kernel(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch kernel [C, h, w] -> [C, *size] such that a resized patch gives the embedding of the original one.

    Least squares, by the pseudo-inverse of bicubic antialiased resizing (FlexiViT, equation 2).
    """
    h, w = weight.shape[1:]
    if (h, w) == tuple(size):
        return weight

    # Resizing is linear: its matrix is what it makes of each unit patch.
    basis = torch.eye(h * w, dtype=torch.float64).view(h * w, 1, h, w)
    resize = F.interpolate(basis, size=size, mode="bicubic", antialias=True).flatten(1)  # [h*w, new]: x @ resize
    inverse: Tensor = torch.linalg.pinv(resize)  # [new, h*w]

    return (weight.double().flatten(1) @ inverse.T).to(weight.dtype).view(-1, *size)


def flatten_kernel(weight: Tensor, order: Order) -> Tensor:
    """Patch kernel [C, h, w] -> line [C, h*w], row by row; boustrophedon runs every second row backwards."""
    if order == "boustrophedon":
        weight = torch.stack([r.flip(-1) if i % 2 else r for i, r in enumerate(weight.unbind(1))], dim=1)
    return weight.flatten(1)


def shorten_line(line: Tensor, taps: int) -> Tensor:
    """Line kernel [C, N] -> [C, taps], taps <= N, by area: a tap gets the sum of the stretch of line it stands for.

    A line of `taps` voxels then gives what the longer kernel gives for it stretched to N voxels (each voxel repeated,
    by shares where N / taps is no integer). Raises InputError when taps > N.
    """
    length = line.shape[1]
    if taps > length:
        raise InputError(f"a patch of {length} pixels gives at most {length} taps, not {taps}; lower tokenizer.taps")

    # Taps stand for equal stretches of the line. A pixel across an end belongs to both stretches by its shares.
    ends = torch.arange(taps + 1, dtype=torch.float64) * length / taps
    pixel = torch.arange(length, dtype=torch.float64)[:, None]
    share = (torch.minimum(pixel + 1, ends[1:]) - torch.maximum(pixel, ends[:-1])).clamp(min=0)  # [N, taps], rows sum 1

    return (line.double() @ share).to(line.dtype)


def average(kernel: Tensor, depth: int) -> Tensor:
    """[C, h, w] -> [C, 1, depth, h, w]: a block that is constant over depth gives its slice's 2D embedding."""
    return (kernel / depth)[:, None, None].repeat(1, 1, depth, 1, 1)


def center(kernel: Tensor, depth: int) -> Tensor:
    """[C, h, w] -> [C, 1, depth, h, w]: any block gives the 2D embedding of its slice depth // 2."""
    out = kernel.new_zeros(len(kernel), 1, depth, *kernel.shape[1:])
    out[:, 0, depth // 2] = kernel
    return out


def tubular(kernel: Tensor, taps: int, order: Order) -> Tensor:
    """[C, h, w] -> [3, C, taps]: the flattened patch as one line kernel along each of z, y, x.

    A line that holds the flattened patch gives, along that axis, the 2D embedding.
    """
    line = shorten_line(flatten_kernel(kernel, order), taps)
    return line.expand(3, -1, -1).clone()


def _block_tensors(lay: Callable[[Tensor, int], Tensor]) -> Callable[..., dict[str, Tensor]]:
    def tensors(kernel: Tensor, bias: Tensor, student: Student, cfg: TransferConfig) -> dict[str, Tensor]:
        depth, *plane = student.patch
        return {"proj.weight": lay(resize_kernel(kernel, (plane[0], plane[1])), depth), "proj.bias": bias}

    return tensors


def _tube_tensors(kernel: Tensor, bias: Tensor, student: Student, cfg: TransferConfig) -> dict[str, Tensor]:
    tokens = student.cfg.tokenizer
    if not isinstance(tokens, TubularTokens):
        raise InputError(f"rule {cfg.rule} needs student.tokenizer.kind=tubular")

    if cfg.block != "zero" and not tokens.keep_block:
        raise InputError(
            f"transfer.block={cfg.block} fills a block kernel that student.tokenizer.keep_block=false omits"
        )

    tensors = {"line_weight": tubular(kernel, tokens.taps, cfg.flatten), "bias": bias}

    # A concatenation starts as the sum.
    eye = torch.eye(len(kernel))
    if tokens.fuse == "concat":
        tensors["fuse.weight"] = torch.cat([eye, eye, eye], dim=1)[:, :, None, None, None]

    # A block kernel at zero leaves the token to the tubes.
    if tokens.keep_block and cfg.block != "zero":
        depth, *plane = student.patch
        lay = center if cfg.block == "center" else average
        tensors["block.weight"] = lay(resize_kernel(kernel, (plane[0], plane[1])), depth)

    return tensors


RULES: dict[str, tuple[str, Callable[[Tensor, Tensor, Student, TransferConfig], dict[str, Tensor]]]] = {
    "average": ("block", _block_tensors(average)),
    "center": ("block", _block_tensors(center)),
    "tubular": ("tubular", _tube_tensors),
    "deformable_tubular": ("deformable tubular", _tube_tensors),
}
"""Rule -> the tokenizer it needs, and the tokenizer's tensors from the gray kernel [C, h, w] and bias [C]."""

CONTROLS: dict[str, Callable[[Teacher], Teacher]] = {"untrained": make_untrained_copy, "shuffled": make_shuffled_copy}
"""Rule -> what it transfers in place of the teacher."""


def find_rule(student: Student) -> Literal["average", "tubular", "deformable_tubular"]:
    """The rule that fills the student's tokenizer; of the two for blocks, the average."""
    tokens = student.cfg.tokenizer
    if not isinstance(tokens, TubularTokens):
        return "average"
    return "deformable_tubular" if tokens.deformable else "tubular"


def transfer(teacher: Teacher, student: Student, cfg: TransferConfig) -> TransferReport:
    """Write the teacher's weights into `student` in place and say what went where; errors as those of `map_weights`."""
    values, report = map_weights(teacher, student, cfg)
    student.load_state_dict({**student.state_dict(), **values})
    return report


def map_weights(teacher: Teacher, student: Student, cfg: TransferConfig) -> tuple[dict[str, Tensor], TransferReport]:
    """What the teacher gives to the student's tensors, by name; of `student`, which may be on meta, only shapes count.

    Raises InputError when rule and tokenizer or student and teacher do not fit (naming the keys to set), and when a
    tensor is left over on either side (naming it). The stem, the decoder, tube offsets, a zero block kernel and the
    depth positions have nothing to come from and keep their start.
    """
    # The controls take the same way as a teacher, by the rule that fits the student.
    if cfg.rule in CONTROLS:
        fitting = dataclasses.replace(cfg, rule=find_rule(student))
        values, report = map_weights(CONTROLS[cfg.rule](teacher), student, fitting)
        return values, dataclasses.replace(report, rule=f"{cfg.rule}, by {report.rule}")

    report = TransferReport(cfg.rule, teacher.identity)
    own = student.state_dict()

    # A student from scratch is reported in the same form, so that runs can be compared.
    if cfg.rule == "scratch":
        report.initial = {name: tensor.numel() for name, tensor in own.items()}
        report.unused = dict.fromkeys(teacher.backbone.state_dict(), "rule scratch")
        return {}, report

    # Translate first: its errors name the keys to set.
    translation = translate(teacher, student) if cfg.blocks else None
    values = {f"tokenizer.{k}": v for k, v in _tokenizer_tensors(teacher, student, cfg).items()}
    report.resampled = {k: (v.numel(), f"from the teacher's patch kernel, rule {cfg.rule}") for k, v in values.items()}

    if translation:
        values |= {f"vit.{k}": v for k, v in translation.same.items()}
        values |= {f"vit.{k}": v for k, (v, _) in translation.changed.items()}
        report.copied = {f"vit.{k}": v.numel() for k, v in translation.same.items()}
        report.resampled |= {f"vit.{k}": (v.numel(), how) for k, (v, how) in translation.changed.items()}
        report.unused = translation.unused
    else:
        # Only the patch kernel goes over, so that all other tensors of the teacher are listed.
        rest = [k for k in teacher.backbone.state_dict() if not k.startswith("patch_embed.proj.")]
        report.unused = dict.fromkeys(rest, "transfer.blocks=false")

    # What has no source in a teacher keeps its start; anything else must have one.
    free = ["encoder.", "decoder.", "to_tokens.", "from_tokens.", "token_gain.", "tokenizer.offsets", "vit.depth_embed"]
    free += ["tokenizer.block"] * (cfg.block == "zero") + ["vit."] * (not cfg.blocks)
    left = [name for name in own if name not in values and not name.startswith(tuple(free))]

    # A tensor that stayed random by mistake would cost accuracy without a sign.
    _refuse_leftovers(teacher, own, values, left)

    report.initial = {name: own[name].numel() for name in own if name not in values}
    return values, report


def _tokenizer_tensors(teacher: Teacher, student: Student, cfg: TransferConfig) -> dict[str, Tensor]:
    required, lay = RULES[cfg.rule]
    tokens = student.cfg.tokenizer
    kind = tokens.kind if not isinstance(tokens, TubularTokens) else ("deformable " * tokens.deformable) + tokens.kind

    # The rule and the tokenizer are two keys of a config, so that the message names the keys which make them agree.
    if kind != required:
        keys = [f"student.tokenizer.kind={required.split()[-1]}"]
        keys += (
            [f"student.tokenizer.deformable={str('deformable' in required).lower()}"] if "tubular" in required else []
        )
        rules = " or ".join(rule for rule, (needs, _) in RULES.items() if needs == kind)
        raise InputError(
            f"transfer.rule={cfg.rule} fills a {required} tokenizer, but the student has a {kind} one; "
            f"set {' '.join(keys)}, or transfer.rule={rules}"
        )

    # Inflation adds an axis and nothing else: the widths must be equal, and three channels fold to gray.
    proj = teacher.backbone.patch_embed.proj
    if proj.bias is None or proj.weight.shape[1] != 3 or len(proj.weight) != student.dim:
        raise InputError(
            f"the patch kernel of {teacher.identity['name']} is {tuple(proj.weight.shape)}"
            f"{'' if proj.bias is not None else ' without a bias'}; want [{student.dim}, 3, h, w] with a bias; "
            "choose a teacher of the student's size"
        )

    # The teacher may lie on a GPU or in half precision. Its kernel is folded once, in float32 on the CPU.
    weight, bias = proj.weight.detach().float().cpu(), proj.bias.detach().float().cpu()
    return lay(*gray_kernel(weight, bias, teacher.mean, teacher.std), student, cfg)


def _refuse_leftovers(
    teacher: Teacher, own: Mapping[str, Tensor], values: Mapping[str, Tensor], left: list[str]
) -> None:
    faults = [f"the teacher's {n.removeprefix('vit.')} has no place in the student" for n in values.keys() - own.keys()]
    faults += [f"the student's {n} has no source in the teacher" for n in left]

    for name in values.keys() & own.keys():
        if values[name].shape != own[name].shape:
            faults.append(f"{name} is {tuple(values[name].shape)}, the student's {tuple(own[name].shape)}")

    # One fault at a time would send the reader from error to error.
    if faults:
        raise InputError(
            f"{teacher.identity['name']} cannot be transferred: {'; '.join(sorted(faults))}. Choose a plain ViT of the "
            "families supervised, DINO, DINOv2, DINOv3 or MAE (GELU MLP four times wider, no extra norms)"
        )


def _million(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 10_000 else str(count)
