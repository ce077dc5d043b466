"""TokenFlow's tokenizers (arXiv 2412.03069): `tokenflow_clipb_32k_enhanced.pt`,
`tokenflow_siglip_32k.pt` and training files of the three vision models; keys to and fro.

Sizes are read from the tensors' shapes, and the vision model from its keys: OpenAI's for CLIP, those
of transformers for SigLIP, timm's for ViTamin. The two codebooks, one tensor here, are two there.
Heads of CLIP have 64 channels and the semantic decoder has 12 heads, as published, unless they are
given.
"""

import re
from collections.abc import Mapping
from math import gcd, isqrt
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.sizes import CNNSizes, cnn_sizes, convolution, count, heads_of, matrix
from tessellar.tokenizers.llamagen.official import cnn_keys
from tessellar.tokenizers.tokenflow.quantizer import SIDES, SharedQuantizer
from tessellar.tokenizers.tokenflow.semantic import SemanticDecoderSize, SemanticVision
from tessellar.tokenizers.tokenflow.tokenizer import (
    AS_IS,
    CLIP_B,
    SIGLIP_SO400M,
    VITAMIN_XL,
    TokenFlow,
)

TEACHER = "encoder_vqkd"  # their name of the semantic encoder
NETWORK = "semantic.network"  # ours
SIGLIP = f"{TEACHER}.vision_model"
LAYER = f"{SIGLIP}.encoder.layers.{{i}}"

CLIP_KEYS = (
    Rule(f"{TEACHER}.class_embedding", f"{NETWORK}.cls_token", lambda t: t[None, None], lambda t: t[0, 0]),
    Rule(f"{TEACHER}.positional_embedding", f"{NETWORK}.pos_embed", lambda t: t[None], lambda t: t[0]),
    Rule(f"{TEACHER}.conv1.weight", f"{NETWORK}.patch_embed.proj.weight"),
    Rule(f"{TEACHER}.ln_pre.{{tensor}}", f"{NETWORK}.norm_pre.{{tensor}}"),
    Rule(f"{TEACHER}.ln_post.{{tensor}}", f"{NETWORK}.norm.{{tensor}}"),
    *(
        Rule(f"{TEACHER}.transformer.resblocks.{{i}}.{theirs}", f"{NETWORK}.blocks.{{i}}.{ours}")
        for theirs, ours in {
            "attn.in_proj_{tensor}": "attn.qkv.{tensor}",
            "attn.out_proj.{tensor}": "attn.proj.{tensor}",
            "ln_{n}.{tensor}": "norm{n}.{tensor}",
            "mlp.c_fc.{tensor}": "mlp.fc1.{tensor}",
            "mlp.c_proj.{tensor}": "mlp.fc2.{tensor}",
        }.items()
    ),
)  # fmt: skip
SIGLIP_KEYS = (
    Rule(f"{SIGLIP}.embeddings.patch_embedding.{{tensor}}", f"{NETWORK}.patch_embed.proj.{{tensor}}"),
    Rule(f"{SIGLIP}.embeddings.position_embedding.weight", f"{NETWORK}.pos_embed", lambda t: t[None], lambda t: t[0]),
    Rule(f"{LAYER}.self_attn.qkv.{{tensor}}", f"{NETWORK}.blocks.{{i}}.attn.qkv.{{tensor}}"),
    Rule(f"{LAYER}.self_attn.out_proj.{{tensor}}", f"{NETWORK}.blocks.{{i}}.attn.proj.{{tensor}}"),
    Rule(f"{LAYER}.layer_norm{{n}}.{{tensor}}", f"{NETWORK}.blocks.{{i}}.norm{{n}}.{{tensor}}"),
    Rule(f"{LAYER}.mlp.{{layer}}.{{tensor}}", f"{NETWORK}.blocks.{{i}}.mlp.{{layer}}.{{tensor}}"),
    Rule(f"{SIGLIP}.post_layernorm.{{tensor}}", f"{NETWORK}.norm.{{tensor}}"),
    Rule(f"{SIGLIP}.head.probe", f"{NETWORK}.attn_pool.latent"),
    Rule(f"{SIGLIP}.head.attention.q.{{tensor}}", f"{NETWORK}.attn_pool.q.{{tensor}}"),
    Rule(f"{SIGLIP}.head.attention.kv.{{tensor}}", f"{NETWORK}.attn_pool.kv.{{tensor}}"),
    Rule(f"{SIGLIP}.head.attention.out_proj.{{tensor}}", f"{NETWORK}.attn_pool.proj.{{tensor}}"),
    Rule(f"{SIGLIP}.head.layernorm.{{tensor}}", f"{NETWORK}.attn_pool.norm.{{tensor}}"),
    Rule(f"{SIGLIP}.head.mlp.{{layer}}.{{tensor}}", f"{NETWORK}.attn_pool.mlp.{{layer}}.{{tensor}}"),
)  # fmt: skip
OTHERS = table(
    {
        **cnn_keys("encoder"),
        **cnn_keys("decoder"),
        "quant_conv.{tensor}": "quant_conv.{tensor}",
        "post_quant_conv.{tensor}": "post_quant_conv.{tensor}",
        "quantize.embedding.weight": "quantizer.codebook.weight",
        "encode_task_layer.{i}.{tensor}": "to_semantic_code.{i}.{tensor}",
        "decode_task_layer.{i}.{tensor}": "semantic_decoder.head.{i}.{tensor}",
        "decoder_vqkd.cls_token": "semantic_decoder.first",
        "decoder_vqkd.pos_embed": "semantic_decoder.positions",
        "decoder_vqkd.patch_embed.proj.bias": "semantic_decoder.patch_in.bias",
        "decoder_vqkd.fc_norm.{tensor}": "semantic_decoder.norm.{tensor}",
        "decoder_vqkd.blocks.{i}.{layer}.{tensor}": "semantic_decoder.blocks.{i}.{layer}.{tensor}",
        "decoder_vqkd.blocks.{i}.{part}.{layer}.{tensor}": "semantic_decoder.blocks.{i}.{part}.{layer}.{tensor}",
    },
    Rule(
        "decoder_vqkd.patch_embed.proj.weight",
        "semantic_decoder.patch_in.weight",
        matrix,
        convolution,
    ),
    drop=("quantize.codebook_used", "scaling_layer.{tensor}", "*.embeddings.position_ids"),
)
SIGLIP_HEADS = 16
DECODER_HEADS = 12
CODEBOOKS = ("quantize.embedding_vqkd.weight", "quantize.embedding_vqgan.weight")
ATTENTION = re.compile(rf"({re.escape(SIGLIP)}\.encoder\.layers\.\d+\.self_attn)\.(.+)")
POOL = f"{SIGLIP}.head.attention"


