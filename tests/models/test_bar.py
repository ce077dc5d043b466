"""BAR: published sizes, the masked-bit head by itself, unmasking by confidence, and that nothing is as large as a
codebook."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tessellar.errors import UserError
from tessellar.models.bar import (
    BAR,
    MaskedBitHead,
    MaskedBits,
    bar_b,
    bar_b_2,
    bar_b_4,
    bar_l,
    bar_l_512,
    official,
)
from tessellar.models.bar.head import draw_masks, even_steps, masked_bit_loss
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import Entities
from tessellar.protocol.guidance import Guidance, Linear
from tessellar.protocol.layout import Bits, Categorical, Layout, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import GREEDY, Sampling
from tessellar.training.optim import decays
from tests.tiny.bar_by_official_names import bit_logits, conditions

LABELS = Condition(ids=torch.tensor([0, 3]))
FALSE_ALARM = 1e-6
"""Probability that the test of frequencies fails although all is well."""


@pytest.mark.parametrize(
    ("preset", "layout", "count", "head"),
    [
        (bar_b, grid_layout(16, 16, Bits(16)), 415_322_158, 156_375_710),
        (bar_b_2, grid_layout(16, 16, Bits(16)), 415_076_098, 156_572_126),
        (bar_b_4, grid_layout(16, 16, Bits(16)), 415_752_223, 157_358_870),
        (bar_l, grid_layout(16, 16, Bits(16)), 1_107_798_990, 156_375_710),
        (bar_l_512, grid_layout(32, 32, Bits(10)), 1_110_727_993, 156_355_449),
    ],
)
def test_published_variants(
    preset: Callable[[Layout], BAR], layout: Layout, count: int, head: int
) -> None:
    """With the fixed frequencies; the head without what brings the transformer's vector to its width."""
    with torch.device("meta"):
        made = preset(layout)
    frequencies = made.bit_head.frequencies.numel()
    assert sum(p.numel() for p in made.parameters()) + frequencies == count
    entry = sum(p.numel() for p in made.bit_head.condition.parameters())
    assert sum(p.numel() for p in made.bit_head.parameters()) + frequencies - entry == head


def small(bits: int = 4, patch: int = 1, **options: Any) -> BAR:
    torch.manual_seed(0)
    layout = grid_layout(2 * patch, 2 * patch, Bits(bits))
    sizes = {"head_width": 24, "head_depth": 1, "num_classes": 5, "dropout": 0.0}
    made = BAR(layout, 32, 2, 4, patch, **sizes, **options).eval()  # type: ignore[arg-type]
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def bits_of(generator: BAR, batch: int = 2, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, generator.layout.blank(batch).shape, generator=draw)


def test_a_head_that_starts_reads_neither_share_nor_vector() -> None:
    torch.manual_seed(0)
    head = MaskedBitHead(8, 6, width=16, depth=2)
    bits = torch.randint(0, 2, (3, 6))
    masked = torch.arange(6).expand(3, 6) < 2
    first = head(torch.randn(3, 8), bits, masked, torch.rand(3))
    second = head(torch.randn(3, 8), bits, masked, torch.rand(3))
    assert torch.equal(first, second) and first.shape == (3, 6, 2)
    other = bits.clone()
    other[:, 0] = 1 - other[:, 0]  # hidden: not read
    assert torch.equal(first, head(torch.randn(3, 8), other, masked, torch.rand(3)))
    other[:, 5] = 1 - other[:, 5]  # known: read
    assert not torch.allclose(first, head(torch.randn(3, 8), other, masked, torch.rand(3)))


def test_the_loss_weighs_hidden_and_known_bits() -> None:
    """Four hidden ones of 0.5 and twelve known ones of 0.1: 2.12 / 5.2."""
    each = torch.cat([torch.full((4,), 0.5), torch.full((12,), 0.1)])
    right = (-each).exp()
    logits = torch.stack([(1 - right).log(), right.log()], -1).view(1, 1, 16, 2)
    bits = torch.ones(1, 1, 16, dtype=torch.int64)
    masked = (torch.arange(16) < 4).view(1, 1, 16)
    assert float(masked_bit_loss(logits, bits, masked)) == pytest.approx(2.12 / 5.2, rel=1e-5)
    two = masked_bit_loss(
        torch.cat([logits, -logits]),
        bits.expand(2, -1, -1),
        masked.expand(2, -1, -1),
        weight=torch.tensor([1.0, 0.0]),
    )
    assert float(two) == pytest.approx(2.12 / 5.2, rel=1e-5)


def test_guidance_counts_tokens_up_to_but_not_to_its_scale() -> None:
    schedule = Linear(5.0, reach_end=False)
    entities = Entities(torch.arange(256), (1,) * 256)
    values = schedule(torch.tensor([[0, 255]]), entities)[0].tolist()
    assert values == pytest.approx([1.0, 4.984375])


