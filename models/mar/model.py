"""MAR: masked autoregression over continuous tokens with a diffusion loss per token (arXiv
2406.11838).

A bidirectional encoder reads the known tokens behind a buffer of class embeddings, a decoder sees
all places and gives a vector z for each; a small MLP (`heads/diffusion_mlp.py`) denoises a token
given its z. Tokens come in random order, a growing set at a time. Different from the official code:
the loss is computed at masked tokens only, which is the same mean, and the order is data
(`Entities`), drawn from each image's own noise.
"""

from functools import partial
from math import ceil, cos, floor, pi

import torch
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.tags import tag
from tessellar.models.mar.head import DiffusionMLP
from tessellar.processes.diffusion import TRAINING_STEPS, full_process
from tessellar.protocol.condition import Condition
from tessellar.protocol.conditioning import ClassConditioning
from tessellar.protocol.distribution import ImplicitDiffusion
from tessellar.protocol.entities import Entities, cells, take
from tessellar.protocol.generator import State
from tessellar.protocol.layout import Continuous, Layout
from tessellar.protocol.masked import MaskedGenerator
from tessellar.protocol.noise import Noise


def planned_sizes(patches: int, steps: int) -> tuple[int, ...]:
    """Patches that become known at each step: floor(L cos(pi / 2 (i + 1) / T)) are left behind step
    i, at least one.

    Raises UserError for more steps than patches.
    """
    if not 1 <= steps <= patches:
        raise UserError(f"{steps} steps for {patches} tokens; give 1 to {patches}")
    left = [patches]
    for i in range(1, steps):
        left.append(max(1, min(left[-1] - 1, floor(patches * cos(pi / 2 * i / steps)))))
    return tuple(a - b for a, b in zip(left, [*left[1:], 0], strict=True) if a > b)


