"""Speculative decoding with a draft model: a small generator drafts, the target judges (arXiv
2211.17192, 2302.01318).

Exact: tokens follow the target's guided, processed distribution, whatever the draft model is. Both
are driven through the generator protocol and roll back to what is committed, image by image.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from tessellar.checkpoints.reading import read_source
from tessellar.errors import UserError
from tessellar.protocol.choice import Choice, race
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Draws
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_number, check_whole
from tessellar.sampling.acceptance import plain_ratio
from tessellar.sampling.algorithm import Algorithm, check_in_order
from tessellar.sampling.couplings import Verdict, fresh, verify
from tessellar.sampling.report import Recorder, forward, running
from tessellar.sampling.speculative import LARGEST_WINDOW, probabilities, require_windows


@torch.no_grad()
def draft_model(
    target: Generator,
    draft: Generator,
    condition: Condition,
    choice: Choice,
    noise: Noise,
    guidance: Guidance = NO_GUIDANCE,
    draft_guidance: Guidance | None = None,
    drafts: int = 4,
    recorder: Recorder | None = None,
) -> Tensor:
    """Tokens [B, N] of the target, from windows of `drafts` entities that the draft model draws one
    after the other.

    `draft_guidance` defaults to the target's. Raises UserError where the two have different layouts
    or entities, or where either has no independent categorical tokens.
    """
    require_same_tokens(target, draft)
    with running(recorder, condition.batch, target.layout.length, noise.device):
        state = target.start(condition, guidance, window=drafts + 1)
        drafting = draft.start(condition, draft_guidance or guidance, window=drafts + 1)
        for generator, started in ((target, state), (draft, drafting)):
            require_windows(started, generator, "speculative decoding with a draft model")
        tokens = target.layout.blank(condition.batch).to(noise.device)
        done = torch.zeros_like(state.fed)
        while bool((done < state.entities.count).any()):
            tokens, q = draw_drafts(
                draft,
                drafting,
                tokens=tokens,
                done=done,
                choice=choice,
                noise=noise,
                drafts=drafts,
                recorder=recorder,
            )
            verdict = _judged(
                target, state, tokens=tokens, q=q, choice=choice, noise=noise, recorder=recorder
            )
            accepted = verdict.accepted.cpu()
            committed = torch.minimum(accepted + 1, state.entities.count - done)
            if recorder is not None:
                alive = done < state.entities.count
                left = (state.entities.count - done).clamp(max=drafts)
                accepted = torch.minimum(accepted, left)
                recorder.window(done[alive], accepted[alive], committed[alive], left[alive])
                recorder.draft_evaluations += drafts * int(alive.sum())
            tokens = state.entities.put(tokens, done, drafts + 1, verdict.tokens.flatten(1))
            done = done + committed
            catch_up(draft, drafting, tokens, done, recorder)
            state.rollback(done)
    return tokens


def draw_drafts(
    draft: Generator,
    state: State,
    tokens: Tensor,
    done: Tensor,
    choice: Choice,
    noise: Noise,
    drafts: int,
    recorder: Recorder | None,
) -> tuple[Tensor, Tensor]:
    """The buffer with drafts behind `done` [B], and their laws [B, drafts, s, V]."""
    laws = []
    for ahead in range(drafts):
        with forward(recorder, tokens.device):
            distribution = draft.predict(state, tokens, count=1)
        law = probabilities(distribution, choice, state)[:, 0]
        laws.append(law)
        drawn = race(law, noise.exponential(*law.shape[1:]))
        tokens = state.entities.put(tokens, done + ahead, 1, drawn)
    return tokens, torch.stack(laws, dim=1)


def _judged(
    target: Generator,
    state: State,
    tokens: Tensor,
    q: Tensor,
    choice: Choice,
    noise: Noise,
    recorder: Recorder | None,
) -> Verdict:
    """The target's verdict on all drafts in one pass; the last slot has no draft and is a fresh
    sample.
    """
    slots = q.shape[1] + 1
    size = q.shape[2]
    window = rearrange(state.entities.get(tokens, state.fed, slots), "b (w s) -> b w s", s=size)
    with forward(recorder, tokens.device):
        distribution = target.predict(state, tokens, count=slots)
    p = probabilities(distribution, choice, state)
    uniform = F.pad(noise.uniform(slots - 1, size), (0, 0, 0, 1))
    exponential = noise.exponential(*p.shape[1:])
    return verify(
        p,
        F.pad(q, (0, 0, 0, 0, 0, 1)),
        draft=window,
        uniform=uniform,
        exponential=exponential,
        acceptance=plain_ratio,
        coupling=fresh,
    )


def catch_up(
    draft: Generator, state: State, tokens: Tensor, done: Tensor, recorder: Recorder | None
) -> None:
    """Roll the draft model back; where all drafts were accepted it has not read the last of them,
    so it does first.
    """
    while bool((state.fed < done).any()):
        with forward(recorder, tokens.device):
            draft.predict(state, tokens, count=1)
    state.rollback(done)


def require_same_tokens(target: Generator, draft: Generator) -> None:
    """Raise UserError unless the draft model predicts the same tokens in the same order."""
    if target.layout != draft.layout:
        raise UserError(
            f"the draft model was built for {draft.layout}, the generator for {target.layout}"
        )
    ours = target.entities
    theirs = draft.entities
    if ours.sizes != theirs.sizes or not torch.equal(ours.order, theirs.order):
        raise UserError(
            "the draft model generates its tokens in another order, or in other groups, than the generator"
        )


@dataclass(frozen=True)
class DraftModel(Algorithm):
    """Speculative decoding (arXiv 2211.17192) with the generator at `model`: an export of the same
    layout. Exact.

    `drafts` entities are drafted for each evaluation; `guidance_scale` guides the draft model alone
    (default: as the generator).
    """

    model: str
    drafts: int = 4
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        check_whole("drafts", self.drafts, 1, LARGEST_WINDOW - 1)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale)

    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance = NO_GUIDANCE,
        recorder: Recorder | None = None,
    ) -> Tensor:
        check_in_order(generator)
        parameter = next(generator.parameters())
        draft = load_draft(self.model).to(parameter.device, parameter.dtype)
        own = None if self.guidance_scale is None else Constant(self.guidance_scale).guidance()
        return draft_model(
            generator,
            draft,
            condition=condition,
            choice=settings.choice,
            noise=noise,
            guidance=guidance,
            draft_guidance=own,
            drafts=self.drafts,
            recorder=recorder,
        )


@lru_cache(maxsize=2)
def load_draft(path: str) -> Generator:
    source = read_source(path)
    if source.kind != "generator":
        raise UserError(f"{path} is a tokenizer; a draft model is a generator")
    generator = source.build("generator")
    generator.bind(source.build("tokenizer"))
    return generator.eval()
