"""MAR's KL VAE (kl16.ckpt, also xAR's and TokenBridge's): official keys to ours and back."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, table
from tessellar.interop.sizes import cnn_sizes
from tessellar.tokenizers.kl_vae.tokenizer import KL16_SCALE, KLVAE
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck

_BLOCK = {"nin_shortcut.{tensor}": "shortcut.{tensor}", "{layer}.{tensor}": "{layer}.{tensor}"}


_ATTENTION = {"proj_out.{tensor}": "proj.{tensor}", "{layer}.{tensor}": "{layer}.{tensor}"}


OWN = ("quantizer.scale", "quantizer.moments", "quantizer.passes")


def keys(levels: int) -> KeyTable:
    """The table of a VAE of that many levels: the official decoder numbers them from the finest,
    ours runs them.
    """
    pairs: dict[str, str] = {}
    for side, group in (("encoder", "down"), ("decoder", "up")):
        for theirs, ours in level_pairs(side, group, levels):
            pairs[theirs] = ours
        for place, name in enumerate(("block_1", "attn_1", "block_2")):
            parts = _ATTENTION if name == "attn_1" else _BLOCK
            pairs |= {f"{side}.mid.{name}.{a}": f"{side}.mid.{place}.{b}" for a, b in parts.items()}
        for layer in ("conv_in", "norm_out", "conv_out"):
            pairs[f"{side}.{layer}.{{tensor}}"] = f"{side}.{layer}.{{tensor}}"
    for layer in ("quant_conv", "post_quant_conv"):
        pairs[f"{layer}.{{tensor}}"] = f"{layer}.{{tensor}}"
    return table(pairs)


def level_pairs(side: str, group: str, levels: int) -> list[tuple[str, str]]:
    resample = "downsample" if group == "down" else "upsample"
    found = []
    for level in range(levels):
        own = f"{side}.levels.{level if group == 'down' else levels - 1 - level}"
        theirs = f"{side}.{group}.{level}"
        for a, b in _BLOCK.items():
            found.append((f"{theirs}.block.{{i}}.{a}", f"{own}.res.{{i}}.{b}"))
        for a, b in _ATTENTION.items():
            found.append((f"{theirs}.attn.{{i}}.{a}", f"{own}.attn.{{i}}.{b}"))
        resampled = f"{own}.resample.conv.{{tensor}}"
        found.append((f"{theirs}.{resample}.conv.{{tensor}}", resampled))
    return found


def from_official(
    state: Mapping[str, Tensor], image_size: int | tuple[int, int] = 256, scale: float = KL16_SCALE
) -> KLVAE:
    """Our VAE with the sizes that the weights show, filled with them; `scale` as published, for no
    file says it.
    """
    OFFICIAL.check(state)
    cnn = cnn_sizes(state, "encoder.down.{i}.block.{j}", len(state["encoder.conv_in.weight"]))
    dim = state["post_quant_conv.weight"].shape[0]
    if len(state["quant_conv.weight"]) != 2 * dim:
        raise UserError(
            "these are the weights of an autoencoder with use_variational=False; only True is supported"
        )
    made = KLVAE(
        GaussianBottleneck(dim, scale=scale),
        image_size,
        cnn.channels,
        cnn.multipliers,
        cnn.blocks,
        encoder_attention=tuple(sorted(_found(state, r"encoder\.down\.(\d+)\.attn\."))),
        decoder_attention=tuple(sorted(_found(state, r"decoder\.up\.(\d+)\.attn\."))),
    )
    return OFFICIAL.fill(made, state)


def to_official(vae: KLVAE) -> dict[str, Tensor]:
    """The official state dict; the inverse of `from_official`."""
    return OFFICIAL.to_official(vae)


def _keys_of(vae: KLVAE) -> KeyTable:
    return keys(len(vae.encoder.levels))


def _found(state: Mapping[str, Any], pattern: str) -> set[int]:
    return {int(found[1]) for key in state if (found := re.match(pattern, key))}


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> KLVAE:
    return from_official(state, options.image_size or 256)


OFFICIAL = TokenizerImporter(
    what="a KL VAE",
    marks=("encoder.conv_in.weight", "quant_conv.weight"),
    entries=("model",),  # `kl16.ckpt` has no other
    keys=_keys_of,
    own=OWN,
    build=_build,
)
