"""VAR: next-scale prediction; all tokens of a scale at once, from coarse to fine (arXiv
2404.02905).

The input of a scale is not the scale before it but the map that all coarser scales add up to,
resized to the new scale; it comes from the tokenizer (`VARVQVAE.next_inputs`), so input and output
have one length and nothing is shifted. Different from the official code: labels are dropped in
training only, and any pyramid of scales is accepted.
"""

from functools import partial
from math import log, sqrt
from typing import NamedTuple, cast

import torch
from einops import rearrange
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.adaln import AdaLNBlock, Modulation, modulate
from tessellar.layers.attention import attention as attend
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache, Slots
from tessellar.layers.llama import StochasticDepth
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.models.parts.scale_reader import ScaleReader
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, scales
from tessellar.protocol.generator import Prefix, State, require_categorical
from tessellar.protocol.layout import Layout

LARGEST_SCALE = log(100)  # of q, before the exponential


class VARPass(NamedTuple):
    """What all blocks of one pass share: the condition (or the vectors made of it), and the cache."""

    condition: Tensor
    cache: KVCache | NoCache
    slots: Slots


class SharedModulation(nn.Module):
    """Six vectors made once for all blocks [B, 1, 6, D], plus the block's own offset (VAR-d36's
    `shared_aln`).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(1, 1, 6, width) / sqrt(width))

    def forward(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return (vectors + self.offset).unbind(2)


class VARAttention(nn.Module):
    """Attention between unit queries and keys at a learned temperature per head; keys have no bias.

    Without `l2_norm` scores are scaled by 0.25 / sqrt(head dim).
    """

    def __init__(self, width: int, num_heads: int, l2_norm: bool, implementation: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = (
            nn.Parameter(torch.full((1, num_heads, 1, 1), log(4.0))) if l2_norm else None
        )

    def forward(self, x: Tensor, layer: int, shared: VARPass) -> Tensor:
        # One fused bias, of which the part of the keys is fixed at zero, as published.
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = rearrange(
            F.linear(x, self.qkv.weight, bias.to(x.dtype)),
            "b n (t h d) -> t b h n d",
            t=3,
            h=self.num_heads,
        )
        scale = 0.25 / sqrt(q.shape[-1])
        if self.log_scale is not None:
            q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=LARGEST_SCALE).exp()
            k = F.normalize(k, dim=-1)
            scale = 1.0
        k, v = shared.cache.write(layer, shared.slots, k, v)
        mask = shared.slots.mask
        is_causal = shared.slots.is_causal
        out = attend(
            q.to(k.dtype),
            k,
            v.to(k.dtype),
            mask=mask,
            is_causal=is_causal,
            implementation=self.implementation,
            scale=scale,
        )
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class VARBlock(AdaLNBlock):
    """An AdaLN block whose condition is that of the whole image."""

    def forward(self, x: Tensor, layer: int, shared: VARPass) -> Tensor:  # type: ignore[override]
        return super().forward(x, shared.condition, (x.shape[1],), layer, shared)

    def init_weights(self, width: int, depth: int, gate_init: float) -> None:
        """Outputs of both branches by 1 / sqrt(2 depth), gates by `gate_init`, the other vectors of
        the modulation by a half.
        """
        attention = cast(VARAttention, self.attention)
        mlp = cast(Mlp, self.mlp)
        if attention.log_scale is not None:
            tag(attention.log_scale, "no_decay")
        for linear in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2):
            tag(linear.weight, "hidden")  # type: ignore[arg-type]
        for linear in (attention.proj, mlp.fc2):
            linear.weight.div_(sqrt(2 * depth))  # type: ignore[operator, union-attr]
        # The six vectors are gate1, gate2, scale1, scale2, shift1, shift2.
        if isinstance(self.modulation, Modulation):
            self.modulation.linear.weight[: 2 * width].mul_(gate_init)
            self.modulation.linear.weight[2 * width :].mul_(0.5)
        else:
            tag(self.modulation.offset, "no_decay")  # type: ignore[arg-type]
            self.modulation.offset[:, :, :2].mul_(gate_init)  # type: ignore[index]
            self.modulation.offset[:, :, 2:].mul_(0.5)  # type: ignore[index]


def block(
    width: int,
    num_heads: int,
    hidden: int,
    drop_path: float,
    shared: bool,
    l2_norm: bool,
    attention: str,
) -> VARBlock:
    """One block; `shared` modulation comes from the generator."""
    made = VARBlock(
        VARAttention(width, num_heads, l2_norm, attention),
        Mlp(width, hidden, act_layer=partial(nn.GELU, approximate="tanh")),  # type: ignore[arg-type]
        nn.LayerNorm(width, eps=1e-6, elementwise_affine=False),
        SharedModulation(width) if shared else Modulation(width, zero=False),
    )
    made.dropout = StochasticDepth(drop_path)
    return made


class VAR(ScaleReader):
    """Class-conditional generator over a pyramid of grids with one codebook.

    `drop_path` defaults to 0.1 depth / 24. Its tokenizer must be bound (`ImageGenerator` does it).
    Raises UserError for other layouts, and for a tokenizer that has no inputs of next scales or
    others than `latent_dim` channels.
    """

    def __init__(
        self,
        layout: Layout,
        width: int = 1024,
        depth: int = 16,
        num_heads: int = 16,
        num_classes: int = 1000,
        latent_dim: int = 32,
        mlp_ratio: float = 4.0,
        condition_dropout: float = 0.1,
        drop_path: float | None = None,
        shared_modulation: bool = False,
        l2_norm: bool = True,
        gate_init: float = 1e-3,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.layout = layout
        self.entities = scales(layout)
        self.attention = attention
        self.num_classes = num_classes
        self.latent_dim = latent_dim
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        vocab = require_categorical(layout, "VAR")
        first = self.entities.sizes[0]
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.start_position = nn.Parameter(torch.empty(1, first, width))
        self.position = nn.Parameter(torch.empty(1, layout.length, width))
        self.scale_embedding = nn.Embedding(self.entities.count, width)
        self.input = nn.Linear(latent_dim, width)
        self.embedding_dropout = nn.Identity()
        self.shared_modulation = nn.Linear(width, 6 * width) if shared_modulation else None
        rate = 0.1 * depth / 24 if drop_path is None else drop_path
        rates = [rate * i / max(depth - 1, 1) for i in range(depth)]
        options = (shared_modulation, l2_norm, attention)
        self.layers = nn.ModuleList(
            block(width, num_heads, round(width * mlp_ratio), r, *options) for r in rates
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.last_modulation = Modulation(width, count=2, zero=False)
        self.output = nn.Linear(width, vocab)
        self.init_weights(width, depth, gate_init)

    def init_weights(self, width: int, depth: int, gate_init: float) -> None:
        """Truncated N(0, 1 / 3D); outputs of branches smaller with depth, gates by `gate_init`,
        last layers small.
        """
        std = sqrt(1 / (3 * width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.start_position, self.position):
            nn.init.trunc_normal_(tag(table, "no_decay"), std=std)
        # As published; the class embedding and the input decay.
        tag(self.scale_embedding.weight, "no_decay")
        with torch.no_grad():
            self.output.weight.mul_(0.02)
            self.last_modulation.linear.weight.mul_(0.5)
            for layer in self.layers:
                cast(VARBlock, layer).init_weights(width, depth, gate_init)

    def prefix(self, condition: Condition) -> Prefix:
        assert condition.ids is not None
        return Prefix(
            self.class_embedding(condition.ids)[:, None]
            + self.start_position
            + self.places()[:, : self.first]
        )

    def places(self) -> Tensor:
        """Embedding of every place and its scale [1, N, D]."""
        return self.position + self.scale_embedding(
            self.scale_of(torch.arange(self.layout.length)).to(self.position.device)
        )

    def embed_inputs(self, inputs: Tensor, index: Tensor) -> Tensor:
        #   scale    0        1 .. S - 1
        #   input    class    the sum of coarser maps, resized to the scale: `next_inputs`
        return self.input(inputs.to(self.input.weight.dtype)) + self.places()[0, self.ranks(index)]

    def block(self, place: Tensor) -> Tensor:
        return self.scale_of(place)

    def input_ends(self, prefix_length: int, entities: Entities) -> Tensor:
        return entities.ends

    def shared(self, place: Tensor, state: State, slots: Slots) -> VARPass:
        assert state.cache is not None and not isinstance(state.cache, PlacedCache)
        vectors = self._condition(state)
        if self.shared_modulation is not None:
            vectors = rearrange(
                self.shared_modulation(F.silu(vectors)), "r n (six d) -> r n six d", six=6
            )
        return VARPass(vectors, state.cache, slots)

    def _condition(self, state: State) -> Tensor:
        assert state.condition.ids is not None
        return self.class_embedding(state.condition.ids)[:, None]

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        scale, shift = self.last_modulation(self._condition(state))
        with torch.autocast(hidden.device.type, enabled=False):
            modulated = modulate(hidden, scale, shift).to(self.output.weight.dtype)
            logits = at_least_float32(self.output(modulated))
        return Logits(state.merge(logits, state.entities.entity_of(first, want)))


# Published variants: depth d, width 64 d, d heads.           parameters at 4,096 codes of 32 channels, 1,000 classes
def var_d16(layout: Layout, num_classes: int = 1000) -> VAR:
    """310,283,520 parameters on the 680 tokens of 256 pixels."""
    return VAR(layout, 1024, 16, 16, num_classes)


def var_d20(layout: Layout, num_classes: int = 1000) -> VAR:
    """600,917,136 parameters."""
    return VAR(layout, 1280, 20, 20, num_classes)


def var_d24(layout: Layout, num_classes: int = 1000) -> VAR:
    """1,033,399,360 parameters."""
    return VAR(layout, 1536, 24, 24, num_classes, gate_init=1e-4)


def var_d30(layout: Layout, num_classes: int = 1000) -> VAR:
    """2,010,020,356 parameters."""
    return VAR(layout, 1920, 30, 30, num_classes, gate_init=1e-5)


def var_d36_s(layout: Layout, num_classes: int = 1000) -> VAR:
    """2,353,893,904 parameters on the 2,240 tokens of 512 pixels; modulation shared by all blocks."""
    return VAR(layout, 2304, 36, 36, num_classes, shared_modulation=True, gate_init=5e-6)
