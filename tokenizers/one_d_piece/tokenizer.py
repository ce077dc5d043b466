"""One-D-Piece: TiTok whose tokens are trained to matter in order, so any prefix decodes (arXiv
2501.10064).

Tail token drop: in training the decoder sees the first n tokens, n uniform over 1..N, one draw a
forward pass and process. Encoding is not causal: all N tokens are computed, then cut. Options of
NesTok, a descendant: the full sequence beside the prefix in every step, and features of a short
decode pulled to those of the full one (`TailDrop`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessellar.layers.tags import untag
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.layout import Layout, sequence_layout
from tessellar.protocol.tokenizer import Quantizer, TokenizerOutput
from tessellar.tokenizers.losses.alignment import cosine_distance
from tessellar.tokenizers.maskgit_vqgan import PixelDecoder, ProxyCodes
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok import TiTok, ViTSize
from tessellar.tokenizers.titok.tokenizer import SIZES, Decoded, Stage


@in_ranges
@dataclass(frozen=True)
class TailDrop:
    """How prefixes are trained.

    `cross_length`: each step decodes all tokens and one prefix, and adds their losses (NesTok),
    instead of the prefix alone. `alignment` weighs 1 - cosine of the prefix's features, in the
    decoder's first layer, with those of all tokens, held constant; it needs `cross_length`.
    `shortest` is the least number of tokens that is kept.
    """

    cross_length: bool = False
    alignment: float = 0.0
    shortest: int = 1


class OneDPiece(TiTok):
    """As TiTok, but decodes any prefix of its tokens from `drop.shortest` on; further arguments as
    TiTok's.

    Raises ValueError where the shortest prefix is not in [1, N], and for an alignment without
    cross-length training.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int = 256,
        patch_size: int = 16,
        num_tokens: int = 256,
        encoder_size: ViTSize = SIZES["base"],
        decoder_size: ViTSize = SIZES["base"],
        pixels: PixelDecoder | None = None,
        mixes: bool = False,
        stage: Stage = "all",
        target: ProxyCodes | None = None,
        attention: str = "auto",
        drop: TailDrop = TailDrop(),  # noqa: B008
        decoder_patch_size: int | None = None,
    ) -> None:
        if not 1 <= drop.shortest <= num_tokens:
            raise ValueError(
                f"the shortest prefix is {drop.shortest}; it must be in [1, {num_tokens}]"
            )
        if drop.alignment and not drop.cross_length:
            raise ValueError("alignment compares a prefix with all tokens: it needs cross_length")
        self.drop = drop
        super().__init__(
            quantizer,
            image_size,
            patch_size=patch_size,
            num_tokens=num_tokens,
            encoder_size=encoder_size,
            decoder_size=decoder_size,
            pixels=pixels,
            mixes=mixes,
            stage=stage,
            target=target,
            attention=attention,
            decoder_patch_size=decoder_patch_size,
        )
        # One-D-Piece's list of what is not decayed lacks "embed", by which TiTok leaves out these
        # two.
        untag(self.encoder.patch_in.weight, "no_decay")
        untag(self.decoder.from_code.weight, "no_decay")

    def make_layout(self, num_tokens: int, quantizer: Quantizer) -> Layout:
        return sequence_layout(num_tokens, quantizer.kind, min_prefix=self.drop.shortest)

    def draw_length(self) -> int:
        """How many tokens this pass keeps: drawn in training, all of them otherwise."""
        if not self.training:
            return self.num_tokens
        return int(torch.randint(self.drop.shortest, self.num_tokens + 1, (), device="cpu"))

    def _reconstruct(
        self, images: Tensor, vectors: Tensor, output: TokenizerOutput
    ) -> TokenizerOutput:
        prefix = vectors[:, : self.draw_length()]
        if not self.training or not self.drop.cross_length:
            return super()._reconstruct(images, prefix, output)
        full = self.decoder(vectors)
        short = self.decoder(prefix)
        losses = output.losses | self.decoder_losses(images, full)
        for name, value in self.decoder_losses(images, short).items():
            losses[f"shorter_{name}"] = value
        if self.drop.alignment:
            losses["alignment"] = self.drop.alignment * self.alignment(short, full)
        shorter = None if self.stage == "proxy" else self.draw_image(short)
        return output._replace(
            reconstruction=self.drawn(images, full), shorter=shorter, losses=losses
        )

    def alignment(self, short: Decoded, full: Decoded) -> Tensor:
        """Mean of 1 - cosine over the map's cells and the mean of the tokens; no gradient reaches
        `full`.
        """
        return cosine_distance(self._features(short), self._features(full).detach()).mean()

    def _features(self, decoded: Decoded) -> Tensor:
        """Cells of the map, then the mean of the tokens: [B, h * w + 1, D]."""
        cells = decoded.first_layer[:, 1 : 1 + self.side**2]
        return torch.cat(
            [cells, decoded.first_layer[:, 1 + self.side**2 :].mean(1, keepdim=True)], dim=1
        )


def _published(size: str, stage: Stage, target: ProxyCodes | None, drop: TailDrop) -> OneDPiece:
    quantizer = VectorQuantizer(4096, 12, unit_codes=False)
    width = SIZES[size]
    return OneDPiece(
        quantizer,
        256,
        patch_size=16,
        num_tokens=256,
        encoder_size=width,
        decoder_size=width,
        pixels=PixelDecoder(),
        mixes=True,
        stage=stage,
        target=target,
        drop=drop,
    )


def one_d_piece_s256(
    stage: Stage = "decoder",
    target: ProxyCodes | None = None,
    drop: TailDrop = TailDrop(),  # noqa: B008
) -> OneDPiece:
    """83,871,247 parameters, 53,130,764 without the pixel decoder; 1 to 256 tokens of 4,096 codes."""
    return _published("small", stage, target, drop)


def one_d_piece_b256(
    stage: Stage = "decoder",
    target: ProxyCodes | None = None,
    drop: TailDrop = TailDrop(),  # noqa: B008
) -> OneDPiece:
    """205,256,463 parameters, 174,515,980 without the pixel decoder; 1 to 256 tokens of 4,096
    codes.
    """
    return _published("base", stage, target, drop)


def one_d_piece_l256(
    stage: Stage = "decoder",
    target: ProxyCodes | None = None,
    drop: TailDrop = TailDrop(),  # noqa: B008
) -> OneDPiece:
    """641,742,863 parameters, 611,002,380 without the pixel decoder; 1 to 256 tokens of 4,096
    codes.
    """
    return _published("large", stage, target, drop)
