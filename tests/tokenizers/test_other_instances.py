"""Importers read sizes and options from weights: instances unlike the recorded ones go out and come back the same.

Each case makes a tokenizer of other widths, depths, patch sizes, image sizes and options than its recording, shaken so
that no two tensors are alike, and what its importer makes of it under official keys.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tokenizers.alitok import AliTok
from tessellar.tokenizers.alitok import official as alitok
from tessellar.tokenizers.bar_fsq import BARFSQ
from tessellar.tokenizers.bar_fsq import official as bar_fsq
from tessellar.tokenizers.bitdance import BinaryAutoencoder
from tessellar.tokenizers.bitdance import official as bitdance
from tessellar.tokenizers.flextok import FlexTok, TransformerSize, official_vae
from tessellar.tokenizers.flextok import official as flextok
from tessellar.tokenizers.flextok.vae import flextok_vae
from tessellar.tokenizers.hita import Hita
from tessellar.tokenizers.hita import official as hita
from tessellar.tokenizers.ibq import IBQVQGAN
from tessellar.tokenizers.ibq import official as ibq
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.kl_vae import official as kl_vae
from tessellar.tokenizers.kl_vae.tokenizer import KL16_SCALE
from tessellar.tokenizers.llamagen import LlamaGenVQ
from tessellar.tokenizers.llamagen import official as llamagen
from tessellar.tokenizers.maskgit_vqgan import MaskGITVQGAN, PixelDecoder
from tessellar.tokenizers.maskgit_vqgan import official as maskgit_vqgan
from tessellar.tokenizers.mingtok import MingTok
from tessellar.tokenizers.mingtok import official as mingtok
from tessellar.tokenizers.one_d_piece import OneDPiece
from tessellar.tokenizers.open_magvit2 import OpenMAGVIT2
from tessellar.tokenizers.open_magvit2 import official as open_magvit2
from tessellar.tokenizers.quantizers.binary_fsq import BinaryFSQ
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.fsq import FSQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.latent_norm import LatentNorm
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.rectok import ChannelBottleneck, RecTok
from tessellar.tokenizers.rectok import official as rectok
from tessellar.tokenizers.restok import ResTok
from tessellar.tokenizers.restok import official as restok
from tessellar.tokenizers.retok import QFormerSize, ReToK
from tessellar.tokenizers.retok import official as retok
from tessellar.tokenizers.seed import SEED, EvaVision, PixelDetokenizer
from tessellar.tokenizers.seed import official as seed
from tessellar.tokenizers.seed.tokenizer import BertSize
from tessellar.tokenizers.semanticist import Semanticist, SlotDecoding
from tessellar.tokenizers.semanticist import official as semanticist
from tessellar.tokenizers.titok import TiTok, ViTSize
from tessellar.tokenizers.titok import official as titok
from tessellar.tokenizers.tokenbridge import PostQuantized
from tessellar.tokenizers.tokenbridge import official as tokenbridge
from tessellar.tokenizers.tokenflow import (
    SemanticDecoderSize,
    SemanticVision,
    SharedQuantizer,
    TokenFlow,
)
from tessellar.tokenizers.tokenflow import official as tokenflow
from tessellar.tokenizers.tokenflow.tokenizer import AS_IS, CLIP_B, SIGLIP_SO400M
from tessellar.tokenizers.uniwetok import UniWeTok
from tessellar.tokenizers.uniwetok import official as uniwetok
from tessellar.tokenizers.var import VARVQVAE, MultiScaleQuantizer
from tessellar.tokenizers.var import official as var

M = TypeVar("M", bound=nn.Module)
Pair = tuple[Tokenizer, Tokenizer]
ENCODER, DECODER = ViTSize(48, 3, 6), ViTSize(32, 1, 2)


def shaken(module: M) -> M:
    """Weights that are all different, and large enough that mistakes show."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return module.eval()


