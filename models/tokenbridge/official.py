"""TokenBridge's generator checkpoints (arXiv 2503.16430), official keys to ours and back. (Its
tokenizer: tokenizers/tokenbridge.)

All sizes but the heads of the backbone are read from the tensors' shapes. The grid and the mask of
the head are buffers of the file: ours has them elsewhere. The order of channels is a constant of
the official code.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import GeneratorImporter, ImportOptions
from tessellar.interop.keys import table
from tessellar.interop.sizes import count
from tessellar.models.mar.official import BACKBONE, backbone_sizes
from tessellar.models.tokenbridge.model import TokenBridge
from tessellar.models.tokenbridge.order import KL16_ORDER
from tessellar.protocol.layout import Factorized, Layout

KEYS = table(
    {
        "output_pos_embed": "backbone.z_positions",
        "condition_proj.{tensor}": "head.condition.{tensor}",
        "channel_embed": "head.position",
        "timesteps_embeddings": "head.step",
        "token_embeddings.{i}.weight": "head.embeddings.{i}.weight",
        "channel_blocks.{i}.attn.{layer}.{tensor}": "head.blocks.{i}.attention.{layer}.{tensor}",
        # Spelled out, so that the way back is one too: ours has norms and the MLP side by side.
        "channel_blocks.{i}.mlp.fc1.{tensor}": "head.blocks.{i}.fc1.{tensor}",
        "channel_blocks.{i}.mlp.fc2.{tensor}": "head.blocks.{i}.fc2.{tensor}",
        "channel_blocks.{i}.norm1.{tensor}": "head.blocks.{i}.norm1.{tensor}",
        "channel_blocks.{i}.norm2.{tensor}": "head.blocks.{i}.norm2.{tensor}",
        "channel_blocks.{i}.adaLN_modulation.1.{tensor}": "head.blocks.{i}.modulation.linear.{tensor}",
        "channel_norm.{tensor}": "head.norm.{tensor}",
        "channel_final.adaLN_modulation.1.{tensor}": "head.last_modulation.linear.{tensor}",
        "channel_heads.{i}.{tensor}": "head.outputs.{i}.{tensor}",
        **BACKBONE,  # the last ones: theirs of blocks are like those of the head too
    },
    drop=("channel_mask", "boundaries", "reconstruction_values"),
)


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    where: str = "the TokenBridge checkpoint",
    decoder_heads: int | None = None,
    channel_order: tuple[int, ...] | None = None,
    condition_dropout: float = 0.1,
    dropout: float = 0.1,
    attention_dropout: float | None = None,
    least_masked: float = 0.7,
) -> TokenBridge:
    """A generator of the sizes that the weights show; raises UserError where they do not fit the
    tokenizer's layout.

    The decoder has as many heads as the encoder unless `decoder_heads` says otherwise. The order of
    channels is KL-16's where there are 16 and none is given, else their own. The last four are of
    training, as TokenBridge's own.
    """
    ours = KEYS.from_official(state, where)
    length = ours["backbone.z_positions"].shape[1]
    channels = ours["backbone.input.weight"].shape[1]
    kind = layout.segments[0].kind
    if not isinstance(kind, Factorized) or len(kind.vocabs) != channels or length != layout.length:
        raise UserError(
            f"{where} is for {length} tokens of {channels} indices, but the tokenizer gives {layout}"
        )
    positions = count(ours, r"head\.outputs\.(\d+)\.")
    head_width = ours["head.condition.weight"].shape[0]
    if channel_order is None and channels == len(KL16_ORDER):
        channel_order = KL16_ORDER
    generator = TokenBridge(
        layout,
        head_width=head_width,
        head_depth=count(ours, r"head\.blocks\.(\d+)\."),
        head_heads=head_width // ours["head.blocks.0.attention.q_norm.weight"].shape[0],
        channel_order=channel_order,
        group=channels // positions,
        parallel=not any(name.startswith("head.embeddings.") for name in ours),
        first_input="official",
        condition_dropout=condition_dropout,
        dropout=dropout,
        attention_dropout=attention_dropout,
        least_masked=least_masked,
        **backbone_sizes(ours, num_heads, decoder_heads, what="TokenBridge"),
    )
    sizes = tuple(len(ours[f"head.outputs.{i}.weight"]) for i in range(positions))
    if sizes != generator.channels.sizes:
        raise UserError(
            f"{where} predicts {sizes[0]} levels of a channel, but the tokenizer gives {layout}"
        )
    return OFFICIAL.fill(generator, state, where)


def to_official(generator: TokenBridge) -> dict[str, Tensor]:
    """The official state dict of our generator, without buffers; the inverse of `from_official`."""
    return OFFICIAL.to_official(generator)


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> TokenBridge:
    return from_official(state, layout, options.num_heads, decoder_heads=options.decoder_heads)


OFFICIAL = GeneratorImporter(
    what="a TokenBridge generator",
    marks=("fake_latent", "condition_proj.weight", "channel_embed"),
    # Of `checkpoint-last.pth`: the official evaluation loads the average.
    entries=("model_ema", "model"),
    keys=KEYS,
    build=_build,
)
