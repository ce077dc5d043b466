"""What SEED's queries read (arXiv 2307.08041): EVA-CLIP's ViT-g/14, or any vision transformer of timm,
frozen. Tokens [B, S, D] are the class token, then patches.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.attention import attention as attend
from tessellar.layers.precision import ExactTables, at_least_float32
from tessellar.networks.vision import VisionModel
from tessellar.protocol.configured import Configured

EPS = 1e-6
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of images in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


class EvaBlock(nn.Module):
    """x += Attention(LN x); x += MLP(LN x); keys have no bias."""

    def __init__(self, width: int, num_heads: int, hidden: int, attention: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = attention
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        fused = F.linear(self.norm1(x), self.qkv.weight, bias.to(x.dtype))
        q, k, v = rearrange(fused, "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        out = attend(q, k, v, implementation=self.implementation)
        x = x + self.proj(rearrange(out, "b h n d -> b n (h d)"))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class EvaVision(Configured, ExactTables):
    """EVA-CLIP's transformer without a last norm: 985,894,528 parameters as published. Images are of
    `image_size`; they are not resized here.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        width: int = 1408,
        depth: int = 39,
        num_heads: int = 16,
        hidden: int = 6144,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if image_size % patch_size or width % num_heads:
            raise UserError(
                f"patches of {patch_size} must divide {image_size} pixels, and {num_heads} heads {width}"
            )
        self.input_size = (image_size, image_size)
        self.dim = width
        self.patch_size = patch_size
        count = (image_size // patch_size) ** 2
        self.patch_in = nn.Linear(3 * patch_size**2, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + count, width))
        self.blocks = nn.ModuleList(
            EvaBlock(width, num_heads, hidden=hidden, attention=attention) for _ in range(depth)
        )
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.eval().requires_grad_(False)

    def tokens(self, images: Tensor) -> Tensor:
        """Of images [B, 3, H, W] in [-1, 1]."""
        return self((at_least_float32(images + 1) / 2 - self.mean) / self.std)

    def forward(self, normalised: Tensor) -> Tensor:
        """Of images as CLIP normalises them."""
        p = self.patch_size
        patches = rearrange(normalised, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        x = self.patch_in(patches.to(self.patch_in.weight.dtype))
        x = torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = x + self.positions.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return x


class TimmVision(VisionModel):
    """A vision transformer of timm in EVA's place; arguments as VisionModel's."""

    def tokens(self, images: Tensor) -> Tensor:
        """Of images [B, 3, H, W] in [-1, 1]."""
        found = self.features(images)
        return torch.cat([found.prefix, found.patches], 1)
