"""TiTok: an image as a short sequence of latent tokens (arXiv 2406.07550; single stage: arXiv
2501.07730).

A transformer reads patches and N learned tokens and keeps the tokens; another draws the image from
them and mask tokens. Two-stage models first learn to predict the codes of a frozen MaskGIT-VQGAN
(`stage` "proxy"), whose decoder then draws the expected code and is trained with TiTok's own
(`stage` "decoder"); single-stage models give pixels. Works on images in [0, 1] inside. Different
from the official code: models below the published widths start otherwise.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32
from tessellar.layers.starts import start_layers
from tessellar.layers.tags import tag
from tessellar.layers.vit import ViTBlock
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.layout import Layout, sequence_layout
from tessellar.protocol.tokenizer import QuantizedTokenizer, Quantizer, TokenizerOutput
from tessellar.tokenizers.maskgit_vqgan import PixelDecoder, ProxyCodes
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.vq import VectorQuantizer

Stage = Literal["all", "proxy", "decoder"]


@in_ranges
@dataclass(frozen=True)
class ViTSize:
    """Width, number of layers and heads of a transformer."""

    width: int
    depth: int
    num_heads: int


SIZES = {"small": ViTSize(512, 8, 8), "base": ViTSize(768, 12, 12), "large": ViTSize(1024, 24, 16)}


def learned(*shape: int) -> nn.Parameter:
    """Normal with standard deviation width^-0.5, not decayed."""
    return tag(nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5), "no_decay")


class Stack(nn.Module):
    """A class token, position tables of the map and of the tokens, norm, blocks, and the norm of
    what is kept.
    """

    def __init__(self, cells: int, num_tokens: int, size: ViTSize, attention: str) -> None:
        super().__init__()
        self.class_token = learned(1, size.width)
        self.positions = learned(cells + 1, size.width)
        self.token_positions = learned(num_tokens, size.width)
        self.norm_in = nn.LayerNorm(size.width)
        self.norm_out = nn.LayerNorm(size.width)
        self.blocks = nn.ModuleList(
            ViTBlock(size.width, size.num_heads, attention=attention, gelu="none")
            for _ in range(size.depth)
        )

    def place(self, cells: Tensor, tokens: Tensor) -> Tensor:
        """[class, cells [B, h * w, D], tokens [B, n, D]] with their positions, normed."""
        #   place   0        1 .. h w     1 + h w ..
        #   reads   class    the map      the tokens, all or the first of them
        first = repeat(self.class_token, "one d -> b one d", b=len(cells))
        grid = torch.cat([first.to(cells.dtype), cells], dim=1) + self.positions
        return self.norm_in(
            torch.cat([grid, tokens + self.token_positions[: tokens.shape[1]]], dim=1)
        )


class TokenEncoder(Stack):
    """Images [B, 3, H, W] in [0, 1] to latents [B, N, C].

    `mixes`: the tokens' memory [B, N, D] is read again as [B, D, N], so that each latent mixes many
    tokens: a slip of the two-stage models that their weights need.
    """

    def __init__(
        self,
        side: int,
        patch_size: int,
        num_tokens: int,
        size: ViTSize,
        out_dim: int,
        mixes: bool,
        attention: str,
    ) -> None:
        super().__init__(side**2, num_tokens, size, attention)
        self.patch_size = patch_size
        self.mixes = mixes
        self.patch_in = nn.Linear(3 * patch_size**2, size.width)
        self.tokens = learned(num_tokens, size.width)
        self.to_code = nn.Linear(size.width, out_dim)
        tag(self.patch_in.weight, "no_decay")

    def hidden(self, images: Tensor) -> Tensor:
        """Token states [B, N, D]."""
        p = self.patch_size
        cells = self.patch_in(rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        x = self.place(cells, repeat(self.tokens, "n d -> b n d", b=len(images)))
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x[:, -len(self.tokens) :])

    def project(self, hidden: Tensor) -> Tensor:
        """Latents [B, N, C] of token states."""
        if self.mixes:
            # A reshape where a transpose was meant: (n, d) is read from element d N + n.
            memory = rearrange(hidden, "b n d -> b (n d)")
            hidden = rearrange(memory, "b (d n) -> b n d", d=hidden.shape[-1])
        return self.to_code(hidden)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.hidden(images))


class Decoded(NamedTuple):
    """What the decoder says of each cell [B, h * w, ...], and its first layer: [B, 1 + h * w + n,
    D].
    """

    cells: Tensor
    first_layer: Tensor


class TokenDecoder(Stack):
    """Code vectors [B, n <= N, C] to the map: scores of `proxies` codes, or with 0 the pixels of
    each patch.
    """

    def __init__(
        self,
        side: int,
        patch_size: int,
        num_tokens: int,
        size: ViTSize,
        dim: int,
        proxies: int,
        attention: str,
    ) -> None:
        super().__init__(side**2, num_tokens, size, attention)
        width = size.width
        self.num_cells = side**2
        self.from_code = nn.Linear(dim, width)
        self.mask_token = learned(1, 1, width)
        tag(self.from_code.weight, "no_decay")
        if proxies:
            self.head = nn.Sequential(
                nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, proxies)
            )
        else:
            self.head = nn.Sequential(nn.Linear(width, 3 * patch_size**2))

    def forward(self, vectors: Tensor) -> Decoded:
        tokens = self.from_code(vectors.to(self.from_code.weight.dtype))
        # One token for every cell: what differs between cells are the positions alone.
        cells = self.mask_token.to(tokens.dtype).expand(len(tokens), self.num_cells, -1)
        x = first = self.place(cells, tokens)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0:
                first = x
        return Decoded(self.head(self.norm_out(x[:, 1 : 1 + self.num_cells])), first)


class TiTok(QuantizedTokenizer):
    """Square images of `image_size` as `num_tokens` tokens.

    With `pixels` a two-stage model, whose decoder scores that network's codes; `target` is the
    VQGAN that `stage` "proxy" learns from (its decoder is copied into `pixels`). `stage` "decoder"
    trains the decoders alone. `mixes` as TokenEncoder says. `decoder_patch_size` None: that of the
    encoder. Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int = 256,
        patch_size: int = 16,
        num_tokens: int = 32,
        encoder_size: ViTSize = SIZES["base"],
        decoder_size: ViTSize = SIZES["base"],
        pixels: PixelDecoder | None = None,
        mixes: bool = False,
        stage: Stage = "all",
        target: ProxyCodes | None = None,
        attention: str = "auto",
        decoder_patch_size: int | None = None,
    ) -> None:
        super().__init__()
        drawn = patch_size if decoder_patch_size is None else decoder_patch_size
        _check_sizes(image_size, patch_size, drawn, num_tokens, pixels, stage)
        self.image_size = (image_size, image_size)
        self.patch_size = patch_size
        self.decoder_patch_size = drawn
        self.side = image_size // drawn  # of the map that the decoder draws
        self.num_tokens = num_tokens
        self.stage = stage
        self.target = target
        self.layout = self.make_layout(num_tokens, quantizer)
        read = image_size // patch_size
        self.encoder = TokenEncoder(
            read,
            patch_size,
            num_tokens=num_tokens,
            size=encoder_size,
            out_dim=quantizer.in_dim,
            mixes=mixes,
            attention=attention,
        )
        proxies = pixels.vocab_size if pixels else 0
        self.decoder = TokenDecoder(
            self.side,
            drawn,
            num_tokens=num_tokens,
            size=decoder_size,
            dim=quantizer.dim,
            proxies=proxies,
            attention=attention,
        )
        self.smooth = None if pixels else nn.Conv2d(3, 3, 3, padding=1)
        init_weights(self, small=min(encoder_size.width, decoder_size.width) < SIZES["small"].width)
        self.quantizer = quantizer
        self.pixels = pixels
        if pixels is not None and target is not None:
            pixels.copy_from(target.model)
        if stage == "decoder":
            self.encoder.requires_grad_(False)
            self.quantizer.requires_grad_(False)
        elif stage == "proxy" and pixels is not None:
            pixels.requires_grad_(False)

    def make_layout(self, num_tokens: int, quantizer: Quantizer) -> Layout:
        """One sequence, decodable as a whole."""
        return sequence_layout(num_tokens, quantizer.kind)

    def train(self, mode: bool = True) -> Self:
        """With stage "decoder" the encoder and the quantizer stay in eval mode."""
        super().train(mode)
        if self.stage == "decoder":
            self.encoder.eval()
            self.quantizer.eval()
        return self

    @property
    def last_layer(self) -> Tensor:
        head = (
            self.decoder.head[-1].weight
            if self.pixels is None
            else self.pixels.decoder.conv_out.weight
        )
        assert isinstance(head, Tensor)
        return head

    def latents(self, images: Tensor) -> Tensor:
        """Vectors before quantization [B, N, C] (means and log variances for the KL variants)."""
        self.check_images(images)
        return self.encoder((images + 1) / 2)

    def scores(self, vectors: Tensor) -> Tensor:
        """Two-stage models: scores of the proxy codes [B, h, w, V] given code vectors [B, n, C]."""
        assert self.pixels is not None, "single-stage models predict pixels"
        return self._map(self.decoder(vectors))

    def _map(self, decoded: Decoded) -> Tensor:
        return rearrange(decoded.cells, "b (h w) k -> b h w k", h=self.side)

    def draw_image(self, decoded: Decoded) -> Tensor:
        """Images [B, 3, H, W] of what the decoder says: in stage "proxy" of the likeliest codes,
        without gradients.
        """
        if self.pixels is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage != "proxy"):
                return self.pixels(self._map(decoded), hard=self.stage == "proxy")
        assert self.smooth is not None
        p = self.decoder_patch_size
        images = rearrange(self._map(decoded), "b h w (p q c) -> b c (h p) (w q)", p=p, q=p)
        return 2 * at_least_float32(self.smooth(images.contiguous())) - 1

    def render(self, vectors: Tensor) -> Tensor:
        """Images of code vectors [B, n, C]."""
        return self.draw_image(self.decoder(vectors))

    def forward(self, images: Tensor) -> TokenizerOutput:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage != "decoder"):
            quantized = self.quantizer(self.latents(images))
        losses = {} if self.stage == "decoder" else dict(quantized.losses)
        output = TokenizerOutput(images, quantized.tokens, losses)
        return self._reconstruct(images, quantized.quantized, output)

    def _reconstruct(
        self, images: Tensor, vectors: Tensor, output: TokenizerOutput
    ) -> TokenizerOutput:
        """`output` with the reconstruction from code vectors [B, N, C], and with the decoder's
        losses.
        """
        decoded = self.decoder(vectors)
        losses = output.losses | self.decoder_losses(images, decoded)
        return output._replace(reconstruction=self.drawn(images, decoded), losses=losses)

    def drawn(self, images: Tensor, decoded: Decoded) -> Tensor:
        """The reconstruction of a forward pass: empty in training of stage "proxy", whose losses
        read scores alone.
        """
        if self.training and self.stage == "proxy":
            return images[:, :0]
        return self.draw_image(decoded)

    def decoder_losses(self, images: Tensor, decoded: Decoded) -> dict[str, Tensor]:
        """In training of stage "proxy": cross entropy of the scores with the VQGAN's codes of the
        same images.
        """
        if self.stage != "proxy" or not self.training:
            return {}
        if self.target is None:
            raise ValueError('stage "proxy" learns the codes of a MaskGIT-VQGAN: give `target`')
        return {"proxy": proxy_loss(self._map(decoded), self.target(images))}