def pixel_decoder() -> PixelDecoder:
    return PixelDecoder(20, 8, 32, (1, 2, 1, 1), 2)


def titok_pixels() -> Pair:
    made = shaken(TiTok(VectorQuantizer(24, 5), 24, 4, 7, ENCODER, DECODER, decoder_patch_size=8))
    quantizer = VectorQuantizer(24, 5)
    return made, titok.tokenizer_from_official(titok.to_official(made), (6, 2), quantizer)


def titok_latents() -> Pair:
    made = shaken(
        TiTok(GaussianBottleneck(3, scale=1.0), 32, 16, 5, DECODER, ENCODER, decoder_patch_size=4)
    )
    return made, titok.tokenizer_from_official(titok.to_official(made), (2, 6))


def titok_two_stages() -> Pair:
    sizes: dict[str, Any] = {"mixes": True, "stage": "decoder", "decoder_patch_size": 8}
    made = shaken(
        TiTok(VectorQuantizer(24, 5), 32, 4, 9, ENCODER, DECODER, pixel_decoder(), **sizes)
    )
    return made, titok.tokenizer_from_official(titok.to_official(made), (6, 2))


def one_d_piece() -> Pair:
    sizes: dict[str, Any] = {"mixes": True, "stage": "decoder", "decoder_patch_size": 8}
    made = shaken(
        OneDPiece(VectorQuantizer(24, 5), 32, 16, 12, DECODER, ENCODER, pixel_decoder(), **sizes)
    )
    return made, titok.tokenizer_from_official(titok.to_official(made), (2, 6), kind=OneDPiece)


def maskgit() -> Pair:
    made = shaken(
        MaskGITVQGAN(VectorQuantizer(20, 12, l2_normalize=False), 24, 32, (1, 3, 2, 1), 2)
    )
    return made, maskgit_vqgan.vqgan_from_official(maskgit_vqgan.vqgan_to_official(made), 24)


def llamagen_vq() -> Pair:
    sizes: dict[str, Any] = {
        "num_res_blocks": 3,
        "z_channels": 24,
        "decoder_multipliers": (2, 1, 1),
    }
    made = shaken(LlamaGenVQ(VectorQuantizer(30, 6), 24, 32, (1, 1, 3), **sizes))
    return made, llamagen.tokenizer_from_official(llamagen.to_official(made), 24)


def kl() -> Pair:
    sizes: dict[str, Any] = {"encoder_attention": (0, 2), "decoder_attention": (1,)}
    made = shaken(KLVAE(GaussianBottleneck(6, scale=0.7), (16, 24), 32, (1, 3, 2), 2, **sizes))
    return made, kl_vae.from_official(kl_vae.to_official(made), (16, 24), 0.7)


def var_vqvae(phis: int, ratio: float, **options: Any) -> Pair:
    sides = (1, 2, 4, 6)
    quantizer = MultiScaleQuantizer(40, 8, sides, phis, ratio, **options)
    made = shaken(VARVQVAE(quantizer, 24, 32, (1, 2, 1), 2, kernel=1 if phis else 5))
    state = var.vqvae_to_official(made)
    return made, var.vqvae_from_official(state, sides, phi_ratio=ratio or 0.5, **options)


def hita_tokenizer() -> Pair:
    quantizers = VectorQuantizer(24, 4), VectorQuantizer(20, 6)
    sizes: dict[str, Any] = {
        "multipliers": (1, 2, 1),
        "num_res_blocks": 2,
        "decoder_multipliers": (2, 1, 1),
    }
    sizes |= {
        "width": 48,
        "depth": 3,
        "num_heads": 6,
        "mlp_dim": 100,
        "holistic": 10,
        "shift": 5,
        "vision_dim": 20,
    }
    made = shaken(Hita(*quantizers, None, 24, 32, **sizes))
    return made, hita.from_official(hita.to_official(made), 24, 6, 5)


