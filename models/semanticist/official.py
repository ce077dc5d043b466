"""Semanticist's generators (arXiv 2503.08685, `semanticist_ar_gen_L.pkl` on the XL tokenizer,
`semanticist_ar_gen_L_on_tok_L.pkl`): official keys to ours and back.

All sizes but the heads are read from the tensors' shapes; the tokenizer may have more slots.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, GeneratorImporter, by_heads
from tessellar.interop.keys import table
from tessellar.interop.sizes import count, ffn_multiple, heads_of
from tessellar.models.semanticist.head import HeadConditioning
from tessellar.models.semanticist.model import SemanticistAR
from tessellar.protocol.layout import Continuous, Layout

_NET = "diffloss.net"
KEYS = table(
    {
        "pos_embed_learned": "input_positions",
        "diffusion_pos_embed_learned": "z_positions",
        "cls_embedding.embedding_table.weight": "conditioning.embedding.weight",
        "z_proj.{tensor}": "input.{tensor}",
        "z_proj_ln.weight": "input_norm.weight",
        "layers.{i}.{part}.{layer}.weight": "layers.{i}.{part}.{layer}.weight",
        "layers.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "norm.weight": "norm.weight",
        f"{_NET}.time_embed.mlp.0.{{tensor}}": "flow_head.time.fc1.{tensor}",
        f"{_NET}.time_embed.mlp.2.{{tensor}}": "flow_head.time.fc2.{tensor}",
        f"{_NET}.cond_embed.{{tensor}}": "flow_head.condition.{tensor}",
        f"{_NET}.input_proj.{{tensor}}": "flow_head.input.{tensor}",
        f"{_NET}.res_blocks.{{i}}.in_ln.{{tensor}}": "flow_head.blocks.{i}.norm.{tensor}",
        f"{_NET}.res_blocks.{{i}}.mlp.0.{{tensor}}": "flow_head.blocks.{i}.fc1.{tensor}",
        f"{_NET}.res_blocks.{{i}}.mlp.2.{{tensor}}": "flow_head.blocks.{i}.fc2.{tensor}",
        f"{_NET}.res_blocks.{{i}}.adaLN_modulation.1.{{tensor}}": "flow_head.blocks.{i}.modulation.linear.{tensor}",
        f"{_NET}.final_layer.linear.{{tensor}}": "flow_head.output.{tensor}",
        f"{_NET}.final_layer.adaLN_modulation.1.{{tensor}}": "flow_head.modulation.linear.{tensor}",
    }
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    where: str = "the Semanticist generator",
) -> SemanticistAR:
    """A generator of the sizes that the weights show, over the first tokens of a layout.

    Raises UserError for other weights, and for a layout of other channels or fewer tokens.
    """
    OFFICIAL.check(state)
    rows, width = state["cls_embedding.embedding_table.weight"].shape
    tokens = state["diffusion_pos_embed_learned"].shape[1]
    channels = state["z_proj.weight"].shape[1]
    kind = layout.segments[0].kind
    fits = isinstance(kind, Continuous) and kind.dim == channels and tokens <= layout.length
    if not fits:
        raise UserError(
            f"{where} is for {tokens} tokens of {channels} channels, but the tokenizer gives {layout}"
        )
    head_width = len(state[f"{_NET}.input_proj.weight"])
    # The output reads the condition beside its input, or it does not.
    read = state[f"{_NET}.final_layer.linear.weight"].shape[1]
    conditioning: HeadConditioning = "concat" if read == 2 * head_width else "adaln"
    generator = SemanticistAR(
        layout,
        width,
        depth=count(state, r"layers\.(\d+)\."),
        num_heads=num_heads or heads_of(width),
        num_classes=rows - 1,
        num_tokens=tokens,
        head_width=head_width,
        head_depth=count(state, r"diffloss\.net\.res_blocks\.(\d+)\."),
        head_conditioning=conditioning,
        ffn_multiple_of=ffn_multiple(width, len(state["layers.0.feed_forward.w1.weight"])),
    )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: SemanticistAR) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


OFFICIAL = GeneratorImporter(
    what="a Semanticist generator",
    marks=(
        "z_proj_ln.weight",
        "cls_embedding.embedding_table.weight",
        "diffloss.net.input_proj.weight",
    ),
    entries=FLAT,
    keys=KEYS,
    build=by_heads(from_official),
)