def proxy_loss(scores: Tensor, codes: Tensor) -> Tensor:
    """Mean cross entropy of scores [B, h, w, V] with codes [B, h * w]."""
    return F.cross_entropy(
        at_least_float32(rearrange(scores, "b h w v -> (b h w) v")), codes.flatten()
    )


def init_weights(titok: TiTok, small: bool) -> None:
    """Initialisation, before the quantizer and the pixel decoder are there, which have their own.

    | weight                             | published widths        | `small` ones            |
    |------------------------------------|-------------------------|-------------------------|
    | linear layers                      | truncated N(0, 0.02)    | torch's default         |
    | queries, keys, values              | Xavier uniform over the fused matrix (nn.MultiheadAttention's) |
    | last 3x3 convolution of RGB        | truncated N(0, 0.02)    | the identity            |
    | biases                             | 0                       | 0                       |
    | tokens and positions (`learned`)  | N(0, 1 / width)         | N(0, 1 / width)         |
    """
    start_layers(titok, (nn.Linear, nn.Conv2d), small)
    for part in titok.modules():
        if isinstance(part, ViTBlock):
            nn.init.xavier_uniform_(part.qkv.weight)
    if small and titok.smooth is not None:
        nn.init.dirac_(titok.smooth.weight)


def _check_sizes(
    image_size: int,
    patch_size: int,
    decoder_patch_size: int,
    num_tokens: int,
    pixels: PixelDecoder | None,
    stage: str,
) -> None:
    for name, size in (("patch_size", patch_size), ("decoder_patch_size", decoder_patch_size)):
        if image_size % size:
            raise ValueError(f"{name} {size} does not divide image_size {image_size}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; it must be at least 1")
    if pixels is not None and pixels.stride != decoder_patch_size:
        raise ValueError(
            f"the pixel decoder enlarges {pixels.stride} times; decoder_patch_size is {decoder_patch_size}"
        )
    if stage not in ("all", "proxy", "decoder") or (stage == "proxy" and pixels is None):
        raise ValueError(
            f'stage is {stage!r}; it must be "all", "decoder" or, with a pixel decoder, "proxy"'
        )


