"""Semanticist's transformers (arXiv 2503.08685): a ViT that writes causal slots, and a diffusion
transformer (DiT, arXiv 2212.09748) that reads them in its sequence.

    encoder   [class, patches | slots]    class and patches see each other; slot k also slots <= k
    decoder   [patches of the noisy latents | slots]    all see all; slots have no position

Different from the official code: the rows of a modulation are ordered as in `AdaLNBlock`, the patch
convolution of the decoder is a linear layer.
"""

from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from tessellar.layers.adaln import AdaLNBlock, Modulation, modulate
from tessellar.layers.attention import attention as attend
from tessellar.layers.llama import StochasticDepth
from tessellar.layers.tags import tag
from tessellar.layers.time_embedding import TimeEmbedding
from tessellar.tokenizers.flextok.transformer import positions_2d
from tessellar.tokenizers.parts.latent_maps import Grid
from tessellar.tokenizers.titok import ViTSize

EPS = 1e-6
REPA_WIDTH = 2048  # hidden width of the projection to the vision model's features


class Attention(nn.Module):
    """Attention with biases; `mask` True = visible."""

    def __init__(self, size: ViTSize, implementation: str) -> None:
        super().__init__()
        if size.width % size.num_heads:
            raise ValueError(f"num_heads {size.num_heads} does not divide width {size.width}")
        self.num_heads = size.num_heads
        self.implementation = implementation
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        out = attend(q, k, v, mask, implementation=self.implementation)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """x += Attention(LN x); x += MLP(LN x), exact GELU, with stochastic depth."""

    def __init__(self, size: ViTSize, drop_path: float, implementation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=EPS)
        self.attention = Attention(size, implementation)
        self.norm2 = nn.LayerNorm(size.width, eps=EPS)
        self.mlp = Mlp(size.width, 4 * size.width)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def slot_mask(before: int, slots: int) -> Tensor:
    """Which of [what stands before | slots] each of them sees, [n, n]: all of the former, and of
    the slots itself and earlier ones.
    """
    place = torch.arange(before + slots)
    return (place < before) | (place <= place[:, None])


class SlotEncoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to states [B, n, D] of the first n slots."""

    def __init__(
        self,
        side: int,
        patch_size: int,
        num_slots: int,
        size: ViTSize,
        drop_path: float,
        attention: str,
    ) -> None:
        super().__init__()
        width = size.width
        self.before = 1 + side**2
        self.patch_in = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.slots = nn.Parameter(torch.empty(1, num_slots, width))
        self.positions = nn.Parameter(torch.empty(1, self.before + num_slots, width))
        rates = [drop_path * i / max(size.depth - 1, 1) for i in range(size.depth)]
        self.blocks = nn.ModuleList(Block(size, rate, attention) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.init_weights()

    def init_weights(self) -> None:
        """Matrices and tables truncated N(0, 0.02), biases 0; all that is a matrix decays."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=0.02)
        tag_hidden(self.blocks)

    def forward(self, images: Tensor, count: int | None = None) -> Tensor:
        patches = rearrange(self.patch_in(images), "b d h w -> b (h w) d")
        slots = self.slots[:, :count]
        parts = [part.expand(len(images), -1, -1) for part in (self.cls_token, patches, slots)]
        x = torch.cat([part.to(patches.dtype) for part in parts], 1)
        x = x + self.positions[:, : x.shape[1]]
        mask = slot_mask(self.before, slots.shape[1]).to(x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x[:, self.before :])


class Denoised(NamedTuple):
    """Predicted noise and variance share [B, C, h, w], and features of the patches [B, n, D'] for
    REPA (None without a projection).
    """

    eps: Tensor
    share: Tensor
    features: Tensor | None


