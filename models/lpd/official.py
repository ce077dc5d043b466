"""LPD's checkpoints (arXiv 2507.01957, `lpd_{l,xl,xxl}_256`, `lpd_{l,xl}_512`), keys to and fro.

All sizes are read from the tensors' shapes; heads have 64 channels as published unless `num_heads`
says otherwise. Positions of another grid than the tokenizer's are resized. LPD reads LlamaGen's
VQ-16 tokens.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, ImportOptions
from tessellar.interop.keys import table
from tessellar.interop.sizes import count, heads_of
from tessellar.models.lpd.model import LPD, resize_positions
from tessellar.protocol.layout import Layout

KEYS = table(
    {
        "class_emb.weight": "class_embedding.weight",
        "fake_latent": "null_embedding",
        "token_emb.weight": "token_embedding.weight",
        "pos_embed": "position_embedding",
        "mask_token": "query",
        "z_proj_ln.{tensor}": "input_norm.{tensor}",
        "blocks.{i}.norm1.{tensor}": "layers.{i}.norm1.{tensor}",
        "blocks.{i}.norm2.{tensor}": "layers.{i}.norm2.{tensor}",
        "blocks.{i}.attn.{layer}.{tensor}": "layers.{i}.attention.{layer}.{tensor}",
        "blocks.{i}.mlp.fc1.{tensor}": "layers.{i}.fc1.{tensor}",
        "blocks.{i}.mlp.fc2.{tensor}": "layers.{i}.fc2.{tensor}",
        "norm.{tensor}": "norm.{tensor}",
        "head.weight": "output.weight",
    }
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    steps: int = 20,
    repulsion: float = 2.0,
    dropout: float = 0.1,
    condition_dropout: float = 0.1,
) -> LPD:
    """A generator of the sizes that the weights show, over the tokens of a layout.

    `steps` and `repulsion` are of the orders that it decodes in unless told otherwise. Raises
    UserError for other weights, and for a layout of another vocabulary.
    """
    OFFICIAL.check(state)
    vocab, width = state["token_emb.weight"].shape
    generator = LPD(
        layout,
        width,
        depth=count(state, r"blocks\.(\d+)\."),
        num_heads=heads_of(width, num_heads),
        num_classes=len(state["class_emb.weight"]),
        steps=min(steps, layout.length),
        repulsion=repulsion,
        dropout=dropout,
        condition_dropout=condition_dropout,
        mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / width,
    )
    if generator.vocab != vocab:
        raise UserError(
            f"this generator predicts {vocab} codes, but the tokenizer gives {layout}: give its own tokenizer"
        )
    # The official loader resizes positions of another grid too.
    fitting = {**state, "pos_embed": resize_positions(state["pos_embed"], generator.grid)}
    return OFFICIAL.fill(generator, fitting)


def to_official(generator: LPD) -> dict[str, Tensor]:
    """The official state dict of our generator; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> LPD:
    """With the published orders of the grid: 20 steps at 16 x 16, 48 at 32 x 32; XXL's and 512 px's
    lie farther apart.
    """
    if layout.length == 1024:
        return from_official(state, layout, options.num_heads, steps=48, repulsion=4.0)
    is_largest = state["token_emb.weight"].shape[1] == 1536
    repulsion = 3.0 if is_largest else 2.0
    return from_official(state, layout, options.num_heads, steps=20, repulsion=repulsion)


OFFICIAL = GeneratorImporter(
    what="an LPD generator",
    marks=("fake_latent", "mask_token", "token_emb.weight", "z_proj_ln.weight", "pos_embed"),
    entries=("model",),
    keys=KEYS,
    build=_build,
    tokenizer="llamagen",
)
