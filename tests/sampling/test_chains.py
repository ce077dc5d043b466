"""Speculative decoding of sub-tokens and of bits gives the law of ancestral sampling: chi-square tests of 40,000 whole
images against the truth, each with a false alarm in a million (conftest.py); and mistakes in one line.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.bar import BAR
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Bits, Chained, Distribution, FactorLogits, with_values
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, PerSubToken
from tessellar.protocol.layout import Bits as BitKind
from tessellar.protocol.layout import Categorical, Factorized, grid_layout, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.acceptance import GroupedRatio
from tessellar.sampling.couplings import COUPLINGS, Reuse, maximal
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.drafts import SCHEMES
from tessellar.sampling.settings import GREEDY, Sampling
from tessellar.sampling.speculative import (
    GroupedJacobi,
    Rules,
    SpeculativeJacobi,
    speculative_jacobi,
)

SAMPLES = 40_000
LABELS = Condition(ids=torch.tensor([0, 1]))


class ChainTable(Generator):
    """Tokens of sub-tokens (`sets` None) or of bits in sets, each with a stored law given all before it."""

    def __init__(
        self, length: int, vocabs: tuple[int, ...], sets: tuple[tuple[int, ...], ...] | None = None
    ) -> None:
        super().__init__()
        self.vocabs = vocabs
        self.sets = sets
        kind = Factorized(vocabs) if sets is None else BitKind(len(vocabs))
        self.layout = sequence_layout(length, kind)
        self.entities = token_order(self.layout)
        self.conditioning = ClassConditioning(3)
        flat = sequence_layout(length * len(vocabs), Categorical(max(vocabs)))
        self.flat = TableGenerator(flat, spread=1.5)

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        rows = self.stack_branches(condition, guidance)
        fed = torch.zeros(condition.batch, dtype=torch.int64)
        return State(rows, guidance, self.entities, fed)

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Chained:
        want = count if want is None else want
        state.advance(count)
        rank = state.entities.steps(state.fed - want, want)
        entity = state.entities.entity_at(rank)
        place = rank.clamp(max=self.layout.length - 1) * len(self.vocabs)
        labels = state.condition.ids
        assert labels is not None
        weights = self.flat.codes ** torch.arange(self.flat.layout.length)
        before = torch.nn.functional.pad((tokens.flatten(1) * weights).cumsum(1), (1, 0))
        before = before.gather(1, place)

        def logits(known: Tensor, factor: int) -> Tensor:
            inside = (known * weights[place[..., None] + torch.arange(len(self.vocabs))]).sum(-1)
            row = state.rows(self.flat.starts[place + factor] + before + inside)
            found = self.flat.table[labels[:, None], row][..., : self.vocabs[factor]]
            return state.merge(found, entity, factor)

        shape = (state.batch, want)
        if self.sets is None:
            return FactorLogits(logits, tuple(range(len(self.vocabs))), shape)

        def log_odds(known: Tensor, shown: Tensor) -> Tensor:
            each = [logits(known, bit) for bit in range(len(self.vocabs))]
            return torch.stack([both[..., 1] - both[..., 0] for both in each], -1)

        return Bits(log_odds, self.sets, shape)


def outcomes(generator: ChainTable) -> Tensor:
    """Every image there is, [n, N, F]."""
    each = [range(vocab) for vocab in generator.vocabs] * generator.layout.length
    return torch.tensor(list(product(*each))).unflatten(1, (-1, len(generator.vocabs)))


def joint(generator: ChainTable, label: int, choice: Choice, guidance: Guidance) -> Tensor:
    """The law of whole images under processing and guidance."""
    images = outcomes(generator)
    state = generator.start(Condition(ids=torch.full((len(images),), label)), guidance)
    scores = generator.predict(state, images, generator.layout.length)
    walk = scores.walk()
    known = torch.zeros_like(images)
    law = torch.ones(len(images), dtype=torch.float64)
    for stage, members in enumerate(scores.stages):
        values = images[..., list(members)]
        p = scores.choice_at(choice, stage).probs(walk(known, stage)).double()
        law *= p.gather(-1, values[..., None])[..., 0].prod(-1).prod(-1)
        known = with_values(known, members, values)
    return law


def histogram(generator: ChainTable, tokens: Tensor) -> Tensor:
    vocabs = generator.vocabs * generator.layout.length
    index = torch.zeros(len(tokens), dtype=torch.int64)
    for vocab, values in zip(vocabs, tokens.flatten(1).unbind(1), strict=True):
        index = index * vocab + values
    return index.bincount(minlength=len(outcomes(generator)))


PROCESSING = (
    Choice(1.2, top_p=0.95, further_temperatures=(0.8,)),
    Guidance(PerSubToken(1.8, (0.7,))),
)
PLAIN = (Choice(), NO_GUIDANCE)
KINDS: dict[str, Callable[[], ChainTable]] = {
    "two sub-tokens": lambda: ChainTable(3, (2, 3)),
    "bits in sets": lambda: ChainTable(2, (2, 2, 2), ((0,), (1, 2))),
}


@pytest.fixture
def exact(shared_noise, fits) -> Callable[..., bool]:
    """Whether images of two labels, in turn, follow their laws."""

    def test(
        generator: ChainTable,
        rules: Rules | None,
        choice: Choice = PLAIN[0],
        guidance: Guidance = PLAIN[1],
        seed: int = 0,
    ) -> bool:
        condition = Condition(ids=torch.tensor([0, 2]).repeat(SAMPLES // 2))
        noise = shared_noise(seed, SAMPLES)
        if rules is None:
            tokens = Ancestral()(generator, condition, Sampling(choice=choice), noise, guidance)
        else:
            tokens = speculative_jacobi(generator, condition, choice, noise, guidance, rules)
        return all(
            fits(histogram(generator, tokens[row::2]), joint(generator, label, choice, guidance))
            for row, label in enumerate((0, 2))
        )

    return test


@pytest.mark.parametrize("kind", KINDS)
def test_ancestral_sampling(kind: str, exact) -> None:
    assert exact(KINDS[kind](), None, *PROCESSING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_law_of_ancestral_sampling(kind: str, coupling: str, exact) -> None:
    assert exact(KINDS[kind](), Rules(3, coupling=COUPLINGS[coupling]), *PROCESSING, seed=1)


@pytest.mark.parametrize("init", SCHEMES)
def test_every_initial_draft(init: str, exact) -> None:
    assert exact(ChainTable(3, (2, 3)), Rules(3, init, coupling=maximal), seed=2)


@pytest.mark.parametrize(
    "rules",
    [Rules(4, acceptance=GroupedRatio(2, 1.0)), Rules(4, coupling=Reuse(0.5))],
    ids=["gsd", "sjd++"],
)
def test_approximate_rules_are_found_out(rules: Rules, exact) -> None:
    assert not exact(ChainTable(5, (2, 2)), rules, seed=3)


def magvit() -> OpenMAGVIT2AR:
    torch.manual_seed(0)
    layout = grid_layout(3, 3, Factorized((5, 7)))
    made = OpenMAGVIT2AR(layout, 32, 1, 4, 1, 3, dropout=0.0, ffn_multiple_of=8).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def bar(sets: tuple[int, ...] | None) -> BAR:
    torch.manual_seed(0)
    layout = grid_layout(3, 3, BitKind(4))
    sizes = {"head_width": 16, "head_depth": 1, "num_classes": 3, "dropout": 0.0}
    made = BAR(layout, 32, 1, 4, sets=sets, **sizes).eval()  # type: ignore[arg-type]
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("make", [magvit, lambda: bar((1, 3))], ids=["open-magvit2", "bar"])
@pytest.mark.parametrize("guidance", [NO_GUIDANCE, Guidance(Constant(1.5))])
def test_greedy_windows_are_greedy_decoding(
    make: Callable[[], Generator], guidance: Guidance
) -> None:
    """With the cache and its roll-back; rows advance apart."""
    generator = make()
    expected = Ancestral()(generator, LABELS, GREEDY, Noise([0, 1]), guidance)
    for algorithm in (SpeculativeJacobi(4), SpeculativeJacobi(5, "repeat-left", "maximal")):
        found = algorithm(generator, LABELS, GREEDY, Noise([2, 3]), guidance)
        assert torch.equal(found, expected)


def test_gsd_reads_a_table_of_each_sub_token() -> None:
    generator = magvit()
    rules = GroupedJacobi(window=4, d_quantile=0.2, d_threshold=None).rules(generator)
    tables = [rule.table for rule in rules.sub_tokens if isinstance(rule, GroupedRatio)]
    assert [len(table) for table in tables if table is not None] == [5, 7]
    tokens = GroupedJacobi(4, d_quantile=0.2)(generator, LABELS, Sampling(), Noise([0, 1]))
    generator.layout.check(tokens)


def test_an_image_is_the_same_alone() -> None:
    generator = magvit()
    both = SpeculativeJacobi(4)(generator, LABELS, Sampling(), Noise([5, 6]))
    alone = SpeculativeJacobi(4)(
        generator, LABELS.select(torch.tensor([1])), Sampling(), Noise([6])
    )
    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: SpeculativeJacobi(4)(bar(None), LABELS, Sampling(), Noise([0, 1])),
            "needs probabilities of tokens, which BAR has none of as it draws them",
        ),
        (
            lambda: GroupedJacobi(4)(bar((2, 2)), LABELS, Sampling(), Noise([0, 1])),
            "GSD's distance filter needs one embedding a code, BAR has none; set d_threshold null",
        ),
    ],
)
def test_what_has_no_probabilities_says_so_in_one_line(
    run: Callable[[], Distribution], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run()
