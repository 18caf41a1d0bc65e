"""Masked autoencoder around a timm ViT: encoder on visible patches, convolutional decoder, normalized pixels.

He et al., "Masked autoencoders are scalable vision learners", CVPR 2022; positions are fixed 2D sine-cosine codes,
evaluated at real coordinates so that one encoder learns every token spacing that timm's resampling can produce.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.teacher.photos import Batch

ARCH = "vit_tiny_patch16_224"
GRID = 14  # tokens per side of ARCH's own position embedding
_schemas: list[torch.library.Library] = []  # a fragment's schemas vanish with the object


def import_timm() -> None:
    """Import timm; where torchvision's compiled ops cannot load (its CUDA build beside a CPU torch), declare them."""
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _schemas.append(library)
        for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
        import timm  # noqa: F401


def encoder(patch: int, **overrides: int) -> nn.Module:
    """timm's ViT-Tiny without a head, with frozen sine-cosine positions; `overrides` (depth, ...) are for tests."""
    import_timm()
    import timm

    vit: nn.Module = timm.create_model(
        ARCH, patch_size=patch, img_size=224, num_classes=0, dynamic_img_size=True, **overrides
    )
    side = 224 // patch
    axis = torch.arange(side, dtype=torch.float32)  # in this model's own token units
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    code = sincos(y.flatten(), x.flatten(), int(vit.embed_dim))  # type: ignore[arg-type]  # [N, D]
    table = vit.pos_embed
    if not isinstance(table, nn.Parameter):
        raise TypeError(f"{ARCH} has no learned position table in this timm version; use timm >= 1.0.15")
    with torch.no_grad():
        table[0, 0] = 0  # class token
        table[0, 1:] = code
    table.requires_grad_(False)
    return vit


