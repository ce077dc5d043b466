"""BAR's forward passes (arXiv 2602.09024) from tensors under the official names alone, function by function as its code
computes them: what our modules are compared with, as no outputs of that code are recorded.

Shapes: B images, L positions, k bits of a position, D width, P positions of the prefix.
"""

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]
COPIES = 32
PREFIX = 1 + COPIES


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def rms(state: State, name: str, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], state[f"{name}.weight"], 1e-6)


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def gated(state: State, name: str, x: Tensor) -> Tensor:
    """SwiGLU, whose first layer is packed."""
    gate, value = linear(state, f"{name}.w12", x).chunk(2, -1)
    return linear(state, f"{name}.w3", F.silu(gate) * value)


def rotation(side: int, channels: int) -> tuple[Tensor, Tensor]:
    """cos, sin [P + L, channels]: rows in the first half of the channels, columns in the second, each
    frequency twice; the prefix is not turned.
    """
    each = channels // 2
    frequencies = 10000.0 ** -(torch.arange(0, each, 2) / each)
    angles = (torch.arange(side)[:, None] * frequencies).repeat_interleave(2, dim=-1)
    rows = angles[:, None].expand(side, side, -1)
    columns = angles[None].expand(side, side, -1)
    both = torch.cat([rows, columns], -1).flatten(0, 1)
    prefix = torch.zeros(PREFIX, channels)
    both = torch.cat([prefix, both])
    return both.cos(), both.sin()


