"""Which tokenizer goes with which generator: built from tiny models of every kind, so that it follows from layouts.

    python -m tests.tiny.pairs > docs/pairs.md

A pair is legal if the generator can be built for the tokenizer's layout (and bound to the tokenizer); otherwise the
one line that construction raises is the reason. tests/test_pairs.py asks all of them, and trains, samples and decodes
one pair of each kind.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tessellar.errors import UserError
from tessellar.models.alitok import AliTokAR
from tessellar.models.arpg import ARPG
from tessellar.models.bar import BAR
from tessellar.models.bitdance import BitDance
from tessellar.models.flextok import FlexAR
from tessellar.models.har import HAR
from tessellar.models.hita import HitaAR
from tessellar.models.ibq import IBQAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.lpd import LPD
from tessellar.models.mar import MAR
from tessellar.models.maskgit import MaskGIT
from tessellar.models.mingtok import MingTokAR
from tessellar.models.next_entity import NextEntity
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.models.randar import RandAR
from tessellar.models.rar import RAR
from tessellar.models.retok import ReToKGPT
from tessellar.models.semanticist import SemanticistAR
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.models.tokenbridge import TokenBridge
from tessellar.models.tokenflow import TokenFlowAR
from tessellar.models.var import VAR
from tessellar.models.xar import XAR
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tokenizers.alitok import AliTok
from tessellar.tokenizers.bar_fsq import BARFSQ
from tessellar.tokenizers.bitdance import BinaryAutoencoder
from tessellar.tokenizers.flextok import FlexTok, TransformerSize
from tessellar.tokenizers.hita import Hita
from tessellar.tokenizers.ibq import IBQVQGAN
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.llamagen import LlamaGenVQ
from tessellar.tokenizers.maskgit_vqgan import MaskGITVQGAN
from tessellar.tokenizers.mingtok import MingTok
from tessellar.tokenizers.one_d_piece import OneDPiece, TailDrop
from tessellar.tokenizers.open_magvit2 import OpenMAGVIT2
from tessellar.tokenizers.parts.regrouped_bits import RegroupedBits
from tessellar.tokenizers.quantizers.binary_fsq import BinaryFSQ
from tessellar.tokenizers.quantizers.fsq import FSQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck, GaussianSpace
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.latent_norm import LatentNorm
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.rectok import ChannelBottleneck, RecTok
from tessellar.tokenizers.restok import ResTok
from tessellar.tokenizers.scale_pyramid import ScalePyramid
from tessellar.tokenizers.seed import SEED, EvaVision, PixelDetokenizer
from tessellar.tokenizers.seed.tokenizer import BertSize
from tessellar.tokenizers.semanticist import Semanticist, SlotDecoding
from tessellar.tokenizers.titok import TiTok, ViTSize
from tessellar.tokenizers.tokenbridge import PostQuantized
from tessellar.tokenizers.tokenflow import (
    SemanticDecoderSize,
    SemanticVision,
    SharedQuantizer,
    TokenFlow,
)
from tessellar.tokenizers.tokenflow.tokenizer import AS_IS
from tessellar.tokenizers.uniwetok import UniWeTok
from tessellar.tokenizers.var import VARVQVAE, MultiScaleQuantizer
from tessellar.tokenizers.vat import VAT, SequenceScales
from tessellar.tokenizers.vit_vq import ViTVQ

CLASSES = 3
TINY = ViTSize(16, 1, 2)


def _vq(vocab: int = 16) -> VectorQuantizer:
    return VectorQuantizer(vocab, 4)


def _bits() -> LFQ:
    return LFQ(6, 3, form="bits")


def _bar_fsq() -> BARFSQ:
    return BARFSQ(BinaryFSQ(16), 16, 4, 16, 1, 2, 2.0, 16, 1, 2)


def _bitdance(layout: Layout, patch: int) -> BitDance:
    sizes: dict[str, Any] = {"head_width": 16, "head_depth": 1, "head_groups": 1, "head_dim": 8}
    return BitDance(layout, 16, 1, 2, patch=patch, num_classes=CLASSES, class_tokens=2, **sizes)


def _kl() -> KLVAE:
    return KLVAE(GaussianBottleneck(4), 16, 32, (1, 1, 1), 1)


def _restok() -> ResTok:
    encoder: dict[str, Any] = {
        "encoder_width": 16,
        "encoder_depth": 2,
        "encoder_heads": 2,
        "stages": 2,
    }
    decoder: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return ResTok(_vq(), 16, 16, 4, 32, (1, 1, 1), 1, 32, **encoder, **decoder)


def _tokenflow() -> TokenFlow:
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    semantic = SemanticVision("vit_base_patch16_clip_quickgelu_224", None, 16, sizes, AS_IS)
    quantizer = SharedQuantizer(16, 3, 2, sides=(1, 2, 4))
    options: dict[str, Any] = {
        "decoder_size": SemanticDecoderSize(16, 1, 2),
        "semantic_dim": 8,
    }
    return TokenFlow(quantizer, semantic, 16, 32, (1, 1, 1), 1, 8, **options)


def _semanticist() -> Semanticist:
    return Semanticist(16, 4, 8, 4, None, 4, TINY, TINY, decoding=SlotDecoding(2))


def _seed() -> SEED:
    vision = EvaVision(16, 8, width=16, depth=1, num_heads=2, hidden=16)
    size = BertSize(16, 1, 2, 16)
    decoder = PixelDetokenizer(8, 16, 8, 16, 1, 2)
    return SEED(vision, 16, 8, 16, 4, size, 1, 2, 8, detokenizer=decoder)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "LlamaGen VQ": lambda: LlamaGenVQ(_vq(), 16, 32, (1, 1, 1), 1, 32),
    "ViT-VQ": lambda: ViTVQ(_vq(), 16, 4, 16, 1, 1, 2),
    "ViT + FSQ": lambda: ViTVQ(FSQ((3, 3, 2)), 16, 4, 16, 1, 1, 2),
    "MaskGIT-VQGAN": lambda: MaskGITVQGAN(VectorQuantizer(16, 32), 16, 32, (1, 1, 1), 1),
    "IBQ": lambda: IBQVQGAN(IBQ(16, 4), 16, 32, (1, 1, 1), 1, 32),
    "Open-MAGVIT2": lambda: OpenMAGVIT2(LFQ(5, split=(2, 3)), 16, 32, (1, 1, 1), 1),
    "BitDance's autoencoder": lambda: BinaryAutoencoder(_bits(), 16, 32, (1, 1, 1), 1),
    "UniWeTok": lambda: UniWeTok(_bits(), 16, 32, (1, 1, 1), 1, 1, 2),
    "BAR-FSQ": _bar_fsq,
    "BAR-FSQ's bits as one id": lambda: RegroupedBits(_bar_fsq()),
    "BAR-FSQ's bits as sub-tokens": lambda: RegroupedBits(_bar_fsq(), split=(4, 6, 6)),
    "TiTok": lambda: TiTok(_vq(), 16, 4, 8, TINY, TINY),
    "AliTok": lambda: AliTok(_vq(), 16, 4, TINY, TINY),
    "One-D-Piece": lambda: OneDPiece(_vq(), 16, 4, 8, TINY, TINY, drop=TailDrop()),
    "FlexTok": lambda: FlexTok(
        FSQ((3, 3, 2)), 16, 8, None, 4, TransformerSize(64, 1), TransformerSize(64, 2)
    ),
    "ResTok": _restok,
    "Hita": lambda: Hita(_vq(), _vq(), None, 16, 32, (1, 1, 1), 1, 16, 1, 2, 24, 4, 1, 0.0, 16),
    "VAR's VQVAE": lambda: VARVQVAE(MultiScaleQuantizer(16, 4, (1, 2, 4)), 16, 32, (1, 1, 1), 1),
    "VAT": lambda: VAT(GaussianSpace(SequenceScales(16, 4, (1, 1, 2, 4))), 16, 4, TINY, TINY),
    "TokenFlow": _tokenflow,
    "RecTok": lambda: RecTok(ChannelBottleneck(4), 16, 4, TINY, TINY, TINY, 8),
    "MingTok": lambda: MingTok(LatentNorm(4), 16, 4, TINY, TINY, TINY),
    "SEED": _seed,
    "KL VAE": _kl,
    "TiTok KL": lambda: TiTok(GaussianBottleneck(4), 16, 4, 8, TINY, TINY),
    "Semanticist": _semanticist,
    "scale pyramid of a KL VAE": lambda: ScalePyramid(_kl(), (1, 2, 4)),
    "TokenBridge's of a KL VAE": lambda: PostQuantized(_kl(), 8),
}
GENERATORS: dict[str, Callable[[Layout], Generator]] = {
    "BitDance, 1x": lambda layout: _bitdance(layout, 1),
    "BitDance, 4x": lambda layout: _bitdance(layout, 2),
    "LlamaGen": lambda layout: LlamaGen(layout, 16, 1, 2, CLASSES, ffn_multiple_of=8),
    "IBQ's AR": lambda layout: IBQAR(layout, 16, 1, 2, CLASSES, ffn_multiple_of=8),
    "Open-MAGVIT2's AR": lambda layout: OpenMAGVIT2AR(
        layout, 16, 1, 2, 1, CLASSES, ffn_multiple_of=8
    ),
    "BAR": lambda layout: _bar(layout, 1),
    "BAR of patches": lambda layout: _bar(layout, 2),
    "ReToK's GPT": lambda layout: ReToKGPT(layout, 16, 1, 2, CLASSES, ffn_multiple_of=8),
    "AliTok's AR": lambda layout: AliTokAR(layout, 16, 1, 2, CLASSES, ffn_multiple_of=8),
    "FlexTok's AR": lambda layout: FlexAR(layout, 16, 1, 2, CLASSES),
    "Token-Shuffle": lambda layout: TokenShuffle(
        layout, 16, 1, 2, 2, num_classes=CLASSES, ffn_multiple_of=8
    ),
    "RAR": lambda layout: RAR(layout, 16, 1, 2, 24, CLASSES),
    "MaskGIT": lambda layout: MaskGIT(layout, "vit", 16, 1, 2, 24, CLASSES),
    "HAR": lambda layout: HAR(layout, 16, 1, 2, CLASSES, ffn_multiple_of=8),
    "Hita's AR": lambda layout: HitaAR(layout, 16, 1, 2, CLASSES, ffn_multiple_of=8),
    "Next entity, cell": lambda layout: NextEntity(
        layout, "cell:2", 16, 1, 2, CLASSES, ffn_multiple_of=8
    ),
    "Next entity, subsample": lambda layout: NextEntity(
        layout, "subsample:2", 16, 1, 2, CLASSES, ffn_multiple_of=8
    ),
    "Next entity, local": lambda layout: NextEntity(
        layout, "local:4", 16, 1, 2, CLASSES, ffn_multiple_of=8
    ),
    "Next entity, level": lambda layout: NextEntity(
        layout, "level", 16, 1, 2, CLASSES, ffn_multiple_of=8
    ),
    "RandAR": lambda layout: RandAR(layout, 16, 1, 2, CLASSES, 4, ffn_multiple_of=8),
    "ARPG": lambda layout: ARPG(layout, 16, 2, 2, CLASSES, 4, ffn_multiple_of=8),
    "LPD": lambda layout: LPD(layout, 16, 1, 2, CLASSES, 4),
    "VAR": lambda layout: VAR(layout, 16, 1, 2, CLASSES, 4),
    "TokenFlow's AR": lambda layout: TokenFlowAR(
        layout, 16, 1, 2, CLASSES, latent_dim=5, ffn_multiple_of=8
    ),
    "xAR, cell": lambda layout: _xar(layout, "cell:2"),
    "xAR, token": lambda layout: _xar(layout, "token"),
    "xAR, subsample": lambda layout: _xar(layout, "subsample:2"),
    "xAR, scale": lambda layout: _xar(layout, "scale"),
    "xAR, image": lambda layout: _xar(layout, "image"),
    "Semanticist's AR": lambda layout: SemanticistAR(
        layout, 16, 1, 2, CLASSES, None, 16, 1, ffn_multiple_of=8
    ),
    "MingTok's AR": lambda layout: MingTokAR(
        layout, 16, 1, 2, CLASSES, feature_dim=16, head_width=16, head_depth=1, ffn_multiple_of=8
    ),
    "MAR": lambda layout: MAR(layout, 16, 1, 2, None, 16, 1, CLASSES, buffer=2, repeats=1, steps=4),
    "TokenBridge": lambda layout: TokenBridge(
        layout,
        16,
        1,
        2,
        head_width=16,
        head_depth=1,
        head_heads=2,
        num_classes=CLASSES,
        buffer=2,
        steps=4,
    ),
}


def _bar(layout: Layout, patch: int) -> BAR:
    return BAR(layout, 16, 1, 2, patch, head_width=16, head_depth=1, num_classes=CLASSES)


def _xar(layout: Layout, entity: str) -> XAR:
    return XAR(layout, entity, 16, 1, 2, num_classes=CLASSES)


@cache
def _on_meta(name: str) -> Tokenizer:
    with torch.device("meta"):
        return TOKENIZERS[name]()


def reason_against(tokenizer: str, generator: str) -> str | None:
    """Why the pair does not go together, or None where it does."""
    made = _on_meta(tokenizer)
    try:
        with torch.device("meta"):
            GENERATORS[generator](made.layout).bind(made)
    except UserError as error:
        return str(error)
    return None


def page() -> str:
    """The page of all pairs, in markdown."""
    lines = [
        "# Which tokenizer with which generator",
        "",
        "Written by `python -m tests.tiny.pairs`; a test keeps it true. It follows from the layouts: a generator that",
        "cannot be built for a tokenizer's layout says why in one line.",
        "",
        "| tokenizer | layout (of a tiny one) | " + " | ".join(GENERATORS) + " |",
        "|---" * (len(GENERATORS) + 2) + "|",
    ]
    reasons: dict[str, dict[str, list[str]]] = {}
    for name in TOKENIZERS:
        cells = []
        for generator in GENERATORS:
            reason = reason_against(name, generator)
            cells.append("-" if reason else "yes")
            if reason:
                reasons.setdefault(generator, {}).setdefault(reason.partition("; ")[0], []).append(
                    name
                )
        lines.append(f"| {name} | {_on_meta(name).layout} | " + " | ".join(cells) + " |")
    lines += ["", "## Why not", ""]
    for generator, found in reasons.items():
        lines += [
            f"- **{generator}**",
            *(f"  - {why}: {', '.join(names)}" for why, names in found.items()),
        ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
