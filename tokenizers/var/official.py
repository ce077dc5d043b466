"""The checkpoints of VAR's VQVAE (arXiv 2404.02905), official keys to ours and back. (The
transformer: models/var.)

Their CNN is LDM's with fused attention, which is split into three here; sizes are read from the
tensors' shapes.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, Rule
from tessellar.interop.sizes import cnn_sizes
from tessellar.tokenizers.kl_vae.official import keys as cnn_table
from tessellar.tokenizers.var import VARVQVAE, MultiScaleQuantizer
from tessellar.tokenizers.var.tokenizer import scales

QKV = re.compile(r"(.*\.attn(?:_1|\.\d+))\.qkv\.(weight|bias)")


def vqvae_keys(levels: int) -> KeyTable:
    """The table of a VQVAE of that many levels, behind `split_qkv`."""
    own = (
        Rule("quantize.embedding.weight", "quantizer.codebook.weight"),
        Rule("quantize.quant_resi.qresi_ls.{i}.{tensor}", "quantizer.phis.{i}.{tensor}"),
    )
    return KeyTable((*own, *cnn_table(levels).rules), ("quantize.ema_vocab_hit_SV",))


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fused projections apart, and the names of phis that are not in a list made as if they were."""
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if found := QKV.fullmatch(key):
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{found[1]}.{name}.{found[2]}"] = part
        else:
            key = key.replace("quant_resi.qresi.", "quant_resi.qresi_ls.0.")
            result[re.sub(r"quant_resi\.(\d+)\.", r"quant_resi.qresi_ls.\1.", key)] = tensor
    return result


def vqvae_from_official(
    state: Mapping[str, Tensor],
    sides: tuple[int, ...] = scales(256),  # noqa: B008
    phi_ratio: float = 0.5,
    commitment_weight: float = 0.25,
    where: str = "the VAR tokenizer",
    cosine: bool = False,
    dropout: float = 0.0,
) -> VARVQVAE:
    """Our tokenizer with the sizes that the weights show; the scales are not among them.

    `phi_ratio` is their `quant_resi` (weights without phis have 0), `cosine` their `using_znorm`.
    """
    OFFICIAL.check(state)
    cnn = cnn_sizes(state, "encoder.down.{i}.block.{j}", len(state["encoder.conv_in.weight"]))
    split = split_qkv(state)
    phis = _count_phis(split)
    vocab_size, dim = state["quantize.embedding.weight"].shape
    quantizer = MultiScaleQuantizer(
        vocab_size,
        dim,
        sides,
        phis=phis,
        phi_ratio=phi_ratio if phis else 0.0,
        cosine=cosine,
        commitment_weight=commitment_weight,
    )
    made = VARVQVAE(
        quantizer,
        sides[-1] * 2 ** (cnn.levels - 1),
        cnn.channels,
        cnn.multipliers,
        cnn.blocks,
        dropout=dropout,
        kernel=split["quant_conv.weight"].shape[-1],
    )
    return OFFICIAL.fill(made, state, where)


def _count_phis(split: Mapping[str, Tensor]) -> int:
    """How many phis there are, behind `split_qkv`."""
    return len(
        {key.split(".")[3] for key in split if key.startswith("quantize.quant_resi.qresi_ls.")}
    )


def vqvae_to_official(vqvae: VARVQVAE) -> dict[str, Tensor]:
    """The official state dict, without their usage statistics."""
    state = OFFICIAL.to_official(vqvae)
    # Phis are one for all scales, one each, or a list that the scales share: three names.
    phis = _count_phis(state)
    if phis == 1:
        return {key.replace("qresi_ls.0.", "qresi."): tensor for key, tensor in state.items()}
    if phis == len(vqvae.quantizer.sides):
        return {key.replace("qresi_ls.", ""): tensor for key, tensor in state.items()}
    return state


def join_qkv(split: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Projections that `split_qkv` took apart, fused again."""
    fused = {}
    for key, tensor in split.items():
        if found := re.fullmatch(r"(.*\.attn(?:_1|\.\d+))\.([qkv])\.(weight|bias)", key):
            if found[2] == "q":
                parts = [split[f"{found[1]}.{name}.{found[3]}"] for name in "qkv"]
                fused[f"{found[1]}.qkv.{found[3]}"] = torch.cat(parts)
        else:
            fused[key] = tensor
    return fused


def _keys_of(vqvae: VARVQVAE) -> KeyTable:
    return vqvae_keys(len(vqvae.encoder.levels))


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> VARVQVAE:
    return vqvae_from_official(state, scales(options.image_size or 256))


OFFICIAL = TokenizerImporter(
    what="a multi-scale VQVAE of VAR",
    marks=("encoder.conv_in.weight", "quantize.embedding.weight"),
    # Of `ar-ckpt-*.pth`; the published files are flat, no weights are averaged.
    entries=("trainer.vae_local",),
    keys=_keys_of,
    own=("quantizer.step", "quantizer.counts"),
    split=split_qkv,
    join=join_qkv,
    build=_build,
)
