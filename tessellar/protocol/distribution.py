"""Distributions: what a generator predicts of an entity, guidance included, and how it is drawn.

Each kind picks what draws it from the sampling settings (`Draws`), so that no loop and no generator
names one.

`Logits`: tokens that are independent given what came before; speculative decoding and search need
this kind. `FactorLogits`: tokens of several sub-tokens, one after the other (TokenBridge's
channels, Open-MAGVIT2's two halves). `Bits`: tokens of bits, sets of them one after the other
(BAR), or all independent. Both are `Chained`. `Implicit`: known only through a network that a solver
integrates: `ImplicitFlow` (a velocity), `BinaryFlow` (the same, of bits), `ImplicitDiffusion` (noise
and variance of a diffusion head). It has no likelihood.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.layers.linear_cross_entropy import linear_cross_entropy
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.choice import Choice
from tessellar.protocol.noise import Noise

Model = Callable[[Tensor, Tensor], Tensor]
"""(x [B, T, C], time, a scalar tensor) to what the solver integrates, guidance inside."""


Head = Callable[[Tensor, int], Tensor]
"""(known [B, T, F], sub-token) to its logits [B, T, V]."""


Walk = Callable[[Tensor, int], Tensor]
"""(known [B, T, F], stage) to the logits [B, T, n, V] of the n sub-tokens of a stage; in `known` those of earlier
stages hold their values, all others 0."""


class Solver(Protocol):
    """What draws from an Implicit: a `Flow`, a `DiffusionSampler`, or anything with this method."""

    def integrate(
        self, model: Model, shape: tuple[int, int], noise: Noise, entity: int, count: int
    ) -> Tensor:
        """[B, T, C] of `shape` (T, C), for entity number `entity` of `count`: solvers may spend
        less on later ones.
        """
        ...


class Draws(Protocol):
    """How tokens are drawn, for every kind of head: `tessellar.sampling.settings.Sampling` is one."""

    @property
    def choice(self) -> Choice: ...

    @property
    def flow(self) -> Solver: ...

    @property
    def diffusion(self) -> Solver: ...


class Distribution(ABC):
    """Prediction of T tokens of each image, guidance included.

    `hidden` [B, T, D] are the hidden states that it was made from, where the generator gives them
    along: drafters on hidden states read them. D and T are the generator's own (one state may stand
    for several tokens).
    """

    hidden: Tensor | None = None

    @abstractmethod
    def sample(self, settings: Draws, noise: Noise) -> Tensor:
        """Tokens [B, T], [B, T, F] or [B, T, C], drawn as the part of `settings` for this kind
        says.
        """

    def log_prob(self, tokens: Tensor) -> Tensor | None:
        """Log-probability [B, T] of each token of `tokens` [B, T, ...]; None where there is no
        likelihood.
        """
        return None

    def probs(self) -> Tensor | None:
        """Probabilities [B, T, V] of one index a token; None for every other kind."""
        return None

    def nats(self, tokens: Tensor) -> Tensor | None:
        """-log p [B] of each image's T tokens together; None where there is no likelihood."""
        log_prob = self.log_prob(tokens)
        return None if log_prob is None else -log_prob.sum(1)

    def with_hidden(self, hidden: Tensor) -> Self:
        """The same distribution with the hidden states that it was made from."""
        return replace(self, hidden=hidden)  # type: ignore[type-var]


@dataclass(frozen=True)
class Implicit(Distribution):
    """One entity of T tokens with C channels; `entity` of `count` says how far decoding is."""

    model: Model
    shape: tuple[int, int]
    entity: int = 0
    count: int = 1
    hidden: Tensor | None = None

    @abstractmethod
    def solver(self, settings: Draws) -> Solver:
        """The part of the settings that draws this kind."""

    def sample(self, settings: Draws, noise: Noise) -> Tensor:
        solver = self.solver(settings)
        return solver.integrate(self.model, self.shape, noise, entity=self.entity, count=self.count)


@dataclass(frozen=True)
class ImplicitFlow(Implicit):
    """The model gives velocities [B, T, C] at times in [0, 1] (flow matching)."""

    def solver(self, settings: Draws) -> Solver:
        return settings.flow