def _two_stage(size: str, num_tokens: int, stage: Stage, target: ProxyCodes | None) -> TiTok:
    quantizer = VectorQuantizer(4096, 12, unit_codes=False)
    width = SIZES[size]
    return TiTok(
        quantizer,
        256,
        patch_size=16,
        num_tokens=num_tokens,
        encoder_size=width,
        decoder_size=width,
        pixels=PixelDecoder(),
        mixes=True,
        stage=stage,
        target=target,
    )


def _single_stage(quantizer: Quantizer, encoder: str, decoder: str, num_tokens: int) -> TiTok:
    return TiTok(quantizer, 256, 16, num_tokens, SIZES[encoder], SIZES[decoder])


def _vq8k(clustering: bool) -> VectorQuantizer:
    """`clustering`: as TA-TiTok trains it, without which most codes die; the published weights read
    it as plain VQ.
    """
    return ClusteringVQ(8192, 64) if clustering else VectorQuantizer(8192, 64, l2_normalize=False)


def _vae16(num_tokens: int) -> GaussianBottleneck:
    """The published KL weight 1e-6 is of sums over tokens and channels."""
    return GaussianBottleneck(16, kl_weight=1e-6 * 16 * num_tokens)


def titok_s128(stage: Stage = "decoder", target: ProxyCodes | None = None) -> TiTok:
    """83,674,639 parameters, 52,934,156 without the pixel decoder; 128 tokens of 4,096 codes."""
    return _two_stage("small", 128, stage, target)


