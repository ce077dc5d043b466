"""Redrawing: every entity behind the first is drawn, then drawn again given its own draft (TokenFlow's
multi-step sampling, arXiv 2412.03069).

The tokens of a scale are independent given the coarser ones; a second look at the map that holds
them makes them agree. The last draw counts, so the law is not the generator's own: approximate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tessellar.protocol.choice import Choice
from tessellar.protocol.distribution import Draws, Solver
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import EntityByEntity, Step, decode_from
from tessellar.sampling.report import Recorder, forward


@dataclass(frozen=True)
class WithChoice:
    """Settings of a draw whose choice is another."""

    choice: Choice
    flow: Solver
    diffusion: Solver


def redrawn_from(
    generator: Generator,
    state: State,
    again: Sequence[Choice],
    settings: Draws,
    noise: Noise,
    tokens: Tensor,
    recorder: Recorder | None = None,
) -> Iterator[Step]:
    """Entity by entity, a step for its draft and one for each choice of `again`."""
    for n in range(state.entities.count):
        for step in decode_from(
            generator, state, settings, noise, tokens, first=n, last=n + 1, recorder=recorder
        ):
            tokens = step.tokens
            yield step
        # The first entity reads the condition alone, which a draft does not change.
        for choice in again if n else ():
            with forward(recorder, tokens.device):
                distribution = generator.predict_again(state, tokens)
            entity = torch.full((state.batch,), n)
            if recorder is not None:
                nothing = torch.zeros_like(entity)
                recorder.window(entity, nothing, nothing, nothing)
            draws = WithChoice(choice, settings.flow, settings.diffusion)
            tokens = state.entities.put(tokens, entity, 1, distribution.sample(draws, noise))
            yield Step(n, distribution, tokens)


@dataclass(frozen=True)
class Redrawn(EntityByEntity):
    """Entity by entity, each but the first drawn again by every choice of `again`, given the draft
    before it. Approximate.

    For generators that read such drafts (TokenFlow). `choice` draws the first drafts.
    """

    again: tuple[Choice, ...] = (Choice(temperature=0.0),)

    exact: ClassVar[bool] = False

    def steps_of(
        self,
        generator: Generator,
        state: State,
        settings: Draws,
        noise: Noise,
        tokens: Tensor,
        recorder: Recorder | None,
    ) -> Iterator[Step]:
        return redrawn_from(
            generator, state, self.again, settings, noise, tokens, recorder=recorder
        )
