"""MingTok's three transformers (arXiv 2510.06590): pre-norm blocks, SwiGLU in the first two, GELU in the
pixel decoder.

    image -> Encoder -> latents -> SemanticDecoder, causal -> features -> PixelDecoder -> image

The class token stands last in the encoder, and so does its position. Positions are in the encoder
alone: the decoders know them from the latents. Heads have `width / num_heads` channels.

Sizes: B images, N patches in raster order, n of them visible, C channels of a latent, D a width.
"""

from math import isqrt

import torch
from einops import rearrange
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.attention import attention as attend
from tessellar.layers.gated_block import packed_hidden
from tessellar.layers.kv_cache import KVCache, NoCache, Slots
from tessellar.layers.llama import PackedSwiGLU
from tessellar.layers.tags import tag
from tessellar.layers.vit import resized_positions
from tessellar.tokenizers.parts.hidden_patches import taken
from tessellar.tokenizers.titok.tokenizer import ViTSize

EPS = 1e-6
FINER = 2  # patches of the pixel decoder in one of the encoder, a side


class Block(nn.Module):
    """x += Attention(LN x); x += MLP(LN x); who sees whom is in `slots`."""

    def __init__(self, size: ViTSize, gated: bool, attention: str) -> None:
        super().__init__()
        width = size.width
        self.num_heads = size.num_heads
        self.implementation = attention
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        if gated:
            self.mlp: nn.Module = PackedSwiGLU(width, packed_hidden(4 * width), width)
        else:
            self.mlp = Mlp(width, 4 * width)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                tag(linear.weight, "hidden")

    def forward(self, x: Tensor, number: int, cache: KVCache | NoCache, slots: Slots) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.norm1(x)), "b n (t h d) -> t b h n d", t=3, h=self.num_heads
        )
        k, v = cache.write(number, slots, k, v)
        out = attend(
            q.to(k.dtype),
            k,
            v,
            mask=slots.mask,
            is_causal=slots.is_causal,
            implementation=self.implementation,
        )
        x = x + self.proj(rearrange(out, "b h n d -> b n (h d)").to(x.dtype))
        return x + self.mlp(self.norm2(x))


class Blocks(nn.Module):
    """`size.depth` blocks, one after the other; `causal`: a row sees itself and those before it."""

    def __init__(self, size: ViTSize, gated: bool, causal: bool, attention: str) -> None:
        super().__init__()
        self.causal = causal
        self.layers = nn.ModuleList(Block(size, gated, attention) for _ in range(size.depth))

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x [B, n, D], which comes behind what a cache holds, and is kept in it."""
        if cache is None:
            n = x.shape[1]
            slots = Slots(torch.arange(n)[None], 0, n, None, self.causal and n > 1)
            return self.through(x, NoCache(x.device), slots)
        place = cache.lengths[:, None] + torch.arange(x.shape[1], device=cache.lengths.device)
        x = self.through(x, cache, cache.reserve(place))
        cache.commit()
        return x

    def through(self, x: Tensor, cache: KVCache | NoCache, slots: Slots) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, number, cache, slots)
        return x


class Encoder(nn.Module):
    """Images [B, 3, H, W] to latents [B, n + 1, C] of the patches at `places` [B, n] (None: of all)
    and of the class token, which is the last.

    `side` is that of the grid whose positions are learned; images of other sizes have them resized.
    """

    def __init__(self, side: int, patch_size: int, size: ViTSize, dim: int, attention: str) -> None:
        super().__init__()
        if size.width % dim:
            raise UserError(f"{dim} channels do not divide the encoder's width {size.width}")
        self.patch_size = patch_size
        self.dim = dim
        self.patch_in = nn.Linear(3 * patch_size**2, size.width)
        self.class_token = tag(nn.Parameter(torch.empty(1, 1, size.width)), "no_decay")
        self.positions = tag(nn.Parameter(torch.empty(1, side**2 + 1, size.width)), "no_decay")
        self.blocks = Blocks(size, gated=True, causal=False, attention=attention)
        self.norm_out = nn.LayerNorm(size.width, eps=EPS)
        self.to_latent = nn.Linear(size.width, dim)

    def forward(self, images: Tensor, places: Tensor | None = None) -> Tensor:
        p = self.patch_size
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        of_class = self.positions[:, -1:]
        positions = resized_positions(self.positions[:, :-1], 0, isqrt(patches.shape[1]))
        if places is not None:
            patches = taken(patches, places)
            positions = taken(positions.expand(len(places), -1, -1), places)
        x = self.patch_in(patches)
        x = x + positions.to(x.dtype)
        last = (self.class_token + of_class).to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([x, last], dim=1)
        x = self.blocks(x)
        # Each output also has the mean of its share of the channels.
        shortcut = rearrange(x, "b n (c h) -> b n c h", c=self.dim).mean(-1)
        return self.to_latent(F.gelu(self.norm_out(x))) + shortcut


class SemanticDecoder(nn.Module):
    """Latents [B, n, C] to features [B, n, D]; a position sees itself and what is before it, in these
    latents and in the cache.
    """

    def __init__(self, dim: int, size: ViTSize, attention: str) -> None:
        super().__init__()
        if size.width % dim:
            raise UserError(
                f"{dim} channels do not divide the semantic decoder's width {size.width}"
            )
        self.size = size
        self.repeats = size.width // dim
        self.from_latent = nn.Linear(dim, size.width)
        self.blocks = Blocks(size, gated=True, causal=True, attention=attention)
        self.norm_out = nn.LayerNorm(size.width, eps=EPS)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache of so many positions a row."""
        weight = self.from_latent.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return KVCache(
            self.size.depth,
            rows,
            heads=self.size.num_heads,
            capacity=capacity,
            dim=self.size.width // self.size.num_heads,
            dtype=dtype,
            device=weight.device,
        )

    def forward(self, latents: Tensor, cache: KVCache | None = None) -> Tensor:
        latents = latents.to(self.from_latent.weight.dtype)
        x = self.from_latent(latents) + latents.repeat_interleave(self.repeats, dim=-1)
        return self.norm_out(self.blocks(x, cache))


class PixelDecoder(nn.Module):
    """Features [B, N, D] to images [B, 3, H, W], not clamped: each becomes 2 x 2 finer ones, which
    all see each other. Always computed in float32.
    """

    def __init__(self, patch_size: int, features: int, size: ViTSize, attention: str) -> None:
        super().__init__()
        self.patch_size = patch_size // FINER
        self.expand = nn.Linear(features, FINER**2 * size.width)
        self.blocks = Blocks(size, gated=False, causal=False, attention=attention)
        self.norm_out = nn.LayerNorm(size.width, eps=EPS)
        self.to_pixels = nn.Linear(size.width, 3 * self.patch_size**2)

    def finer(self, features: Tensor) -> Tensor:
        """Inputs [B, 4 N, D] of the blocks."""
        side = isqrt(features.shape[1])
        return rearrange(
            self.expand(features),
            "b (h w) (x y c) -> b (h x w y) c",
            h=side,
            x=FINER,
            y=FINER,
        )

    def patches(self, features: Tensor) -> Tensor:
        """Pixels [B, 4 N, 3 p^2] of the finer patches, channels last in each."""
        x = self.finer(features)
        return self.to_pixels(self.norm_out(self.blocks(x)))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            pixels = self.patches(features.to(self.expand.weight.dtype))
        return unpatchify(pixels, self.patch_size)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, 3, H, W] as patches [B, N, 3 p^2], channels last in each."""
    p = patch_size
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`, for square images."""
    side = isqrt(patches.shape[1])
    p = patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=p, q=p)
