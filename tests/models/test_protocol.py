"""What every generator of the house must hold, whatever its X: one line of GENERATORS and all of this is asked of it.

Cached equals fresh, predictions depend on earlier entities alone, images of a batch do not touch each other, roll-back
forgets, and training has gradients everywhere.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessellar.models.flextok import FlexAR
from tessellar.models.har import HAR
from tessellar.models.hita import HitaAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.maskgit import MaskGIT
from tessellar.models.next_entity import NextEntity
from tessellar.models.rar import RAR
from tessellar.models.retok import ReToKGPT
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, Linear
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout, sequence_layout

CLASSES = 5
GRID, LINE = grid_layout(4, 4, Categorical(23)), sequence_layout(8, Categorical(19))

HITA = Layout((Segment((4,), Categorical(23), "holistic"), Segment((2, 3), Categorical(23), "patches")))


def next_entity(layout: Layout, x: str) -> NextEntity:
    return NextEntity(layout, x, 32, 2, 4, CLASSES, dropout=0.0, ffn_multiple_of=8)


GENERATORS: dict[str, Callable[[], Generator]] = {
    "llamagen": lambda: LlamaGen(GRID, 32, 2, 4, CLASSES, ffn_multiple_of=8, dropout=0.0),
    "llamagen-1d": lambda: LlamaGen(LINE, 32, 2, 4, CLASSES, ffn_multiple_of=8, dropout=0.0),
    "flextok-ar": lambda: FlexAR(LINE, 32, 2, 4, CLASSES, learned_positions=True),
    "har": lambda: HAR(sequence_layout(16, Categorical(19)), 32, 2, 4, CLASSES, dropout=0.0, ffn_multiple_of=8),
    "har-first-2": lambda: HAR(LINE, 32, 2, 4, CLASSES, 2, dropout=0.0, ffn_multiple_of=8),
    "hita": lambda: HitaAR(HITA, 32, 2, 4, CLASSES, dropout=0.0, ffn_multiple_of=8),
    "maskgit": lambda: MaskGIT(LINE, "vit", 32, 2, 4, 64, CLASSES, dropout=0.0),
    "maskgit-uvit": lambda: MaskGIT(GRID, "uvit", 32, 2, 4, 64, CLASSES, dropout=0.0),
    "retok": lambda: ReToKGPT(LINE, 32, 2, 4, CLASSES, ffn_multiple_of=8, dropout=0.0),
    "next-token": lambda: next_entity(LINE, "token"),
    "next-cell": lambda: next_entity(GRID, "cell:2"),
    "next-subsample": lambda: next_entity(GRID, "subsample:2"),
    "next-level": lambda: next_entity(LINE, "level:1,1,2,4"),
    "next-random": lambda: next_entity(GRID, "random:0"),
    "rar": lambda: RAR(GRID, 32, 2, 4, 64, CLASSES, dropout=0.0),
    "rar-1d": lambda: RAR(LINE, 32, 2, 4, 64, CLASSES, dropout=0.0),
}
GUIDANCES = {"plain": NO_GUIDANCE, "guided": Guidance(Linear(3.0, start=1.5))}

every_generator = pytest.mark.parametrize("name", GENERATORS)


def make(name: str) -> Generator:
    torch.manual_seed(0)
    generator = GENERATORS[name]().eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator


def labels(batch: int) -> Condition:
    return Condition(ids=torch.arange(batch) % CLASSES)


def tokens_of(layout: Layout, batch: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, layout.length, generator=draw) * layout.vocab()).long()


def predicted(generator: Generator, state: State, tokens: Tensor, count: int, want: int) -> Tensor:
    distribution = generator.predict(state, tokens, count, want)
    assert isinstance(distribution, Logits)
    return distribution.logits


def fresh(generator: Generator, condition: Condition, guidance: Guidance, tokens: Tensor, entity: int) -> Tensor:
    """Prediction of one entity by a state that has seen nothing before."""
    return predicted(generator, generator.start(condition, guidance), tokens, entity + 1, 1)


@every_generator
@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_cached_equals_fresh(name: str, guidance: str, batch: int) -> None:
    generator, rule = make(name), GUIDANCES[guidance]
    tokens = tokens_of(generator.layout, batch)
    state = generator.start(labels(batch), rule)
    for entity in range(generator.entities.count):
        cached = predicted(generator, state, tokens, 1, 1)
        torch.testing.assert_close(cached, fresh(generator, labels(batch), rule, tokens, entity), atol=1e-4, rtol=1e-5)


@every_generator
@torch.no_grad()
def test_an_entity_depends_on_earlier_ones_alone(name: str) -> None:
    generator = make(name)
    entities, tokens = generator.entities, tokens_of(generator.layout, 2)
    middle = entities.count // 2
    other = tokens_of(generator.layout, 2, seed=1)
    changed = replaced_from(entities, tokens, other, middle)
    state, again = generator.start(labels(2)), generator.start(labels(2))
    before = predicted(generator, state, tokens, entities.count, entities.count)
    after = predicted(generator, again, changed, entities.count, entities.count)
    seen = int(entities.ends[middle + 1])
    torch.testing.assert_close(before[:, :seen], after[:, :seen], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, seen:], after[:, seen:])


def replaced_from(entities: Entities, tokens: Tensor, other: Tensor, entity: int) -> Tensor:
    """`tokens` up to an entity, `other` from there on."""
    first = torch.full((len(tokens),), entity)
    count = entities.count - entity
    return entities.put(tokens, first, count, entities.get(other, first, count))


@every_generator
@torch.no_grad()
def test_images_of_a_batch_do_not_touch_each_other(name: str) -> None:
    generator = make(name)
    count, tokens, guidance = generator.entities.count, tokens_of(generator.layout, 3), GUIDANCES["guided"]
    together = predicted(generator, generator.start(labels(3), guidance), tokens, count, count)
    for i in range(3):
        state = generator.start(labels(3).select(torch.tensor([i])), guidance)
        alone = predicted(generator, state, tokens[i : i + 1], count, count)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-5)


@every_generator
@torch.no_grad()
def test_what_is_rolled_back_is_forgotten(name: str) -> None:
    generator = make(name)
    count, tokens = generator.entities.count, tokens_of(generator.layout, 2)
    drafted = replaced_from(generator.entities, tokens, tokens_of(generator.layout, 2, seed=1), count // 2 - 1)
    state = generator.start(labels(2), GUIDANCES["guided"])
    predicted(generator, state, drafted, count, 1)
    state.rollback(torch.full((2,), count // 2))
    again = predicted(generator, state, tokens, 1, 1)
    expected = fresh(generator, labels(2), GUIDANCES["guided"], tokens, count // 2)
    draft = fresh(generator, labels(2), GUIDANCES["guided"], drafted, count // 2)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(again, draft)


@every_generator
def test_training_reaches_every_parameter(name: str) -> None:
    generator = make(name).train()
    losses = generator.loss(tokens_of(generator.layout, 8), Condition(ids=torch.arange(8) % CLASSES))
    torch.stack(list(losses.values())).sum().backward()
    without = [n for n, p in generator.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []
