"""What every generator of the house must hold, whatever its X: one line of GENERATORS and all of this is asked of it.

Cached equals fresh, predictions depend on earlier entities alone, images of a batch do not touch each other, roll-back
forgets, and training has gradients everywhere.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.models.alitok import AliTokAR
from tessellar.models.arpg import ARPG
from tessellar.models.bar import BAR, MaskedBits
from tessellar.models.bitdance import BitDance
from tessellar.models.flextok import FlexAR
from tessellar.models.har import HAR
from tessellar.models.hita import HitaAR
from tessellar.models.ibq import IBQAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.lpd import LPD
from tessellar.models.mar import MAR
from tessellar.models.maskgit import MaskGIT
from tessellar.models.mingtok import MingTokAR
from tessellar.models.next_entity import NextEntity
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.models.randar import RandAR
from tessellar.models.rar import RAR
from tessellar.models.retok import ReToKGPT
from tessellar.models.semanticist import SemanticistAR
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.models.tokenbridge import TokenBridge
from tessellar.models.tokenbridge.head import ChannelLogits
from tessellar.models.tokenflow import TokenFlowAR
from tessellar.models.var import VAR
from tessellar.models.xar import XAR
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import (
    Chained,
    Distribution,
    Implicit,
    Logits,
    with_values,
)
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, Linear
from tessellar.protocol.layout import (
    Bits,
    Categorical,
    Continuous,
    Factorized,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)
from tessellar.tokenizers.quantizers.gaussian import GaussianSpace
from tessellar.tokenizers.titok import ViTSize
from tessellar.tokenizers.var import VARVQVAE, MultiScaleQuantizer
from tessellar.tokenizers.vat import VAT, SequenceScales
from tests.tiny.other_generators import post_quantized
from tests.tiny.pairs import TOKENIZERS

CLASSES = 5
GRID, LINE = grid_layout(4, 4, Categorical(23)), sequence_layout(8, Categorical(19))

LATENTS = grid_layout(4, 4, Continuous(3))
HITA = Layout(
    (Segment((4,), Categorical(23), "holistic"), Segment((2, 3), Categorical(23), "patches"))
)


def next_entity(layout: Layout, x: str) -> NextEntity:
    return NextEntity(layout, x, 32, 2, 4, CLASSES, dropout=0.0, ffn_multiple_of=8)


def xar(x: str) -> XAR:
    return XAR(LATENTS, x, 32, 1, 4, CLASSES, dropout=0.0)


def mar(patch: int, steps: int) -> MAR:
    """So small that a batch is expected to hold dropped classes, and tokens to read, only if both are frequent."""
    often = {"condition_dropout": 0.5, "least_masked": 0.1}
    sizes = {"buffer": 2, "repeats": 1, "steps": steps, "dropout": 0.0}
    layout = grid_layout(4 * patch, 4 * patch, Continuous(3))
    return MAR(layout, 32, 1, 4, None, 32, 1, CLASSES, patch, **sizes, **often)  # type: ignore[arg-type]


def var() -> VAR:
    """With the tokenizer that its inputs come from."""
    tokenizer = VARVQVAE(MultiScaleQuantizer(16, 4, (1, 2, 4)), 16, 32, (1, 1, 1), 1).eval()
    generator = VAR(tokenizer.layout, 32, 2, 4, CLASSES, 4, drop_path=0.0)
    generator.bind(tokenizer)
    return generator


def var_of_sequences() -> VAR:
    """Over scales that are sequences, VAT's."""
    space = GaussianSpace(SequenceScales(16, 6, (1, 1, 3, 5)))
    tokenizer = VAT(space, 16, 4, ViTSize(16, 1, 2), ViTSize(16, 1, 2)).eval()
    generator = VAR(tokenizer.layout, 32, 2, 4, CLASSES, 6, drop_path=0.0)
    generator.bind(tokenizer)
    return generator


def tokenflow() -> TokenFlowAR:
    """With the tokenizer whose codes it adds up."""
    tokenizer = TOKENIZERS["TokenFlow"]().eval()
    generator = TokenFlowAR(
        tokenizer.layout, 32, 2, 4, CLASSES, latent_dim=5, ffn_multiple_of=8, condition_dropout=0.5
    )
    generator.bind(tokenizer)
    return generator


def mingtok() -> MingTokAR:
    """With the tokenizer whose features it reads."""
    tokenizer = TOKENIZERS["MingTok"]().eval()
    sizes: dict[str, Any] = {"feature_dim": 16, "head_width": 24, "head_depth": 2, "repeats": 1}
    generator = MingTokAR(
        tokenizer.layout, 32, 2, 4, CLASSES, ffn_multiple_of=8, condition_dropout=0.5, **sizes
    )
    generator.bind(tokenizer)
    return generator


def tokenbridge(**options: Any) -> TokenBridge:
    """With the tokenizer that says what its tokens stand for; draws as those of `mar`."""
    tokenizer = post_quantized(4, 5)
    often = {"condition_dropout": 0.5, "least_masked": 0.1}
    sizes = {"depth": 1, "num_heads": 4, "head_width": 16, "head_depth": 1, "head_heads": 2}
    rest = {"num_classes": CLASSES, "buffer": 2, "steps": 5, "dropout": 0.0}
    generator = TokenBridge(tokenizer.layout, 32, **sizes, **rest, **often, **options)
    generator.bind(tokenizer)
    return generator


def bitdance(patch: int, **options: Any) -> BitDance:
    """Queries and class tokens are few, so that a batch is expected to hold a dropped class."""
    layout = grid_layout(4, 4, Bits(5))
    sizes = {"head_width": 16, "head_depth": 2, "head_groups": 1, "head_dim": 8, "repeats": 1}
    rates = {"condition_dropout": 0.5, "flip": 0.2}
    return BitDance(
        layout,
        32,
        2,
        4,
        patch=patch,
        num_classes=CLASSES,
        class_tokens=3,
        **sizes,  # type: ignore[arg-type]
        **rates,  # type: ignore[arg-type]
        **options,
    )


def open_magvit2(layout: Layout) -> OpenMAGVIT2AR:
    return OpenMAGVIT2AR(layout, 32, 2, 4, 2, CLASSES, dropout=0.0, ffn_multiple_of=8)


def bar(patch: int, **options: Any) -> BAR:
    """Half of the samples in an order of their own."""
    layout = grid_layout(2 * patch, 3 * patch, Bits(3))
    return BAR(
        layout,
        32,
        depth=2,
        num_heads=4,
        patch=patch,
        head_width=24,
        head_depth=1,
        num_classes=CLASSES,
        dropout=0.0,
        random_order=0.5,
        condition_dropout=0.5,
        **options,
    )


def token_shuffle(layout: Layout) -> TokenShuffle:
    return TokenShuffle(layout, 32, 2, 4, 2, num_classes=CLASSES, ffn_multiple_of=8)


