"""Drafts from hidden states: a small drafter reads what the generator's last evaluation made of the
image and drafts the next tokens at once (FLASH, arXiv 2505.12728; models/flash/).

Exact: given what is committed the drafts are independent, each of a law that is known, so
speculative sampling (arXiv 2211.17192) applies as it does to a draft model, whose many evaluations
one pass of the drafter replaces. Every image commits its own number of tokens.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.checkpoints.reading import read_source
from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache
from tessellar.protocol.choice import Choice, race
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Draws
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.layout import Layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.acceptance import plain_ratio
from tessellar.sampling.algorithm import Algorithm, check_in_order
from tessellar.sampling.couplings import fresh, verify
from tessellar.sampling.report import Recorder, forward, running
from tessellar.sampling.speculative import probabilities, require_windows


class Drafter(Protocol):
    """A model that drafts from hidden states: `FlashDrafter`, or one of others."""

    layout: Layout
    drafts: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "Drafter": ...

    def new_cache(self, batch: int, window: int) -> KVCache: ...

    def draft(
        self, cache: KVCache, tokens: Tensor, hidden: Tensor, order: Tensor, kept: Tensor
    ) -> Tensor:
        """Logits [B, K, V] of the tokens behind the first `kept` [B] of a window."""
        ...


@torch.no_grad()
def flash_drafts(
    target: Generator,
    drafter: Drafter,
    condition: Condition,
    choice: Choice,
    noise: Noise,
    guidance: Guidance = NO_GUIDANCE,
    recorder: Recorder | None = None,
) -> Tensor:
    """Tokens [B, N] of the target, of which `drafter.drafts` are drafted for each evaluation.

    Raises UserError for a drafter of other tokens, and for a generator that gives no hidden states
    or does not go token by token.
    """
    name = type(target).__name__
    if drafter.layout != target.layout:
        raise UserError(
            f"the drafter was built for {drafter.layout}, the generator for {target.layout}"
        )
    drafts = drafter.drafts
    with running(recorder, condition.batch, target.layout.length, noise.device):
        state = target.start(condition, guidance, window=drafts + 1)
        require_windows(state, target, "speculative decoding with a drafter")
        if set(state.entities.sizes) != {1} or state.entities.order.ndim > 1:
            raise UserError(f"a drafter goes token by token in one order; {name} does not")
        count = state.entities.count
        cache = drafter.new_cache(condition.batch, drafts + 1)
        tokens = target.layout.blank(condition.batch).to(noise.device)
        done = torch.zeros_like(state.fed)
        codes = int(target.layout.vocab().max())
        # Nothing is drafted before the first evaluation: laws of 0 accept nothing.
        q = torch.zeros(condition.batch, drafts, codes, device=noise.device)
        while bool((done < count).any()):
            state.rollback(done)
            window = state.entities.get(tokens, done, drafts + 1)
            with forward(recorder, tokens.device):
                distribution = target.predict(state, tokens, count=drafts + 1)
            hidden = distribution.hidden
            if hidden is None or hidden.shape[:2] != window.shape:
                raise UserError(f"{name} gives no hidden state for each token: no drafter reads it")
            p = probabilities(distribution, choice, state)
            verdict = verify(
                p,
                F.pad(q, (0, 0, 0, 1))[:, :, None],
                draft=window[..., None],
                uniform=F.pad(noise.uniform(drafts, 1), (0, 0, 0, 1)),
                exponential=noise.exponential(*p.shape[1:]),
                acceptance=plain_ratio,
                coupling=fresh,
            )
            accepted = verdict.accepted.cpu()
            left = count - done
            committed = torch.minimum(accepted + 1, left)
            if recorder is not None:
                alive = left > 0
                drafted = left.clamp(max=drafts)
                accepted = torch.minimum(accepted, drafted)
                recorder.window(done[alive], accepted[alive], committed[alive], drafted[alive])
                recorder.draft_evaluations += int(alive.sum())
            drawn = verdict.tokens[..., 0]
            tokens = state.entities.put(tokens, done, drafts + 1, drawn)
            with forward(recorder, tokens.device):
                logits = drafter.draft(cache, drawn, hidden, state.entities.order, committed)
            q = choice.probs(logits)
            done = done + committed
            tokens = state.entities.put(
                tokens, done, drafts, race(q, noise.exponential(*q.shape[1:]))
            )
    return tokens


@dataclass(frozen=True)
class FlashDrafts(Algorithm):
    """FLASH (arXiv 2505.12728): drafts from the generator's hidden states, by the drafter at `model`,
    an export that was trained with this generator. Exact.
    """

    model: str

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
        drafter = load_drafter(self.model).to(parameter.device, parameter.dtype)
        return flash_drafts(
            generator,
            drafter,
            condition=condition,
            choice=settings.choice,
            noise=noise,
            guidance=guidance,
            recorder=recorder,
        )


@lru_cache(maxsize=2)
def load_drafter(path: str) -> Drafter:
    source = read_source(path)
    found = source.build("generator") if source.kind == "generator" else None
    if found is None or not hasattr(found, "draft"):
        raise UserError(
            f"{path} is no drafter; FlashDrafts takes the export of a FlashDrafter (configs/fashion_mnist/flash.yaml)"
        )
    return found.eval()  # type: ignore[return-value]
