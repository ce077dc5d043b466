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
    state = generator.state_dict()
    backbone = 0
    wrong = []
    for key, tensor in source.state_dict().items():
        fits = key in state and state[key].shape == tensor.shape
        if fits:
            state[key] = tensor
        # What depends on the window (the MLP blocks that fuse it) may differ, the backbone not.
        if key.startswith(("layers.", "norm.", "token_embedding.", "output.")):
            backbone += 1
            if not fits:
                wrong.append(key)
    if wrong or not backbone:
        raise UserError(
            f"a warm start needs the same backbone; {', '.join(wrong[:3]) or 'it has none'} differs"
        )
    generator.load_state_dict(state)


@torch.no_grad()
def start_from_text(generator: TokenShuffle, state: Mapping[str, Tensor]) -> None:
    """The blocks and the text rows of a Llama in Hugging Face's names (`model.layers...`) into the
    backbone.

    That layout rotates halves of a head, ours adjacent pairs: rows of q and k are regrouped. Rows
    of images and marks stay as made. Raises UserError where sizes differ.
    """
    own = generator.state_dict()
    # Rows of the joint vocabulary: [text 0 .. offset - 1, BOI, EOI, codes]; a text model has the
    # first of them alone.
    offset = generator.offset - 2
    for layer in range(len(generator.layers)):
        theirs = f"model.layers.{layer}."
        ours = f"layers.{layer}."
        q = _pairs(_need(state, f"{theirs}self_attn.q_proj.weight"), generator.head_dim)
        k = _pairs(_need(state, f"{theirs}self_attn.k_proj.weight"), generator.head_dim)
        v = _need(state, f"{theirs}self_attn.v_proj.weight")  # not rotated: its rows stay
        _copy(own, f"{ours}attention.wqkv.weight", torch.cat([q, k, v]))
        for name, source in HF_LAYER.items():
            _copy(own, f"{ours}{name}.weight", _need(state, f"{theirs}{source}.weight"))
    _copy(own, "norm.weight", _need(state, "model.norm.weight"))
    tables = {
        "token_embedding.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }
    # Either table may be absent: tied embeddings on one side, separate ones on the other.
    for name, source in tables.items():
        if name in own and offset > 0 and source in state:
            _copy({name: own[name][:offset]}, name, _need(state, source))
    generator.load_state_dict(own)


# Ours, theirs: linear layers and norms of a block that have the same rows in both.
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