def sincos(y: Tensor, x: Tensor, width: int) -> Tensor:
    """Sine-cosine code of token coordinates y, x [...] -> [..., width].

    Wavelengths from 5 tokens, which timm's resampling of the table still follows, to 60, twice the largest grid;
    the usual ones, up to 2 pi 10^4, spend two thirds of the channels on constants.
    """
    octave = torch.linspace(0, 1, width // 4, device=y.device)
    omega = 2 * math.pi / (5 * 12**octave)  # [width / 4]
    phase_y, phase_x = y[..., None] * omega, x[..., None] * omega  # [..., width / 4]
    return torch.cat([phase_x.sin(), phase_x.cos(), phase_y.sin(), phase_y.cos()], -1)


def patchify(image: Tensor, patch: int) -> Tensor:
    """image [B, C, H, W] -> [B, N, C * patch * patch], pixels in the order of the patch convolution's weights."""
    return F.unfold(image, patch, stride=patch).transpose(1, 2)


def normalized(patches: Tensor) -> Tensor:
    """Per-patch zero mean and unit variance, [B, N, P] -> [B, N, P]; the floor keeps JPEG noise of flat sky small."""
    mean = patches.mean(-1, keepdim=True)
    return (patches - mean) / (patches.var(-1, keepdim=True) + 1e-4).sqrt()


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D], index [B, K] -> [B, K, D]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def attend_near(blocks: nn.Module) -> None:
    """Start every attention looking at tokens like itself, hence, through the position code, at near ones.

    Query and key weights of a head are one random orthogonal projection (Trockman & Kolter, "Mimetic initialization
    of self-attention layers", ICML 2023). From near-uniform attention a short training never gets to copying from
    neighbors.
    """
    for block in blocks.children():
        attention: nn.Module = block.attn  # type: ignore[assignment]
        qkv: nn.Linear = attention.qkv  # type: ignore[assignment]
        width = qkv.in_features
        heads = int(attention.num_heads)  # type: ignore[arg-type]
        turned = torch.cat([nn.init.orthogonal_(torch.empty(width // heads, width)) for _ in range(heads)])
        with torch.no_grad():
            qkv.weight[: 2 * width] = math.sqrt(2) * torch.cat([turned, turned])  # logits of 2, on average


def whiten(vit: nn.Module, patches: Tensor) -> None:
    """Start the patch embedding as the whitened principal components of `patches` [n, P], in -1..1.

    A short training has no steps to spare on finding what a second of linear algebra knows. The floor is the variance
    of the noise put on training images; 0.7 is the root mean square of the position code that is added.
    """
    patches = patches.double()
    mean = patches.mean(0)  # [P]
    variance, basis = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))  # ascending
    weight = 0.7 * basis / (variance.clamp_min(0) + 0.01).sqrt()  # [P, P], components are columns
    proj: nn.Conv2d = vit.patch_embed.proj  # type: ignore[union-attr,assignment]
    chosen = weight.flip(1)[:, : proj.out_channels].T  # [D, P], strongest first
    with torch.no_grad():
        proj.weight.copy_(chosen.reshape(proj.weight.shape))
        if proj.bias is not None:
            proj.bias.copy_(-(chosen @ mean))


class Near(nn.Module):
    """Residual block of two 3 x 3 convolutions over the token grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, W, n, n] -> [B, W, n, n]."""
        change: Tensor = self.second(F.gelu(self.first(self.norm(grid))))
        return grid + change


class MaskedAutoencoder(nn.Module):
    """A timm ViT and the light decoder that is thrown away after training.

    The decoder is convolutional: what a visible patch says about one at its left differs from what it says about one
    below, and a convolution has that built in where attention must learn it, for which a short training is too short.
    """

    def __init__(self, vit: nn.Module, patch: int, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        dim = int(vit.embed_dim)  # type: ignore[arg-type]
        self.vit, self.patch = vit, patch
        self.embed = nn.Linear(dim, width)
        self.hidden = nn.Parameter(torch.zeros(width))
        self.blocks = nn.Sequential(*[Near(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, 3 * patch * patch)
        nn.init.zeros_(self.predict.weight)  # the first guess is the patch mean, loss 1
        attend_near(vit.blocks)  # type: ignore[arg-type]

    def encode(self, patches: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """patches [B, K, P] at token coordinates y, x [B, K] -> class token and tokens [B, 1 + K, D]."""
        vit = self.vit
        proj: nn.Conv2d = vit.patch_embed.proj  # type: ignore[union-attr,assignment]
        tokens = F.linear(patches, proj.weight.flatten(1), proj.bias)  # the convolution, on visible patches only
        tokens = tokens + sincos(y, x, tokens.shape[-1])
        cls: Tensor = vit.cls_token  # type: ignore[assignment]
        tokens = torch.cat([cls.expand(len(tokens), -1, -1), tokens], 1)  # [B, 1 + K, D]
        encoded: Tensor = vit.norm(vit.blocks(tokens))  # type: ignore[operator]
        return encoded

    def forward(self, batch: Batch, keep: int) -> Tensor:
        """Squared error on the hidden patches, as a share of what predicting every patch's mean makes; a scalar.

        The first `keep` tokens of each order are visible.
        """
        image, target, order, y, x = batch.image, batch.target, batch.order, batch.y, batch.x
        seen, unseen = order[:, :keep], order[:, keep:]
        tokens = self.encode(pick(patchify(image, self.patch), seen), y.gather(1, seen), x.gather(1, seen))
        tokens = self.embed(tokens[:, 1:])  # [B, K, W]
        n, width = math.isqrt(order.shape[1]), tokens.shape[-1]
        grid = self.hidden.to(tokens.dtype).expand(len(tokens), n * n, -1)
        grid = grid.scatter(1, seen[..., None].expand(-1, -1, width), tokens)  # [B, N, W]
        decoded = self.blocks(grid.mT.reshape(-1, width, n, n)).flatten(2).mT  # [B, N, W]
        decoded = pick(decoded, unseen)
        wanted = normalized(pick(patchify(target, self.patch), unseen))
        guess: Tensor = self.predict(self.norm(decoded)).float()
        return (guess - wanted).square().sum() / wanted.square().sum().clamp_min(1)
