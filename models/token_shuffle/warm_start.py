"""Token-Shuffle weights (arXiv 2504.17789) to ours and back, and warm starts; no checkpoint of the
paper is public.

Names are those of the method's written form: separate q, k, v, one joint vocabulary `[text, BOI,
EOI, codes]`. A warm start takes the backbone of a text Llama in Hugging Face's names, or of a
LlamaGen generator (windows of one code).
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.token_shuffle.model import TokenShuffle


@torch.no_grad()
def warm_start(generator: TokenShuffle, source: LlamaGen | TokenShuffle) -> None:
    """Start from a generator of other windows: all weights of the same name and shape; the rest
    stays as made.

    MLP blocks are the identity as made. Raises UserError where backbones differ.
    """
    own = generator.state_dict()
    given = source.state_dict()
    wrong = [
        key
        for key, t in given.items()
        if _is_backbone(key) and (key not in own or own[key].shape != t.shape)
    ]
    if wrong or not any(_is_backbone(key) for key in given):
        raise UserError(
            f"a warm start needs the same backbone; {', '.join(wrong[:3]) or 'it has none'} differs"
        )
    same = {key: t for key, t in given.items() if key in own and own[key].shape == t.shape}
    generator.load_state_dict({**own, **same})


def _is_backbone(key: str) -> bool:
    return key.startswith(("layers.", "norm.", "token_embedding.", "output."))


@torch.no_grad()
def start_from_text(generator: TokenShuffle, state: Mapping[str, Tensor]) -> None:
    """The blocks and the text rows of a Llama in Hugging Face's names (`model.layers...`) into the
    backbone.

    That layout rotates halves of a head, ours adjacent pairs: rows of q and k are regrouped. Rows
    of images and marks stay as made. Raises UserError where sizes differ.
    """
    own = generator.state_dict()
    offset = generator.offset - 2
    for layer in range(len(generator.layers)):
        theirs = f"model.layers.{layer}."
        ours = f"layers.{layer}."
        q, k, v = (_need(state, f"{theirs}self_attn.{name}_proj.weight") for name in "qkv")
        q = _pairs(q, generator.head_dim)
        k = _pairs(k, generator.head_dim)
        _copy(own, f"{ours}attention.wqkv.weight", torch.cat([q, k, v]))
        for name, source in HF_LAYER.items():
            _copy(own, f"{ours}{name}.weight", _need(state, f"{theirs}{source}.weight"))
    _copy(own, "norm.weight", _need(state, "model.norm.weight"))
    tables = {
        "token_embedding.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }
    for name, source in tables.items():
        if name in own and offset > 0 and source in state:
            _copy({name: own[name][:offset]}, name, _need(state, source))
    generator.load_state_dict(own)


HF_LAYER = {
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def _need(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise UserError(f"this is no Llama in Hugging Face's names: {key} is missing")
    return state[key]


def _copy(own: Mapping[str, Tensor], key: str, tensor: Tensor) -> None:
    if own[key].shape != tensor.shape:
        raise UserError(
            f"{key} is {list(own[key].shape)} here and {list(tensor.shape)} in the text model"
        )
    own[key].copy_(tensor)


def _pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (half, j) of each head to rows (j, half)."""
    return rearrange(weight, "(h two d) i -> (h d two) i", two=2, d=head_dim // 2)