def restok_tokenizer() -> Pair:
    sizes: dict[str, Any] = {
        "multipliers": (1, 2),
        "num_res_blocks": 2,
        "z_channels": 24,
        "stages": 3,
        "legacy": True,
    }
    sizes |= {"encoder_width": 32, "encoder_depth": 6, "encoder_heads": 4}
    sizes |= {"decoder_width": 48, "decoder_depth": 1, "decoder_heads": 2, "vision_dim": 10}
    made = shaken(ResTok(VectorQuantizer(24, 4), 16, 32, 8, 32, **sizes))
    return made, restok.from_official(restok.to_official(made), 16, (4, 2), min_tokens=8)


def retok_tokenizer() -> Pair:
    sizes: dict[str, Any] = {
        "multipliers": (1, 2, 1),
        "num_res_blocks": 2,
        "z_channels": 24,
        "semantic_dim": 9,
    }
    sizes |= {
        "encoder_size": QFormerSize(40, 3, 5),
        "decoder_size": QFormerSize(32, 1, 2),
        "semantic_layer": 1,
    }
    sizes["decoder_multipliers"] = (2, 1, 1)
    made = shaken(ReToK(VectorQuantizer(24, 4, rotation=True), 32, 16, 4, 32, **sizes))
    return made, retok.tokenizer_from_official(retok.to_official(made), 5, 2)


FLEXTOK_SIZES = (TransformerSize(48, 2, 24), TransformerSize(32, 3, 8))


def flextok_config(**trunk: Any) -> dict[str, Any]:
    """The official config of the tokenizer that `flextok_tokenizer` makes; `trunk`: more of its decoder's options."""
    encoder = {
        "patches": {"_target_": "x.PatchEmbedder", "patch_sizes": [3, 3]},
        "table": {"_target_": "x.PositionalEmbeddingAdder", "posemb_type": "sincos"},
        "registers": {"_target_": "x.Registers1D"},
        "packer": {"_target_": "x.BlockWiseSequencePacker", "mask_mode": "causal_last"},
        "trunk": {"_target_": "x.FlexTransformer", "head_dim": 24},
        "head": {"_target_": "x.LinearHead"},
    }
    decoder = {
        "linear": {"_target_": "x.LinearLayer"},
        "learned": {"_target_": "x.PositionalEmbeddingAdder", "posemb_type": "learnable_sum"},
        "dropout": {"_target_": "x.MaskedNestedDropout", "size_sampling_mode": "uniform"},
        "null": {"_target_": "x.LearnedNullCond"},
        "patches": {"_target_": "x.PatchEmbedder", "patch_sizes": [3, 3]},
        "table": {"_target_": "x.PositionalEmbeddingAdder", "posemb_type": "sincos"},
        "packer": {"_target_": "x.BlockWiseSequencePacker", "mask_mode": "full"},
        "time": {"_target_": "x.TimestepEmbedder", "max_timestep": 10.0},
        "trunk": {"_target_": "x.FlexTransformer", "head_dim": 8, "adaLN_expansion": 2, **trunk},
        "out": {"_target_": "x.ToPatchesLinearHead"},
    }
    return {
        "vae": {"scaling_factor": 0.3},
        "encoder": {"module_dict": encoder},
        "decoder": {"module_dict": decoder},
        "regularizer": {"levels": [4, 3, 5]},
        "vae_base_config_override": {"norm_num_groups": 2},
    }


def flextok_tokenizer() -> Pair:
    vae = flextok_vae(5, 48, 0.3, widths=(8, 16, 8), num_res_blocks=2, groups=2)
    sizes: dict[str, Any] = {"patch_size": 3, "max_timestep": 10.0, "table": 5}
    sizes |= {"encoder_size": FLEXTOK_SIZES[0], "decoder_size": FLEXTOK_SIZES[1]}
    made = shaken(FlexTok(FSQ((4, 3, 5)), 48, 6, vae, **sizes))
    config = flextok_config()
    return made, flextok.from_official(flextok.to_official(made, config), config, 48)


