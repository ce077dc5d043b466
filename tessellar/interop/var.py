"""VAR's checkpoints (arXiv 2404.02905): the multi-scale VQVAE and the transformer, official keys to ours and back.

Their CNN is LDM's with fused attention, which is split into three here; sizes are read from the tensors' shapes.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import KeyTable, Rule, table
from tessellar.interop.kl_vae import keys as cnn_table
from tessellar.interop.official import ImportOptions
from tessellar.interop.sizes import cnn_sizes, count, heads_of
from tessellar.interop.weights import load_strict
from tessellar.models.conditioners import ClassConditioner
from tessellar.models.var import VAR
from tessellar.pipeline import ImageGenerator
from tessellar.tokenizers.base import Tokenizer
from tessellar.tokenizers.layout import Layout
from tessellar.tokenizers.quantizers.multi_scale import MultiScaleQuantizer
from tessellar.tokenizers.var_vqvae import SCALES_256, VARVQVAE

# Of `ar-ckpt-*.pth`; the published files are flat. No weights are averaged.
TOKENIZER_ENTRIES = ("trainer.vae_local",)
GENERATOR_ENTRIES = ("trainer.var_wo_ddp",)
OWN = ("quantizer.step", "quantizer.counts")
QKV = re.compile(r"(.*\.attn(?:_1|\.\d+))\.qkv\.(weight|bias)")


def vqvae_keys(levels: int) -> KeyTable:
    """The table of a VQVAE of that many levels, behind `_split`."""
    own = (
        Rule("quantize.embedding.weight", "quantizer.codebook.weight"),
        Rule("quantize.quant_resi.qresi_ls.{i}.{tensor}", "quantizer.phis.{i}.{tensor}"),
    )
    return KeyTable((*own, *cnn_table(levels).rules), ("quantize.ema_vocab_hit_SV",))


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    sides: tuple[int, ...] = SCALES_256,
    phi_ratio: float = 0.5,
    commitment_weight: float = 0.25,
    where: str = "the VAR tokenizer",
) -> VARVQVAE:
    """Our tokenizer with the sizes that the weights show; the scales are not among them."""
    if "encoder.conv_in.weight" not in state or "quantize.embedding.weight" not in state:
        raise UserError(f"{where} holds no multi-scale VQVAE: encoder.conv_in or the codebook is absent")
    cnn = cnn_sizes(state, "encoder.down.{i}.block.{j}", len(state["encoder.conv_in.weight"]))
    split = _split(state)
    phis = count(split, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    vocab_size, dim = state["quantize.embedding.weight"].shape
    quantizer = MultiScaleQuantizer(vocab_size, dim, sides, phis, phi_ratio, commitment_weight=commitment_weight)
    made = VARVQVAE(
        quantizer,
        sides[-1] * 2 ** (cnn.levels - 1),
        cnn.channels,
        cnn.multipliers,
        cnn.blocks,
    )
    own = {name: tensor for name, tensor in made.state_dict().items() if name in OWN}
    load_strict(made, {**vqvae_keys(cnn.levels).from_official(split, where), **own}, where)
    return made.eval()


def vqvae_to_official(vqvae: VARVQVAE) -> dict[str, Tensor]:
    """The official state dict (four shared phis), without their usage statistics."""
    state = {name: tensor for name, tensor in vqvae.state_dict().items() if name not in OWN}
    split = vqvae_keys(len(vqvae.encoder.levels)).to_official(state)
    fused = {}
    for key, tensor in split.items():
        if found := re.fullmatch(r"(.*\.attn(?:_1|\.\d+))\.([qkv])\.(weight|bias)", key):
            if found[2] == "q":
                parts = [split[f"{found[1]}.{name}.{found[3]}"] for name in "qkv"]
                fused[f"{found[1]}.qkv.{found[3]}"] = torch.cat(parts)
        else:
            fused[key] = tensor
    return fused


KEYS = table(
    {
        "pos_start": "start_position",
        "pos_1LC": "position",
        "lvl_embed.weight": "scale_embedding.weight",
        "class_emb.weight": "class_embedding.weight",
        "word_embed.{tensor}": "input.{tensor}",
        "blocks.{i}.ada_lin.1.{tensor}": "layers.{i}.modulation.linear.{tensor}",
        "blocks.{i}.ada_gss": "layers.{i}.modulation.offset",
        "blocks.{i}.attn.mat_qkv.weight": "layers.{i}.attention.qkv.weight",
        "blocks.{i}.attn.q_bias": "layers.{i}.attention.q_bias",
        "blocks.{i}.attn.v_bias": "layers.{i}.attention.v_bias",
        "blocks.{i}.attn.scale_mul_1H11": "layers.{i}.attention.log_scale",
        "blocks.{i}.attn.proj.{tensor}": "layers.{i}.attention.proj.{tensor}",
        "blocks.{i}.ffn.{layer}.{tensor}": "layers.{i}.mlp.{layer}.{tensor}",
        "shared_ada_lin.1.{tensor}": "shared_modulation.{tensor}",
        "head_nm.ada_lin.1.{tensor}": "last_modulation.linear.{tensor}",
        "head.{tensor}": "output.{tensor}",
    },
    drop=("lvl_1L", "attn_bias_for_masking", "blocks.{i}.attn.zero_k_bias"),
)


def is_generator(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of the transformer rather than of the VQVAE."""
    return "pos_1LC" in state


def from_official(
    state: Mapping[str, Tensor], layout: Layout, num_heads: int | None = None, where: str = "the VAR checkpoint"
) -> VAR:
    """A generator of the sizes that the weights show; raises UserError where they do not fit the tokenizer's layout."""
    length, width = state["pos_1LC"].shape[1:]
    if length != layout.length:
        raise UserError(f"{where} is for {length} tokens, but the tokenizer gives {layout}")
    depth = count(state, r"blocks\.(\d+)\.")
    l2_norm = "blocks.0.attn.scale_mul_1H11" in state
    generator = VAR(
        layout,
        width,
        depth,
        num_heads or (state["blocks.0.attn.scale_mul_1H11"].shape[1] if l2_norm else heads_of(width)),
        state["class_emb.weight"].shape[0] - 1,
        state["word_embed.weight"].shape[1],
        state["blocks.0.ffn.fc1.weight"].shape[0] / width,
        shared_modulation="shared_ada_lin.1.weight" in state,
        l2_norm=l2_norm,
    )
    if generator.output.out_features != state["head.weight"].shape[0]:
        raise UserError(f"{where} predicts {state['head.weight'].shape[0]} codes, but the tokenizer gives {layout}")
    load_strict(generator, KEYS.from_official(state, where), where)
    return generator.eval()


def to_official(generator: VAR) -> dict[str, Tensor]:
    """The official state dict, without the buffers; the inverse of `from_official`."""
    return KEYS.to_official(generator.state_dict())


def import_tokenizer(state: Mapping[str, Tensor], options: ImportOptions) -> VARVQVAE:
    """What `convert.py import var` makes of a tokenizer's file."""
    from tessellar.tokenizers.var_vqvae import SCALES_512

    return vqvae_from_official(state, SCALES_512 if options.image_size == 512 else SCALES_256)


def import_generator(state: Mapping[str, Tensor], tokenizer: Tokenizer, options: ImportOptions) -> ImageGenerator:
    """What `convert.py import var` makes of a generator's file."""
    generator = from_official(state, tokenizer.layout, options.num_heads)
    return ImageGenerator(tokenizer, generator, ClassConditioner(generator.num_classes))
