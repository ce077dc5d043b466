"""BAR's tokenizer BAR-FSQ (arXiv 2602.09024): SigLIP2's vision tower, k signs a token, a ViT decoder.

The encoder is a copy of the tower that is trained on, behind frozen patch embeddings; the decoder a
ViT-L from scratch, whose third block is drawn to the features of the untouched tower (`teacher`).
The loss's other parts are in tokenizers/losses: pixels, LPIPS, ConvNeXt's logits, Gram matrices, a
discriminator. Different from the official code: the binary quantizer is centred, and the decoder has
no norm in front of its blocks, unless the published presets ask for both; any sizes are taken.

Shapes: images [B, 3, H, W], N patches, D width of the encoder, E of the decoder, k bits.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.files import read_official
from tessellar.interop.keys import Rule, table
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.layers.vit import ViTBlock
from tessellar.networks.vision import Teacher
from tessellar.protocol.configured import refuse_outside
from tessellar.protocol.layout import grid_layout
from tessellar.protocol.tokenizer import GridTokenizer, Quantizer, TokenizerOutput
from tessellar.tokenizers.quantizers.binary_fsq import BinaryFSQ

ALIGNED_LAYER = 3  # blocks of the decoder before its state is compared
HIDDEN_SIGLIP = 4304 / 1152


def _blocks(
    width: int, depth: int, num_heads: int, ratio: float, gelu: str, eps: float
) -> nn.Sequential:
    blocks = [ViTBlock(width, num_heads, mlp_ratio=ratio, gelu=gelu, eps=eps) for _ in range(depth)]
    return nn.Sequential(*blocks)


# Of SigLIP2's tower, by timm's names.
TOWER = table(
    {
        "patch_embed.proj.bias": "patch_in.bias",
        "pos_embed": "positions",
        "blocks.{i}.norm1.{tensor}": "encoder.{i}.attention_norm.{tensor}",
        "blocks.{i}.norm2.{tensor}": "encoder.{i}.mlp_norm.{tensor}",
        "blocks.{i}.attn.qkv.{tensor}": "encoder.{i}.qkv.{tensor}",
        "blocks.{i}.attn.proj.{tensor}": "encoder.{i}.proj.{tensor}",
        "blocks.{i}.mlp.fc1.{tensor}": "encoder.{i}.fc1.{tensor}",
        "blocks.{i}.mlp.fc2.{tensor}": "encoder.{i}.fc2.{tensor}",
        "norm.{tensor}": "encoder_norm.{tensor}",
    },
    Rule(
        "patch_embed.proj.weight",
        "patch_in.weight",
        lambda t: rearrange(t, "d c p q -> d (p q c)"),
        lambda t: t,
    ),
    drop=("attn_pool.*", "head.*", "fc_norm.*"),
)


class BARFSQ(GridTokenizer):
    """Images of `image_size` as a grid of tokens of bits, one a patch.

    `tower`: a file of SigLIP2's vision tower (timm's names) from which the encoder starts; its patch
    embeddings then stay as they are. `teacher` is the untouched tower, for training alone. `norm_in`
    puts a norm in front of the decoder's blocks, whose norms have `decoder_eps`. Raises UserError
    where sizes do not fit.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int = 256,
        patch_size: int = 16,
        width: int = 1152,
        depth: int = 27,
        num_heads: int = 16,
        mlp_ratio: float = HIDDEN_SIGLIP,
        decoder_width: int = 1024,
        decoder_depth: int = 24,
        decoder_heads: int = 16,
        tower: str | None = None,
        teacher: Teacher | None = None,
        alignment_weight: float = 0.7,
        norm_in: bool = False,
        decoder_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise UserError(f"patches of {patch_size} do not divide images of {image_size}")
        if teacher is not None and (teacher.dim != width or decoder_depth < ALIGNED_LAYER):
            raise UserError(
                f"the teacher's features have {teacher.dim} channels, the encoder {width}: they are the same tower; "
                f"and the decoder needs {ALIGNED_LAYER} blocks, it has {decoder_depth}"
            )
        side = image_size // patch_size
        self.image_size = (image_size, image_size)
        self.side = side
        self.patch_size = patch_size
        self.layout = grid_layout(side, side, quantizer.kind)
        self.alignment_weight = alignment_weight
        self.teacher = teacher
        self.patch_in = nn.Linear(3 * patch_size**2, width)
        self.positions = nn.Parameter(torch.empty(1, side**2, width))
        self.encoder = _blocks(width, depth, num_heads, mlp_ratio, "tanh", eps=1e-6)
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.to_code = nn.Linear(width, quantizer.dim)
        self.quantizer = quantizer
        self.from_code = nn.Linear(quantizer.dim, decoder_width)
        self.class_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_positions = nn.Parameter(torch.empty(1, 1 + side**2, decoder_width))
        self.norm_in = nn.LayerNorm(decoder_width, eps=decoder_eps) if norm_in else nn.Identity()
        self.decoder = _blocks(
            decoder_width, decoder_depth, decoder_heads, 4.0, "none", eps=decoder_eps
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=decoder_eps)
        self.to_pixels = nn.Linear(decoder_width, 3 * patch_size**2)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        self.align: nn.Sequential | None = None
        if teacher is not None:
            self.align = nn.Sequential(
                nn.Linear(decoder_width, 2048),
                nn.SiLU(),
                nn.Linear(2048, 2048),
                nn.SiLU(),
                nn.Linear(2048, width),
            )
        self.init_weights()
        if tower is not None:
            refuse_outside(f"weights of BAR's encoder, {tower}")
            self._config["tower"] = None  # an export is complete in itself
            self.patch_in.requires_grad_(False)
            self.positions.requires_grad_(False)
            if torch.get_default_device().type != "meta":
                self.start_from(read_official(tower), tower)

    def init_weights(self) -> None:
        """Tables and the class token N(0, 0.02); linear layers truncated N(0, 0.02), outputs of
        branches too, biases 0. With `norm_in`, as published: the decoder's tables N(0, 1 / width), the
        last convolution as linear layers.

        The encoder's rate is its own (`encoder_rate` of the optimizer).
        """
        published = isinstance(self.norm_in, nn.LayerNorm)
        layers: list[nn.Linear | nn.Conv2d] = [self.smooth] if published else []
        layers += [module for module in self.modules() if isinstance(module, nn.Linear)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.positions, std=0.02)
        for table_ in (self.class_token, self.decoder_positions):
            nn.init.normal_(table_, std=table_.shape[-1] ** -0.5 if published else 0.02)
        for table_ in (self.positions, self.class_token, self.decoder_positions):
            tag(table_, "no_decay")
        for part in (self.encoder, self.encoder_norm):
            for parameter in part.parameters():
                tag(parameter, "encoder")

    def start_from(self, state: Mapping[str, Tensor], where: str = "the tower") -> None:
        """The encoder as SigLIP2's tower; positions of another grid are resized.

        Raises UserError for the weights of another network.
        """
        ours = TOWER.from_official(state, where)
        positions = ours.get("positions")
        if positions is not None and positions.ndim == 3:
            ours["positions"] = resized_table(positions, self.side)
        own = self.state_dict()
        kept = {
            name: tensor
            for name, tensor in own.items()
            if not name.startswith(("patch_in", "positions", "encoder."))
            and not name.startswith("encoder_norm")
        }
        load_strict(self, {**kept, **ours}, where)

    @property
    def last_layer(self) -> Tensor:
        return self.smooth.weight

    def latents(self, images: Tensor) -> Tensor:
        self.check_images(images)
        patches = rearrange(
            images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch_size, q=self.patch_size
        )
        hidden = self.encoder_norm(self.encoder(self.patch_in(patches) + self.positions))
        with torch.autocast(images.device.type, enabled=False):
            weight = at_least_float32(self.to_code.weight)
            bias = at_least_float32(self.to_code.bias)
            return F.linear(at_least_float32(hidden), weight, bias)

    def render(self, vectors: Tensor) -> Tensor:
        return self._render(vectors)[0]

    def _render(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and the patches' states [B, N, E] behind the third block."""
        x = self.from_code(vectors.to(self.from_code.weight.dtype))
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.decoder_positions
        x = self.norm_in(x)
        states = x
        for number, block in enumerate(self.decoder, start=1):
            x = block(x)
            if number == ALIGNED_LAYER:
                states = x
        pixels = self.to_pixels(self.decoder_norm(x[:, 1:]))
        images = rearrange(
            pixels,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=self.side,
            p=self.patch_size,
            q=self.patch_size,
        )
        return at_least_float32(self.smooth(images)), states[:, 1:]

    def forward(self, images: Tensor) -> TokenizerOutput:
        quantized = self.quantizer(self.latents(images))
        drawn, states = self._render(quantized.quantized)
        losses = dict(quantized.losses)
        if self.teacher is not None and self.align is not None and self.training:
            target = at_least_float32(self.teacher(images).patches)
            found = at_least_float32(self.align(states))
            losses["alignment"] = self.alignment_weight * F.mse_loss(found, target)
        return TokenizerOutput(drawn, quantized.tokens, losses)


def resized_table(positions: Tensor, side: int) -> Tensor:
    """Positions [1, h h, D] of SigLIP2's tower on a grid of `side` x `side`, bilinearly."""
    maps = rearrange(positions, "b (h w) d -> b d h w", h=isqrt(positions.shape[1]))
    resized = F.interpolate(maps, (side, side), mode="bilinear", antialias=True)
    return rearrange(resized, "b d h w -> b (h w) d")


def bar_fsq_256(
    bits: int = 16, tower: str | None = None, teacher: Teacher | None = None, centred: bool = False
) -> BARFSQ:
    """16 x 16 tokens of 16 bits at 256 pixels; the published quantizer unless `centred`.

    716,050,516 parameters.
    """
    return _published(BinaryFSQ(bits, centred), 256, tower=tower, teacher=teacher)


def bar_fsq_512(
    bits: int = 10, tower: str | None = None, teacher: Teacher | None = None, centred: bool = False
) -> BARFSQ:
    """32 x 32 tokens of 10 bits at 512 pixels; the published quantizer unless `centred`."""
    return _published(BinaryFSQ(bits, centred), 512, tower=tower, teacher=teacher)


def _published(
    quantizer: BinaryFSQ, image_size: int, tower: str | None, teacher: Teacher | None
) -> BARFSQ:
    return BARFSQ(
        quantizer, image_size, tower=tower, teacher=teacher, norm_in=True, decoder_eps=1e-5
    )