def flextok_autoencoder() -> Pair:
    made = shaken(flextok_vae(3, 32, 0.9, widths=(12, 24, 12), num_res_blocks=1, groups=3))
    return made, official_vae.vae_from_official(official_vae.to_official(made), 32, 0.9, groups=3)


def alitok_causal() -> Pair:
    made = shaken(AliTok(ClusteringVQ(24, 5), 24, 8, encoder_size=ENCODER, decoder_size=DECODER))
    made.quantizer.shares.fill_(0.25)  # type: ignore[union-attr]
    return made, alitok.from_official(alitok.to_official(made), (6, 2))


def alitok_bidirectional() -> Pair:
    sizes: dict[str, Any] = {"encoder_size": DECODER, "decoder_size": ENCODER, "buffer": 5}
    quantizer = VectorQuantizer(24, 5, l2_normalize=False)
    made = shaken(AliTok(quantizer, 32, 4, stage="bidirectional", **sizes))
    return made, alitok.from_official(alitok.to_official(made), (2, 6))


def bar_fsq_of_other_patches() -> Pair:
    """Codes of 70 bits, heads of other widths on both sides."""
    quantizer = BinaryFSQ(70, centred=False)
    sizes: dict[str, Any] = {"width": 36, "depth": 3, "num_heads": 6, "mlp_ratio": 2.5}
    decoder: dict[str, Any] = {"decoder_width": 24, "decoder_depth": 2, "decoder_heads": 4}
    made = BARFSQ(quantizer, 24, 8, **sizes, **decoder, norm_in=True, decoder_eps=1e-5)
    # Away from the threshold, which lies far from the middle.
    made.to_code.bias.data.fill_(-3.8)
    return made, bar_fsq.from_official(bar_fsq.to_official(shaken(made)), (6, 4))


def ibq_of_three_levels() -> Pair:
    """Attention at two levels."""
    sizes: dict[str, Any] = {"num_res_blocks": 2, "z_channels": 24, "attention": (0, 2)}
    made = shaken(IBQVQGAN(IBQ(30, 6), (16, 24), 32, (1, 3, 2), **sizes))
    return made, ibq.from_official(ibq.to_official(made), (16, 24))


def open_magvit2_of_three_levels() -> Pair:
    """Three sub-tokens, of more levels and other widths."""
    made = shaken(OpenMAGVIT2(LFQ(9, split=(2, 4, 3)), (16, 24), 32, (1, 3, 2), 2))
    state = open_magvit2.to_official(made)
    return made, open_magvit2.from_official(state, (16, 24), (2, 4, 3))


def tokenflow_of(semantic: SemanticVision, image_size: int, **options: Any) -> TokenFlow:
    """Scales up to the patches of the images; a decoder wider and deeper than the encoder."""
    side = semantic.side_at(image_size)
    quantizer = SharedQuantizer(24, 5, 3, sides=(1, *range(2, side + 1, 2)), init_step=None)
    return TokenFlow(
        quantizer,
        semantic,
        image_size,
        channels=32,
        num_res_blocks=1,
        z_channels=12,
        decoder_size=SemanticDecoderSize(24, 2, 3),
        semantic_dim=7,
        **options,
    )


def tokenflow_clip() -> Pair:
    """Images larger than the table of positions, and an enhanced decoder."""
    sizes = {"patch_size": 4, "embed_dim": 40, "depth": 3, "num_heads": 5}
    semantic = SemanticVision(CLIP_B["name"], None, 16, sizes, AS_IS)  # type: ignore[arg-type]
    options = {"multipliers": (1, 2, 1), "decoder_channels": 64, "decoder_blocks": 2}
    made = shaken(tokenflow_of(semantic, 24, **options))
    state = tokenflow.to_official(made)
    return made, tokenflow.from_official(state, 24, made.quantizer.sides, (5, 3))