def turned(x: Tensor, place: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of x [B, H, n, d] turned as those of `place` [B, n]."""
    cos, sin = (table[place][:, None] for table in tables)
    first, second = x[..., ::2], x[..., 1::2]
    across = torch.stack([-second, first], -1).flatten(-2)
    return x * cos + across * sin


def conditions(state: State, bits: Tensor, labels: Tensor, orders: Tensor, heads: int) -> Tensor:
    """What the head is told, [B, L, head's width], of bits [B, L, k] in raster order, which are read in
    `orders` [B, L].
    """
    batch, length = orders.shape
    label = state["embeddings.weight"][labels + 3][:, None]
    read = linear(state, "input_merge", state["input_embeddings.weight"][bits].flatten(2))
    read = read.gather(1, orders[..., None].expand_as(read))
    start = state["cls_token"].expand(batch, -1, -1)
    x = torch.cat([start, label.expand(-1, COPIES, -1), read], 1)

    own = torch.cat([torch.arange(PREFIX).expand(batch, -1), orders + PREFIX], 1)
    following = torch.cat([orders[:, 1:], orders[:, -1:]], 1)
    target = torch.cat([orders[:, :1].expand(-1, PREFIX), following], 1) + PREFIX
    x = x + state["pos_embed"][0][own] + state["target_aware_pos_embed"][0][target]

    told = label + state["timesteps_embeddings"][:, : PREFIX + length]
    tables = rotation(math.isqrt(length), x.shape[-1] // heads)
    for block in range(sum(name.endswith("attn.qkv.bias") for name in state)):
        x = block_of(state, f"blocks.{block}", x, F.silu(told), (own, target), tables, heads)
    x = rms(state, "norm", x[:, PREFIX - 1 : -1])
    return linear(state, "latent_condition_proj", x)


def block_of(
    state: State,
    name: str,
    x: Tensor,
    told: Tensor,
    places: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    heads: int,
) -> Tensor:
    own, target = places
    vectors = linear(state, f"{name}.adaLN_modulation.1", told).chunk(6, -1)
    shift, scale, gate = vectors[:3]
    h = rms(state, f"{name}.norm1", x) * (1 + scale) + shift
    qkv = linear(state, f"{name}.attn.qkv", h)
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
    q = rms(state, f"{name}.attn.q_norm", q)
    k = turned(rms(state, f"{name}.attn.k_norm", k), own, tables)
    here, there = q.chunk(2, 1)
    q = torch.cat([turned(here, own, tables), turned(there, target, tables)], 1)
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = rearrange(seen, "b h n d -> b n (h d)")
    x = x + gate * linear(state, f"{name}.attn.proj", seen)
    shift, scale, gate = vectors[3:]
    h = rms(state, f"{name}.norm2", x) * (1 + scale) + shift
    return x + gate * gated(state, f"{name}.mlp", h)


def bit_logits(state: State, values: Tensor, told: Tensor, ratio: Tensor) -> Tensor:
    """The head's logits [n, k, 2] of values 0, 1, 2 (hidden) [n, k], given [n, width] and shares [n]."""
    embedded = state["lm_head.input_embed.weight"][values].flatten(1)
    x = rms(state, "lm_head.ln_pre", linear(state, "lm_head.input_proj", embedded))
    angles = 2 * math.pi * ratio[:, None] * state["lm_head.t_embedder.W"]
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    time = F.silu(linear(state, "lm_head.t_embedder.mlp.0", waves))
    told = F.silu(F.silu(linear(state, "lm_head.t_embedder.mlp.2", time) + told))
    for number in range(sum(name.endswith("in_ln.weight") for name in state)):
        name = f"lm_head.transformer.{number}"
        shift, scale, gate = linear(state, f"{name}.adaLN_modulation.1", told).chunk(3, -1)
        h = rms(state, f"{name}.in_ln", x) * (1 + scale) + shift
        x = x + gate * gated(state, f"{name}.mlp", h)
    last = "lm_head.adaln_before_head"
    scale, shift = linear(state, f"{last}.adaLN_modulation.1", told).chunk(2, -1)
    x = rms(state, f"{last}.norm_final", x) * (1 + scale) + shift
    return linear(state, "lm_head.output_embed", x).unflatten(-1, (-1, 2))


def encoded(state: State, images: Tensor, heads: int) -> Tensor:
    """Bits [B, L, k] of images [B, 3, H, W], by FSQ's rounding of two levels."""
    embeddings = "encoder.siglip.embeddings"
    patch = math.isqrt(state[f"{embeddings}.patch_embedding.weight"].shape[1] // 3)
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
    x = linear(state, f"{embeddings}.patch_embedding", patches)
    x = x + state[f"{embeddings}.position_embedding.weight"]
    for number in range(sum("trainable" in n and n.endswith("q_proj.bias") for n in state)):
        name = f"encoder.trainable_encoder.layers.{number}"
        h = norm(state, f"{name}.layer_norm1", x, 1e-6)
        parts = (linear(state, f"{name}.self_attn.{part}_proj", h) for part in "qkv")
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=heads) for part in parts)
        seen = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + linear(state, f"{name}.self_attn.out_proj", seen)
        h = linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.layer_norm2", x, 1e-6))
        x = x + linear(state, f"{name}.mlp.fc2", F.gelu(h, approximate="tanh"))
    x = norm(state, "encoder.trainable_post_layernorm", x, 1e-6)
    half = 1.001 / 2
    z = linear(state, "quantize.in_proj", x)
    rounded = ((z + math.atanh(0.5 / half)).tanh() * half - 0.5).round()
    return (rounded + 1).long()


def decoded(state: State, bits: Tensor, heads: int) -> Tensor:
    """Images of bits [B, L, k]."""
    x = linear(state, "quantize.out_proj", 2.0 * bits - 1)
    start = state["decoder.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([start, x], 1) + state["decoder.positional_embedding"]
    x = norm(state, "decoder.ln_pre", x, 1e-5)
    for number in range(sum(name.endswith("attn.qkv.bias") for name in state)):
        name = f"decoder.transformer.{number}"
        qkv = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x, 1e-5))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
        seen = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + linear(state, f"{name}.attn.proj", seen)
        h = linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x, 1e-5))
        x = x + linear(state, f"{name}.mlp.fc2", F.gelu(h))
    x = norm(state, "decoder.ln_post", x[:, 1:], 1e-5)
    x = rearrange(x, "b (h w) d -> b d h w", h=math.isqrt(x.shape[1]))
    x = F.conv2d(x, state["decoder.ffn.0.weight"], state["decoder.ffn.0.bias"])
    patch = math.isqrt(x.shape[1] // 3)
    x = rearrange(x, "b (p q c) h w -> b c (h p) (w q)", p=patch, q=patch)
    return F.conv2d(x, state["decoder.conv_out.weight"], state["decoder.conv_out.bias"], padding=1)
