"""Speculative decoding without statistics: greedy, batches, fake models, refusals, and what the recorder counts."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance
from tessellar.protocol.layout import Categorical, grid_layout, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.acceptance import GroupedRatio
from tessellar.sampling.couplings import COUPLINGS, Reuse, maximal
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.draft_model import draft_model
from tessellar.sampling.drafts import SCHEMES
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import GREEDY, Sampling
from tessellar.sampling.speculative import Rules, speculative_jacobi

GUIDED = Guidance(Constant(2.0))
GRID = grid_layout(3, 4, Categorical(23))


def llamagen(text: bool = False, seed: int = 0, depth: int = 2) -> LlamaGen:
    torch.manual_seed(seed)
    kind = (
        {"num_classes": None, "caption_dim": 6, "caption_length": 5} if text else {"num_classes": 7}
    )
    generator = LlamaGen(GRID, 32, depth, 4, ffn_multiple_of=8, **kind)  # type: ignore[arg-type]
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return generator.eval()


def condition(text: bool, batch: int) -> Condition:
    if not text:
        return Condition(ids=torch.arange(batch) % 7)
    valid = torch.arange(5) >= torch.tensor([0, 2, 4])[torch.arange(batch) % 3][:, None]
    features = torch.randn(batch, 5, 6, generator=torch.Generator().manual_seed(1))
    return Condition(valid=valid, features=features * valid[..., None])


class Planned(TableGenerator):
    """A generator whose law depends on the place alone: logits `plan` [N, V]."""

    plan: Tensor

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Logits:
        want = count if want is None else want
        state.fed = state.fed + count
        place = (state.fed - want)[:, None] + torch.arange(want)
        return Logits(self.plan[place.clamp(max=len(self.plan) - 1)])


def planned(plan: Tensor) -> Planned:
    generator = Planned(sequence_layout(1, Categorical(2)))
    generator.plan, generator.layout = plan, sequence_layout(len(plan), Categorical(plan.shape[1]))
    generator.entities = token_order(generator.layout)
    return generator


def pointing(tokens: Sequence[int], codes: int = 4) -> Tensor:
    """Logits [N, V] that leave no choice but `tokens`."""
    return torch.full((len(tokens), codes), -torch.inf).scatter(
        1, torch.tensor(tokens)[:, None], 0.0
    )


RULES = [
    *(
        Rules(window, init, coupling=maximal)
        for window, init in ((1, "random"), (2, "uniform"), (5, "repeat-up"))
    ),
    *(Rules(16, init) for init in SCHEMES),
    *(Rules(4, coupling=coupling) for coupling in (*COUPLINGS.values(), Reuse(0.3))),
    *(Rules(6, acceptance=GroupedRatio(5, exact_official=official)) for official in (False, True)),
]


@pytest.mark.parametrize("guidance", [NO_GUIDANCE, GUIDED])
@pytest.mark.parametrize("rules", RULES, ids=lambda r: f"{r.window} {r.init}")
def test_greedy_gives_the_tokens_of_plain_greedy_decoding(rules: Rules, guidance: Guidance) -> None:
    generator, cond = llamagen(True), condition(True, 3)
    plain = Ancestral()(generator, cond, GREEDY, Noise([0, 1, 2]), guidance)
    assert torch.equal(
        speculative_jacobi(generator, cond, GREEDY.choice, Noise([0, 1, 2]), guidance, rules), plain
    )


@pytest.mark.parametrize("guidance", [NO_GUIDANCE, GUIDED])
def test_greedy_with_a_draft_model(guidance: Guidance) -> None:
    target, draft, cond = llamagen(), llamagen(seed=1, depth=1), condition(False, 3)
    plain = Ancestral()(target, cond, GREEDY, Noise([0, 1, 2]), guidance)
    assert torch.equal(
        draft_model(target, draft, cond, GREEDY.choice, Noise([3, 4, 5]), guidance), plain
    )


def test_a_window_of_one_is_plain_decoding_with_the_same_noise() -> None:
    generator, cond, choice = llamagen(), condition(False, 2), Choice(top_k=9)
    plain = Ancestral()(generator, cond, Sampling(choice=choice), Noise([4, 5]), GUIDED)
    assert torch.equal(
        speculative_jacobi(generator, cond, choice, Noise([4, 5]), GUIDED, Rules(1)), plain
    )


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    "rules",
    [
        *(Rules(5, coupling=c) for c in COUPLINGS.values()),
        Rules(7, "sample-left"),
        Rules(6, acceptance=GroupedRatio(5)),
    ],
)
def test_an_image_does_not_depend_on_its_batch(text: bool, rules: Rules) -> None:
    generator, cond = llamagen(text), condition(text, 4)
    together = speculative_jacobi(generator, cond, Choice(0.5), Noise(range(9, 13)), GUIDED, rules)
    for b in range(4):
        alone = cond.select(torch.tensor([b]))
        assert torch.equal(
            speculative_jacobi(generator, alone, Choice(0.5), Noise([9 + b]), GUIDED, rules)[0],
            together[b],
        )


def test_an_image_drafted_by_a_model_does_not_depend_on_its_batch() -> None:
    target, draft, cond = llamagen(), llamagen(seed=1), condition(False, 4)
    together = draft_model(target, draft, cond, Choice(0.5), Noise(range(4)), GUIDED)
    for b in range(4):
        alone = draft_model(
            target, draft, cond.select(torch.tensor([b])), Choice(0.5), Noise([b]), GUIDED
        )
        assert torch.equal(alone[0], together[b])


def test_groups_of_one_are_plain_sjd_token_for_token() -> None:
    generator, cond = llamagen(), condition(False, 3)
    plain = speculative_jacobi(generator, cond, Choice(0.7), Noise([1, 2, 3]), GUIDED, Rules(6))
    for official in (False, True):
        rules = Rules(6, acceptance=GroupedRatio(1, exact_official=official))
        assert torch.equal(
            speculative_jacobi(generator, cond, Choice(0.7), Noise([1, 2, 3]), GUIDED, rules), plain
        )


def test_grouped_decoding_accepts_more() -> None:
    generator = TableGenerator(sequence_layout(6, Categorical(5)), spread=0.7)
    cond, recorders = Condition(ids=torch.zeros(300, dtype=torch.int64)), (Recorder(), Recorder())
    for recorder, acceptance in zip(recorders, (Rules().acceptance, GroupedRatio(4)), strict=True):
        rules = Rules(5, acceptance=acceptance)
        speculative_jacobi(
            generator, cond, Choice(), Noise(range(300)), NO_GUIDANCE, rules, recorder
        )
    assert recorders[1].evaluations < 0.9 * recorders[0].evaluations


def drafted(target: Generator, draft: Generator, drafts: int) -> tuple[Tensor, Recorder]:
    recorder = Recorder()
    tokens = draft_model(
        target,
        draft,
        condition(False, 2),
        Choice(),
        Noise([0, 1]),
        drafts=drafts,
        recorder=recorder,
    )
    return tokens, recorder


def test_a_draft_model_that_is_always_right() -> None:
    plan = pointing([0, 3, 1, 2, 2, 0, 1, 3])
    tokens, recorder = drafted(planned(plan), planned(plan), 3)
    assert tokens.tolist() == 2 * [plan.argmax(1).tolist()]
    assert recorder.committed == [0, 0, 0, 0, 4] and recorder.report().acceptance == [1.0, 1.0, 1.0]


def test_a_draft_model_that_is_always_wrong() -> None:
    plan = pointing([0, 3, 1, 2, 2, 0, 1, 3])
    tokens, recorder = drafted(planned(plan), planned(plan.roll(1, dims=1)), 3)
    assert tokens.tolist() == 2 * [plan.argmax(1).tolist()]
    assert recorder.committed == [0, 16] and recorder.report().acceptance == [0.0, 0.0, 0.0]


def test_a_draft_model_that_is_sometimes_right() -> None:
    """Wrong at places 2 and 3: the windows commit 0-2, 3, then 4-7; a rejection still commits the right token."""
    right, guess = [0, 3, 1, 2, 2, 0, 1, 3], [0, 3, 0, 0, 2, 0, 1, 3]
    tokens, recorder = drafted(planned(pointing(right)), planned(pointing(guess)), 3)
    assert tokens.tolist() == [right, right]
    assert recorder.committed == [0, 2, 0, 2, 2] and recorder.begun == [2, 0, 0, 2, 2]


def test_jacobi_on_a_law_without_choice_or_context() -> None:
    """The first pass already samples every draft of the window right; initial drafts at its end may not be."""
    plan, recorder = pointing([0, 3, 1, 2, 2, 0, 1, 3, 3, 1]), Recorder()
    tokens = speculative_jacobi(
        planned(plan),
        condition(False, 2),
        Choice(),
        Noise([0, 1]),
        NO_GUIDANCE,
        Rules(10),
        recorder,
    )
    assert tokens.tolist() == 2 * [plan.argmax(1).tolist()]
    assert recorder.passes <= 2


def test_never_more_evaluations_than_tokens_and_every_token_once() -> None:
    generator, cond, recorder = llamagen(), condition(False, 5), Recorder()
    speculative_jacobi(generator, cond, Choice(), Noise(range(5)), GUIDED, Rules(4), recorder)
    report = recorder.report()
    assert recorder.passes <= 12 and report.evaluations <= 60
    assert sum(n * times for n, times in enumerate(report.committed)) == report.tokens == 60
    assert sum(report.gained) == 60 and sum(report.begun) == report.evaluations == report.tried[0]


def test_the_recorder_sees_plain_decoding_and_uncertain_tokens() -> None:
    generator, recorder = TableGenerator(sequence_layout(5, Categorical(3))), Recorder(entropy=True)
    cond = Condition(ids=torch.tensor([0, 1]))
    Ancestral()(generator, cond, Sampling(), Noise([0, 1]), recorder=recorder)
    assert recorder.evaluations == 10 and recorder.passes == 5 and recorder.committed == [0, 10]
    assert recorder.report().uncertain_tokens and recorder.report().uncertain_drafted == 0
    nats = recorder.report().nats
    assert nats is not None and 0 < nats < 10 * math.log(3)
    speculative_jacobi(generator, cond, GREEDY.choice, Noise([0, 1]), recorder=recorder)
    report = recorder.report()
    assert report.nats == nats  # a greedy choice is certain
    assert report.images == 4 and report.tokens == 20
    assert 0 < report.network_seconds < report.seconds == pytest.approx(recorder.seconds)
    assert report.as_dict()["tokens_per_evaluation"] == pytest.approx(20 / report.evaluations)
    assert "20 tokens" in str(report) and "network evaluations an image" in str(report)


@pytest.mark.parametrize("window", [1, 3])
def test_entropy_is_that_of_the_laws_of_committed_tokens(window: int) -> None:
    cond = Condition(ids=torch.tensor([0, 1]))

    def nats(spread: float, windows: bool) -> float | None:
        generator = TableGenerator(sequence_layout(5, Categorical(3)), spread=spread)
        recorder, noise = Recorder(entropy=True), Noise([0, 1])
        if windows:
            speculative_jacobi(
                generator, cond, Choice(0.7), noise, rules=Rules(window), recorder=recorder
            )
        else:
            Ancestral()(generator, cond, Sampling(choice=Choice(0.7)), noise, recorder=recorder)
        return recorder.report().nats

    assert nats(0, True) == pytest.approx(10 * math.log(3))  # all laws are uniform
    if window == 1:  # the same tokens, so the same laws
        assert nats(1.5, True) == pytest.approx(nats(1.5, False))


class Coupled(Distribution):
    """A head whose tokens depend on each other."""

    def sample(self, sampler: object, noise: Noise) -> Tensor:
        return torch.zeros(2, 1, dtype=torch.int64)


def broken(change: Callable[[TableGenerator], None]) -> TableGenerator:
    generator = TableGenerator(sequence_layout(6, Categorical(2)))
    change(generator)
    return generator


def unequal(generator: TableGenerator) -> None:
    generator.entities = Entities(torch.arange(6), (1, 2, 3))


def coupled(generator: TableGenerator) -> None:
    generator.predict = lambda *args, **kwargs: Coupled()  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("change", "reason"), [(unequal, "entities of one size"), (coupled, "independent logits")]
)
def test_what_cannot_be_decoded_is_refused_in_one_line(change: Callable, reason: str) -> None:
    generator, cond = broken(change), Condition(ids=torch.tensor([0, 1]))
    with pytest.raises(UserError, match=reason) as jacobi:
        speculative_jacobi(generator, cond, Choice(), Noise([0, 1]))
    with pytest.raises(UserError, match=reason):
        draft_model(generator, generator, cond, Choice(), Noise([0, 1]))
    assert "\n" not in str(jacobi.value)


def test_draft_models_of_other_tokens_are_refused() -> None:
    target, cond = (
        TableGenerator(sequence_layout(6, Categorical(2))),
        Condition(ids=torch.tensor([0])),
    )
    with pytest.raises(UserError, match="built for"):
        draft_model(
            target, TableGenerator(grid_layout(2, 3, Categorical(2))), cond, Choice(), Noise([0])
        )
    with pytest.raises(UserError, match="other groups"):
        draft_model(
            target, TableGenerator(target.layout, entity_size=2), cond, Choice(), Noise([0])
        )