def tokenflow_siglip() -> Pair:
    """Images that their patches do not fill, and a decoder of other multipliers."""
    sizes = {"patch_size": 7, "embed_dim": 36, "depth": 3, "num_heads": 4, "mlp_ratio": 2.3}
    options = {**SIGLIP_SO400M["options"], **sizes}
    semantic = SemanticVision(**{**SIGLIP_SO400M, "image_size": 30, "options": options})
    made = shaken(tokenflow_of(semantic, 30, multipliers=(1, 2), decoder_multipliers=(2, 1)))
    state = tokenflow.to_official(made)
    return made, tokenflow.from_official(state, 30, made.quantizer.sides, (4, 3))


def tokenflow_vitamin() -> Pair:
    options = {"fc_norm": False, "final_norm": False, "depth": 1}
    semantic = [SemanticVision("vitamin_small_224", None, 32, options) for _ in range(2)]
    made = shaken(tokenflow_of(semantic[0], 32, multipliers=(1, 1, 1)))
    sizes: dict[str, Any] = {"heads": (6, 3), "semantic": semantic[1]}
    return made, tokenflow.from_official(
        tokenflow.to_official(made), 32, made.quantizer.sides, **sizes
    )


def bitdance_with_noise() -> Pair:
    quantizer = LFQ(12, 3, form="bits")
    made = BinaryAutoencoder(quantizer, (16, 24), 32, (2, 1, 3), 2, noisy=True)
    return made, bitdance.from_official(bitdance.to_official(shaken(made)), (16, 24), groups=3)


def bitdance_of_one_level() -> Pair:
    made = BinaryAutoencoder(LFQ(70, 10, form="bits"), 8, 64, (1,), 1)
    return made, bitdance.from_official(bitdance.to_official(shaken(made)), 8, groups=10)


def uniwetok_of_other_heads() -> Pair:
    quantizer = LFQ(66, 11, form="bits", commitment_weight=0.0)
    made = UniWeTok(quantizer, (8, 20), 32, (1, 2, 3), 2, attention_depth=2, num_heads=6)
    state = uniwetok.to_official(shaken(made))
    return made, uniwetok.from_official(state, (8, 20), 6, groups=11)


def mingtok_of_three_sizes() -> Pair:
    """Heads of other widths on both sides, positions of another image size, other statistics."""
    made = shaken(
        MingTok(
            LatentNorm(8, -0.4, 2.5),
            36,
            12,
            encoder_size=ENCODER,
            semantic_size=ViTSize(32, 3, 2),
            pixel_size=ViTSize(24, 1, 2),
            trained_size=24,
        )
    )
    return made, mingtok.from_official(mingtok.to_official(made), 36, (-0.4, 2.5), (6, 2))


