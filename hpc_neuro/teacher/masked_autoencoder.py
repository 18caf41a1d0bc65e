"""The objective `pixels`: a masked autoencoder around a timm ViT predicts the normalized pixels of hidden patches.

He et al., "Masked autoencoders are scalable vision learners", CVPR 2022: encoder on visible patches, light decoder. The
decoder is convolutional. Positions are fixed 2D sine-cosine codes, evaluated at real coordinates so that one encoder
learns every token spacing that timm's resampling can produce.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_neuro.models.teacher import Teacher, create_vit
from hpc_neuro.teacher.config import TRAINED_SIZE, TaskConfig
from hpc_neuro.teacher.objective import Batch, Network, Objective, patchify, pick, uniform
from hpc_neuro.teacher.patch_embedding import get_projection, whiten_embedding

DECODER_WIDTH = 128
"""Channels of the decoder."""

DECODER_BLOCKS = 2
"""Blocks of the decoder."""


class PixelObjective(Objective):
    """Pixels of hidden patches, normalized per patch."""

    name = "pixels"
    arch = "vit_tiny_patch16_224"
    method = (
        "masked autoencoder (He et al., CVPR 2022) with a convolutional decoder; target: pixels normalized per patch; "
        "fixed sine-cosine positions at random offset and spacing; patch embedding started from whitened principal "
        "components; crops of 1/4 to 1 of the tile's side, quarter turns, mirroring, gray with probability 0.8, "
        "inversion, gamma, contrast, noise on the input and not on the target; losses are shares of what the patch "
        "mean makes"
    )

    def make_encoder(self, patch: int, depth: int) -> nn.Module:
        """timm's ViT-Tiny without a head, with frozen sine-cosine positions, whose tokens look at near ones."""
        vit: nn.Module = create_vit(self.arch, patch_size=patch, img_size=TRAINED_SIZE, depth=depth)
        table: nn.Parameter = vit.pos_embed  # type: ignore[assignment]
        with torch.no_grad():
            table.copy_(_make_table(TRAINED_SIZE // patch, table.shape[-1]))
        table.requires_grad_(False)
        attend_near(vit.blocks)  # type: ignore[arg-type]
        return vit

    def start_patches(self, vit: nn.Module, patches: Tensor) -> None:
        """Whitened principal components."""
        whiten_embedding(vit, patches)

    def find_obstacle(self, teacher: Teacher) -> str | None:
        """Its table of positions has to be that of `make_encoder`: training evaluates the code between tokens, too."""
        table = getattr(teacher.backbone, "pos_embed", None)
        side = int(teacher.backbone.patch_embed.img_size[0]) // teacher.patch
        expected = _make_table(side, teacher.dim)
        # Cards hold float16.
        if table is None or table.shape != expected.shape or not torch.allclose(table.cpu(), expected, atol=1e-3):
            return "`pixels` needs the fixed positions of a teacher that it made"
        return None

    def make_network(self, vit: nn.Module, patch: int, task: TaskConfig, sample: Tensor) -> Network:
        """The ViT with a decoder of random weights, whose first guess is the patch mean."""
        vit.pos_embed.requires_grad_(False)
        return MaskedAutoencoder(vit, patch)

    def draw_coordinates(self, draws: torch.Generator, count: int, n: int, patch: int) -> tuple[Tensor, Tensor]:
        """Coordinates somewhere on the ViT's own table, in its tokens.

        timm squeezes the table onto any image, so the spacing of neighbors is grid / tokens: half of the crops keep
        the spacing 1, the others draw one between what a twice larger and what this small image would get.
        """
        grid = TRAINED_SIZE // patch
        widest = (grid - 1) / max(1, n - 1)
        spacing = torch.where(torch.rand(count, generator=draws) < 0.5, 1.0, uniform(draws, count, 0.5, widest))
        room = grid - 1 - spacing * (n - 1)  # [count]
        axis = torch.arange(n, dtype=torch.float32)
        rows = (uniform(draws, count, 0, 1) * room)[:, None] + spacing[:, None] * axis  # [count, n]
        columns = (uniform(draws, count, 0, 1) * room)[:, None] + spacing[:, None] * axis
        y = rows[:, :, None].expand(-1, -1, n).flatten(1)
        return y, columns[:, None, :].expand(-1, n, -1).flatten(1)

    @torch.no_grad()
    def measure_extra(
        self, network: Network, untrained: Network, images: Tensor, task: TaskConfig
    ) -> dict[str, dict[str, float]]:
        """Loss on whole held-out images under fixed masks; predicting the mean of each patch scores 1."""
        assert isinstance(network, MaskedAutoencoder)
        assert isinstance(untrained, MaskedAutoencoder)
        device = next(network.parameters()).device
        image = F.interpolate(images, (task.crop, task.crop), mode="area").to(device)  # [B, 3, S, S]
        count, n = len(image), task.crop // network.patch
        order = torch.rand(count, n * n, generator=torch.Generator().manual_seed(1)).argsort(1).to(device)
        axis = torch.arange(n, dtype=torch.float32, device=device) + (TRAINED_SIZE // network.patch - n) / 2
        y, x = (c.flatten().expand(count, -1) for c in torch.meshgrid(axis, axis, indexing="ij"))
        batch, keep = Batch(image, image, order, y, x), task.count_visible(network.patch)
        losses = {"trained": float(network(batch, keep)), "random_weights": float(untrained(batch, keep))}
        return {"reconstruction": {**losses, "patch_mean": 1.0}}


def _make_table(side: int, width: int) -> Tensor:
    """timm's position table [1, 1 + side^2, width] with sine-cosine codes; 0 for the class token."""
    axis = torch.arange(side, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    table = torch.zeros(1, 1 + side * side, width)
    table[0, 1:] = sincos(y.flatten(), x.flatten(), width)
    return table


def sincos(y: Tensor, x: Tensor, width: int) -> Tensor:
    """Sine-cosine code of token coordinates y, x [...] -> [..., width].

    Wavelengths from 5 tokens, which timm's resampling of the table still follows, to 60, twice the largest grid;
    the usual ones, up to 2 pi 10^4, spend two thirds of the channels on constants.
    """
    octave = torch.linspace(0, 1, width // 4, device=y.device)
    omega = 2 * math.pi / (5 * 12**octave)  # [width / 4]
    phase_y, phase_x = y[..., None] * omega, x[..., None] * omega  # [..., width / 4]
    return torch.cat([phase_x.sin(), phase_x.cos(), phase_y.sin(), phase_y.cos()], -1)


def normalize_patches(patches: Tensor) -> Tensor:
    """Per-patch zero mean and unit variance, [B, N, P] -> [B, N, P]; the floor keeps JPEG noise of flat sky small."""
    mean = patches.mean(-1, keepdim=True)
    return (patches - mean) / (patches.var(-1, keepdim=True) + 1e-4).sqrt()


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


class MaskedAutoencoder(Network):
    """A timm ViT and the light decoder that is thrown away after training.

    The decoder is convolutional: what a visible patch says about one at its left differs from what it says about one
    below, and a convolution has that built in where attention must learn it, for which a short training is too short.
    """

    def __init__(self, vit: nn.Module, patch: int, width: int = DECODER_WIDTH, depth: int = DECODER_BLOCKS) -> None:
        super().__init__()
        dim = int(vit.embed_dim)  # type: ignore[arg-type]
        self.vit, self.patch = vit, patch
        self.embed = nn.Linear(dim, width)
        self.hidden = nn.Parameter(torch.zeros(width))
        self.blocks = nn.Sequential(*[Near(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, 3 * patch * patch)
        # The first guess is the patch mean, loss 1.
        nn.init.zeros_(self.predict.weight)

    def encode(self, patches: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """patches [B, K, P] at token coordinates y, x [B, K] -> class token and tokens [B, 1 + K, D]."""
        vit = self.vit
        proj = get_projection(vit)
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
        wanted = normalize_patches(pick(patchify(target, self.patch), unseen))
        guess: Tensor = self.predict(self.norm(decoded)).float()
        return (guess - wanted).square().sum() / wanted.square().sum().clamp_min(1)
