"""Decoding by confidence: predict all unknown tokens, keep those that the generator is surest of,
repeat (MaskGIT).

arXiv 2202.04200 with TiTok's arccos schedule (arXiv 2406.07550): behind step n of T a share
arccos((n + 1) / T) 2 / pi of the tokens is still unknown. Gumbel noise of a falling temperature
goes into the draw and into the confidence, so the law is not the generator's own: approximate.

Tokens of several indices (TokenBridge, arXiv 2503.16430) are drawn as their head draws them; their
confidence is the mean log-probability of an index.
"""

from dataclasses import dataclass
from math import acos, floor, pi
from typing import ClassVar

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Draws, Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.masked import MaskedGenerator
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_number, check_whole
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.report import Recorder, forward, running


def planned_sizes(length: int, steps: int) -> tuple[int, ...]:
    """Tokens that become known at each step; raises UserError for fewer tokens than steps."""
    if not 1 <= steps <= length:
        raise UserError(f"{steps} steps for {length} tokens; give 1 to {length}")
    unknown = [length]
    for n in range(1, steps):
        left = floor(length * acos(n / steps) * 2 / pi)
        unknown.append(max(1, min(left, unknown[-1] - 1)))
    if min(unknown) < 1 or len(set(unknown)) < len(unknown):
        raise UserError(
            f"{steps} steps are too many for {length} tokens in MaskGIT's schedule; give fewer"
        )
    return tuple(before - after for before, after in zip(unknown, [*unknown[1:], 0], strict=True))


@dataclass(frozen=True)
class MaskGIT(Algorithm):
    """Decoding by confidence (arXiv 2202.04200) of a masked generator, in `steps` evaluations.
    Approximate.

    Draws and confidences have noise of (1 - r) times `temperature` at progress r = (n + 1) / T;
    `anneal` divides the logits by 0.5 + 0.8 (1 - r). The temperature and filters of `choice` have
    no part in it, but for tokens of several indices: those are drawn by `choice`, and noise is in
    the confidence alone.
    """

    steps: int = 8
    temperature: float = 1.0
    anneal: bool = True

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole("steps of MaskGIT", self.steps, least=1)
        check_number("temperature of MaskGIT", self.temperature, least=0)

    @torch.no_grad()
    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance = NO_GUIDANCE,
        recorder: Recorder | None = None,
    ) -> Tensor:
        if not isinstance(generator, MaskedGenerator):
            raise UserError(
                f"algorithm MaskGIT needs a masked generator; {type(generator).__name__} predicts in order"
            )
        if settings.choice != Choice() and generator.layout.is_categorical:
            raise UserError(
                "algorithm MaskGIT has a temperature of its own: set it there, and leave choice as it is"
            )
        batch = condition.batch
        length = generator.layout.length
        sizes = planned_sizes(length, self.steps)
        # The step at which a token became known.
        step_of = torch.full((batch, length), self.steps)
        state = generator.start(
            condition, guidance, Entities(torch.arange(length).expand(batch, -1), sizes)
        )
        tokens = generator.layout.blank(batch).to(noise.device)
        with running(recorder, batch, length, noise.device):
            for n, size in enumerate(sizes):
                rest = 1 - (n + 1) / self.steps
                with forward(recorder, noise.device):
                    predicted = generator.predict_rest(state, tokens)
                spread = self.temperature * rest
                known = (step_of < n).to(noise.device)
                if isinstance(predicted, Logits):
                    scale = 0.5 + 0.8 * rest if self.anneal else 1.0
                    logits = predicted.logits / scale
                    gumbel = _gumbel(noise.uniform(*logits.shape[1:]))
                    drawn = (logits + spread * gumbel).argmax(-1)
                    tokens = torch.where(known, tokens, drawn)
                    confidence = logits.gather(2, tokens[..., None])[..., 0]
                else:
                    drawn = predicted.sample(settings, noise)
                    tokens = torch.where(known[..., None], tokens, drawn)
                    log_prob = predicted.log_prob(tokens)
                    if log_prob is None:
                        raise UserError(
                            f"algorithm MaskGIT asks how sure a prediction is; {type(generator).__name__} "
                            "cannot say"
                        )
                    confidence = log_prob / tokens.shape[-1]
                confidence = confidence + spread * _gumbel(noise.uniform(length))
                surest = confidence.masked_fill(known, -torch.inf).topk(size).indices
                step_of.scatter_(1, surest.cpu(), n)
                state.entities = Entities(step_of.argsort(dim=1, stable=True), sizes)
                state.advance(1)
                if recorder is not None:
                    recorder.plain(torch.full((batch,), n))
        return tokens


def _gumbel(uniform: Tensor) -> Tensor:
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