class MAR(MaskedGenerator):
    """Class-conditional generator over one grid of continuous latents; `patch` x `patch` of them
    are one token.

    `steps` is the number of sets in which tokens are decoded by default, `repeats` how many noise
    levels each token is trained at in one update. Width, depth and heads of the decoder, and
    dropout of attention weights, are those of the encoder and of the projections unless given.
    Raises UserError for other layouts.
    """

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_width: int | None = None,
        head_width: int = 1024,
        head_depth: int = 6,
        num_classes: int = 1000,
        patch: int = 1,
        buffer: int = 64,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        mlp_ratio: float = 4.0,
        least_masked: float = 0.7,
        repeats: int = 4,
        steps: int = 64,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        attention_dropout: float | None = None,
    ) -> None:
        super().__init__()
        kind = layout.segments[0].kind
        if layout.grid is None or not isinstance(kind, Continuous):
            raise UserError(
                f"MAR generates one grid of continuous latents; this tokenizer gives {layout}"
            )
        self.layout = layout
        self.condition_dropout = condition_dropout
        self.num_classes = num_classes
        self.patch = patch
        self.buffer = buffer
        self.least_masked = least_masked
        self.repeats = repeats
        self.steps = steps
        self.cells = cells(layout, patch, patch)
        self.conditioning = ClassConditioning(num_classes)
        self.channels, self.length = kind.dim * patch**2, self.cells.count
        self.entities = self.sets(torch.arange(self.length), steps)
        inner = decoder_width or width
        make = partial(
            Block,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            proj_drop=dropout,
            attn_drop=dropout if attention_dropout is None else attention_dropout,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        )
        self.class_embedding = nn.Embedding(num_classes, width)
        self.null_embedding = nn.Parameter(torch.empty(1, width))
        self.input = nn.Linear(self.channels, width)
        self.input_norm = nn.LayerNorm(width, eps=1e-6)
        self.encoder_positions = nn.Parameter(torch.empty(1, buffer + self.length, width))
        self.encoder_blocks = nn.ModuleList(make(width, num_heads) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_input = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.empty(1, 1, inner))
        self.decoder_positions = nn.Parameter(torch.empty(1, buffer + self.length, inner))
        self.decoder_blocks = nn.ModuleList(
            make(inner, decoder_heads or num_heads) for _ in range(decoder_depth or depth)
        )
        self.decoder_norm = nn.LayerNorm(inner, eps=1e-6)
        self.z_positions = nn.Parameter(torch.empty(1, self.length, inner))
        self.head = DiffusionMLP(self.channels, inner, head_width, head_depth)
        self.init_weights()

    def init_weights(self) -> None:
        """Tables, tokens and the class embedding N(0, 0.02), linear layers Xavier.

        As published, the head is not decayed, and every other matrix or table is.
        """
        tables = (
            self.null_embedding,
            self.encoder_positions,
            self.mask_token,
            self.decoder_positions,
            self.z_positions,
        )
        for table in (*tables, self.class_embedding.weight):
            nn.init.normal_(table, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("head."):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "blocks" in name:
                    tag(module.weight, "hidden")
        for parameter in self.head.parameters():
            tag(parameter, "no_decay")

    def sets(self, order: Tensor, steps: int) -> Entities:
        """Entities of latents from an order of patches [L] or [B, L]; raster order inside each set."""
        sizes = planned_sizes(self.length, steps)
        order = torch.cat([part.sort(-1).values for part in order.split(sizes, dim=-1)], -1)
        places = self.cells.order.view(self.length, -1)[order].flatten(-2)
        return Entities(places, tuple(size * self.patch**2 for size in sizes))

    def plan(self, noise: Noise, steps: int | None = None) -> Entities:
        """An order of its own for each image."""
        return self.sets(noise.uniform(self.length).argsort(-1).cpu(), steps or self.steps)

    def to_patches(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, C] to [B, L, C p p], channel slowest."""
        cells = take(tokens, self.cells.order.expand(len(tokens), -1))
        return rearrange(cells, "b (l q) c -> b l (c q)", l=self.length)

    def embed_classes(self, condition: Condition) -> Tensor:
        """[R, D]; the number of classes stands for none."""
        assert condition.ids is not None
        known = self.class_embedding(condition.ids.clamp(max=self.num_classes - 1))
        return torch.where((condition.ids == self.num_classes)[:, None], self.null_embedding, known)

    def encode(self, patches: Tensor, visible: Tensor, condition: Condition) -> Tensor:
        """Buffer and visible patches [R, P + V, D]; `visible` [R, V] are their places, ascending."""
        label = self.embed_classes(condition)[:, None].expand(-1, self.buffer, -1)
        x = self.input_norm(
            torch.cat([label, self.input(patches.to(label.dtype))], 1) + self.encoder_positions
        )
        x = torch.cat([x[:, : self.buffer], take(x, visible + self.buffer)], 1)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def vectors(self, patches: Tensor, known: Tensor, condition: Condition) -> Tensor:
        """z [R, L, D] of all patches, given the `known` [R, L] ones (as many in each row)."""
        count = int(known[0].sum())
        assert bool((known.sum(1) == count).all()), "images must be in step"
        visible = (~known).to(torch.int8).argsort(dim=1, stable=True)[:, :count].to(patches.device)
        encoded = self.decoder_input(self.encode(patches, visible, condition))
        x = self.mask_token.expand(len(patches), self.length, -1).to(encoded.dtype)
        x = x.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), encoded[:, self.buffer :])
        x = torch.cat([encoded[:, : self.buffer], x], 1) + self.decoder_positions
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer :] + self.z_positions

    def fill(
        self, state: State, tokens: Tensor, known: Tensor, places: Tensor, entity: Tensor
    ) -> ImplicitDiffusion:
        """Guidance acts on the predicted noise alone; the variance stays the conditional one."""
        area = self.patch**2
        cell_of = torch.empty(self.layout.length, dtype=torch.int64)
        cell_of[self.cells.order] = torch.arange(self.layout.length) // area
        wanted = cell_of[places[:, ::area]]
        entity = entity[:, ::area]
        known_patches = state.rows(known[:, self.cells.order[::area]])
        z = self.vectors(state.rows(self.to_patches(tokens)), known_patches, state.condition)
        z = take(z, state.rows(wanted))
        planned = Entities(
            torch.arange(self.length), tuple(size // area for size in state.entities.sizes)
        )

        def model(x: Tensor, t: Tensor) -> Tensor:
            """eps and v, channels [2 C], of noisy latents [B, T, C] at the original step number t."""
            noisy = state.rows(rearrange(x.to(z.dtype), "b (l q) c -> b l (c q)", q=area))
            eps, v = self.head(noisy, t.expand(noisy.shape[:2]), z)
            eps = state.guidance.merge(eps, entity, planned)
            v = v[: state.batch]
            unfolded = (rearrange(part, "b l (c q) -> b (l q) c", q=area) for part in (eps, v))
            return torch.cat([*unfolded], -1)

        number = int(entity.flatten()[0])
        return ImplicitDiffusion(
            model, (places.shape[1], self.channels // area), number, state.entities.count
        )

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Diffusion loss at the masked patches; one mask ratio a batch, N(1, 0.25) within
        [least_masked, 1].
        """
        ratio = nn.init.trunc_normal_(torch.empty(1), 1.0, 0.25, self.least_masked, 1.0)
        count = ceil(self.length * float(ratio))
        rank = torch.rand(len(tokens), self.length).argsort(1).argsort(1)
        rows = self.repeats * len(tokens) * self.length
        t = torch.randint(TRAINING_STEPS, (rows,), device=tokens.device)
        noise = torch.randn(rows, self.channels, device=tokens.device)
        return {
            "diffusion": self.masked_loss(
                tokens, rank < count, self.drop_condition(condition), t, noise, weight
            )
        }

    def masked_loss(
        self,
        tokens: Tensor,
        masked: Tensor,
        condition: Condition,
        t: Tensor,
        noise: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean of squared error and variational bound over masked patches [B, L], `repeats` times
        each.

        t [K B L] and noise [K B L, C p p] are indexed by repetition, sample, patch.
        """
        patches = self.to_patches(tokens)
        z = self.vectors(patches, ~masked, condition)
        chosen = masked.to(tokens.device).flatten().repeat(self.repeats)
        rows = [x.flatten(0, 1).repeat(self.repeats, 1)[chosen] for x in (patches, z)]
        losses = self.row_losses(rows[0].float(), rows[1], t[chosen], noise[chosen])
        share = (
            torch.ones(masked.shape, device=tokens.device)
            if weight is None
            else weight[:, None].expand(masked.shape)
        )
        share = share.flatten().repeat(self.repeats)[chosen]
        return (losses * share).sum() / share.sum().clamp(min=torch.finfo(losses.dtype).eps)

    def row_losses(self, clean: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Loss [n] of tokens [n, C] given z [n, D] at steps t [n] with noise [n, C]."""
        process = full_process()
        eps, v = self.head(process.noisy(clean, t, noise).to(z.dtype), t, z)
        error, bound = process.losses(eps, v, clean, t, noise)
        return error + bound


# Published variants: blocks of encoder and of decoder, width, heads; head depth, width.   parameters at 16 x 16 x 16
def mar_b(layout: Layout, num_classes: int = 1000) -> MAR:
    """207,924,768 parameters."""
    return MAR(
        layout,
        768,
        depth=12,
        num_heads=12,
        decoder_width=None,
        head_width=1024,
        head_depth=6,
        num_classes=num_classes,
    )


def mar_l(layout: Layout, num_classes: int = 1000) -> MAR:
    """478,326,304 parameters."""
    return MAR(
        layout,
        1024,
        depth=16,
        num_heads=16,
        decoder_width=None,
        head_width=1280,
        head_depth=8,
        num_classes=num_classes,
    )


def mar_h(layout: Layout, num_classes: int = 1000) -> MAR:
    """942,403,104 parameters."""
    return MAR(
        layout,
        1280,
        depth=20,
        num_heads=16,
        decoder_width=None,
        head_width=1536,
        head_depth=12,
        num_classes=num_classes,
    )
