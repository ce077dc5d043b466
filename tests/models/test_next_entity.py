"""Next-entity prediction: queries see each other and nothing of other entities' queries, and LPD's order."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.models.next_entity import NextEntity
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import Entities, local_order, parse_entities
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.layout import (
    Categorical,
    Continuous,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)
from tessellar.protocol.local_order import local_sizes
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from
from tessellar.sampling.settings import Sampling

GRID = grid_layout(4, 4, Categorical(23))


def make(layout: Layout = GRID, x: str = "cell:2", **options) -> NextEntity:
    torch.manual_seed(0)
    generator = NextEntity(layout, x, 32, 2, 4, 5, dropout=0.0, ffn_multiple_of=8, **options).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator


def labels(batch: int) -> Condition:
    return Condition(ids=torch.arange(batch) % 5)


def tokens_of(layout: Layout, batch: int) -> torch.Tensor:
    return (torch.rand(batch, layout.length) * layout.vocab()).long()


@pytest.mark.parametrize("x", ["token", "cell:2", "level:1,1,2,4,8", "local:6", "image"])
@torch.no_grad()
def test_training_and_decoding_predict_the_same(x: str) -> None:
    """One pass with the queries of all entities is what decoding computes with those of one at a time."""
    generator, tokens = make(x=x), tokens_of(GRID, 2)
    state = generator.start(labels(2))
    decoded = [generator.predict(state, tokens).logits for _ in range(generator.entities.count)]
    trained = generator.score(tokens, labels(2)).logits
    torch.testing.assert_close(torch.cat(decoded, 1), trained, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_queries_of_an_entity_see_each_other() -> None:
    """With another target beside it, the prediction of a token changes: no independent heads."""
    generator, tokens = make(), tokens_of(GRID, 1)
    usual, order = Entities(torch.arange(16), (2,) * 8), torch.arange(16)
    order[[1, 15]] = order[[15, 1]]
    first = generator.score(tokens, labels(1), usual).logits[:, 0]
    other = generator.score(tokens, labels(1), Entities(order, (2,) * 8)).logits[:, 0]
    assert not torch.allclose(first, other, atol=1e-3)


@torch.no_grad()
def test_the_cache_holds_context_alone() -> None:
    generator, tokens = make(), tokens_of(GRID, 2)
    state = generator.start(labels(2), Guidance(Constant(2.0)))
    for entity in range(4):
        generator.predict(state, tokens)
        assert state.cache.lengths.tolist() == [1 + 4 * entity] * 4


@torch.no_grad()
def test_images_with_orders_of_their_own_decode_as_alone() -> None:
    generator, tokens = make(), tokens_of(GRID, 2)
    orders = torch.stack([torch.randperm(16), torch.randperm(16)])
    together = generator.start(labels(2), Guidance(Constant(2.0)), Entities(orders, (4,) * 4))
    got = torch.cat([generator.predict(together, tokens).logits for _ in range(4)], 1)
    for i in range(2):
        one = labels(2).select(torch.tensor([i]))
        alone = generator.start(one, Guidance(Constant(2.0)), Entities(orders[i], (4,) * 4))
        expected = torch.cat(
            [generator.predict(alone, tokens[i : i + 1]).logits for _ in range(4)], 1
        )
        torch.testing.assert_close(got[i : i + 1], expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_images_may_stand_at_different_entities() -> None:
    """After a roll-back to different entities, each image goes on as it would alone."""
    generator, tokens = make(), tokens_of(GRID, 2)
    state = generator.start(labels(2), window=2)
    whole = generator.predict(state, tokens, 4).logits
    state.rollback(torch.tensor([1, 3]))
    again = generator.predict(state, tokens, 2, 2).logits
    torch.testing.assert_close(again[0], whole[0, 4:12], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(again[1, :4], whole[1, 12:], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_decoding_loop_makes_as_many_evaluations_as_entities() -> None:
    generator = make()
    state = generator.start(labels(3), Guidance(Constant(1.5)))
    steps = list(decode_from(generator, state, Sampling(), Noise([0, 1, 2]), GRID.blank(3)))
    assert len(steps) == 4
    GRID.check(steps[-1].tokens)


@torch.no_grad()
def test_vocabularies_of_segments_are_kept_apart() -> None:
    layout = Layout((Segment((2,), Categorical(7), "a"), Segment((4,), Categorical(11), "b")))
    generator = make(layout, "level")
    for guidance in (Guidance(), Guidance(Constant(3.0))):
        state = generator.start(labels(2), guidance)
        logits = generator.predict(state, tokens_of(layout, 2), 2).logits
        assert bool((logits[:, :2, 7:] == -torch.inf).all()) and bool(
            logits[:, :2, :7].isfinite().all()
        )
        assert bool(logits[:, 2:].isfinite().all())


def test_training_on_random_orders_keeps_sizes() -> None:
    generator = make(x="level:1,1,2,4,8", random_order=0.5).train()
    drawn = generator.training_order(64)
    own = (drawn.order == generator.entities.order).all(1).float().mean()
    assert drawn.sizes == generator.entities.sizes and 0.2 < float(own) < 0.8
    assert torch.equal(drawn.order.sort(1).values, torch.arange(16).expand(64, -1))
    assert bool(generator.loss(tokens_of(GRID, 4), labels(4))["cross_entropy"].isfinite())


def test_it_learns_what_its_targets_are_whatever_the_order() -> None:
    """Tokens that say their own place are learnt at once only if queries are read in generation order."""
    layout = grid_layout(2, 4, Categorical(8))
    torch.manual_seed(0)
    generator = NextEntity(layout, "local:3", 32, 1, 2, 5, dropout=0.0, ffn_multiple_of=8).train()
    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-2)
    tokens = torch.arange(8).expand(4, -1)
    for _ in range(30):
        loss = generator.loss(tokens, labels(4))["cross_entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


def test_tokens_without_categories_are_refused() -> None:
    with pytest.raises(UserError, match="categorical"):
        NextEntity(sequence_layout(8, Continuous(4)))


@pytest.mark.parametrize("steps", [1, 3, 8, 16])
@pytest.mark.parametrize("shape", [(4, 4), (2, 8), (3, 7)])
def test_a_local_order_is_a_partition_of_growing_entities(
    shape: tuple[int, int], steps: int
) -> None:
    entities = local_order(grid_layout(*shape, Categorical(2)), steps)
    assert entities.count == steps and sorted(entities.order.tolist()) == list(
        range(shape[0] * shape[1])
    )
    assert local_sizes(64, 16)[0] == 1 and local_sizes(64, 16)[-1] > local_sizes(64, 16)[1]


def test_a_local_order_goes_near_what_is_known_and_keeps_tokens_apart() -> None:
    """Against random orders of the same sizes: nearer to known tokens, farther from each other."""
    layout = grid_layout(8, 8, Categorical(2))
    local = local_order(layout, 20)
    random = parse_entities("random:0", layout)
    reference = Entities(random.order, local.sizes)
    (near, touching), (near_random, touching_random) = nearness(local), nearness(reference)
    assert near < 1.2 < near_random
    assert touching < 0.15 < 0.3 < touching_random


def nearness(entities: Entities) -> tuple[float, float]:
    """Mean distance to the nearest known token, and the share of tokens with a neighbour in their own entity."""
    place = torch.stack([entities.order // 8, entities.order % 8], 1).double()
    known, touching = [], []
    for a, b in zip(entities.ends[1:-1].tolist(), entities.ends[2:].tolist(), strict=True):
        known += torch.cdist(place[a:b], place[:a]).amin(1).tolist()
        between = torch.cdist(place[a:b], place[a:b]) + 1e9 * torch.eye(b - a)
        touching += (between.amin(1) < 1.9).tolist()
    return sum(known) / len(known), sum(touching) / len(touching)


def test_local_orders_repeat_by_seed() -> None:
    orders = [parse_entities(x, GRID).order for x in ("local:6", "local:6,0", "local:6,1")]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("x", ["local:0", "local:17", "local"])
def test_steps_that_do_not_fit_are_refused(x: str) -> None:
    with pytest.raises(UserError):
        parse_entities(x, GRID)
