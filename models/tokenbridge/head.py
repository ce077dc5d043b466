"""TokenBridge's channel head (arXiv 2503.16430): the indices of a token's channels, one after the
other, given its vector z.

Position i of P predicts the i-th channel in an order, or a group of channels as one class. A small
transformer runs over the positions, causally; every position is modulated by z and by its own step.
All positions at once, none given another's class, are the paper's ablation (`parallel`).

Shapes: n tokens, P positions, V_i classes of position i, C channels, D widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.kv_cache import KVCache, NoCache
from tessellar.layers.precision import at_least_float32
from tessellar.models.parts.modulated_block import ModulatedBlock, ModulatedPass
from tessellar.protocol.distribution import Distribution, Draws, FactorLogits, Head
from tessellar.protocol.noise import Noise

FirstInput = Literal["train_consistent", "official"]


@dataclass(frozen=True)
class ChannelClasses:
    """Channels in an order, `group` of them to a class.

    Channel `order[i group]` varies slowest in class i. Raises UserError where the groups do not
    divide the channels, and for an order that does not name each channel once.
    """

    vocabs: tuple[int, ...]
    order: tuple[int, ...]
    group: int = 1

    def __post_init__(self) -> None:
        count = len(self.vocabs)
        if sorted(self.order) != list(range(count)):
            raise UserError(f"channel_order must name each of the {count} channels once")
        if self.group < 1 or count % self.group:
            raise UserError(f"groups of {self.group} do not divide {count} channels")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Classes of each position."""
        return tuple(prod(vocabs) for vocabs in self._vocabs)

    @property
    def _vocabs(self) -> list[tuple[int, ...]]:
        ordered = [self.vocabs[channel] for channel in self.order]
        starts = range(0, len(ordered), self.group)
        return [tuple(ordered[start : start + self.group]) for start in starts]

    def classes(self, tokens: Tensor) -> Tensor:
        """Tokens [..., C] to classes [..., P]."""
        made = []
        ordered = tokens[..., list(self.order)].split(self.group, dim=-1)
        for vocabs, indices in zip(self._vocabs, ordered, strict=True):
            joint = torch.zeros_like(indices[..., 0])
            for vocab, index in zip(vocabs, indices.unbind(-1), strict=True):
                joint = joint * vocab + index
            made.append(joint)
        return torch.stack(made, -1)

    def tokens(self, classes: Tensor) -> Tensor:
        """Classes [..., P] to tokens [..., C]; the inverse of `classes`."""
        ordered: list[Tensor] = []
        for vocabs, joint in zip(self._vocabs, classes.unbind(-1), strict=True):
            indices: list[Tensor] = []
            for vocab in reversed(vocabs):
                indices.append(joint % vocab)
                joint = joint.div(vocab, rounding_mode="floor")
            ordered += reversed(indices)
        back = torch.tensor(self.order).argsort().tolist()
        return torch.stack([ordered[place] for place in back], -1)


