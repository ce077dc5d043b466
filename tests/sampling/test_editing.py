"""Free tokens given kept ones: the conditional law where the order allows it, a stated one elsewhere.

Chi-square tests of 100,000 images against the exact law of a table, each with false alarm 1e-6 (conftest.py).
"""

from collections.abc import Callable
from itertools import count as counting

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import Entities, ordered, token_order
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import Blend, Constant, Guidance
from tessellar.protocol.layout import (
    Bits,
    Categorical,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)
from tessellar.protocol.noise import Noise
from tessellar.sampling.confidence import MaskGIT
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.editing import given as editing
from tessellar.sampling.editing.edits import Outpaint, kept_outside
from tessellar.sampling.editing.given import draw_given, in_units, kept_first, order_around
from tessellar.sampling.search.priors import vocabulary_sizes
from tessellar.sampling.settings import GREEDY, Sampling
from tests.tiny.other_generators import CASES, Pair
from tests.tiny.pairs import GENERATORS

SAMPLES = 100_000
LAYOUT = sequence_layout(5, Categorical(3))
GUIDED = Sampling(guidance=Constant(1.6), choice=Choice(temperature=1.2))
PICTURE = torch.tensor([2, 0, 1, 2, 0])
CLASS = Condition(ids=torch.tensor([1]))


class AnyOrder(TableGenerator):
    """The law of the table in the order that is asked for, whatever it is."""

    def free_order(self) -> Entities:
        return token_order(self.layout)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, shared_noise) -> Callable[..., Tensor]:
    """Tokens of many images of one class given what is kept."""
    streams = counting(3)
    # The noise is shared, so seeds are not read.
    monkeypatch.setattr(editing, "derive", lambda *parts: 0)
    monkeypatch.setattr(
        editing, "Noise", lambda seeds, device="cpu": shared_noise(next(streams), len(seeds))
    )

    def draw(
        generator: Generator, kept: Tensor, particles: int = 1, count: int = SAMPLES
    ) -> Tensor:
        return draw_given(
            generator,
            CLASS.select(torch.zeros(count, dtype=torch.int64)),
            GUIDED,
            seeds=range(count),
            tokens=PICTURE.expand(count, -1),
            kept=kept,
            particles=particles,
        )

    return draw


def conditional(generator: TableGenerator, kept: Tensor) -> Tensor:
    """The law of whole images given that they agree with the picture where it is kept."""
    joint = generator.joint(CLASS, GUIDED.choice, GUIDED.guidance.guidance())[0]
    agrees = (generator.outcomes()[:, kept] == PICTURE[kept]).all(1)
    law = joint * agrees
    return law / law.sum()


def sequential(generator: TableGenerator, kept: Tensor) -> Tensor:
    """The stated approximation: each free token given all before it, kept ones taken for certain."""
    images = generator.outcomes()
    state = generator.start(
        CLASS.select(torch.zeros(len(images), dtype=torch.int64)), GUIDED.guidance.guidance()
    )
    laws = GUIDED.choice.probs(generator.predict(state, images, generator.layout.length).logits)
    each = laws.double().gather(-1, images[..., None])[..., 0]
    agrees = (images[:, kept] == PICTURE[kept]).all(1)
    return each[:, ~kept].prod(1) * agrees


def test_the_rest_of_a_prefix_has_the_conditional_law(drawn, fits, histogram) -> None:
    generator = TableGenerator(LAYOUT)
    kept = torch.tensor([True, True, False, False, False])
    counts = histogram(generator, drawn(generator, kept))
    assert fits(counts, conditional(generator, kept))


def test_a_generator_of_any_order_has_the_conditional_law_for_every_mask(
    drawn, fits, histogram
) -> None:
    kept = torch.tensor([False, True, False, False, True])
    generator = AnyOrder(LAYOUT)
    counts = histogram(generator, drawn(generator, kept))
    in_order = AnyOrder(LAYOUT)
    in_order.entities = ordered([1, 4, 0, 2, 3], (1,) * 5)
    assert fits(counts, conditional(in_order, kept))


