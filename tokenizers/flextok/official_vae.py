"""diffusers' AutoencoderKL, FlexTok's frozen VAE: official keys to those of `KLVAE` and back.

Sizes are read from the tensors' shapes; the number of groups of the norms and the scale of the
latents stand only in the official config.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.checkpoints.reading import load_tokenizer
from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.files import is_official_file, read_official
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.sizes import cnn_sizes, matrix
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.kl_vae.official import OWN
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck


def as_convolution(t: Tensor) -> Tensor:
    """The weight of a linear layer (or of a 1x1 convolution, as older files have it) as that of a
    convolution.
    """
    return t[:, :, None, None] if t.ndim == 2 else t


def keys() -> KeyTable:
    pairs = {
        "quant_conv.{tensor}": "quant_conv.{tensor}",
        "post_quant_conv.{tensor}": "post_quant_conv.{tensor}",
    }
    for side, group, resample in (
        ("encoder", "down_blocks", "downsamplers"),
        ("decoder", "up_blocks", "upsamplers"),
    ):
        level = f"{side}.levels.{{i}}"
        block = f"{side}.{group}.{{i}}"
        for layer in ("conv_in", "conv_out"):
            pairs[f"{side}.{layer}.{{tensor}}"] = f"{side}.{layer}.{{tensor}}"
        pairs[f"{side}.conv_norm_out.{{tensor}}"] = f"{side}.norm_out.{{tensor}}"
        pairs[f"{block}.{resample}.0.conv.{{tensor}}"] = f"{level}.resample.conv.{{tensor}}"
        places = {f"{block}.resnets.{{j}}": f"{level}.res.{{j}}"}
        places |= {f"{side}.mid_block.resnets.{n}": f"{side}.mid.{2 * n}" for n in (0, 1)}
        for theirs, ours in places.items():
            pairs[f"{theirs}.conv_shortcut.{{tensor}}"] = f"{ours}.shortcut.{{tensor}}"
            pairs[f"{theirs}.{{layer}}.{{tensor}}"] = f"{ours}.{{layer}}.{{tensor}}"
        pairs[f"{side}.mid_block.attentions.0.group_norm.{{tensor}}"] = (
            f"{side}.mid.1.norm.{{tensor}}"
        )
    return table(pairs, *attention_rules())


def attention_rules() -> list[Rule]:
    """The attention in the middle, with today's names first, then those of older files."""
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj"}
    names |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj"}
    rules = []
    for theirs, ours in names.items():
        key = f"{{side}}.mid_block.attentions.0.{theirs}"
        own = f"{{side}}.mid.1.{ours}"
        rules.append(Rule(f"{key}.weight", f"{own}.weight", as_convolution, matrix))
        rules.append(Rule(f"{key}.bias", f"{own}.bias"))
    return rules


KEYS = keys()


def load_official(vae: KLVAE, state: Mapping[str, Tensor], where: str = "the VAE") -> KLVAE:
    """Official weights into a VAE of the same sizes, strictly; the scale stays."""
    own = {name: vae.state_dict()[name] for name in OWN}
    load_strict(vae, {**KEYS.from_official(state, where), **own}, where)
    return vae.eval()


def to_official(vae: KLVAE) -> dict[str, Tensor]:
    """The official state dict; the inverse of `load_official`."""
    return KEYS.to_official(
        {name: tensor for name, tensor in vae.state_dict().items() if name not in OWN}
    )


def vae_from_official(
    state: Mapping[str, Tensor], image_size: int, scale: float, groups: int = 32
) -> KLVAE:
    """Our VAE with the sizes that the weights show, filled with them."""
    missing = {"encoder.conv_in.weight", "post_quant_conv.weight"} - state.keys()
    if missing:
        raise UserError(
            f"these are not the weights of diffusers' AutoencoderKL: {', '.join(missing)} is absent"
        )
    cnn = cnn_sizes(
        state, "encoder.down_blocks.{i}.resnets.{j}", len(state["encoder.conv_in.weight"])
    )
    channels = len(state["post_quant_conv.weight"])
    made = KLVAE(
        GaussianBottleneck(channels, scale=scale),
        image_size,
        cnn.channels,
        cnn.multipliers,
        cnn.blocks,
        encoder_attention=(),
        decoder_attention=(),
        groups=groups,
    )
    return load_official(made, state)


def load_vae(vae: KLVAE, file: str, scale: float | None = None) -> KLVAE:
    """Weights of diffusers' file, or of an export of ours, into `vae`; `scale` counts before the
    export's.
    """
    if is_official_file(file):
        return load_official(vae, read_official(file), file)
    found = load_tokenizer(file)
    if not isinstance(found, KLVAE):
        raise UserError(f"{file} is a {type(found).__name__}; FlexTok's VAE is a KLVAE")
    load_strict(vae, found.state_dict(), file)
    if scale is not None:
        vae.quantizer.scale.fill_(scale)
    return vae.eval()