@dataclass(frozen=True)
class BinaryFlow(ImplicitFlow):
    """A flow over tokens of bits as the numbers -1 and 1 (BitDance): the sign of what the solver ends
    with, exactly 0 as a bit of 0.
    """

    def sample(self, settings: Draws, noise: Noise) -> Tensor:
        return (super().sample(settings, noise) > 0).long()


@dataclass(frozen=True)
class ImplicitDiffusion(Implicit):
    """The model gives noise and variance share [B, T, 2 C] at original step numbers (a diffusion
    head).
    """

    def solver(self, settings: Draws) -> Solver:
        return settings.diffusion


@dataclass(frozen=True)
class Logits(Distribution):
    """Categorical logits [B, T, V], float32; a vocabulary smaller than V is padded with -inf."""

    logits: Tensor
    hidden: Tensor | None = None

    def sample(self, settings: Draws, noise: Noise) -> Tensor:
        return settings.choice.draw(self.logits, noise)

    def log_prob(self, tokens: Tensor) -> Tensor:
        return _log_prob(self.logits, tokens)

    def probs(self) -> Tensor:
        return self.logits.float().softmax(-1)

    def cross_entropy(self, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats a token of `tokens` [B, T]; `weight` [B] weighs (or drops)
        whole samples.
        """
        loss = F.cross_entropy(self.logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return _mean_loss(loss.view(tokens.shape), weight)


def _mean_loss(loss: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of losses [B, T] of tokens; `weight` [B] weighs whole samples."""
    if weight is None:
        return loss.mean()
    eps = torch.finfo(loss.dtype).eps
    return (loss * weight[:, None]).sum() / (weight.sum() * loss.shape[1]).clamp(min=eps)


@dataclass(frozen=True)
class ProjectedLogits(Distribution):
    """Categorical logits `states weight^T` [B, T, V] of `states` [B, T, D] and `weight` [V, D], that
    are never held at once for a loss: what training with many codes takes.
    """

    states: Tensor
    weight: Tensor
    hidden: Tensor | None = None

    def together(self) -> Logits:
        """The same with its table of logits."""
        return Logits(at_least_float32(F.linear(self.states, self.weight)), self.hidden)

    def sample(self, settings: Draws, noise: Noise) -> Tensor:
        return self.together().sample(settings, noise)

    def probs(self) -> Tensor:
        return self.together().probs()

    def log_prob(self, tokens: Tensor) -> Tensor:
        states = self.states.flatten(0, 1)
        return -linear_cross_entropy(states, self.weight, tokens.flatten()).view(tokens.shape)

    def cross_entropy(self, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        """As `Logits.cross_entropy`."""
        return _mean_loss(-self.log_prob(tokens), weight)


class Chained(Distribution):
    """T tokens of F sub-tokens each, in stages: those of a stage are independent given the stages
    before it.

    `stages` are the sub-tokens of each stage; together they are all of them.
    """

    shape: tuple[int, int]  # B, T
    device: torch.device | str

    @property
    @abstractmethod
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the sub-tokens of each stage."""

    @abstractmethod
    def walk(self) -> Walk:
        """What gives the logits of the stages, good for one walk through all of them, in order."""

    def choice_at(self, choice: Choice, stage: int) -> Choice:
        """How the sub-tokens of a stage are drawn."""
        return choice

    @property
    def count(self) -> int:
        """Sub-tokens F of a token."""
        return sum(map(len, self.stages))

    def sample(self, settings: Draws, noise: Noise) -> Tensor:
        walk = self.walk()
        tokens = torch.zeros(*self.shape, self.count, dtype=torch.int64, device=self.device)
        for stage, members in enumerate(self.stages):
            choice = self.choice_at(settings.choice, stage)
            tokens = with_values(tokens, members, choice.draw(walk(tokens, stage), noise))
        return tokens

    def log_prob(self, tokens: Tensor) -> Tensor:
        walk = self.walk()
        known = torch.zeros_like(tokens)
        total = torch.zeros(tokens.shape[:2], device=tokens.device)
        for stage, members in enumerate(self.stages):
            values = tokens[..., list(members)]
            total = total + _log_prob(walk(known, stage), values).sum(-1)
            known = with_values(known, members, values)
        return total


@dataclass(frozen=True)
class FactorLogits(Chained):
    """T tokens of F sub-tokens each, drawn one after the other in `order`, each given those before
    it.

    `head(known, factor)` gives the logits [B, T, V] of sub-token `factor`, guidance included; in
    `known` [B, T, F] the sub-tokens before it in `order` hold their values, all others 0. `begin`,
    where there is one, makes the same head with a cache, good for one walk through `order`.
    `together`, where there is one, gives the logits of all sub-tokens of known tokens [B, T, F] at
    once, in their own order.
    """

    head: Head
    order: tuple[int, ...]
    shape: tuple[int, int]  # B, T
    device: torch.device | str = "cpu"
    hidden: Tensor | None = None
    begin: Callable[[], Head] | None = None
    together: Callable[[Tensor], Sequence[Tensor]] | None = None

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        return tuple((factor,) for factor in self.order)

    def walk(self) -> Walk:
        head = self.head if self.begin is None else self.begin()
        return lambda known, stage: head(known, self.order[stage])[..., None, :]

    def choice_at(self, choice: Choice, stage: int) -> Choice:
        return choice.of_factor(self.order[stage])

    def log_prob(self, tokens: Tensor) -> Tensor:
        if self.together is None:
            return super().log_prob(tokens)
        each = [
            _log_prob(logits, ids)
            for logits, ids in zip(self.together(tokens), tokens.unbind(-1), strict=True)
        ]
        return torch.stack(each).sum(0)

    def cross_entropy(self, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats a token of `tokens` [B, T, F]: the mean over tokens of the sum over
        sub-tokens; `weight` [B] weighs (or drops) whole samples.
        """
        loss = -self.log_prob(tokens)
        if weight is None:
            return loss.mean()
        count = (weight.sum() * tokens.shape[1]).clamp(min=torch.finfo(loss.dtype).eps)
        return (loss * weight[:, None]).sum() / count


@dataclass(frozen=True)
class Bits(Chained):
    """T tokens of n bits each: `sets` of bits one after the other, the bits of a set independent
    given the sets before.

    `head(known, shown)` gives the log-odds [B, T, n] that bits are 1, guidance included; in `known`
    [B, T, n] the bits of earlier sets, those that are True in `shown` [n], hold their values, all
    others 0.
    """

    head: Callable[[Tensor, Tensor], Tensor]
    sets: tuple[tuple[int, ...], ...]
    shape: tuple[int, int]  # B, T
    device: torch.device | str = "cpu"
    hidden: Tensor | None = None

    @classmethod
    def independent(cls, log_odds: Tensor) -> "Bits":
        """All bits at once, from log-odds [B, T, n]."""
        batch, length, count = log_odds.shape
        return cls(
            lambda known, shown: log_odds, (tuple(range(count)),), (batch, length), log_odds.device
        )

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        return self.sets

    def walk(self) -> Walk:
        shown = torch.zeros(len(self.sets), self.count, dtype=torch.bool, device=self.device)
        for stage, before in enumerate(self.sets[:-1]):
            shown[stage + 1 :, list(before)] = True

        def two_logits(known: Tensor, stage: int) -> Tensor:
            """The log-odds of a stage's bits as logits [..., 2] of their two values."""
            log_odds = self.head(known, shown[stage])[..., list(self.sets[stage])]
            return torch.stack([torch.zeros_like(log_odds), log_odds], -1)

        return two_logits


def _log_prob(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability [...] of `ids` [...] under logits [..., V], in float32."""
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def with_values(tokens: Tensor, members: tuple[int, ...], values: Tensor) -> Tensor:
    """A copy of tokens [B, T, F] with `values` [B, T, n] as the sub-tokens `members`."""
    index = torch.tensor(members, device=tokens.device)
    return tokens.index_copy(-1, index, values)