def in_sets(generator: Generator) -> Generator:
    """The same generator over sets of a random order."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    generator.entities = Entities(order, (1, 2, 5, 4, 4))
    return generator


def arpg() -> ARPG:
    return ARPG(GRID, 32, 4, 4, CLASSES, 6, dropout=0.0, ffn_multiple_of=8)


def randar() -> RandAR:
    return RandAR(GRID, 32, 2, 4, CLASSES, 6, dropout=0.0, ffn_multiple_of=8)


GENERATORS: dict[str, Callable[[], Generator]] = {
    "alitok": lambda: AliTokAR(HITA, 32, 2, 4, CLASSES, dropout=0.0, ffn_multiple_of=8),
    "arpg": arpg,
    "arpg-sets": lambda: in_sets(arpg()),
    "bitdance": lambda: bitdance(1),
    "bitdance-patches": lambda: bitdance(2),
    "llamagen": lambda: LlamaGen(GRID, 32, 2, 4, CLASSES, ffn_multiple_of=8, dropout=0.0),
    "llamagen-1d": lambda: LlamaGen(LINE, 32, 2, 4, CLASSES, ffn_multiple_of=8, dropout=0.0),
    "bar": lambda: bar(1),
    "bar-patches": lambda: bar(2),
    "sets-of-bar": lambda: bar(1, sets=(2, 1)),
    "flextok-ar": lambda: FlexAR(LINE, 32, 2, 4, CLASSES, learned_positions=True),
    "har": lambda: HAR(
        sequence_layout(16, Categorical(19)), 32, 2, 4, CLASSES, dropout=0.0, ffn_multiple_of=8
    ),
    "har-first-2": lambda: HAR(LINE, 32, 2, 4, CLASSES, 2, dropout=0.0, ffn_multiple_of=8),
    "hita": lambda: HitaAR(HITA, 32, 2, 4, CLASSES, dropout=0.0, ffn_multiple_of=8),
    "ibq": lambda: IBQAR(GRID, 32, 2, 4, CLASSES, dropout=0.0, ffn_multiple_of=8),
    "open-magvit2": lambda: open_magvit2(grid_layout(3, 3, Factorized((5, 7)))),
    "open-magvit2-1d": lambda: open_magvit2(sequence_layout(6, Factorized((3, 5, 4)))),
    "lpd": lambda: LPD(GRID, 32, 2, 4, CLASSES, 6, condition_dropout=0.5, dropout=0.0),
    "mingtok": mingtok,
    "maskgit": lambda: MaskGIT(LINE, "vit", 32, 2, 4, 64, CLASSES, dropout=0.0),
    "maskgit-uvit": lambda: MaskGIT(GRID, "uvit", 32, 2, 4, 64, CLASSES, dropout=0.0),
    "retok": lambda: ReToKGPT(LINE, 32, 2, 4, CLASSES, ffn_multiple_of=8, dropout=0.0),
    "semanticist": lambda: SemanticistAR(
        sequence_layout(8, Continuous(3), min_prefix=1),
        32,
        2,
        4,
        CLASSES,
        6,
        24,
        2,
        dropout=0.0,
        ffn_multiple_of=8,
    ),
    "next-token": lambda: next_entity(LINE, "token"),
    "next-cell": lambda: next_entity(GRID, "cell:2"),
    "next-subsample": lambda: next_entity(GRID, "subsample:2"),
    "next-level": lambda: next_entity(LINE, "level:1,1,2,4"),
    "next-random": lambda: next_entity(GRID, "random:0"),
    "randar": randar,
    "randar-sets": lambda: in_sets(randar()),
    "rar": lambda: RAR(GRID, 32, 2, 4, 64, CLASSES, dropout=0.0),
    "rar-1d": lambda: RAR(LINE, 32, 2, 4, 64, CLASSES, dropout=0.0),
    "var": var,
    "var-of-sequences": var_of_sequences,
    "tokenflow": tokenflow,
    "token-shuffle": lambda: token_shuffle(GRID),
    "token-shuffle-1d": lambda: token_shuffle(sequence_layout(16, Categorical(19))),
    "xar-cell": lambda: xar("cell:2"),
    "xar-token": lambda: xar("token"),
    "xar-subsample": lambda: xar("subsample:2"),
    "mar": lambda: mar(1, 5),
    "mar-patches": lambda: mar(2, 3),
    "tokenbridge": lambda: tokenbridge(channel_order=(2, 0, 3, 1)),
    "tokenbridge-groups": lambda: tokenbridge(group=2, first_input="official"),
    "tokenbridge-parallel": lambda: tokenbridge(parallel=True),
}
GUIDANCES = {"plain": NO_GUIDANCE, "guided": Guidance(Linear(3.0, start=1.5))}

WITHOUT_LIKELIHOOD = (
    "bitdance",
    "maskgit",
    "mingtok",
    "xar",
    "mar",
    "semanticist",
    "tokenbridge",
    "bar",
)

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
    if layout.is_continuous:
        return torch.randn(layout.blank(batch).shape, generator=draw)
    kind = layout.segments[0].kind
    if isinstance(kind, Bits):
        return torch.randint(0, 2, layout.blank(batch).shape, generator=draw)
    if isinstance(kind, Factorized):
        return (
            torch.rand(layout.blank(batch).shape, generator=draw) * torch.tensor(kind.vocabs)
        ).long()
    return (torch.rand(batch, layout.length, generator=draw) * layout.vocab()).long()


def predicted(generator: Generator, state: State, tokens: Tensor, count: int, want: int) -> Tensor:
    """What is predicted of the last `want` of `count` entities, [B, T, ...]; one at a time where it is no logits."""
    at_once = isinstance(generator, (OpenMAGVIT2AR, BAR))
    if not at_once and not generator.layout.is_categorical and want > 1:
        return torch.cat([predicted(generator, state, tokens, 1, 1) for _ in range(count)], 1)
    return values(generator.predict(state, tokens, count, want), len(tokens))


def values(distribution: Distribution, batch: int) -> Tensor:
    """Logits, or what the solver is told of one fixed noisy entity in the middle of its way."""
    if isinstance(distribution, Logits):
        return distribution.logits
    if isinstance(distribution, ChannelLogits):
        batch, length = distribution.inner.shape
        tokens = torch.ones(batch, length, len(distribution.channels.vocabs), dtype=torch.int64)
        return distribution.log_prob(tokens)[..., None]
    if isinstance(distribution, Chained):
        return of_stages(distribution)
    if isinstance(distribution, MaskedBits):
        bits = torch.ones(distribution.shape, dtype=torch.int64)
        masked = torch.arange(distribution.shape[-1]).expand(distribution.shape) > 0
        logits = distribution.model(bits, masked, torch.full(distribution.shape[:2], 0.7))
        return logits.flatten(2).repeat_interleave(distribution.tokens_each, 1)
    assert isinstance(distribution, Implicit)
    noisy = torch.randn(1, *distribution.shape, generator=torch.Generator().manual_seed(7))
    return distribution.model(noisy.expand(batch, -1, -1), torch.tensor(0.5))


def of_stages(distribution: Chained) -> Tensor:
    """All logits of its stages, one after the other [B, T, n], in tokens whose every sub-token is 1."""
    walk = distribution.walk()
    known = torch.zeros(*distribution.shape, distribution.count, dtype=torch.int64)
    parts = []
    for stage, members in enumerate(distribution.stages):
        parts.append(walk(known, stage).flatten(2))
        known = with_values(known, members, torch.ones(*distribution.shape, len(members)).long())
    return torch.cat(parts, -1)


def fresh(
    generator: Generator, condition: Condition, guidance: Guidance, tokens: Tensor, entity: int
) -> Tensor:
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
        torch.testing.assert_close(
            cached, fresh(generator, labels(batch), rule, tokens, entity), atol=1e-4, rtol=1e-5
        )


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
    count, tokens, guidance = (
        generator.entities.count,
        tokens_of(generator.layout, 3),
        GUIDANCES["guided"],
    )
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
    drafted = replaced_from(
        generator.entities, tokens, tokens_of(generator.layout, 2, seed=1), count // 2 - 1
    )
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
    for seed in range(3):  # masks and dropped conditions are drawn anew
        losses = generator.loss(tokens_of(generator.layout, 8, seed), labels(8))
        torch.stack(list(losses.values())).sum().backward()
    without = [
        n for n, p in generator.named_parameters() if p.grad is None or not bool(p.grad.any())
    ]
    assert without == []


@every_generator
@torch.no_grad()
def test_nats_are_those_of_the_entities_one_after_the_other(name: str) -> None:
    """Of every generator with a likelihood; validation asks for them and the losses together."""
    generator, tokens = make(name), tokens_of(make(name).layout, 2)
    found = generator.nats(tokens, labels(2))
    losses, nats = generator.evaluate(tokens, labels(2))
    assert losses.keys() == generator.loss(tokens, labels(2)).keys()
    if name.startswith(WITHOUT_LIKELIHOOD):
        assert found is None and nats is None
        return
    state = generator.start(labels(2))
    total = torch.zeros(2)
    for entity in range(generator.entities.count):
        distribution = generator.predict(state, tokens)
        part = distribution.nats(generator.entities.get(tokens, torch.full((2,), entity), 1))
        assert part is not None
        total += part
    assert found is not None and nats is not None
    torch.testing.assert_close(found, total, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(nats, total, atol=1e-3, rtol=1e-4)