def test_a_mask_in_a_fixed_order_has_the_stated_law_and_particles_approach_the_conditional_one(
    drawn, fits, histogram
) -> None:
    generator = TableGenerator(LAYOUT)
    kept = torch.tensor([True, False, False, True, True])
    truth = conditional(generator, kept)
    counts = histogram(generator, drawn(generator, kept))
    assert fits(counts, sequential(generator, kept))
    assert not fits(counts, truth)

    def distance(found: Tensor) -> float:
        return float((found / found.sum() - truth).abs().sum() / 2)

    few, many = (
        histogram(generator, drawn(generator, kept, particles, 4_000)) for particles in (3, 30)
    )
    assert distance(many) < 0.35 * distance(few) < 0.35 * distance(counts)


def test_nothing_kept_is_plain_sampling_and_a_batch_changes_nothing() -> None:
    generator = TableGenerator(LAYOUT)
    labels = Condition(ids=torch.tensor([0, 2, 1]))
    none = torch.zeros(5, dtype=torch.bool)
    tokens = PICTURE.expand(3, -1)
    found = draw_given(generator, labels, GUIDED, [4, 5, 6], tokens, none)
    assert torch.equal(found, GUIDED.tokens(generator, labels, [4, 5, 6]))
    kept = torch.tensor([True, False, True, False, False])
    together = draw_given(generator, labels, GUIDED, [4, 5, 6], tokens, kept, particles=3)
    alone = draw_given(
        generator, labels.select(torch.tensor([1])), GUIDED, [5], tokens[:1], kept, particles=3
    )
    assert torch.equal(together[1:2], alone)


def example(layout: Layout) -> Tensor:
    """Tokens [2, N, ...] of a layout, drawn."""
    blank = layout.blank(2)
    draw = torch.Generator().manual_seed(0)
    if layout.is_continuous:
        return torch.randn(blank.shape, generator=draw)
    return (torch.rand(blank.shape, generator=draw) * vocabulary_sizes(layout)).long()