def seed_tokenizer(reverse: bool) -> Pair:
    """Other widths, depths and heads; both get one detokenizer, which no official file holds."""
    vision = EvaVision(24, 8, width=30, depth=3, num_heads=5, hidden=44)
    size = BertSize(48, 3, 6, 52)
    sizes: dict[str, Any] = {"num_tokens": 7, "vocab_size": 19, "code_dim": 6, "decoder_depth": 1}
    made = SEED(
        vision, 24, qformer_size=size, decoder_heads=3, embedding_dim=9, reverse=reverse, **sizes
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    again = seed.from_official(seed.to_official(made.eval()), (5, 6), 3)
    made.detokenizer = again.detokenizer = shaken(PixelDetokenizer(9, 24, 8, 16, 1, 2))
    return made, again


def rectok_of_two_depths() -> Pair:
    """Normed queries and keys, and statistics that no official file holds."""
    sizes: dict[str, Any] = {"encoder_size": ENCODER, "decoder_size": ViTSize(32, 1, 2)}
    made = shaken(
        RecTok(
            ChannelBottleneck(7),
            24,
            8,
            semantic_size=DECODER,
            semantic_dim=9,
            qk_norm=True,
            **sizes,
        )
    )
    return made, rectok.from_official(rectok.to_official(made), (6, 2), 2)


def rectok_without_a_teacher() -> Pair:
    made = shaken(
        RecTok(
            ChannelBottleneck(4),
            32,
            8,
            encoder_size=DECODER,
            decoder_size=ENCODER,
            semantic_dim=None,
        )
    )
    return made, rectok.from_official(rectok.to_official(made), (2, 6))


def semanticist_tokenizer() -> Pair:
    """Of pixels in patches of 8, with a projection, and more heads than the widths say."""
    sizes: dict[str, Any] = {"encoder_size": DECODER, "decoder_size": ENCODER, "repa_dim": 7}
    decoding = SlotDecoding(2)
    made = shaken(Semanticist(24, 4, 9, 5, None, 8, decoding=decoding, tap=3, **sizes))
    again = semanticist.from_official(semanticist.to_official(made), None, (2, 6))
    again.decoding = decoding
    return made, again


def tokenbridge_of_few_levels() -> Pair:
    """Over a rectangular VAE of other widths; a file does not tell the levels."""
    vae = KLVAE(GaussianBottleneck(6, scale=KL16_SCALE), (16, 24), 32, (1, 3, 2), 2)
    made = shaken(PostQuantized(vae, 6))
    return made, tokenbridge.from_official(tokenbridge.to_official(made), (16, 24), levels=6)


# By the folder of the tokenizer; behind a comma what is other about it.
CASES: dict[str, Callable[[], Pair]] = {
    "bar_fsq": bar_fsq_of_other_patches,
    "bitdance, fed with noise": bitdance_with_noise,
    "bitdance, of one level": bitdance_of_one_level,
    "uniwetok, of other heads": uniwetok_of_other_heads,
    "mingtok": mingtok_of_three_sizes,
    "rectok": rectok_of_two_depths,
    "rectok, without a semantic decoder": rectok_without_a_teacher,
    "ibq": ibq_of_three_levels,
    "open_magvit2": open_magvit2_of_three_levels,
    "tokenflow, of CLIP": tokenflow_clip,
    "tokenflow, of SigLIP": tokenflow_siglip,
    "tokenflow, of ViTamin": tokenflow_vitamin,
    "alitok, causal": alitok_causal,
    "alitok, bidirectional": alitok_bidirectional,
    "titok, of pixels": titok_pixels,
    "titok, of latents": titok_latents,
    "titok, of two stages": titok_two_stages,
    "one_d_piece": one_d_piece,
    "maskgit_vqgan": maskgit,
    "llamagen": llamagen_vq,
    "kl_vae": kl,
    "var, one phi": lambda: var_vqvae(1, 0.3),
    "var, a phi a scale, cosine": lambda: var_vqvae(0, 0.5, cosine=True),
    "var, two phis": lambda: var_vqvae(2, 0.8),
    "var, no phi": lambda: var_vqvae(3, 0.0),
    "hita": hita_tokenizer,
    "restok": restok_tokenizer,
    "retok": retok_tokenizer,
    "seed": lambda: seed_tokenizer(reverse=False),
    "seed, a reverse Q-Former": lambda: seed_tokenizer(reverse=True),
    "semanticist": semanticist_tokenizer,
    "tokenbridge": tokenbridge_of_few_levels,
    "flextok": flextok_tokenizer,
    "kl_vae, of FlexTok": flextok_autoencoder,
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_another_instance_comes_back_the_same(name: str) -> None:
    torch.manual_seed(0)
    made, again = CASES[name]()
    assert type(made).__module__.split(".")[2] == name.partition(",")[0]
    assert again.image_size == made.image_size and again.layout == made.layout
    images = torch.rand(2, 3, *made.image_size) * 2 - 1
    tokens = _tokens(made, images)
    assert torch.equal(_tokens(again, images), tokens)
    assert len(tokens.unique()) > 1, "the tokens would not show a difference"
    assert torch.equal(again.decode(tokens), made.decode(tokens))
    assert torch.equal(again.last_layer, made.last_layer)
    if isinstance(made, TokenFlow) and isinstance(again, TokenFlow):
        assert torch.equal(again.semantics(tokens), made.semantics(tokens))


def test_every_importer_of_a_tokenizer_has_another_instance() -> None:
    importers = set()
    for path in Path(alitok.__file__).parents[1].glob("*/official.py"):
        if "\nOFFICIAL" in path.read_text(encoding="utf-8"):  # that of quantizers reads no file
            importers.add(path.parent.name)
    assert importers == {name.partition(",")[0] for name in CASES}


def _tokens(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Its tokens of the images; Hita's checkpoints lack the vision model, so that its features are made up."""
    if not isinstance(tokenizer, Hita):
        return tokenizer.encode(images)
    vision = torch.randn(2, 9, 20, generator=torch.Generator().manual_seed(1))
    return tokenizer.forward_with(images, vision).tokens


def test_a_decoder_of_other_patches_draws_its_own_grid() -> None:
    made = TiTok(VectorQuantizer(24, 5), 32, 4, 7, ENCODER, DECODER, decoder_patch_size=16)
    assert made.side == 2 and made.decode(torch.zeros(1, 7, dtype=torch.int64)).shape == (
        1,
        3,
        32,
        32,
    )
    with pytest.raises(ValueError, match="decoder_patch_size 5 does not divide image_size 32"):
        TiTok(VectorQuantizer(24, 5), 32, 4, 7, ENCODER, DECODER, decoder_patch_size=5)


def test_a_decoder_of_another_depth_of_levels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder_multipliers \(1, 2\) must be 3 levels"):
        LlamaGenVQ(VectorQuantizer(30, 6), 16, 32, (1, 1, 2), decoder_multipliers=(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_type": "batch"}, "norm_type is 'batch'; only 'group' is supported"),
        ({"mystery": 1}, "the official option 'mystery' is not known here"),
    ],
)
def test_llamagen_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    config = {
        "ch_mult": [1, 1],
        "z_channels": 8,
        "codebook_size": 16,
        "codebook_embed_dim": 4,
        **options,
    }
    with pytest.raises(UserError, match=message):
        llamagen.tokenizer_from_config(config, 16)


def test_flextok_options_are_refused_by_name() -> None:
    made, _ = flextok_tokenizer()
    assert isinstance(made, FlexTok)
    state = flextok.to_official(made, flextok_config())
    for options, message in (
        ({"qk_norm": False}, "trunk: qk_norm is False"),
        ({"adaLN_expansion": 1}, "expansion is 1"),
    ):
        with pytest.raises(UserError, match=message):
            flextok.from_official(state, flextok_config(**options), 48)
    other = flextok_config()
    other["encoder"]["module_dict"]["packer"]["mask_mode"] = "full"
    with pytest.raises(
        UserError, match="packer: mask_mode is 'full'; only 'causal_last' is supported"
    ):
        flextok.from_official(state, other, 48)


def test_an_autoencoder_without_a_posterior_is_refused() -> None:
    made, _ = kl()
    assert isinstance(made, KLVAE)
    state = kl_vae.to_official(made)
    state |= {
        "quant_conv.weight": state["quant_conv.weight"][:6],
        "quant_conv.bias": state["quant_conv.bias"][:6],
    }
    with pytest.raises(UserError, match="use_variational=False"):
        kl_vae.from_official(state, (16, 24))


def test_var_weights_of_a_size_without_published_scales_are_refused() -> None:
    made, _ = var_vqvae(1, 0.3)
    assert isinstance(made, VARVQVAE)
    with pytest.raises(UserError, match="published for 256, 512, 1024 pixels, not 384"):
        var.OFFICIAL.build(var.vqvae_to_official(made), ImportOptions(image_size=384))
