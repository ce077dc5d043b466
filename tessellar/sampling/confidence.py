"""Decoding by confidence: predict all unknown tokens, keep those that the generator is surest of, repeat (MaskGIT).

arXiv 2202.04200 with TiTok's arccos schedule (arXiv 2406.07550): behind step n of T a share arccos((n + 1) / T) 2 / pi
of the tokens is still unknown. Gumbel noise of a falling temperature goes into the draw and into the confidence, so the
law is not the generator's own: approximate.
"""

from math import acos, floor, pi

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.guidance import Guidance
from tessellar.protocol.masked import MaskedGenerator
from tessellar.protocol.noise import Noise
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
        raise UserError(f"{steps} steps are too many for {length} tokens in MaskGIT's schedule; give fewer")
    return tuple(before - after for before, after in zip(unknown, [*unknown[1:], 0], strict=True))


@torch.no_grad()
def decode_by_confidence(
    generator: MaskedGenerator,
    condition: Condition,
    noise: Noise,
    guidance: Guidance,
    steps: int,
    temperature: float,
    anneal: bool = True,
    recorder: Recorder | None = None,
) -> Tensor:
    """Tokens [B, N]; the noise has temperature (1 - r) times `temperature` at progress r = (n + 1) / T.

    `anneal` divides the logits by 0.5 + 0.8 (1 - r).
    """
    batch, length, sizes = condition.batch, generator.layout.length, planned_sizes(generator.layout.length, steps)
    step_of = torch.full((batch, length), steps)  # the step at which a token became known
    state = generator.start(condition, guidance, Entities(torch.arange(length).expand(batch, -1), sizes))
    tokens = generator.layout.blank(batch).to(noise.device)
    with running(recorder, batch, length, noise.device):
        for n, size in enumerate(sizes):
            rest = 1 - (n + 1) / steps
            with forward(recorder, noise.device):
                predicted = generator.predict_rest(state, tokens)
            assert isinstance(predicted, Logits)
            logits = predicted.logits / (0.5 + 0.8 * rest) if anneal else predicted.logits
            known = (step_of < n).to(noise.device)
            drawn = (logits + temperature * rest * _gumbel(noise.uniform(*logits.shape[1:]))).argmax(-1)
            tokens = torch.where(known, tokens, drawn)
            confidence = logits.gather(2, tokens[..., None])[..., 0]
            confidence = confidence + temperature * rest * _gumbel(noise.uniform(length))
            surest = confidence.masked_fill(known, -torch.inf).topk(size).indices
            step_of.scatter_(1, surest.cpu(), n)
            state.entities, state.fed = Entities(step_of.argsort(dim=1, stable=True), sizes), state.fed + 1
            if recorder is not None:
                recorder.plain(torch.full((batch,), n))
    return tokens


def _gumbel(uniform: Tensor) -> Tensor:
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
