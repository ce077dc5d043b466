"""BitDance's checkpoints (arXiv 2602.14041, `BitDance_{B_1x,B_4x,B_16x,L_1x,H_1x}.pt`), keys to and
fro; and the head of its text-to-image model alone.

All sizes are read from the tensors' shapes; heads have 64 channels as published unless `num_heads`
says otherwise. A file also holds the frozen autoencoder (`vae.*`), which the tokenizer's importer
takes.
"""

from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, ImportOptions
from tessellar.interop.keys import KeyTable, table
from tessellar.interop.packed_gates import join_gates, split_gates
from tessellar.interop.sizes import HEAD_DIM, count, heads_of
from tessellar.models.bitdance.head import BinaryHead
from tessellar.models.bitdance.model import TIMES, BitDance
from tessellar.processes.flow import Times
from tessellar.protocol.layout import Bits, Layout

TEXT_HEAD_DIM = 128  # of the attention in the text-to-image model's head


def head_pairs(theirs: str, ours: str) -> dict[str, str]:
    """Pairs of the head, whose keys begin so."""
    pairs = {
        "time_embed.mlp.0.{tensor}": "time.fc1.{tensor}",
        "time_embed.mlp.2.{tensor}": "time.fc2.{tensor}",
        "cond_embed.{tensor}": "condition.{tensor}",
        "input_proj.{tensor}": "input.{tensor}",
        "ada_ln_blocks.{i}.{tensor}": "modulations.{i}.{tensor}",
        "final_layer.ada_ln_modulation.{tensor}": "modulation.{tensor}",
        "final_layer.linear.{tensor}": "output.{tensor}",
        "res_blocks.{i}.w1.{tensor}": "blocks.{i}.mlp.w1.{tensor}",
        "res_blocks.{i}.w2.{tensor}": "blocks.{i}.mlp.w2.{tensor}",
        "res_blocks.{i}.attn.wqkv.{tensor}": "blocks.{i}.wqkv.{tensor}",
        "res_blocks.{i}.attn.wo.{tensor}": "blocks.{i}.wo.{tensor}",
        "res_blocks.{i}.{norm}.{tensor}": "blocks.{i}.{norm}.{tensor}",
    }
    return {f"{theirs}{a}": f"{ours}{b}" for a, b in pairs.items()}


HEAD_KEYS = table(head_pairs("net.", ""))
KEYS: KeyTable = table(
    {
        "cls_embedding.weight": "conditioning.embedding.weight",
        "query_token": "query",
        "proj_in.{layer}.{tensor}": "token_input.{layer}.{tensor}",
        "emb_norm.weight": "input_norm.weight",
        "layers.{i}.{part}.{layer}.weight": "layers.{i}.{part}.{layer}.weight",
        "layers.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "norm.weight": "norm.weight",
        "pos_for_diff.weight": "head_positions.weight",
        **head_pairs("head.net.", "denoiser."),
    },
    drop=("vae.*",),
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    head_dim: int = HEAD_DIM,
    repeats: int = 4,
    flip: float = 0.1,
    times: Times = TIMES,
) -> BitDance:
    """A generator of the sizes that the weights show, over the tokens of a layout.

    What training draws is told. Raises UserError for other weights, and for a layout of other bits.
    """
    OFFICIAL.check(state)
    length, width = state["pos_for_diff.weight"].shape
    classes, positions = state["cls_embedding.weight"].shape
    bits = len(state["head.net.final_layer.linear.bias"])
    kind = layout.segments[0].kind
    if not isinstance(kind, Bits) or (kind.n, layout.length) != (bits, length):
        raise UserError(
            f"this generator predicts {length} tokens of {bits} bits, but the tokenizer gives {layout}: "
            "give its own tokenizer"
        )
    area = 1 + state["query_token"].shape[1] if "query_token" in state else 1
    generator = BitDance(
        layout,
        width,
        depth=count(state, r"layers\.(\d+)\."),
        num_heads=heads_of(width, num_heads),
        head_width=len(state["head.net.input_proj.bias"]),
        head_depth=count(state, r"head\.net\.res_blocks\.(\d+)\."),
        head_groups=count(state, r"head\.net\.ada_ln_blocks\.(\d+)\."),
        patch=isqrt(area),
        num_classes=classes - 1,
        class_tokens=positions // width,
        flip=flip,
        repeats=repeats,
        times=times,
        head_dim=head_dim,
    )
    return OFFICIAL.fill(generator, state)


def to_official(generator: BitDance) -> dict[str, Tensor]:
    """The official state dict of our generator, without an autoencoder; the inverse of
    `from_official`.
    """
    return OFFICIAL.to_official(generator)


def head_from_official(
    state: Mapping[str, Tensor], tokens: int, head_dim: int = TEXT_HEAD_DIM, bounded: bool = True
) -> BinaryHead:
    """A head alone, of `tokens` tokens at once, with the sizes that the weights show: the
    text-to-image model's.
    """
    width, condition_width = state["net.cond_embed.weight"].shape
    head = BinaryHead(
        len(state["net.final_layer.linear.bias"]),
        condition_width,
        width,
        depth=count(state, r"net\.res_blocks\.(\d+)\."),
        groups=count(state, r"net\.ada_ln_blocks\.(\d+)\."),
        tokens=tokens,
        head_dim=head_dim,
        bounded=bounded,
    )
    where = "the file of BitDance's head"
    load_strict(head, HEAD_KEYS.from_official(state, where), where)
    return head.eval()


def head_to_official(head: BinaryHead) -> dict[str, Tensor]:
    """The inverse of `head_from_official`."""
    return HEAD_KEYS.to_official(head.state_dict())


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> BitDance:
    """With the flips of the published training: 0.1 at the width of B, 0.05 at L's and H's."""
    flip = 0.1 if state["emb_norm.weight"].shape[0] <= 768 else 0.05
    return from_official(state, layout, options.num_heads, flip=flip)


OFFICIAL = GeneratorImporter(
    what="a BitDance generator",
    marks=("cls_embedding.weight", "pos_for_diff.weight", "head.net.final_layer.linear.weight"),
    entries=("ema", "model"),
    keys=KEYS,
    split=split_gates,
    join=join_gates,
    build=_build,
)
