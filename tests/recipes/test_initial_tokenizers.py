"""Tokenizers at their published widths start as the official code starts them; small ones by a rule of their width."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessellar.protocol.configured import build
from tessellar.tokenizers import (
    alitok,
    hita,
    ibq,
    kl_vae,
    llamagen,
    one_d_piece,
    open_magvit2,
    restok,
    retok,
    titok,
    var,
)
from tessellar.tokenizers.alitok.official import to_official as alitok_names
from tessellar.tokenizers.hita.official import to_official as hita_names
from tessellar.tokenizers.ibq.official import to_official as ibq_names
from tessellar.tokenizers.kl_vae.official import to_official as kl_names
from tessellar.tokenizers.llamagen.official import to_official as llamagen_names
from tessellar.tokenizers.losses.blur_discriminator import BlurDiscriminator
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.open_magvit2.official import to_official as open_magvit2_names
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.restok.official import to_official as restok_names
from tessellar.tokenizers.retok.official import to_official as retok_names
from tessellar.tokenizers.titok.official import DISCRIMINATOR_KEYS
from tessellar.tokenizers.titok.official import to_official as titok_names
from tessellar.tokenizers.titok.tokenizer import SIZES
from tessellar.tokenizers.var.official import vqvae_to_official as var_names
from tests.recipes.frame import GOLDEN, read_recorded
from tests.recipes.initial import unlike

State = Mapping[str, Tensor]


def recorded(system: str, part: str, *which: str) -> dict[str, Any]:
    """Recorded kinds of parameters of one part, of the variant `which` where there are several."""
    init = read_recorded(GOLDEN, system)["parts"][part]["init"]
    for key in which:
        init = init[key]
    return init["params"]


def shallow(preset: Callable[..., nn.Module], **changes: Any) -> Any:
    """A preset with other arguments of its class (its depth), as a recording names them."""
    with torch.device("meta"):
        config: Any = preset().config  # type: ignore[union-attr]
    return build({**config, "init_args": {**config["init_args"], **changes}})


def vaex_names(vqvae: Any) -> State:
    """vaex has one scale and one convolution of phi; VAR's four of them are of the same kind."""
    state = var_names(vqvae)
    phis = {name: tensor for name, tensor in state.items() if ".qresi_ls." in name}
    for tensor in ("weight", "bias"):
        state[f"quantize.quant_resi.{tensor}"] = torch.stack(
            [t for n, t in phis.items() if n.endswith(tensor)]
        )
    return state


def restok_l() -> State:
    return restok_names(
        shallow(restok.restok_l_128, encoder_depth=4, decoder_depth=4, vision_dim=1024)
    )