@pytest.mark.parametrize(("make", "condition"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_every_generator_keeps_what_is_kept(make: Callable[[], Pair], condition: Condition) -> None:
    generator = make()[0].eval()
    tokens = example(generator.layout)
    rows = condition.select(torch.tensor([0, 1]))
    length = generator.layout.length
    kept = torch.rand(length, generator=torch.Generator().manual_seed(1)) < 0.5
    kept = in_units(generator, kept)
    found = draw_given(generator, rows, Sampling(), [0, 1], tokens, kept)
    assert torch.equal(found[:, kept], tokens[:, kept].to(found.dtype))
    assert not torch.equal(found, tokens.to(found.dtype))
    order = order_around(generator, kept, Noise([0, 1]))
    assert order.exact == (generator.free_order() is not None)
    assert int(order.entities.ends[order.first]) == (
        int(kept.sum()) if order.exact else first_of(generator, kept)
    )


@pytest.mark.parametrize("name", ["RandAR", "ARPG", "BAR"])
def test_further_generators_of_any_order_begin_with_what_is_kept(name: str) -> None:
    layout = grid_layout(4, 4, Bits(6) if name == "BAR" else Categorical(16))
    torch.manual_seed(0)
    generator = GENERATORS[name](layout).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = example(layout)
    rows = Condition(ids=torch.tensor([0, 2]))
    kept = torch.arange(16) % 3 == 0
    found = draw_given(generator, rows, Sampling(), [0, 1], tokens, kept)
    assert torch.equal(found[:, kept], tokens[:, kept]) and not torch.equal(found, tokens)
    order = order_around(generator, kept, Noise([0, 1]))
    assert order.exact and int(order.entities.ends[order.first]) == 6
    # The first free tokens know of every kept one, wherever it stands.
    other = tokens.clone()
    other[:, 15] = 1 - other[:, 15].clamp(max=1)

    @torch.no_grad()
    def log_prob(given: Tensor) -> Tensor | None:
        state = generator.start(rows, entities=order.entities)
        law = generator.predict(state, given, count=order.first + 1, want=1)
        return law.log_prob(order.entities.get(found, torch.full((2,), order.first), 1))

    before = log_prob(tokens)
    after = log_prob(other)
    if before is None or after is None:  # bits by confidence have no probability
        before = found[:, ~kept].float()
        after = draw_given(generator, rows, Sampling(), [0, 1], other, kept)[:, ~kept].float()
    assert not torch.allclose(before, after)


def first_of(generator: Generator, kept: Tensor) -> int:
    """How many tokens the entities at the start of the order have that are kept as a whole."""
    count = 0
    for places in generator.entities.order.split(generator.entities.sizes):
        if not bool(kept[places].all()):
            break
        count += len(places)
    return count


@pytest.mark.parametrize("name", ["llamagen_classes", "har_of_other_levels", "var_of_other_scales"])
def test_a_given_prefix_goes_on_as_it_did(name: str) -> None:
    """Greedy: the picture's own first entities, then the same as without them."""
    make, condition = next((m, c) for m, c in CASES if m.__name__ == name)
    generator = make()[0].eval()
    rows = condition.select(torch.tensor([0, 1]))
    with torch.no_grad():
        whole = GREEDY.tokens(generator, rows, [0, 1])
        end = int(generator.entities.ends[2])
        kept = torch.arange(generator.layout.length) < end
        damaged = torch.where(kept, whole, 0)
        assert torch.equal(draw_given(generator, rows, GREEDY, [0, 1], damaged, kept), whole)


def test_kept_tokens_come_first_in_orders_of_sets() -> None:
    plan = Entities(torch.tensor([[3, 1, 0, 5, 2, 4], [0, 1, 2, 3, 4, 5]]), (1, 2, 3))
    found = kept_first(plan, torch.tensor([False, True, False, False, True, False]))
    assert found.order.tolist() == [[1, 4, 3, 0, 5, 2], [1, 4, 0, 2, 3, 5]]
    assert found.sizes == (2, 1, 3)  # sets go on ending at 3 and 6 known tokens


def test_blended_classes_have_the_geometric_mean_of_their_laws() -> None:
    generator = TableGenerator(LAYOUT)
    one, other = Condition(ids=torch.tensor([0])), Condition(ids=torch.tensor([2]))

    def logits(condition: Condition, guidance: Guidance) -> Tensor:
        state = generator.start(condition, guidance)
        return generator.predict(state, PICTURE[None], 5).logits

    plain = Guidance()
    mixed = logits(one, Guidance(blend=Blend(other, 0.25)))
    assert torch.allclose(mixed, 0.75 * logits(one, plain) + 0.25 * logits(other, plain))
    guided = logits(one, Guidance(Constant(2.0), Blend(other, 0.25)))
    null = logits(generator.null(one), plain)
    assert torch.allclose(guided, null + 2.0 * (mixed - null), atol=1e-5)
    for share, label in ((0.0, one), (1.0, other)):
        ends = Guidance(Constant(2.0), Blend(other, share))
        assert torch.allclose(logits(one, ends), logits(label, Guidance(Constant(2.0))), atol=1e-5)


def test_masks_become_tokens() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, 3] = True  # one pixel of the upper left quarter
    grid = kept_outside(mask, grid_layout(2, 2, Categorical(4)))
    assert grid.tolist() == [False, True, True, True]
    kind = Categorical(4)
    mask[:, :4] = True
    scales = kept_outside(mask, Layout((Segment((1, 1), kind), Segment((2, 2), kind))))
    assert scales.tolist() == [True, False, True, False, True]  # half of the whole is masked
    hita = kept_outside(mask, Layout((Segment((2,), kind), Segment((2, 2), kind))))
    assert hita.tolist() == [False, False, False, True, False, True]
    with pytest.raises(UserError, match="no place"):
        kept_outside(mask, LAYOUT)


def test_margins_of_out_painting() -> None:
    picture = torch.rand(3, 8, 12) * 2 - 1
    canvas, mask = Outpaint(left=0.25, right=0.0, top=0.0, bottom=0.5).canvas(picture)
    assert canvas.shape == picture.shape and mask[:4, 3:].sum() == 0
    assert int(mask.sum()) == 8 * 12 - 4 * 9
    with pytest.raises(UserError, match="leave nothing"):
        Outpaint(left=0.5, right=0.5)
    with pytest.raises(UserError, match="no margin"):
        Outpaint(left=0, right=0, top=0, bottom=0)


def test_what_cannot_be_given_tokens_is_said() -> None:
    generator = TableGenerator(LAYOUT)
    kept = torch.arange(5) < 2
    with pytest.raises(UserError, match="drawn by Ancestral"):
        draw_given(generator, CLASS, Sampling(algorithm=MaskGIT()), [0], PICTURE[None], kept)
    with pytest.raises(UserError, match="order of its own"):
        draw_given(
            generator, CLASS, Sampling(algorithm=Ancestral(steps=3)), [0], PICTURE[None], kept
        )
