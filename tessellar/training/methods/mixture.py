"""TokenUnify's mixture of objectives over one sequence of tokens (arXiv 2405.16847).

Random-token prediction hides some places and asks for them, next-token prediction asks for the one
behind a prefix, next-all-token prediction for all of them behind it. What is hidden, what is put in
its place and how the three are weighed over a run are functions here, for tokens of any kind
(indices, vectors, patches of pixels) and any backbone.

`MixtureObjective` is the mixture for a generator of categorical tokens that is causal: next-token is
its ordinary teacher forcing, next-all a small network that tells every later token from the state
behind a prefix, random-token a pass in which every position sees all others and the hidden tokens are
random ones with a mark. What sampling and exports see does not change. The official objectives are
for pixels of volumes: there next-token is one patch an image, and next-all the whole volume.

Shapes: B samples, N places, D width of the generator, P prefixes, T tokens asked for, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.models.parts.prefix_transformer import PrefixTransformer, generated
from tessellar.protocol.arguments import COUNTS, SHARES, SIZES, in_ranges
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.training.methods.context_noise import replaced, require_teacher_forcing


def hidden_at(places: Tensor, length: int) -> Tensor:
    """Which of N places [B, N] are among `places` [B, n]."""
    hidden = torch.zeros(len(places), length, dtype=torch.bool, device=places.device)
    return hidden.scatter(1, places, True)


def random_places(batch: int, length: int, ratio: float) -> Tensor:
    """floor(ratio N) different places [B, n] of each sample, drawn uniformly."""
    return torch.rand(batch, length).argsort(1)[:, : int(ratio * length)]


def hidden_behind(counts: Tensor, length: int) -> Tensor:
    """Which of N places [B, N] lie behind the first `counts` [B]."""
    return torch.arange(length, device=counts.device) >= counts[:, None]


def filled(tokens: Tensor, hidden: Tensor, fill: Tensor) -> Tensor:
    """Tokens [B, N, ...] with `fill` (the same shape, or one value) at the hidden places [B, N]."""
    chosen = hidden.reshape(*hidden.shape, *[1] * (tokens.ndim - 2))
    return torch.where(chosen, fill.to(tokens.dtype), tokens)


class Weights(NamedTuple):
    """How much each objective counts now; one that counts 0 is not computed."""

    random: float
    next: float
    next_all: float


class MixtureSchedule(ABC):
    """How the objectives share a run."""

    @abstractmethod
    def weights(self, epoch: int, progress: float) -> Weights:
        """Of epoch number `epoch`, at the share `progress` of the run in [0, 1]."""


@in_ranges
@dataclass(frozen=True)
class Joint(MixtureSchedule):
    """All at once, weighed: the official `auto_mode 1` has next and next-all at 1."""

    random_weight: float = 0.0
    next_weight: float = 1.0
    next_all_weight: float = 1.0

    def weights(self, epoch: int, progress: float) -> Weights:
        return Weights(self.random_weight, self.next_weight, self.next_all_weight)


@in_ranges
@dataclass(frozen=True)
class Alternating(MixtureSchedule):
    """Next-token for `every` epochs, next-all for as many, and so on: the official `auto_mode 0`."""

    every: int = 100

    def weights(self, epoch: int, progress: float) -> Weights:
        is_next = epoch // self.every % 2 == 0
        return Weights(0.0, float(is_next), float(not is_next))


@in_ranges
@dataclass(frozen=True)
class Stages(MixtureSchedule):
    """Random tokens for the first `share` of the run, then next and next-all together: the paper's
    two runs, one after the other, in one.
    """

    share: float = 0.5

    def weights(self, epoch: int, progress: float) -> Weights:
        if progress < self.share:
            return Weights(1.0, 0.0, 0.0)
        return Weights(0.0, 1.0, 1.0)


@in_ranges
@dataclass(frozen=True)
class Mixture:
    """Options: `schedule` weighs the objectives over the run.

    Random-token: the share of hidden tokens is drawn in [`least_hidden`, `most_hidden`]. Next-all:
    `prefixes` of each image are asked for `later` tokens (0: all) behind them, by a network of width
    `hidden`.
    """

    ranges: ClassVar = {
        "least_hidden": SHARES,
        "most_hidden": SHARES,
        "prefixes": SIZES,
        "later": COUNTS,
    }

    schedule: MixtureSchedule = Joint()
    least_hidden: float = 0.4
    most_hidden: float = 0.4
    prefixes: int = 4
    later: int = 16
    hidden: int = 512


class MixtureObjective(nn.Module):
    """The losses of a mixture, and what they train beside the generator: the mark of hidden tokens
    and the network of next-all.

    Raises UserError for a generator that does not read and predict one categorical token a position.
    """

    def __init__(self, settings: Mixture, generator: Generator) -> None:
        super().__init__()
        model = require_teacher_forcing(generator, "mixture")
        kind = type(model)
        one_each = kind.num_reads is PrefixTransformer.num_reads and set(model.entities.sizes) == {
            1
        }
        if not one_each or kind.loss is not PrefixTransformer.loss:
            raise UserError(
                f"mixture needs a generator that reads and predicts one token a position, such as LlamaGen; "
                f"{kind.__name__} does not"
            )
        if settings.least_hidden > settings.most_hidden:
            raise UserError(
                f"least_hidden {settings.least_hidden} is above most_hidden {settings.most_hidden}"
            )
        self.settings = settings
        width = model.num_heads * model.head_dim
        length = model.layout.length
        vocab = int(model.layout.vocab().max())
        self.mark = nn.Parameter(torch.zeros(width))
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        self.later = nn.Sequential(
            nn.Linear(width, settings.hidden), nn.SiLU(), nn.Linear(settings.hidden, vocab)
        )

    def forward(
        self,
        generator: PrefixTransformer,
        tokens: Tensor,
        condition: Condition,
        epoch: int,
        progress: float,
    ) -> dict[str, Tensor]:
        """Weighed losses of tokens [B, N] by their names; those of weight 0 are left out."""
        weights = self.settings.schedule.weights(epoch, progress)
        condition = generator.drop_condition(condition)
        entities = generator.training_order(len(tokens))
        terms: dict[str, Tensor] = {}
        if weights.next or weights.next_all:
            scores = generator.score(tokens, condition, entities)
            targets = generated(tokens, entities)
            for name, value in generator.losses_of(scores, targets).items() if weights.next else ():
                terms[name] = weights.next * value
            if weights.next_all:
                assert scores.hidden is not None
                all_later = self.next_all(scores.hidden, targets, entities)
                terms["next_all"] = weights.next_all * all_later
        if weights.random:
            hidden_tokens = self.random(generator, tokens, condition, entities)
            terms["random"] = weights.random * hidden_tokens
        return terms

    def next_all(self, hidden: Tensor, targets: Tensor, entities: Entities) -> Tensor:
        """Cross-entropy of tokens behind some prefixes, of hidden states [B, N, D] that have read so
        many tokens as their index says; `targets` [B, N] in generation order.
        """
        batch, length = targets.shape
        device = targets.device
        counts = torch.randint(1, length, (batch, self.settings.prefixes), device=device)
        if self.settings.later:
            share = torch.rand(*counts.shape, self.settings.later, device=device)
            ranks = counts[..., None] + (share * (length - counts)[..., None]).long()
        else:
            ranks = torch.arange(length, device=device).expand(*counts.shape, length)
        logits = self.later_logits(hidden, counts, ranks, entities)
        rows = torch.arange(batch, device=device)[:, None, None]
        asked = targets[rows, ranks]
        each = F.cross_entropy(logits.flatten(0, 2), asked.flatten(), reduction="none")
        behind = (ranks >= counts[..., None]).flatten()
        return (each * behind).sum() / behind.sum()

    def later_logits(
        self, hidden: Tensor, counts: Tensor, ranks: Tensor, entities: Entities
    ) -> Tensor:
        """Scores [B, P, T, V] of the tokens of generation `ranks` [B, P, T], each from the state that
        has read `counts` [B, P] tokens.
        """
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        read = hidden[rows, counts]
        order = entities.order.to(hidden.device).expand(len(hidden), -1)
        places = order[rows[..., None], ranks]
        return at_least_float32(self.later(read[:, :, None] + self.place[places]))

    def random(
        self, generator: PrefixTransformer, tokens: Tensor, condition: Condition, entities: Entities
    ) -> Tensor:
        """Cross-entropy of hidden tokens, every position seeing all others."""
        batch, length = tokens.shape
        least, most = self.settings.least_hidden, self.settings.most_hidden
        ratio = least + (most - least) * float(torch.rand(()))
        places = random_places(batch, length, ratio).to(tokens.device)
        hidden = hidden_at(places, length)
        with hiding(generator, hidden, self.mark):
            scores = generator.score(tokens, condition, entities)
        assert isinstance(scores, Logits)
        asked = generated(hidden, entities)
        each = -scores.log_prob(generated(tokens, entities))
        return (each * asked).sum() / asked.sum().clamp(min=1)


@contextmanager
def hiding(generator: PrefixTransformer, hidden: Tensor, mark: Tensor) -> Iterator[None]:
    """Inside, teacher forcing reads random tokens with `mark` [D] added where `hidden` [B, N] is
    True, and every position sees all others.
    """

    def read(tokens: Tensor, entities: Entities) -> Tensor:
        vocab = generator.layout.vocab().to(tokens.device)
        share = torch.rand(tokens.shape, device=tokens.device, dtype=torch.float64)
        in_order.append(generated(hidden, entities))
        return replaced(tokens, hidden, (share * vocab).to(tokens.dtype))

    def mark_hidden(inputs: Tensor, index: Tensor) -> Tensor:
        index = index.to(inputs.device).expand(len(inputs), -1)
        return inputs + in_order[-1].gather(1, index)[..., None] * mark.to(inputs.dtype)

    in_order: list[Tensor] = []
    generator.reader = read
    generator.veil = mark_hidden
    generator.sees_all = True
    try:
        yield
    finally:
        generator.reader = None
        generator.veil = None
        generator.sees_all = False
