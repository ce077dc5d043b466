"""TokenFlow's semantic side: the teacher's own vision transformer, trained further, and a BEiT-style
decoder that gives back the teacher's features (arXiv 2412.03069; BEiT v2, arXiv 2208.06366).

Vectors are [B, h w, D] in raster order. Tables of positions are enlarged for other image sizes as in
the official code: by a factor of (side + 0.1) / table side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, Self

import torch
from timm.models.beit import Block
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.layers.vit import resized_positions
from tessellar.networks.timm_networks import Options
from tessellar.networks.vision import Preprocessing, Teacher, VisionFeatures, VisionModel
from tessellar.protocol.arguments import in_ranges


@in_ranges
@dataclass(frozen=True)
class SemanticDecoderSize:
    """Of the semantic decoder."""

    width: int = 768
    depth: int = 3
    num_heads: int = 12


def task_layer(width: int, out: int) -> nn.Sequential:
    """What stands between the transformers and the codes, and between them and the teacher."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


class SemanticVision(VisionModel):
    """A vision transformer of timm as TokenFlow reads it, at any image size that its patches divide.

    Unlike other vision models it is trained; what no feature reads (blocks behind `layers`, pooling)
    stays as it was. `normed`: the features are those behind the last norm. `shared_dim`: CLIP's,
    projected to the so many channels in which images and texts meet. Images are not resized. Raises
    UserError for networks that are no such transformer, and for a file without the projection.
    """

    def __init__(
        self,
        name: str | None = None,
        weights: str | None = None,
        image_size: int | None = None,
        options: Options = {},  # noqa: B006
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008
        layers: tuple[int, ...] = (-1,),
        label: str | None = None,
        normed: bool = True,
        shared_dim: int | None = None,
    ) -> None:
        self.normed = normed
        self.shared_dim = shared_dim
        self.projection: Tensor | None = None  # of the file, read while the network is made
        super().__init__(
            name,
            weights,
            image_size=image_size,
            options=options,
            preprocessing=preprocessing,
            layers=layers,
            label=label,
        )
        network: Any = self.network
        if not isinstance(network, VisionTransformer) or network.reg_token is not None:
            raise UserError(f"{self.name} is no plain vision transformer, which TokenFlow reads")
        if len(self.layers) != 1:
            raise UserError(f"TokenFlow reads one layer of its vision model, not {len(layers)}")
        if shared_dim is not None:
            empty = torch.zeros(super().dim, shared_dim)
            found = empty if self.projection is None else self.projection
            self.projection = None
            self.register_buffer("shared_space", found)
        self.requires_grad_(True)
        self.train()
        unread = [*network.blocks[self.layers[0] + 1 :], network.fc_norm, network.head]
        if network.attn_pool is not None:
            unread.append(network.attn_pool)
        if not self.normed:
            unread.append(network.norm)
        for part in unread:  # no feature reads it
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Unlike other vision models, in the mode of what trains it."""
        nn.Module.train(self, mode)
        return self

    def fill(self, state: Mapping[str, Tensor], where: str) -> None:
        """As a vision model, from files that may hold more: a projection, a norm behind pooling."""
        if self.shared_dim is not None:
            self.projection = projection_of(state, self.shared_dim, where)
        own = self.network.state_dict()
        kept = {k: t for k, t in state.items() if k in own or not k.startswith("fc_norm.")}
        super().fill(kept, where)

    @property
    def side(self) -> int:
        """Patches along one side of an image of the size that the table of positions is for."""
        return self.side_at(self.input_size[0])

    def side_at(self, image_size: int) -> int:
        """Patches along one side of an image; raises UserError where they do not divide it."""
        reduction = int(self.network.feature_info[self.layers[0]]["reduction"])  # type: ignore[index]
        if image_size % reduction and image_size != self.input_size[0]:
            raise UserError(f"the patches of {self.name}, {reduction}, do not divide {image_size}")
        return image_size // reduction

    @property
    def grid(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def dim(self) -> int:
        return super().dim if self.shared_dim is None else self.shared_dim

    def preprocess(self, images: Tensor) -> Tensor:
        normalised = ((at_least_float32(images) + 1) / 2 - self.mean) / self.std
        return normalised.to(next(self.network.parameters()).dtype)

    def patch_features(self, images: Tensor) -> Tensor:
        network: Any = self.network
        # Checked by size in our words; timm's check knows one size alone.
        self.side_at(images.shape[-1])
        network.patch_embed.strict_img_size = images.shape[-1] == self.input_size[0]
        x = network.patch_embed(self.preprocess(images))
        side = isqrt(x.shape[1])
        first = network.num_prefix_tokens
        if first:
            x = torch.cat([network.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        if network.pos_embed is not None:
            x = x + resized_positions(network.pos_embed, first, side).to(x.dtype)
        x = network.norm_pre(x)
        for block in network.blocks[: self.layers[0] + 1]:
            x = block(x)
        if self.normed:
            x = network.norm(x)
        patches = x[:, first:]
        space = self._buffers.get("shared_space")
        return patches if space is None else at_least_float32(patches) @ space

    def features(self, images: Tensor) -> VisionFeatures:
        self.check_filled()
        patches = at_least_float32(self.patch_features(images))
        return VisionFeatures(patches[:, :0], patches)


def projection_of(state: Mapping[str, Tensor], out: int, where: str) -> Tensor:
    """CLIP's projection [D, out] of OpenAI's, open_clip's or timm's weights; raises UserError where
    there is none.
    """
    found = None
    for name in ("visual.proj", "proj"):
        found = state.get(name, found)
    for name in ("head.weight", "visual.head.proj.weight"):
        if name in state:
            found = state[name].T
    if found is None or found.shape[1] != out:
        raise UserError(
            f"{where} has no projection to {out} channels of a space of images and texts (visual.proj)"
        )
    return found.float()


def semantic_teacher(
    name: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    options: Options = {},  # noqa: B006
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008
    layers: tuple[int, ...] = (-1,),
    label: str | None = None,
    normed: bool = True,
    shared_dim: int | None = None,
) -> Teacher:
    """A frozen SemanticVision whose features the semantic decoder is to give back."""
    model = SemanticVision(
        name,
        weights,
        image_size=image_size,
        options=options,
        preprocessing=preprocessing,
        layers=layers,
        label=label,
        normed=normed,
        shared_dim=shared_dim,
    )
    return Teacher(model.requires_grad_(False))  # type: ignore[arg-type]


class SemanticDecoder(nn.Module):
    """Semantic code vectors [B, h w, C] of a map to features [B, h w, `out_dim`]; its table of
    positions is for `side` x `side`.
    """

    def __init__(self, side: int, code_dim: int, size: SemanticDecoderSize, out_dim: int) -> None:
        super().__init__()
        width = size.width
        self.patch_in = nn.Linear(code_dim, width)
        self.first = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + side**2, width))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(width, size.num_heads, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
            for _ in range(size.depth)
        )
        self.norm = norm(width)
        self.head = task_layer(width, out_dim)

    def init_weights(self) -> None:
        """Truncated N(0, 0.02), biases 0, as BEiT's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.first, self.positions):
            nn.init.trunc_normal_(tag(table, "no_decay"), std=0.02)

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.patch_in(vectors.to(self.patch_in.weight.dtype))
        x = torch.cat([self.first.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        x = x + resized_positions(self.positions, 1, isqrt(vectors.shape[1])).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 1:]))
