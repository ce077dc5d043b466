"""MAR: masked autoregression over continuous tokens with a diffusion loss per token (arXiv
2406.11838).

The masked backbone (`parts/masked_backbone.py`) gives a vector z for each place from the known
tokens; a small MLP (`head.py`) denoises a token given its z. Tokens come in random order, a growing
set at a time (`parts/random_sets.py`). Different from the official code: the loss is computed at
masked tokens only, which is the same mean, and the order is data (`Entities`), drawn from each
image's own noise.
"""

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.models.mar.head import DiffusionMLP
from tessellar.models.parts.masked_backbone import MaskedBackbone
from tessellar.models.parts.random_sets import RandomSets
from tessellar.processes.diffusion import TRAINING_STEPS, full_process
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import ImplicitDiffusion
from tessellar.protocol.entities import Entities, take
from tessellar.protocol.generator import State
from tessellar.protocol.layout import Continuous, Layout


class MAR(RandomSets):
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
        kind = layout.segments[0].kind
        if layout.grid is None or not isinstance(kind, Continuous):
            raise UserError(
                f"MAR generates one grid of continuous latents; this tokenizer gives {layout}"
            )
        super().__init__(layout, patch, steps=steps, least_masked=least_masked)
        self.repeats = repeats
        self.channels = kind.dim * patch**2
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        self.backbone = MaskedBackbone(
            self.channels,
            self.length,
            width=width,
            depth=depth,
            num_heads=num_heads,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            num_classes=num_classes,
            buffer=buffer,
            dropout=dropout,
            attention_dropout=attention_dropout,
            mlp_ratio=mlp_ratio,
        )
        self.head = DiffusionMLP(
            self.channels, self.backbone.out_dim, width=head_width, depth=head_depth
        )
        self.backbone.init_weights()
        # As published: all else that is a matrix decays.
        for parameter in self.head.parameters():
            tag(parameter, "no_decay")

    def fill(
        self, state: State, tokens: Tensor, known: Tensor, places: Tensor, entity: Tensor
    ) -> ImplicitDiffusion:
        """Guidance acts on the predicted noise alone; the variance stays the conditional one."""
        area = self.patch**2
        entity = entity[:, ::area]
        known_patches = state.rows(self.known_patches(known))
        z = self.backbone(state.rows(self.to_patches(tokens)), known_patches, state.condition)
        z = take(z, state.rows(self.patches_at(places)))
        planned = Entities(
            torch.arange(self.length), tuple(size // area for size in state.entities.sizes)
        )

        def model(x: Tensor, t: Tensor) -> Tensor:
            """eps and v, channels [2 C], of noisy latents [B, T, C] at the original step number t."""
            noisy = state.rows(rearrange(x.to(z.dtype), "b (l q) c -> b l (c q)", q=area))
            eps, v = self.head(noisy, t.expand(noisy.shape[:2]), z)
            eps = state.guidance.merge(eps, entity, planned)
            v = v[: state.batch]
            eps = rearrange(eps, "b l (c q) -> b (l q) c", q=area)
            v = rearrange(v, "b l (c q) -> b (l q) c", q=area)
            return torch.cat([eps, v], -1)

        number = int(entity.flatten()[0])
        return ImplicitDiffusion(
            model, (places.shape[1], self.channels // area), number, state.entities.count
        )

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Diffusion loss at the masked patches (`draw_mask`)."""
        masked = self.draw_mask(len(tokens))
        rows = self.repeats * len(tokens) * self.length
        t = torch.randint(TRAINING_STEPS, (rows,), device=tokens.device)
        noise = torch.randn(rows, self.channels, device=tokens.device)
        condition = self.drop_condition(condition)
        return {"diffusion": self.masked_loss(tokens, masked, condition, t, noise, weight)}

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
        z = self.backbone(patches, ~masked, condition)
        chosen = masked.to(tokens.device).flatten().repeat(self.repeats)
        clean = patches.flatten(0, 1).repeat(self.repeats, 1)[chosen]
        z = z.flatten(0, 1).repeat(self.repeats, 1)[chosen]
        losses = self.row_losses(at_least_float32(clean), z, t[chosen], noise[chosen])
        if weight is None:
            weight = torch.ones(len(masked), device=tokens.device)
        share = weight[:, None].expand(masked.shape)
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
    return MAR(layout, 768, 12, 12, head_width=1024, head_depth=6, num_classes=num_classes)


def mar_l(layout: Layout, num_classes: int = 1000) -> MAR:
    """478,326,304 parameters."""
    return MAR(layout, 1024, 16, 16, head_width=1280, head_depth=8, num_classes=num_classes)


def mar_h(layout: Layout, num_classes: int = 1000) -> MAR:
    """942,403,104 parameters."""
    return MAR(layout, 1280, 20, 16, head_width=1536, head_depth=12, num_classes=num_classes)
