"""Binary tokenizers whose decoder may read noise beside the codes (WeTok, arXiv 2508.05599; BitDance,
UniWeTok): what the bits leave open is drawn.

Training draws the noise anew. Outside of it an image's noise comes from a stream that its first
token seeds, so that the same tokens give the same image, alone and in a batch.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.cnn_binary import BinaryDecoder
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.noise import Noise
from tessellar.tokenizers.parts.vqgan import VQGAN

SEED_BITS = 62  # of the first token: what a seed holds


class NoisyDecoder(VQGAN):
    """A VQGAN over one vector of signs a cell, whose decoder reads codes and (with `noisy`) noise of
    the same shape.
    """

    decoder: BinaryDecoder
    noisy: bool

    def decode(self, tokens: Tensor, noise: Noise | None = None) -> Tensor:
        """Images of tokens [B, N, ...]; image b is drawn by stream b of `noise`, or by its own seed."""
        self.layout.check(tokens)
        vectors = self.quantizer.decode(tokens)
        if noise is None or not self.noisy:
            return self.render_with(vectors, self.own_noise(vectors))
        drawn = noise.normal(*vectors.shape[1:])
        if len(drawn) != len(tokens):
            raise ValueError(f"noise has {len(drawn)} streams for {len(tokens)} images")
        return self.render_with(vectors, drawn)

    def decode_seeded(self, tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.decode(tokens, noise=Noise(seeds, tokens.device))

    def render(self, vectors: Tensor) -> Tensor:
        if self.training:
            return self.render_with(vectors, torch.randn_like(vectors))
        return self.render_with(vectors, self.own_noise(vectors))

    def render_with(self, vectors: Tensor, noise: Tensor | None) -> Tensor:
        """Images of vectors [B, N, C] with noise of their shape, which is not read unless `noisy`."""
        height = self.grid[0]
        dtype = self.decoder.conv_in.weight.dtype
        maps = rearrange(vectors.to(dtype), "b (h w) c -> b c h w", h=height)
        noisy = None
        if self.noisy and noise is not None:
            noisy = rearrange(noise.to(dtype), "b (h w) c -> b c h w", h=height)
        return at_least_float32(self.decoder(maps, noisy))

    def own_noise(self, vectors: Tensor) -> Tensor | None:
        """Noise [B, N, C] of vectors, each image's from the seed that its first vector's signs are."""
        if not self.noisy:
            return None
        bits = (vectors[:, 0, :SEED_BITS] > 0).long()
        seeds = (bits << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)
        return Noise(seeds.tolist(), vectors.device).normal(*vectors.shape[1:])

    def maps(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def starting_from(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A noisy decoder goes on from one without noise: it begins by ignoring the noise."""
        name = "decoder.conv_in.weight"
        taken = dict(state)
        missing = self.decoder.conv_in.weight.shape[1] - taken[name].shape[1]
        if self.noisy and missing == self.quantizer.dim:
            taken[name] = F.pad(taken[name], (0, 0, 0, 0, 0, missing))
        return taken


def freeze_codes(tokenizer: NoisyDecoder, *modules: nn.Module) -> None:
    """Leave the decoder alone to train: the encoder, and with it the tokens, stays as it is."""
    for module in (tokenizer.encoder, tokenizer.quantizer, *modules):
        module.requires_grad_(False)