def test_masks_follow_their_schedule() -> None:
    """At least one bit, the share that is told not rounded, uniform over bits; and all bits where it is wanted."""
    torch.manual_seed(0)
    masked, ratio = draw_masks((200, 100), 8)
    count = masked.sum(-1)
    assert int(count.min()) == 1 and float(ratio.min()) == 1 / 8
    assert torch.equal(count, (8 * ratio).round().clamp(min=1).long())
    # The logit of a share between the ends is normal with deviation 0.8.
    inside = ratio[(ratio > 0.3) & (ratio < 0.7)]
    share = math.erf(math.log(0.7 / 0.3) / 0.8 / math.sqrt(2))
    assert len(inside) / ratio.numel() == pytest.approx(share, abs=0.015)
    assert masked.float().mean((0, 1)).std() < 0.01
    full, told = draw_masks((200, 100), 8, full_share=0.25)
    assert float((told == 1).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert bool(full[told == 1].all())


def fake(logits: Tensor, tokens_each: int = 1) -> tuple[MaskedBits, list[Tensor]]:
    """A distribution whose logits [B, T, k, 2] are known, and what it was asked with: known bits, -1 where hidden."""
    asked: list[Tensor] = []

    def model(bits: Tensor, masked: Tensor, ratio: Tensor) -> Tensor:
        assert torch.allclose(ratio, masked.float().mean(-1))
        asked.append(bits.masked_fill(masked, -1))
        return logits

    return MaskedBits(model, tuple(logits.shape[:3]), tokens_each), asked  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 2.5])
def test_each_step_keeps_its_number_of_bits_for_good(temperature: float) -> None:
    """Also where all are equally confident."""
    made, asked = fake(torch.zeros(3, 5, 16, 2))
    choice = Choice(temperature, bit_steps=(2, 2, 5, 7))
    tokens = made.sample(Sampling(choice=choice), Noise(range(3)))
    assert [int((a >= 0).sum(-1).unique()) for a in asked] == [0, 2, 4, 9]
    for earlier, later in zip(asked, [*asked[1:], tokens], strict=True):
        known = earlier >= 0
        assert torch.equal(later[known], earlier[known])
    assert tokens.shape == (3, 5, 16) and set(tokens.unique().tolist()) <= {0, 1}


def test_one_bit_in_one_step_is_bernoulli() -> None:
    """sigmoid of the difference of logits over the temperature; a normal test of 60,000 bits."""
    odds = 1.3
    logits = torch.tensor([0.2, 0.2 + odds]).expand(20, 3000, 1, 2)
    made, _ = fake(logits)
    choice = Choice(2.0, bit_steps=(1,))
    drawn = made.sample(Sampling(choice=choice), Noise(range(20)))
    p = 1 / (1 + math.exp(-odds / 2.0))
    z = (float(drawn.float().mean()) - p) / math.sqrt(p * (1 - p) / 60_000)
    assert math.erfc(abs(z) / math.sqrt(2)) > FALSE_ALARM


def test_temperature_falls_to_a_quarter_in_four_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from tessellar.models.bar import head

    seen: list[float] = []
    draw = head.draw_bits

    def note(logits: Tensor, temperature: float, noise: Noise) -> Tensor:
        seen.append(temperature)
        return draw(logits, temperature, noise)

    monkeypatch.setattr(head, "draw_bits", note)
    made, _ = fake(torch.zeros(1, 1, 16, 2))
    made.sample(Sampling(choice=Choice(2.5)), Noise([0]))
    assert seen == [2.5, 1.875, 1.25, 0.625]
    assert even_steps(16) == (4, 4, 4, 4) and even_steps(3) == (1, 1, 1)
    assert sum(even_steps(10)) == 10


def test_tokens_of_a_patch_come_apart_in_their_order() -> None:
    """Positions of 2 x 2 tokens of 3 bits: row, column, bit."""
    generator = small(bits=3, patch=2)
    wanted = bits_of(generator, batch=1)
    entities = generator.entities
    first = torch.zeros(1, dtype=torch.int64)
    position = entities.get(wanted, first, 4).view(1, 4, 12)
    logits = torch.stack([1.0 - position, position.float()], -1)
    made, _ = fake(20 * logits, tokens_each=4)
    tokens = entities.put(torch.zeros_like(wanted), first, 4, made.sample(GREEDY, Noise([0])))
    assert torch.equal(tokens, wanted)