class SlotDiT(nn.Module):
    """Noise and variance of noisy maps, conditioned on slots in the sequence and on the time.

    `tap`: blocks in front of the features that REPA aligns, with a projection to `repa_dim`
    channels.
    """

    positions: Tensor

    def __init__(
        self,
        grid: Grid,
        num_slots: int,
        slot_dim: int,
        size: ViTSize,
        repa_dim: int | None,
        tap: int,
        attention: str,
    ) -> None:
        super().__init__()
        if repa_dim is not None and not 1 <= tap <= size.depth:
            raise ValueError(f"tap is {tap}; the decoder has {size.depth} blocks")
        width = size.width
        self.grid = grid
        self.tap = tap
        self.patch_in = nn.Linear(grid.patch_dim, width)
        # The first half of the channels says the column, the second the row.
        table = rearrange(positions_2d(grid.patches, width), "one d x y -> one (y x) d")
        self.positions = nn.Parameter(table.contiguous(), requires_grad=False)
        self.time = TimeEmbedding(width)
        gelu = partial(nn.GELU, approximate="tanh")
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                Attention(size, attention),
                Mlp(width, 4 * width, act_layer=gelu),  # type: ignore[arg-type]
                nn.LayerNorm(width, eps=EPS, elementwise_affine=False),
                Modulation(width),
            )
            for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = Modulation(width, count=2)
        self.head = nn.Linear(width, 2 * grid.patch_dim)
        self.projector = None if repa_dim is None else projector(width, repa_dim)
        self.init_weights()
        # Behind the initialisation, as published: torch's default.
        self.from_slot = nn.Linear(slot_dim, width)
        self.null = nn.Parameter(torch.empty(1, num_slots, slot_dim))
        nn.init.normal_(self.null, std=0.02)
        tag_hidden(self.blocks)

    def init_weights(self) -> None:
        """Initialisation.

        | weight                    | distribution        |
        |---------------------------|---------------------|
        | linear layers             | Xavier uniform      |
        | time embedding            | N(0, 0.02)          |
        | modulations, last layer   | 0                   |
        | biases                    | 0                   |
        | null slots                | N(0, 0.02)          |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time.fc1, self.time.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.head.weight)

    def fill(self, slots: Tensor, kept: Tensor) -> Tensor:
        """All slots [B, N, C] where slots [B, n, C] are given and the first `kept` [B] of them
        stay: the learned null of its place in each other.
        """
        missing = self.null.shape[1] - slots.shape[1]
        padded = nn.functional.pad(slots, (0, 0, 0, missing))
        place = torch.arange(self.null.shape[1], device=slots.device)
        stays = place < kept.to(slots.device)[:, None]
        return torch.where(stays[..., None], padded, self.null.to(slots.dtype))

    def forward(self, maps: Tensor, t: Tensor, slots: Tensor) -> Denoised:
        """Of noisy maps [B, C, h, w] at step numbers t [B], given all slots [B, N, C]."""
        patches = self.patch_in(self.grid.split(maps)) + self.positions
        count = patches.shape[1]
        x = torch.cat([patches, self.from_slot(slots).to(patches.dtype)], 1)
        condition = self.time(t)[:, None]
        features = None
        for number, block in enumerate(self.blocks, 1):
            x = block(x, condition, (x.shape[1],))
            if self.projector is not None and number == self.tap:
                features = self.projector(x[:, :count])
        shift, scale = self.modulation(condition)
        out = self.head(modulate(self.norm(x[:, :count]), scale, shift))
        eps, share = self.grid.join(out).chunk(2, dim=1)
        return Denoised(eps, share, features)


def projector(width: int, out: int) -> nn.Sequential:
    """REPA's projection (arXiv 2410.06940): three layers, SiLU."""
    return nn.Sequential(
        nn.Linear(width, REPA_WIDTH),
        nn.SiLU(),
        nn.Linear(REPA_WIDTH, REPA_WIDTH),
        nn.SiLU(),
        nn.Linear(REPA_WIDTH, out),
    )


def tag_hidden(blocks: nn.ModuleList) -> None:
    """Tag the matrices between hidden layers, for optimizers that tell them apart."""
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        for linear in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2):  # type: ignore[union-attr]
            tag(linear.weight, "hidden")  # type: ignore[arg-type, union-attr]
