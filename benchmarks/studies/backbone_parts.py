"""MAR with one thing changed (arXiv 2406.11838), for the study of its masked backbone: the backbone,
its tables of positions, or the order of tokens.
"""

from math import ceil, isqrt
from typing import Any

import torch
from torch import Tensor, nn

from tessellar.layers.precision import at_least_float32
from tessellar.models.bitdance.head import sincos_table
from tessellar.models.llamagen.model import rope_table
from tessellar.models.mar import MAR
from tessellar.models.mar.head import DiffusionMLP
from tessellar.models.parts.masked_backbone import MaskedBackbone
from tessellar.models.parts.random_sets import draw_share
from tessellar.models.semanticist import SemanticistAR
from tessellar.models.tokenbridge import TokenBridge
from tessellar.processes.diffusion import TRAINING_STEPS, full_process
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import ImplicitDiffusion
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import State
from tessellar.protocol.layout import Layout
from tessellar.protocol.noise import Noise


class CausalMAR(SemanticistAR):
    """MAR's diffusion head and loss behind Semanticist's causal transformer, in raster order.

    Positions are learned tables as MAR's own, or with `rotations` LlamaGen's, which know the grid
    from the start, and tables that stay at zero. `options` are SemanticistAR's others.
    """

    def __init__(
        self,
        layout: Layout,
        width: int,
        head_width: int,
        head_depth: int,
        options: dict[str, Any],
        rotations: bool = False,
    ) -> None:
        super().__init__(layout, width=width, head_width=head_width, head_depth=1, **options)
        self.flow_head = DiffusionMLP(self.channels, width, width=head_width, depth=head_depth)  # type: ignore[assignment]
        if rotations:
            self.set_rotations(*rope_table(layout, 1, self.head_dim, base=10000.0))
            for table in (self.input_positions, self.z_positions):
                nn.init.zeros_(table)
                table.requires_grad_(False)

    def head_at(  # type: ignore[override]
        self, state: State, hidden: Tensor, rank: Tensor
    ) -> ImplicitDiffusion:
        """As MAR's: guidance acts on the predicted noise, the variance stays the conditional one."""
        place = rank.clamp(max=self.layout.length - 1).to(hidden.device)
        z = hidden + state.rows(self.z_positions[0, place])
        entity = state.entities.entity_at(rank)

        def model(x: Tensor, t: Tensor) -> Tensor:
            noisy = state.rows(x.to(z.dtype))
            eps, v = self.flow_head(noisy, t.expand(noisy.shape[:2]), z)
            return torch.cat([state.merge(eps, entity), v[: state.batch]], -1)

        shape = (rank.shape[1], self.channels)
        return ImplicitDiffusion(model, shape, int(entity.min()), state.entities.count)

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Diffusion loss at all tokens; samples are not weighed."""
        condition = self.drop_condition(condition)
        rows = self.repeats * tokens.shape[1] * len(tokens)
        t = torch.randint(TRAINING_STEPS, (rows,), device=tokens.device)
        noise = torch.randn(rows, self.channels, device=tokens.device)
        return {"diffusion": self.token_losses(tokens, condition, t, noise).mean()}

    def token_losses(
        self, tokens: Tensor, condition: Condition, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Losses [K, B, N] of tokens [B, N, C] at steps t [K B N] with noise [K B N, C]."""
        hidden = self.score(at_least_float32(tokens), condition).hidden
        assert hidden is not None
        repeats = len(t) // tokens[..., 0].numel()
        z = (hidden + self.z_positions).flatten(0, 1).repeat(repeats, 1)
        clean = at_least_float32(tokens).flatten(0, 1).repeat(repeats, 1)
        process = full_process()
        eps, v = self.flow_head(process.noisy(clean, t, noise).to(z.dtype), t, z)
        error, bound = process.losses(eps, v, clean, t, noise)
        return (error + bound).unflatten(0, (repeats, *tokens.shape[:2]))


def start_at_grid(backbone: MaskedBackbone) -> None:
    """Tables of positions begin as sines and cosines of row and column, and are learned from there."""
    side = isqrt(backbone.length)
    place = torch.arange(backbone.length)
    tables = (backbone.encoder_positions, backbone.decoder_positions, backbone.z_positions)
    with torch.no_grad():
        for table in tables:
            # The buffer of class embeddings, where there is one, stands before the grid.
            table[0, -backbone.length :] = sincos_table(place // side, place % side, table.shape[2])


class GridMAR(MAR):
    """Knows from the start which patches are neighbours; `options` are MAR's."""

    def __init__(self, layout: Layout, options: dict[str, Any]) -> None:
        super().__init__(layout, **options)
        start_at_grid(self.backbone)


class GridTokenBridge(TokenBridge):
    """Knows from the start which patches are neighbours; `options` are TokenBridge's."""

    def __init__(self, layout: Layout, options: dict[str, Any]) -> None:
        super().__init__(layout, **options)
        start_at_grid(self.backbone)


class RasterMAR(MAR):
    """Known patches are those before the others in raster order, in training and in sampling."""

    def draw_mask(self, batch: int) -> Tensor:
        count = ceil(self.length * draw_share(self.least_masked))
        return (torch.arange(self.length) >= self.length - count).expand(batch, -1)

    def plan(self, noise: Noise, steps: int | None = None) -> Entities:
        """One order for all images."""
        return self.sets(torch.arange(self.length), steps or self.steps)


class UniformMAR(MAR):
    """Any share of the patches is known in training, none rarer than another; `options` are MAR's."""

    def __init__(self, layout: Layout, options: dict[str, Any]) -> None:
        super().__init__(layout, **options)

    def draw_mask(self, batch: int) -> Tensor:
        count = int(torch.randint(1, self.length + 1, ()))
        orders = torch.rand(batch, self.length).argsort(1)
        return orders < count