@torch.no_grad()
def test_random_orders_are_cached_as_they_are_scored() -> None:
    """Two images, each in an order of whole patches of its own."""
    generator = small(bits=3, patch=2, random_order=1.0).train()
    order = generator.training_order(2)
    assert not torch.equal(order.order[0], order.order[1])
    generator.eval()
    tokens = bits_of(generator)
    scores = generator.score(tokens, LABELS, order)
    state = generator.start(LABELS, entities=order)
    assert scores.hidden is not None
    for entity in range(4):
        step = generator.predict(state, tokens)
        assert step.hidden is not None
        torch.testing.assert_close(
            step.hidden[:, 0], scores.hidden[:, entity], atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_bits_set_by_set_have_a_likelihood() -> None:
    """Over all tokens of 4 bits it sums to one, and nats of an image are there; by confidence there are none."""
    generator = small(sets=(1, 2, 1))
    tokens = bits_of(generator)
    state = generator.start(LABELS)
    every = torch.tensor(list(product((0, 1), repeat=4)))
    distribution = generator.predict(state, tokens)
    total = torch.zeros(2)
    for token in every:
        log_prob = distribution.log_prob(token.expand(2, 1, 4))
        assert log_prob is not None
        total += log_prob[:, 0].exp()
    torch.testing.assert_close(total, torch.ones(2), atol=1e-5, rtol=0)
    assert generator.nats(tokens, LABELS) is not None
    assert small().nats(tokens, LABELS) is None


class Largest(TorchDispatchMode):
    """Remembers how many values the largest tensor had."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, Tensor):
                self.values = max(self.values, made.numel())
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as mode:
        yield mode


@pytest.mark.parametrize("bits", [32, 256])
def test_nothing_is_as_large_as_a_codebook(bits: int) -> None:
    """Training and sampling at 2^32 and 2^256 codes: the largest tensor is of the model's widths."""
    generator = small(bits=bits)
    tokens = bits_of(generator)
    with largest() as seen:
        generator.train().loss(tokens, LABELS)["cross_entropy"].backward()
        generator.eval()
        drawn = Sampling(2.0).tokens(generator, LABELS, [0, 1])
    generator.layout.check(drawn)
    assert seen.values < 300 * bits + 20_000 < 2**20


def test_memory_of_the_head_grows_with_its_bits() -> None:
    """Twice the bits are less than twice the head; a softmax over 2^18 codes alone would be larger than it."""
    sizes = {}
    with torch.device("meta"):
        for bits in (12, 18, 32, 64):
            head = MaskedBitHead(768, bits)
            sizes[bits] = sum(p.numel() * p.element_size() for p in head.parameters())
    assert max(sizes.values()) - min(sizes.values()) < 8 * 2048 * 64
    assert sizes[64] - sizes[32] < 2 * 2048 * 32 * 4 + 2**20
    assert 4 * 768 * 2**18 > sizes[18]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BAR(grid_layout(4, 4, Categorical(8))), "BAR predicts tokens of bits"),
        (lambda: small(sets=(2, 1)), r"sets \[2, 1\] must make the 4 bits"),
        (lambda: small(patch=2, sets=(2, 2)), "with patch 1"),
        (lambda: BAR(grid_layout(3, 3, Bits(4)), 32, 1, 4, 2), "do not divide|does not divide"),
        (lambda: Choice(bit_steps=(0, 4)), "bit_steps is 0"),
        (
            lambda: fake(torch.zeros(1, 1, 4, 2))[0].sample(
                Sampling(choice=Choice(bit_steps=(2, 3))), Noise([0])
            ),
            r"bit_steps \[2, 3\] make 5 bits; a position has 4",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@torch.no_grad()
def test_guidance_acts_on_the_logits_of_bits() -> None:
    generator = small()
    tokens = bits_of(generator)
    guided = generator.predict(generator.start(LABELS, Guidance(Linear(3.0, start=2.0))), tokens)
    plain = generator.predict(generator.start(LABELS), tokens)
    null = generator.predict(generator.start(generator.null(LABELS)), tokens)
    bits = torch.zeros(2, 1, 4, dtype=torch.int64)
    masked = torch.ones(2, 1, 4, dtype=torch.bool)
    found = []
    for distribution in (guided, plain, null):
        assert isinstance(distribution, MaskedBits)
        found.append(distribution.model(bits, masked, torch.ones(2, 1)))
    torch.testing.assert_close(found[0], found[2] + 2.0 * (found[1] - found[2]))


@torch.no_grad()
def test_every_position_of_the_prefix_stands_half_at_the_first_tokens_place() -> None:
    """The second half of the query heads; the first half, and the keys, of the prefix are not turned."""
    generator = small(random_order=1.0)
    order = Entities(torch.tensor([[2, 0, 1, 3], [3, 1, 0, 2]]), (1,) * 4)
    state = generator.start(LABELS, entities=order)
    assert state.prefix is not None
    place = torch.arange(state.prefix.length + 4)[None]
    slots: Any = None
    told = generator.shared(place, state, slots)
    prefix = state.prefix.length
    assert bool((told.own.cos[:, :prefix] == 1).all()) and not told.own.sin[:, :prefix].any()
    for image, first in enumerate((2, 3)):
        wanted = generator.rope_sin[first].expand(prefix, -1)
        assert torch.equal(told.target.sin[image, :prefix], wanted) and wanted.any()
    # Behind the last token is no place: its own.
    assert torch.equal(told.target.cos[:, -1], told.own.cos[:, -1])


@pytest.mark.parametrize(("patch", "bits"), [(1, 4), (2, 3)])
def test_a_published_file_gives_the_generator_back(patch: int, bits: int) -> None:
    generator = small(bits=bits, patch=patch)
    state = official.to_official(generator)
    assert state["blocks.0.mlp.w12.weight"].shape == (2 * 85, 32)
    half: Any = generator.layers[0].mlp.w1.weight  # type: ignore[union-attr]
    assert torch.equal(state["blocks.0.mlp.w12.weight"][:85], half)
    own: Any = generator.layers[1].mlp.w2.bias  # type: ignore[union-attr]
    assert torch.equal(state["blocks.1.mlp.w3.bias"], own)
    assert torch.equal(state["lm_head.t_embedder.W"], generator.bit_head.frequencies)
    for layer in range(2):  # tables that ours computes
        state[f"blocks.{layer}.attn.rope.freqs_cos"] = torch.ones(37, 8)
    again = official.from_official(state, generator.layout)
    tokens = bits_of(generator)
    with torch.no_grad():
        wanted = generator.score(tokens, LABELS).hidden
        found = again.score(tokens, LABELS).hidden
    assert wanted is not None and found is not None and torch.equal(found, wanted)
    drawn = [Sampling(2.0).tokens(one, LABELS, [0, 1]) for one in (generator, again)]
    assert torch.equal(*drawn)
    with pytest.raises(UserError, match="predicts .* bits a position, but the tokenizer gives"):
        official.from_official(state, grid_layout(2, 2, Bits(7)))


def test_what_decays_is_told_by_the_official_names() -> None:
    """All with "embed", "ln" or "norm" in them and all vectors do not; the start token does."""
    for name, parameter in small().named_parameters():
        (theirs,) = official.KEYS.to_official({name: parameter})
        spared = any(word in theirs.lower() for word in ("norm", "ln", "bias", "embed"))
        assert decays(parameter) == (not spared and parameter.ndim > 1), theirs


def test_dropout_is_of_the_large_variants_alone() -> None:
    with torch.device("meta"):
        rates = {}
        for name, preset in (("b", bar_b), ("l", bar_l)):
            made = preset(grid_layout(16, 16, Bits(16)))
            rates[name] = {layer.dropout.p for layer in made.layers}  # type: ignore[union-attr]
    assert rates == {"b": {0.0}, "l": {0.2}}


@pytest.mark.parametrize("raster", [True, False], ids=["raster", "orders of their own"])
@torch.no_grad()
def test_the_transformer_computes_what_the_official_tensors_say(raster: bool) -> None:
    generator = small()
    state = official.to_official(generator)
    bits = bits_of(generator)
    drawn = torch.rand(2, 4, generator=torch.Generator().manual_seed(2)).argsort(1)
    orders = torch.arange(4).expand(2, -1) if raster else drawn
    told = conditions(state, bits, LABELS.ids, orders, heads=4)  # type: ignore[arg-type]
    scores = generator.score(bits, LABELS, Entities(orders, (1,) * 4))
    assert scores.hidden is not None
    torch.testing.assert_close(
        generator.bit_head.condition(scores.hidden), told, atol=2e-5, rtol=1e-4
    )
    masked = torch.arange(4).expand(2, 4, -1) % 2 == 0
    ratio = torch.tensor([[0.1, 0.4, 0.7, 1.0]]).expand(2, -1)
    ours = generator.bit_head(scores.hidden, bits, masked, ratio)
    values = bits.masked_fill(masked, 2).flatten(0, 1)
    theirs = bit_logits(state, values, told.flatten(0, 1), ratio.flatten())
    torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_patches_are_rows_of_the_patch_then_columns_then_bits() -> None:
    generator = small(bits=3, patch=2)
    bits = bits_of(generator)
    together = rearrange(bits, "b (h p w q) k -> b (h w) (p q k)", h=2, p=2, w=2, q=2)
    raster = torch.arange(4).expand(2, -1)
    state = official.to_official(generator)
    told = conditions(state, together, LABELS.ids, raster, heads=4)  # type: ignore[arg-type]
    hidden = generator.score(bits, LABELS).hidden
    torch.testing.assert_close(generator.bit_head.condition(hidden), told, atol=2e-5, rtol=1e-4)