def is_siglip(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(SIGLIP) for key in state)


def split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two codebooks side by side, SigLIP's projections fused, and that of its pooling apart."""
    result = {}
    for key, tensor in state.items():
        attention = ATTENTION.fullmatch(key)
        if key == CODEBOOKS[0]:
            result["quantize.embedding.weight"] = torch.cat([state[name] for name in CODEBOOKS], 1)
        elif attention and attention[2].startswith("q_proj."):
            parts = [
                f"{attention[1]}.{attention[2].replace('q_', f'{name}_', 1)}" for name in "qkv"
            ]
            fused = torch.cat([state[part] for part in parts])
            result[f"{attention[1]}.qkv.{attention[2].removeprefix('q_proj.')}"] = fused
        elif key.startswith(f"{POOL}.in_proj_"):
            kind = key.removeprefix(f"{POOL}.in_proj_")
            third = len(tensor) // 3
            result[f"{POOL}.q.{kind}"] = tensor[:third]
            result[f"{POOL}.kv.{kind}"] = tensor[third:]
        elif key != CODEBOOKS[1] and not (attention and attention[2][:2] in ("k_", "v_")):
            result[key] = tensor
    return result


def join(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split`."""
    semantic_dim = len(state["encode_task_layer.2.weight"])
    result = {}
    for key, tensor in state.items():
        attention = ATTENTION.fullmatch(key)
        if key == "quantize.embedding.weight":
            result[CODEBOOKS[0]] = tensor[:, :semantic_dim]
            result[CODEBOOKS[1]] = tensor[:, semantic_dim:]
        elif attention and attention[2].startswith("qkv."):
            kind = attention[2].removeprefix("qkv.")
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{attention[1]}.{name}_proj.{kind}"] = part
        elif key.startswith(f"{POOL}.q."):
            kind = key.removeprefix(f"{POOL}.q.")
            result[f"{POOL}.in_proj_{kind}"] = torch.cat([tensor, state[f"{POOL}.kv.{kind}"]])
        elif not key.startswith(f"{POOL}.kv."):
            result[key] = tensor
    return result


def keys_of(tokenizer: TokenFlow) -> KeyTable:
    """The table of a tokenizer, whose vision model decides the keys of the semantic encoder."""
    network: Any = tokenizer.semantic.network
    if network.attn_pool is not None:
        semantic = SIGLIP_KEYS
    elif network.cls_token is not None:
        semantic = CLIP_KEYS
    else:
        names = network.state_dict()
        semantic = tuple(Rule(f"{TEACHER}.{name}", f"{NETWORK}.{name}") for name in names)
    return KeyTable((*semantic, *OTHERS.rules), OTHERS.drop)


def semantic_of(
    state: Mapping[str, Tensor], num_heads: int | None = None, image_size: int | None = None
) -> SemanticVision:
    """The vision model of an official state dict, with random weights; only SigLIP's patches need
    not fill images of `image_size`.
    """
    if f"{TEACHER}.class_embedding" in state:
        width, _, patch, _ = state[f"{TEACHER}.conv1.weight"].shape
        side = isqrt(len(state[f"{TEACHER}.positional_embedding"]) - 1)
        depth = count(state, rf"{TEACHER}\.transformer\.resblocks\.(\d+)\.")
        return SemanticVision(
            CLIP_B["name"],  # type: ignore[arg-type]
            image_size=side * patch,
            options={
                "patch_size": patch,
                "embed_dim": width,
                "depth": depth,
                "num_heads": heads_of(width, num_heads),
            },
            preprocessing=AS_IS,
        )
    if is_siglip(state):
        width, _, patch, _ = state[f"{SIGLIP}.embeddings.patch_embedding.weight"].shape
        side = isqrt(len(state[f"{SIGLIP}.embeddings.position_embedding.weight"]))
        hidden = len(state[f"{SIGLIP}.encoder.layers.0.mlp.fc1.bias"])
        published: dict[str, Any] = {**SIGLIP_SO400M}
        published["options"] = {
            **SIGLIP_SO400M["options"],
            "patch_size": patch,
            "embed_dim": width,
            "depth": count(state, re.escape(SIGLIP) + r"\.encoder\.layers\.(\d+)\."),
            "num_heads": num_heads or SIGLIP_HEADS,
            # timm cuts off the product
            "mlp_ratio": (hidden + 0.5) / width,
        }
        # The published images are a little larger than their 27 patches.
        published["image_size"] = image_size or {27: 384}.get(side, side * patch)
        return SemanticVision(**published)
    return SemanticVision(**VITAMIN_XL)


def decoder_sizes(state: Mapping[str, Tensor], encoder: CNNSizes) -> dict[str, Any]:
    """The pixel decoder's own sizes, by the names of TokenFlow's arguments."""
    found = cnn_sizes(state, "decoder.conv_blocks.{i}.res.{j}", 1)
    widths = found.multipliers[::-1]  # numbered from the coarsest
    channels = widths[0] // encoder.multipliers[0]
    multipliers = None
    if widths != tuple(channels * m for m in encoder.multipliers):
        channels = gcd(*widths)
        multipliers = tuple(width // channels for width in widths)
    return {
        "decoder_channels": channels,
        "decoder_multipliers": multipliers,
        "decoder_blocks": found.blocks - 1,
    }


def from_official(
    state: Mapping[str, Tensor],
    image_size: int | None = None,
    sides: tuple[int, ...] | None = None,
    heads: tuple[int, int] | None = None,
    semantic: SemanticVision | None = None,
    commitment_weight: float = 0.25,
    entropy_weight: float = 0.0,
    where: str = "",
) -> TokenFlow:
    """A tokenizer with the sizes that the weights show, filled with them.

    `sides` None: the published scales of that grid. `heads` are those of the vision model and of the
    semantic decoder. `semantic`: the vision model, where it is none of the three published ones.
    """
    OFFICIAL.check(state)
    semantic = semantic or semantic_of(state, heads and heads[0], image_size)
    image_size = image_size or semantic.input_size[0]
    side = semantic.side_at(image_size)
    if sides is None and side not in SIDES:
        raise UserError(
            f"TokenFlow is published for grids of {', '.join(map(str, SIDES))}; these images of {image_size} have "
            f"{side} patches a side: give another --image-size"
        )
    codes, semantic_dim = state[CODEBOOKS[0]].shape
    quantizer = SharedQuantizer(
        codes,
        semantic_dim,
        pixel_dim=state[CODEBOOKS[1]].shape[1],
        sides=sides or SIDES[side],
        commitment_weight=commitment_weight,
        entropy_weight=entropy_weight,
    )
    cnn = cnn_sizes(state, "encoder.conv_blocks.{i}.res.{j}", len(state["encoder.conv_in.weight"]))
    width = state["decoder_vqkd.cls_token"].shape[-1]
    made = TokenFlow(
        quantizer,
        semantic,
        image_size,
        channels=cnn.channels,
        multipliers=cnn.multipliers,
        num_res_blocks=cnn.blocks,
        z_channels=len(state["encoder.conv_out.weight"]),
        decoder_size=SemanticDecoderSize(
            width,
            count(state, r"decoder_vqkd\.blocks\.(\d+)\."),
            heads[1] if heads else DECODER_HEADS,
        ),
        semantic_dim=len(state["decode_task_layer.2.weight"]),
        semantic_side=isqrt(state["decoder_vqkd.pos_embed"].shape[1] - 1),
        **decoder_sizes(state, cnn),
    )
    return OFFICIAL.fill(made, state, where)


def to_official(tokenizer: TokenFlow) -> dict[str, Tensor]:
    """Official state dict of a tokenizer; the inverse of `from_official`."""
    return OFFICIAL.to_official(tokenizer)


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> TokenFlow:
    heads = None
    if options.num_heads is not None:
        heads = (options.num_heads, options.decoder_heads or DECODER_HEADS)
    return from_official(state, options.image_size, heads=heads)


OFFICIAL = TokenizerImporter(
    what="a TokenFlow tokenizer",
    marks=("encoder.conv_in.weight", *CODEBOOKS),
    entries=("ema", "model", "state_dict"),
    keys=keys_of,
    own=("quantizer.step", "quantizer.counts"),
    split=split,
    join=join,
    build=_build,
)
