"""Semanticist's tokenizers (arXiv 2503.08685, `semanticist_tok_{L,XL}.pkl`): official keys to ours
and back.

The files are averages of what is trained: the positions of the decoder are made, and the VAE is
MAR's `kl16.ckpt`, which has to lie beside them. Sizes are read from the tensors' shapes; heads are
those of the published widths, or 64 channels each, unless they are given.
"""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.sizes import count, heads_of
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.semanticist.official_vae import load_vae
from tessellar.tokenizers.semanticist.tokenizer import Semanticist
from tessellar.tokenizers.titok import ViTSize

VAE_FILE = "kl16.ckpt"
HEADS = {1152: 16}  # of DiT-XL: 72 channels each
# theirs: shift1 scale1 gate1 shift2 scale2 gate2; ours: gate1 gate2 scale1 scale2 shift1 shift2
TO_OURS = [2, 5, 1, 4, 0, 3]
TO_THEIRS = [4, 2, 0, 5, 3, 1]


def _rows(t: Tensor, order: list[int]) -> Tensor:
    parts = t.chunk(6)
    return torch.cat([parts[row] for row in order])


def rows_to_ours(t: Tensor) -> Tensor:
    """Rows of a modulation in our order."""
    return _rows(t, TO_OURS)


def rows_to_theirs(t: Tensor) -> Tensor:
    """The inverse of `rows_to_ours`."""
    return _rows(t, TO_THEIRS)


def patch_matrix(t: Tensor) -> Tensor:
    """The convolution over patches of latents as a linear layer of pixels, channels side by side."""
    return rearrange(t, "d c p q -> d (p q c)")


def keys(channels: int) -> KeyTable:
    """The table of a tokenizer whose decoder draws maps of that many channels."""

    def patch_convolution(t: Tensor) -> Tensor:
        side = isqrt(t.shape[1] // channels)
        return rearrange(t, "d (p q c) -> d c p q", p=side, q=side)

    blocks = "{side}.blocks.{i}"
    pairs = {
        "encoder.patch_embed.proj.{tensor}": "encoder.patch_in.{tensor}",
        "encoder.pos_embed": "encoder.positions",
        "encoder.slot_embed": "encoder.slots",
        "encoder.cls_token": "encoder.cls_token",
        "encoder.norm.{tensor}": "encoder.norm.{tensor}",
        "encoder.blocks.{i}.norm1.{tensor}": "encoder.blocks.{i}.norm1.{tensor}",
        "encoder.blocks.{i}.norm2.{tensor}": "encoder.blocks.{i}.norm2.{tensor}",
        "encoder2slot.{tensor}": "to_slot.{tensor}",
        "dit.null_cond": "decoder.null",
        "dit.x_embedder.proj.bias": "decoder.patch_in.bias",
        "dit.t_embedder.mlp.0.{tensor}": "decoder.time.fc1.{tensor}",
        "dit.t_embedder.mlp.2.{tensor}": "decoder.time.fc2.{tensor}",
        "dit.autoenc_cond_embedder.{tensor}": "decoder.from_slot.{tensor}",
        "dit.final_layer.linear.{tensor}": "decoder.head.{tensor}",
        "dit.final_layer.adaLN_modulation.1.{tensor}": "decoder.modulation.linear.{tensor}",
        "dit.projector.{i}.{tensor}": "decoder.projector.{i}.{tensor}",
    }
    for theirs, ours in (("encoder", "encoder"), ("dit", "decoder")):
        for part, own in (("attn", "attention"), ("mlp", "mlp")):
            left = blocks.replace("{side}", theirs)
            right = blocks.replace("{side}", ours)
            pairs[f"{left}.{part}.{{layer}}.{{tensor}}"] = f"{right}.{own}.{{layer}}.{{tensor}}"
    return table(
        pairs,
        Rule(
            "dit.x_embedder.proj.weight",
            "decoder.patch_in.weight",
            patch_matrix,
            patch_convolution,
        ),
        Rule(
            "dit.blocks.{i}.adaLN_modulation.1.{tensor}",
            "decoder.blocks.{i}.modulation.linear.{tensor}",
            rows_to_ours,
            rows_to_theirs,
        ),
        # A state dict that is no average may hold them; ours are made alike.
        drop=("dit.pos_embed", "nested_sampler.arange", "vae.*", "repa_encoder.*"),
    )


def from_official(
    state: Mapping[str, Tensor],
    vae: KLVAE | None,
    heads: tuple[int, int] | None = None,
    where: str = "the Semanticist checkpoint",
) -> Semanticist:
    """A tokenizer of the sizes that the weights show; `vae` gives what its decoder draws (None:
    pixels).

    `heads` are those of encoder and decoder. Raises UserError for other weights.
    """
    OFFICIAL.check(state)
    width, _, patch, _ = state["encoder.patch_embed.proj.weight"].shape
    slots = state["encoder.slot_embed"].shape[1]
    side = isqrt(state["encoder.pos_embed"].shape[1] - 1 - slots)
    decoder_width, _, decoder_patch, _ = state["dit.x_embedder.proj.weight"].shape
    given = heads or (heads_of(width), HEADS.get(decoder_width) or heads_of(decoder_width))
    projection = state.get("dit.projector.4.weight")
    made = Semanticist(
        side * patch,
        patch,
        num_slots=slots,
        slot_dim=len(state["encoder2slot.weight"]),
        vae=vae,
        decoder_patch_size=decoder_patch,
        encoder_size=ViTSize(width, count(state, r"encoder\.blocks\.(\d+)\."), given[0]),
        decoder_size=ViTSize(decoder_width, count(state, r"dit\.blocks\.(\d+)\."), given[1]),
        repa_dim=None if projection is None else len(projection),
        tap=min(8, count(state, r"dit\.blocks\.(\d+)\.")),
    )
    return OFFICIAL.fill(made, state, where)


def to_official(tokenizer: Semanticist) -> dict[str, Tensor]:
    """The official state dict of what is trained; the inverse of `from_official`."""
    return OFFICIAL.to_official(tokenizer)


def vae_beside(file: str | None, image_size: int) -> KLVAE:
    """MAR's VAE of the file beside the tokenizer's; raises UserError where there is none."""
    found = None if file is None else Path(file).with_name(VAE_FILE)
    if found is None or not found.is_file():
        raise UserError(
            f"Semanticist's weights hold no VAE: put MAR's {VAE_FILE} beside {file or 'them'}"
        )
    return load_vae(found, image_size)


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> Semanticist:
    patch = state["encoder.patch_embed.proj.weight"].shape[-1]
    cells = state["encoder.pos_embed"].shape[1] - 1 - state["encoder.slot_embed"].shape[1]
    vae = vae_beside(options.file, isqrt(cells) * patch)
    return from_official(state, vae, options.heads)


def _keys_of(tokenizer: Semanticist) -> KeyTable:
    return keys(tokenizer.grid.channels)


OFFICIAL = TokenizerImporter(
    what="a Semanticist tokenizer",
    marks=("encoder.slot_embed", "encoder2slot.weight", "dit.null_cond"),
    entries=FLAT,
    keys=_keys_of,
    own=("decoder.positions", "passes", "vae.*"),
    build=_build,
)
