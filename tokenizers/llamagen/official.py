"""LlamaGen's VQ tokenizer and PatchGAN: official keys to ours and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessellar.checkpoints.weights import load_strict
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import table
from tessellar.interop.options import check_options
from tessellar.interop.sizes import CNNSizes, cnn_sizes
from tessellar.tokenizers.llamagen.tokenizer import LlamaGenVQ
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.quantizers.vq import VectorQuantizer

_SIDE = {
    "{side}.conv_in.{tensor}": "{side}.conv_in.{tensor}",
    "{side}.conv_blocks.{i}.res.{j}.nin_shortcut.{tensor}": "{side}.levels.{i}.res.{j}.shortcut.{tensor}",
    "{side}.conv_blocks.{i}.res.{j}.{layer}.{tensor}": "{side}.levels.{i}.res.{j}.{layer}.{tensor}",
    "{side}.conv_blocks.{i}.attn.{j}.proj_out.{tensor}": "{side}.levels.{i}.attn.{j}.proj.{tensor}",
    "{side}.conv_blocks.{i}.attn.{j}.{layer}.{tensor}": "{side}.levels.{i}.attn.{j}.{layer}.{tensor}",
    "{side}.conv_blocks.{i}.downsample.conv.{tensor}": "{side}.levels.{i}.resample.conv.{tensor}",
    "{side}.conv_blocks.{i}.upsample.conv.{tensor}": "{side}.levels.{i}.resample.conv.{tensor}",
    "{side}.mid.{i}.proj_out.{tensor}": "{side}.mid.{i}.proj.{tensor}",
    "{side}.mid.{i}.{layer}.{tensor}": "{side}.mid.{i}.{layer}.{tensor}",
    "{side}.norm_out.{tensor}": "{side}.norm_out.{tensor}",
    "{side}.conv_out.{tensor}": "{side}.conv_out.{tensor}",
}


def cnn_keys(side: str, own: str | None = None) -> dict[str, str]:
    """The table of `encoder` or `decoder` (our name: `own`); the way back must tell `downsample`
    from `upsample`.
    """
    other = "upsample" if side == "encoder" else "downsample"
    named = {}
    for theirs, ours in _SIDE.items():
        if other not in theirs:
            named[theirs.replace("{side}", side)] = ours.replace("{side}", own or side)
    return named


KEYS = table(
    {
        **cnn_keys("encoder"),
        **cnn_keys("decoder"),
        "quant_conv.{tensor}": "quant_conv.{tensor}",
        "post_quant_conv.{tensor}": "post_quant_conv.{tensor}",
        "quantize.embedding.weight": "quantizer.codebook.weight",
    },
    drop=("quantize.codebook_used",),
)


def load_official(
    tokenizer: LlamaGenVQ, state: Mapping[str, Tensor], where: str = "the checkpoint"
) -> LlamaGenVQ:
    """Official weights into a tokenizer of the same sizes, strictly."""
    return OFFICIAL.fill(tokenizer, state, where)


def to_official(tokenizer: LlamaGenVQ) -> dict[str, Tensor]:
    """Official state dict of a tokenizer (without their queue of recent codes)."""
    return OFFICIAL.to_official(tokenizer)


def tokenizer_from_official(state: Mapping[str, Tensor], image_size: int = 256) -> LlamaGenVQ:
    """A tokenizer with the sizes that the weights show, filled with them."""
    OFFICIAL.check(state)
    cnn = cnn_sizes(state, "encoder.conv_blocks.{i}.res.{j}", len(state["encoder.conv_in.weight"]))
    vocab, dim = state["quantize.embedding.weight"].shape
    tokenizer = LlamaGenVQ(
        VectorQuantizer(vocab, dim),
        image_size,
        cnn.channels,
        cnn.multipliers,
        cnn.blocks,
        state["encoder.conv_out.weight"].shape[0],
        decoder_multipliers=decoder_multipliers(state, "decoder.conv_blocks.{i}.res.{j}", cnn),
    )
    return load_official(tokenizer, state)


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> LlamaGenVQ:
    return tokenizer_from_official(state, options.image_size or 256)


OFFICIAL = TokenizerImporter(
    what="a LlamaGen VQ tokenizer",
    marks=("encoder.conv_in.weight", "encoder.conv_blocks.*", "quantize.embedding.weight"),
    entries=("ema", "model", "state_dict"),  # the order of the official reconstruction script
    keys=KEYS,
    own=("quantizer.step", "quantizer.counts"),
    build=_build,
)


def decoder_multipliers(
    state: Mapping[str, Tensor], block: str, encoder: CNNSizes
) -> tuple[int, ...] | None:
    """Multipliers of a decoder that numbers its levels from the coarsest; None where they are the
    encoder's.
    """
    found = cnn_sizes(state, block, encoder.channels).multipliers[::-1]
    return None if found == encoder.multipliers else found


READ = (
    "codebook_size codebook_embed_dim codebook_l2_norm commit_loss_beta entropy_loss_ratio ch ch_mult encoder_ch_mult "
    "decoder_ch_mult num_res_blocks z_channels dropout_p codebook_show_usage"
).split()
SUPPORTED = {
    "norm": "GroupNorm(32, eps=1e-6)",
    "norm_type": "group",
    "in_channels": 3,
    "out_channels": 3,
}
SUPPORTED |= {"resamp_with_conv": True}


def tokenizer_from_config(
    config: Mapping[str, Any], image_size: int | tuple[int, int]
) -> LlamaGenVQ:
    """An untrained tokenizer of the official options; raises UserError for those that are not
    supported.
    """
    check_options(config, "the LlamaGen VQ tokenizer", READ, SUPPORTED)
    multipliers = config.get("ch_mult", (1, 1, 2, 2, 4))
    quantizer = VectorQuantizer(
        config["codebook_size"],
        config["codebook_embed_dim"],
        config.get("codebook_l2_norm", True),
        commitment_weight=config.get("commit_loss_beta", 0.25),
        entropy_weight=config.get("entropy_loss_ratio", 0.0),
    )
    return LlamaGenVQ(
        quantizer,
        image_size,
        channels=config.get("ch", 128),
        multipliers=tuple(config.get("encoder_ch_mult", multipliers)),
        num_res_blocks=config.get("num_res_blocks", 2),
        z_channels=config["z_channels"],
        dropout=config.get("dropout_p", 0.0),
        decoder_multipliers=tuple(config.get("decoder_ch_mult", multipliers)),
    )


def discriminator_from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PatchGAN:
    """The official PatchGAN; its keys are ours."""
    made = PatchGAN(config.get("ndf", 64), config.get("n_layers", 3), config.get("input_nc", 3))
    load_strict(made, state, "the discriminator")
    return made
