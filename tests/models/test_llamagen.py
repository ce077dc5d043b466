"""LlamaGen through the protocol: causality, prefix consistency, cached = uncached, guidance, padding, roll-back."""

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.condition import Condition, cat
from tessellar.protocol.distribution import Logits
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Interval
from tessellar.protocol.layout import (
    Categorical,
    Continuous,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import Ancestral, decode_from
from tessellar.sampling.settings import GREEDY, Sampling

GRID = grid_layout(3, 4, Categorical(23))


def model(text: bool = False, layout: Layout = GRID) -> LlamaGen:
    torch.manual_seed(0)
    kind = (
        {"num_classes": None, "caption_dim": 6, "caption_length": 5} if text else {"num_classes": 7}
    )
    generator = LlamaGen(layout, 32, 2, 4, ffn_multiple_of=8, **kind)  # type: ignore[arg-type]
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


def condition(text: bool, batch: int) -> Condition:
    if not text:
        return Condition(ids=torch.arange(batch) % 7)
    valid = torch.arange(5) >= torch.tensor([0, 2, 4])[torch.arange(batch) % 3][:, None]
    features = torch.randn(batch, 5, 6, generator=torch.Generator().manual_seed(1))
    return Condition(valid=valid, features=features * valid[..., None])


def scores(generator: LlamaGen, tokens: Tensor, cond: Condition) -> Tensor:
    distribution = generator.score(tokens, cond)
    assert isinstance(distribution, Logits)
    return distribution.logits


def tokens_of(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 23, (batch, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", [False, True])
@torch.no_grad()
def test_causality_and_prefix_consistency(text: bool) -> None:
    generator, cond, tokens = model(text), condition(text, 3), tokens_of(3)
    before = scores(generator, tokens, cond)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 23
    after = scores(generator, changed, cond)
    assert torch.equal(before[:, :6], after[:, :6])
    assert bool((before[:, 6:] != after[:, 6:]).any(-1).all())


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "guidance", [NO_GUIDANCE, Guidance(Constant(2.5)), Guidance(Interval(2.0, 2, 6))]
)
@torch.no_grad()
def test_cached_equals_uncached(text: bool, batch: int, guidance: Guidance) -> None:
    """float32: greedy tokens equal; logits of every step within 1e-4 of a teacher-forced pass without a cache."""
    generator, cond = model(text), condition(text, batch)
    state = generator.start(cond, guidance)
    tokens, logits = GRID.blank(batch), []
    for step in decode_from(generator, state, GREEDY, Noise(range(batch)), tokens):
        tokens = step.tokens
        assert isinstance(step.distribution, Logits)
        logits.append(step.distribution.logits)
    both = scores(
        generator,
        tokens.repeat(guidance.branches, 1),
        cond if guidance.branches == 1 else cat([cond, generator.null(cond)]),
    )
    expected = guidance.merge(both, torch.arange(12).expand(batch, -1), generator.entities)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=0)
    assert torch.equal(tokens, expected.argmax(-1))


@pytest.mark.parametrize("guidance", [NO_GUIDANCE, Guidance(Constant(2.0))])
@torch.no_grad()
def test_bfloat16_stays_close(guidance: Guidance) -> None:
    """bfloat16, cached against uncached: within 4 % of the logits' range; equal argmax wherever the gap exceeds it."""
    generator, cond = model(), condition(False, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state, tokens, logits = generator.start(cond, guidance), GRID.blank(3), []
        for step in decode_from(generator, state, GREEDY, Noise(range(3)), tokens):
            tokens = step.tokens
            logits.append(step.distribution.logits)  # type: ignore[attr-defined]
        both = cond if guidance.branches == 1 else cat([cond, generator.null(cond)])
        expected = guidance.merge(
            scores(generator, tokens.repeat(guidance.branches, 1), both),
            torch.arange(12).expand(3, -1),
            generator.entities,
        )
    tolerance = 0.04 * float(expected.max() - expected.min())
    cached = torch.cat(logits, 1)
    assert float((cached - expected).abs().max()) < tolerance
    best = expected.topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * tolerance
    assert bool(clear.any()) and torch.equal(cached.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize("text", [False, True])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(text: bool) -> None:
    generator, cond, guidance = model(text), condition(text, 3), Guidance(Constant(1.7))
    together = Ancestral()(generator, cond, Sampling(), Noise([5, 6, 7]), guidance)
    for b in range(3):
        alone = Ancestral()(
            generator, cond.select(torch.tensor([b])), Sampling(), Noise([5 + b]), guidance
        )
        assert torch.equal(together[b], alone[0])


@torch.no_grad()
def test_guidance_scales_one_and_zero() -> None:
    generator, cond, tokens = model(), condition(False, 2), tokens_of(2)
    conditional, null = (
        scores(generator, tokens, cond),
        scores(generator, tokens, generator.null(cond)),
    )
    for scale, expected in ((1.0, conditional), (0.0, null)):
        state = generator.start(cond, Guidance(Constant(scale)))
        guided = generator.predict(state, tokens, 12)
        torch.testing.assert_close(guided.logits, expected, atol=1e-5, rtol=1e-5)  # type: ignore[attr-defined]


@torch.no_grad()
def test_rollback_per_image_equals_a_fresh_prefill() -> None:
    generator, cond, tokens = model(True), condition(True, 3), tokens_of(3)
    state = generator.start(cond, Guidance(Constant(2.0)), window=4)
    generator.predict(state, tokens_of(3, seed=9), 8)
    fed = torch.tensor([8, 3, 0])
    state.rollback(fed)
    got = generator.predict(state, tokens, 4).logits  # type: ignore[attr-defined]
    for b in range(3):
        one = torch.tensor([b])
        fresh = generator.start(cond.select(one), Guidance(Constant(2.0)), window=4)
        mixed = tokens[b : b + 1].clone()
        if fed[b] > 0:  # the inputs in the cache came from the other tokens
            mixed[:, : int(fed[b]) - 1] = tokens_of(3, seed=9)[b, : int(fed[b]) - 1]
        expected = generator.predict(fresh, mixed, int(fed[b]) + 4, want=4)
        torch.testing.assert_close(got[b : b + 1], expected.logits, atol=1e-5, rtol=1e-5)  # type: ignore[attr-defined]


@torch.no_grad()
def test_forks_share_nothing() -> None:
    generator, cond, tokens = model(), condition(False, 2), tokens_of(2)
    state = generator.start(cond, Guidance(Constant(2.0)))
    generator.predict(state, tokens, 5)
    fork = state.select(torch.tensor([1, 0, 1]))
    forked = generator.predict(fork, tokens[[1, 0, 1]], 3).logits  # type: ignore[attr-defined]
    original = generator.predict(state, tokens, 3).logits  # type: ignore[attr-defined]
    torch.testing.assert_close(forked, original[[1, 0, 1]])


@torch.no_grad()
def test_given_tokens_are_kept_when_in_painting() -> None:
    generator, cond, tokens = model(), condition(False, 2), tokens_of(2)
    state = generator.start(cond)
    *_, last = decode_from(generator, state, GREEDY, Noise([0, 1]), tokens, first=7)
    assert torch.equal(last.tokens[:, :7], tokens[:, :7])
    assert torch.equal(last.tokens[:, 7:], scores(generator, last.tokens, cond).argmax(-1)[:, 7:])


@torch.no_grad()
def test_scores_ignore_padding_captions() -> None:
    generator, cond, tokens = model(True), condition(True, 3), tokens_of(3)
    noisy = cond._replace(features=torch.where(cond.valid[..., None], cond.features, 9.0))  # type: ignore[index]
    torch.testing.assert_close(scores(generator, tokens, cond), scores(generator, tokens, noisy))


def test_first_loss_is_log_of_the_vocabulary() -> None:
    generator = LlamaGen(GRID, 32, 2, 4, num_classes=7)
    loss = generator.loss(tokens_of(4), condition(False, 4))["cross_entropy"]
    assert float(loss.detach()) == pytest.approx(torch.tensor(23.0).log().item(), abs=1e-6)


def test_dropped_condition_is_the_null_condition() -> None:
    generator, tokens = model(), tokens_of(4)
    generator.conditioning.dropout = 1.0
    generator.train()
    for module in generator.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    losses = [
        generator.loss(tokens, Condition(ids=torch.full((4,), c)))["cross_entropy"] for c in (1, 5)
    ]
    null = generator.loss(tokens, generator.null(condition(False, 4)))["cross_entropy"]
    assert losses[0] == losses[1] == null


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for switch in (False, True):
        generator = model().train()
        generator.activation_checkpointing = switch
        for module in generator.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        generator.conditioning.dropout = 0.0
        generator.loss(tokens_of(2), condition(False, 2))["cross_entropy"].backward()
        gradients.append([p.grad for p in generator.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sequence_and_several_segments_train() -> None:
    two = Layout(
        (Segment((4,), Categorical(23), "holistic"), Segment((2, 4), Categorical(23), "grid"))
    )
    for layout in (sequence_layout(12, Categorical(23)), two):
        loss: dict[str, Tensor] = model(layout=layout).loss(tokens_of(2), condition(False, 2))
        assert torch.isfinite(loss["cross_entropy"])


def test_layouts_that_do_not_fit_are_refused_in_one_line() -> None:
    unequal = Layout((Segment((4,), Categorical(8)), Segment((4,), Categorical(9))))
    for layout, reason in (
        (sequence_layout(4, Continuous(3)), "categorical"),
        (unequal, "one vocabulary"),
    ):
        with pytest.raises(UserError, match=reason):
            LlamaGen(layout, 32, 1, 4)


def test_wrong_caption_length_is_named() -> None:
    generator: Generator = model(True)
    short = Condition(valid=torch.ones(1, 3, dtype=torch.bool), features=torch.zeros(1, 3, 6))
    with pytest.raises(ValueError, match="3 positions"):
        generator.start(short)