class ChannelHead(nn.Module):
    """Vectors z [n, D] to logits of `sizes` classes, in a transformer of `width` and `depth`.

    The first input is z's projection, later ones the classes before. `first_input` "official" adds
    the first step's embedding to it outside of training, as the official sampler does and its
    training does not.
    """

    def __init__(
        self,
        condition_dim: int,
        sizes: Sequence[int],
        width: int,
        depth: int,
        num_heads: int,
        dropout: float = 0.1,
        parallel: bool = False,
        first_input: FirstInput = "train_consistent",
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"{num_heads} heads do not divide the head's width {width}")
        count = len(sizes)
        self.sizes = tuple(sizes)
        self.num_heads = num_heads
        self.parallel = parallel
        self.first_input: FirstInput = first_input
        self.condition = nn.Linear(condition_dim, width)
        self.position = nn.Parameter(torch.empty(1, count, width))
        self.step = nn.Parameter(torch.empty(1, count, width))
        read = () if parallel else self.sizes[:-1]
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in read)
        self.blocks = nn.ModuleList(
            ModulatedBlock(width, num_heads, 4 * width, dropout, "auto") for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.last_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.last_modulation = Modulation(width, count=2)
        self.outputs = nn.ModuleList(nn.Linear(width, size) for size in self.sizes)

    def init_weights(self) -> None:
        """Linear layers Xavier, tables N(0, 0.02), modulations zero; embeddings of classes keep
        torch's N(0, 1), as published.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                zero = "modulation" in name
                (nn.init.zeros_ if zero else nn.init.xavier_uniform_)(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.position, self.step):
            nn.init.normal_(table, std=0.02)

    def forward(self, z: Tensor, classes: Tensor, sampled: bool = False) -> list[Tensor]:
        """Logits [n, V_i] of all positions, given the `classes` [n, P] before each of them.

        `sampled` asks for what sampling sees, where that differs from training.
        """
        condition = self.condition(z)[:, None]
        modulation = condition + self.step
        inputs = self._first(condition, sampled)
        if self.parallel:
            x = inputs.expand(-1, len(self.sizes), -1)
        else:
            before = classes[:, :-1].unbind(1)
            known = [table(ids) for table, ids in zip(self.embeddings, before, strict=True)]
            x = torch.cat([inputs, *(vector[:, None] for vector in known)], 1)
        cache = NoCache(z.device)
        # Causal; where positions are drawn at once no input holds a class, and all may see all.
        numbers = torch.arange(len(self.sizes))[None]
        slots = cache.reserve(torch.zeros_like(numbers) if self.parallel else numbers)
        hidden = self._run(x + self.position, ModulatedPass(modulation, cache, slots))
        return [output(hidden[:, i]) for i, output in enumerate(self.outputs)]

    def steps(self, z: Tensor) -> Head:
        """The head for one walk through the positions of tokens z [B, T, D], behind a cache: each
        call feeds one class more.
        """
        shape = z.shape[:2]
        condition = self.condition(z.flatten(0, 1))[:, None]
        modulation = condition + self.step
        if self.parallel:
            at_once = self(z.flatten(0, 1), torch.empty(0), sampled=True)
            return lambda known, position: at_least_float32(at_once[position]).unflatten(0, shape)
        width = condition.shape[-1]
        cache = KVCache(
            len(self.blocks),
            len(condition),
            heads=self.num_heads,
            capacity=len(self.sizes),
            dim=width // self.num_heads,
            dtype=condition.dtype,
            device=z.device,
        )

        def logits(known: Tensor, position: int) -> Tensor:
            if position == 0:
                x = self._first(condition, sampled=True)
            else:
                x = self.embeddings[position - 1](known[..., position - 1].flatten())[:, None]
            slots = cache.reserve(torch.tensor([[position]]))
            own = modulation[:, position : position + 1]
            x = x + self.position[:, position : position + 1]
            hidden = self._run(x, ModulatedPass(own, cache, slots))
            cache.commit()
            return at_least_float32(self.outputs[position](hidden[:, 0])).unflatten(0, shape)

        return logits

    def _first(self, condition: Tensor, sampled: bool) -> Tensor:
        """Input of the first position [n, 1, D]."""
        if sampled and self.first_input == "official":
            return condition + self.step[:, :1]
        return condition

    def _run(self, x: Tensor, shared: ModulatedPass) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, number, shared)
        scale, shift = self.last_modulation(shared.condition)
        return modulate(self.last_norm(self.norm(x)), scale, shift)


@dataclass(frozen=True)
class ChannelLogits(Distribution):
    """T tokens of C channels: the classes of `inner`, position after position, as channels."""

    inner: FactorLogits
    channels: ChannelClasses
    hidden: Tensor | None = None

    @classmethod
    def of(cls, head: ChannelHead, channels: ChannelClasses, z: Tensor) -> "ChannelLogits":
        """What the head predicts of vectors z [B, T, D]."""
        shape = (z.shape[0], z.shape[1])

        def uncached(known: Tensor, position: int) -> Tensor:
            logits = head(z.flatten(0, 1), known.flatten(0, 1), sampled=True)[position]
            return at_least_float32(logits).unflatten(0, shape)

        order = tuple(range(len(channels.sizes)))
        inner = FactorLogits(uncached, order, shape, z.device, begin=lambda: head.steps(z))
        return cls(inner, channels, hidden=z)

    def sample(self, settings: Draws, noise: Noise) -> Tensor:
        return self.channels.tokens(self.inner.sample(settings, noise))

    def log_prob(self, tokens: Tensor) -> Tensor:
        return self.inner.log_prob(self.channels.classes(tokens))