STARTS: dict[str, tuple[Callable[[], State], tuple[str, ...]]] = {
    "titok_s128": (lambda: titok_names(titok.titok_s128()), ("titok", "stage1", "s128")),
    "titok_b64": (lambda: titok_names(titok.titok_b64()), ("titok", "stage2", "before_loading")),
    "titok_l32": (lambda: titok_names(titok.titok_l32()), ("titok", "stage1", "l32")),
    "titok_bl128_vq8k": (
        lambda: titok_names(titok.titok_bl128_vq8k(clustering=True)),
        ("titok", "single_stage_vq"),
    ),
    "titok_bl64_vae": (
        lambda: titok_names(titok.titok_bl64_vae_c16()),
        ("titok", "single_stage_kl"),
    ),
    "alitok_causal": (
        lambda: alitok_names(alitok.alitok_256("causal")),
        ("alitok", "tokenizer_stage1"),
    ),
    "alitok_bidirectional": (
        lambda: alitok_names(alitok.alitok_256()),
        ("alitok", "tokenizer_stage2"),
    ),
    "one_d_piece_s256": (
        lambda: titok_names(one_d_piece.one_d_piece_s256()),
        ("one_d_piece", "stage1", "s256"),
    ),
    "one_d_piece_b256": (
        lambda: titok_names(one_d_piece.one_d_piece_b256()),
        ("one_d_piece", "stage1", "b256"),
    ),
    "restok_l_128": (restok_l, ("restok", "tokenizer")),
    "retok_s_b": (lambda: retok_names(retok.retok_s_b()), ("retok", "tokenizer")),
    "var_vqvae": (lambda: vaex_names(var.var_vqvae()), ("var", "tokenizer")),
    "kl16": (lambda: kl_names(kl_vae.kl16()), ("mar", "tokenizer")),
    "vq_16": (lambda: llamagen_names(llamagen.vq_16()), ("llamagen", "tokenizer")),
    "open_magvit2_256": (
        lambda: open_magvit2_names(open_magvit2.open_magvit2_256()),
        ("seed_voken", "magvit2_tokenizer_256"),
    ),
    "patchgan": (lambda: PatchGAN().state_dict(), ("llamagen", "discriminator")),
    "blur_discriminator": (
        lambda: DISCRIMINATOR_KEYS.to_official(BlurDiscriminator().state_dict()),
        ("titok", "stage2_discriminator"),
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_weights_start_as_officially(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (
        SIZES
    ):  # the recorded instances have two layers; a kind's deviation does not depend on their number
        monkeypatch.setitem(SIZES, size, replace(SIZES[size], depth=2))
    torch.manual_seed(0)
    make, where = STARTS[name]
    assert unlike(make(), recorded(*where)) == []


def test_hita_starts_as_officially() -> None:
    torch.manual_seed(0)
    vision_branch = re.compile(r"decode_transformer\.(mask_embedding|norm_vfm|norm|proj)(\.|$)")
    kinds = {
        kind: facts
        for kind, facts in recorded("hita", "tokenizer").items()
        if not vision_branch.match(kind)
    }
    assert unlike(hita_names(hita.hita_v()), kinds) == []


def test_ibq_starts_as_officially() -> None:
    """Its recorded table is taming's, which the official code swaps afterwards for one of N(0, 1)."""
    torch.manual_seed(0)
    made = ibq.ibq_16384()
    kinds = recorded("seed_voken", "ibq_tokenizer")
    table = kinds.pop("quantize.embedding.weight")
    assert table["std"] < 1e-4 and abs(float(made.quantizer.codebook.weight.std()) - 1) < 1e-2  # type: ignore[union-attr]
    assert unlike(ibq_names(made), kinds) == []


def std_of_latents(width: int, channels: int, z_channels: int) -> float:
    """How far latents of different images lie apart at the start."""
    torch.manual_seed(0)
    made = retok.ReToK(
        VectorQuantizer(512, 8),
        image_size=32,
        num_tokens=32,
        always=4,
        channels=channels,
        multipliers=(1, 1, 2),
        num_res_blocks=1,
        z_channels=z_channels,
        encoder_size=retok.QFormerSize(width, 2, 4),
        decoder_size=retok.QFormerSize(width, 3, 4),
        semantic_dim=None,
    )
    images = (torch.rand(16, 3, 4, 4) * 2 - 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        return float(made.latents(made.encoder(images)).std(0).mean())


def test_latents_of_a_small_model_differ_as_much_as_those_of_a_published_width() -> None:
    published = std_of_latents(512, 128, 256)
    assert std_of_latents(96, 32, 64) > 0.8 * published
    assert std_of_latents(64, 32, 32) > 0.8 * published


@pytest.mark.parametrize("width", [64, 128])
def test_layers_of_small_models_keep_the_deviation_of_their_input(width: int) -> None:
    torch.manual_seed(0)
    size = titok.ViTSize(width, 2, 4)
    made = {
        "titok": titok.TiTok(VectorQuantizer(64, 8), 32, 8, 8, size, size),
        "restok": restok.ResTok(
            VectorQuantizer(64, 8),
            image_size=32,
            num_tokens=8,
            min_tokens=4,
            channels=32,
            multipliers=(1, 1, 1),
            stages=2,
            encoder_width=width,
            encoder_depth=2,
            encoder_heads=2,
            decoder_width=width,
            decoder_depth=2,
            decoder_heads=2,
        ),
    }
    for name, tokenizer in made.items():
        layers = [
            part
            for part in tokenizer.modules()
            if isinstance(part, nn.Linear) and part.in_features >= width
        ]
        gains = [float(layer.weight.detach().std()) * layer.in_features**0.5 for layer in layers]
        assert min(gains) > 0.5, name
        assert all(layer.bias is None or not layer.bias.any() for layer in layers)