def titok_b64(stage: Stage = "decoder", target: ProxyCodes | None = None) -> TiTok:
    """204,814,095 parameters, 174,073,612 without the pixel decoder; 64 tokens of 4,096 codes."""
    return _two_stage("base", 64, stage, target)


def titok_l32(stage: Stage = "decoder", target: ProxyCodes | None = None) -> TiTok:
    """641,054,735 parameters, 610,314,252 without the pixel decoder; 32 tokens of 4,096 codes."""
    return _two_stage("large", 32, stage, target)


def titok_bl64_vq8k(clustering: bool = False) -> TiTok:
    """390,016,148 parameters; 64 tokens of 8,192 codes, single stage."""
    return _single_stage(_vq8k(clustering), "base", "large", 64)


def titok_bl128_vq8k(clustering: bool = False) -> TiTok:
    """390,179,988 parameters; 128 tokens of 8,192 codes, single stage."""
    return _single_stage(_vq8k(clustering), "base", "large", 128)


def titok_sl256_vq8k(clustering: bool = False) -> TiTok:
    """330,260,884 parameters; 256 tokens of 8,192 codes, single stage."""
    return _single_stage(_vq8k(clustering), "small", "large", 256)


def titok_ll32_vae_c16() -> TiTok:
    """606,879,604 parameters; 32 continuous tokens of 16 channels."""
    return _single_stage(_vae16(32), "large", "large", 32)


def titok_bl64_vae_c16() -> TiTok:
    """389,418,100 parameters; 64 continuous tokens of 16 channels."""
    return _single_stage(_vae16(64), "base", "large", 64)


def titok_bl128_vae_c16() -> TiTok:
    """389,581,940 parameters; 128 continuous tokens of 16 channels."""
    return _single_stage(_vae16(128), "base", "large", 128)
