"""Hita's generator: a Llama over holistic tokens, then patches, with a vocabulary for each (arXiv
2507.02358).

Two embedding tables and two heads, chosen by position. Where a holistic token is predicted a
learned vector is added to queries and keys of every layer; from the first patch on positions are
LlamaGen's 2D rotation, whose first entry is zero. The official cached sampler looks the last
holistic token up in the patch table, other than training: `lookup="official"` reproduces that for
imported weights, "train_consistent" does not.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import NoCache
from tessellar.layers.llama import Positions, grid_angles
from tessellar.layers.precision import at_least_float32
from tessellar.models.parts.llama import (
    SIZE_B,
    SIZE_L,
    SIZE_XL,
    SIZE_XXL,
    ClassPrefix,
    LlamaGenerator,
)
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import State
from tessellar.protocol.layout import Categorical, Layout

Lookup = Literal["train_consistent", "official"]


def two_vocabularies(layout: Layout) -> tuple[int, int]:
    """Vocabularies of a sequence and a grid behind it; raises UserError for any other layout."""
    kinds = [segment.kind for segment in layout.segments]
    shapes = [len(segment.shape) for segment in layout.segments]
    if shapes != [1, 2] or not all(isinstance(kind, Categorical) for kind in kinds):
        raise UserError(
            f"Hita's generator reads a categorical sequence, then a grid; this tokenizer gives {layout}"
        )
    return kinds[0].vocab, kinds[1].vocab  # type: ignore[union-attr]


class HitaAR(LlamaGenerator):
    """Class-conditional next-token generator over a holistic segment and a grid."""

    predicts_places = True

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        lookup: Lookup = "train_consistent",
        attention: str = "auto",
    ) -> None:
        super().__init__(
            width,
            depth,
            num_heads=num_heads,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            dropout=dropout,
            drop_path=0.0,
            attention=attention,
        )
        self.layout = layout
        self.entities = token_order(layout)
        self.vocabularies = two_vocabularies(layout)
        self.lookup = lookup
        self.holistic = layout.segments[0].length
        self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        self.holistic_embedding = nn.Embedding(self.vocabularies[0], width)
        self.patch_embedding = nn.Embedding(self.vocabularies[1], width)
        self.holistic_positions = nn.Parameter(torch.empty(self.holistic, width))
        self.holistic_output = nn.Linear(width, self.vocabularies[0], bias=False)
        self.patch_output = nn.Linear(width, self.vocabularies[1], bias=False)
        self.set_rotations(*self.rotations(rope_base))
        self.init_weights()

    def init_weights(self, zero_init_residual: bool = False) -> None:
        """As every Llama generator, and both heads 0, so that the first losses are exactly ln V."""
        super().init_weights(zero_init_residual)
        nn.init.normal_(self.holistic_positions, std=0.02)
        nn.init.zeros_(self.holistic_output.weight)
        nn.init.zeros_(self.patch_output.weight)

    def rotations(self, base: float) -> tuple[Tensor, Tensor]:
        """cos, sin [S + 1 + N, head_dim / 2]: none before the boundary, zero at it, then the
        grid's.
        """
        height, width = self.layout.segments[1].shape
        cell = torch.arange(height * width)
        #   place       0 .. S - 1                    S               S + 1 ..
        #   reads       class, holistic 0 .. S - 2    holistic S - 1  patches in raster order
        #   rotation    none (cos 1, sin 0)           zero            of the grid
        angles = grid_angles(cell // width, cell % width, self.head_dim, base)
        before = torch.zeros(self.holistic, angles.shape[1])
        zero = torch.zeros(1, angles.shape[1])
        return torch.cat([before + 1, zero, angles.cos()]), torch.cat([before, zero, angles.sin()])

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        return self._look_up(tokens, index, self.holistic)

    def _embed(self, state: State, tokens: Tensor, index: Tensor) -> Tensor:
        """The official quirk is the sampler's alone: training and scoring keep to the right tables."""
        quirk = self.lookup == "official" and not isinstance(state.cache, NoCache)
        return self._look_up(
            state.rows(tokens), index, self.holistic - 1 if quirk else self.holistic
        )

    def _look_up(self, tokens: Tensor, index: Tensor, boundary: int) -> Tensor:
        index = index.clamp(max=self.layout.length - 1).to(tokens.device)
        ids = tokens.gather(1, index.expand(len(tokens), -1))
        holistic = self.holistic_embedding(ids.clamp(max=self.vocabularies[0] - 1))
        patches = self.patch_embedding(ids.clamp(max=self.vocabularies[1] - 1))
        return torch.where((index < boundary)[..., None], holistic, patches)

    def positions(self, place: Tensor, state: State) -> Positions:
        place = place.clamp(max=len(self.rope_cos) - 1).to(self.rope_cos.device)
        bias = F.pad(self.holistic_positions, (0, 0, 0, 1))[place.clamp(max=self.holistic)]
        return Positions(self.rope_cos[place], self.rope_sin[place], bias)

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        return self.head_at(state, hidden, state.entities.steps(first, want))

    def head_at(self, state: State, hidden: Tensor, rank: Tensor) -> Logits:
        entity = state.entities.entity_at(rank)
        rows = state.rows(entity < self.holistic).to(hidden.device)
        is_read = state.input_size is None  # a fixed state gives the host nothing to read
        if is_read and bool(rows.all()):
            logits = self.holistic_output(hidden)
        elif is_read and not bool(rows.any()):
            logits = self.patch_output(hidden)
        else:
            # The smaller vocabulary is padded, so that one tensor holds the logits of both heads.
            widest = max(self.vocabularies)
            holistic = self.holistic_output(hidden)
            patches = self.patch_output(hidden)
            holistic = F.pad(holistic, (0, widest - holistic.shape[-1]), value=-torch.inf)
            patches = F.pad(patches, (0, widest - patches.shape[-1]), value=-torch.inf)
            logits = torch.where(rows[..., None], holistic, patches)
        return Logits(state.merge(at_least_float32(logits), entity))

    def losses_of(
        self, scores: Distribution, targets: Tensor, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Two means with equal weight, whatever the lengths of the segments."""
        assert isinstance(scores, Logits)
        parts = {"holistic": slice(None, self.holistic), "patches": slice(self.holistic, None)}
        losses = {}
        for name, part in parts.items():
            of_part = Logits(scores.logits[:, part])
            losses[name] = of_part.cross_entropy(targets[:, part], weight)
        return losses


# Published variants, of the sizes in models/parts/llama.py; parameters on 128 + 441 tokens of 16,384 codes each
def hita_ar_b(layout: Layout, num_classes: int = 1000) -> HitaAR:
    """136,152,576 parameters."""
    return HitaAR(layout, num_classes=num_classes, **SIZE_B)


def hita_ar_l(layout: Layout, num_classes: int = 1000) -> HitaAR:
    """376,596,480 parameters."""
    return HitaAR(layout, num_classes=num_classes, **SIZE_L)


def hita_ar_xl(layout: Layout, num_classes: int = 1000) -> HitaAR:
    """816,806,400 parameters."""
    return HitaAR(layout, num_classes=num_classes, **SIZE_XL)


def hita_ar_xxl(layout: Layout, num_classes: int = 1000) -> HitaAR:
    """1,461,500,928 parameters."""
    return HitaAR(layout, num_classes=num_classes, **SIZE_XXL)


def hita_ar_2b(layout: Layout, num_classes: int = 1000) -> HitaAR:
    """2,251,549,440 parameters."""
    return HitaAR(layout, width=1920, depth=48, num_heads=32, num_classes=num_classes)
