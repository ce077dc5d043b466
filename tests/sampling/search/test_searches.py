"""Searches: what they equal in special cases, what they count, that they can be resumed."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import token_order
from tessellar.protocol.guidance import Constant
from tessellar.protocol.layout import Categorical, grid_layout, sequence_layout
from tessellar.sampling.search.beam import ARFree, Beam, Lookahead
from tessellar.sampling.search.best_of import BestOfN
from tessellar.sampling.search.journal import ImageJournal
from tessellar.sampling.search.priors import Branching, StreamNoise, UniformPrior, likeliest
from tessellar.sampling.search.schedules import Even, Geometric, Listed
from tessellar.sampling.search.searching import Found, Task
from tessellar.sampling.search.verifiers import Likelihood
from tessellar.sampling.settings import GREEDY, Sampling

GUIDED = Sampling(guidance=Constant(1.7), choice=Choice(temperature=0.9, top_k=2))


def plain(task: Task, sampling: Sampling) -> Tensor:
    return sampling.tokens(task.generator, task.condition, [task.seed])


def same(a: Found, b: Found) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in ((a.tokens, b.tokens), (a.scores, b.scores), (a.images, b.images))
    )


@pytest.mark.parametrize("schedule", [Even(), Geometric(), Listed(at=(2, 3))])
def test_a_beam_of_one_likeliest_candidate_is_greedy_decoding(task, schedule) -> None:
    given = task(sampling=replace(GREEDY, guidance=Constant(1.7)))
    search = Beam(Likelihood(), width=1, candidates=1, schedule=schedule, sample=False)
    assert torch.equal(search(given).tokens, plain(given, given.sampling))


def test_a_beam_of_one_drawn_candidate_is_plain_sampling(task) -> None:
    for seed in range(4):
        given = task(seed, sampling=GUIDED)
        found = Beam(Likelihood(), width=1, candidates=1, schedule=Even(every=2))(given)
        assert torch.equal(found.tokens, plain(given, GUIDED))


def test_best_of_one_is_plain_sampling_and_more_never_scores_worse(task, liking) -> None:
    given = task(sampling=GUIDED)
    first = BestOfN(liking(), count=1)(given)
    assert torch.equal(first.tokens, plain(given, GUIDED))
    assert torch.equal(first.images, given.tokenizer.decode(first.tokens))
    scores = [float(BestOfN(liking(), count=count)(given).scores[0]) for count in (1, 2, 5, 9)]
    assert scores == sorted(scores) and scores[0] < scores[-1]


def test_likelihoods_of_whole_sequences_are_those_of_the_processed_law(task) -> None:
    given = task(sampling=GUIDED)
    found = BestOfN(Likelihood(), count=6)(given, results=6)
    law = given.generator.joint(given.condition, GUIDED.choice, GUIDED.guidance.guidance())[0]
    digits = 3 ** torch.arange(6).flip(0)
    assert torch.allclose(found.scores, law[(found.shown * digits).sum(1)].log())


def textbook(task: Task, width: int) -> Tensor:
    """Beam search as it is written in textbooks: every prefix anew, all continuations, the best kept."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    length = task.generator.layout.length
    for place in range(length):
        grown = []
        for score, prefix in beams:
            tokens = torch.tensor([[*prefix, *[0] * (length - place)]])
            state = task.generator.start(task.condition, task.sampling.guidance.guidance())
            law = task.generator.predict(state, tokens, count=place + 1, want=1)
            assert isinstance(law, Logits)
            each = law.logits[0, 0].log_softmax(-1).double().tolist()
            grown += [(score + each[code], (*prefix, code)) for code in range(len(each))]
        beams = sorted(grown, key=lambda beam: -beam[0])[:width]
    return torch.tensor([prefix for _, prefix in beams])


def test_with_all_continuations_it_is_textbook_beam_search(task) -> None:
    given = task(sampling=Sampling(guidance=Constant(1.7)))
    for width in (1, 3, 3**5):
        search = Beam(Likelihood(), width=width, candidates=3, schedule=Even(), sample=False)
        assert torch.equal(search(given).tokens, textbook(given, width))
    joint = given.generator.joint(given.condition, Choice(), given.sampling.guidance.guidance())
    best = given.generator.outcomes()[joint[0].argmax()]
    assert torch.equal(search(given).tokens[0], best)


def test_shared_caches_give_what_fresh_ones_give() -> None:
    torch.manual_seed(0)
    generator = LlamaGen(grid_layout(2, 3, Categorical(5)), 16, 2, 2, num_classes=3).eval()
    torch.nn.init.normal_(generator.output.weight, std=0.5)
    given = Task(
        generator=generator,
        tokenizer=None,  # type: ignore[arg-type]  # the likelihood reads no image
        condition=Condition(ids=torch.tensor([1])),
        sampling=Sampling(guidance=Constant(2.0)),
        seed=0,
        decoder=lambda tokens, known: tokens,
    )
    with torch.no_grad():
        wanted = textbook(given, 4)
    for branch in ("last", "first"):
        search = Beam(
            Likelihood(), width=4, candidates=5, schedule=Even(), sample=False, branch=branch
        )
        assert torch.equal(search(given).tokens, wanted)


def test_look_ahead_of_nothing_is_a_beam_and_leaves_the_draws_alone(task, liking) -> None:
    options = {"width": 3, "candidates": 4, "schedule": Geometric(), "replacement": True}
    beam = Beam(liking(), **options)(task())
    assert same(beam, Lookahead(liking(), **options, ahead=0)(task()))
    assert same(beam, Lookahead(liking(), **options, until=0)(task()))
    # What looks ahead judges otherwise, but proposes the same first candidates.
    proposed: list[Tensor] = []

    class Watching(ImageJournal):
        def record(self, step, tokens, choices) -> None:
            proposed.append(tokens)

    far = Lookahead(liking(), **options)
    Beam(liking(), **options)(task(), progress=Watching(Path("none")))
    first = proposed[0]
    proposed.clear()
    found = far(task(), progress=Watching(Path("none")))
    assert torch.equal(proposed[0], first)
    assert not same(found, beam)


def test_candidates_of_a_beam_part_at_the_last_or_the_first_entity(task, liking) -> None:
    pools: list[Tensor] = []

    class Watching(ImageJournal):
        def record(self, step, tokens, choices) -> None:
            pools.append(tokens)

    for branch in ("last", "first"):
        search = Beam(
            liking(), width=1, candidates=3, schedule=Listed(at=(4,)), branch=branch, complete=False
        )
        search(task(3), progress=Watching(Path("none")))
    last, first = pools
    assert (last[:, :3] == last[0, :3]).all() and len(last[:, 3].unique()) == 3
    assert len(first[:, 0].unique()) == 3
    shared = Beam(
        liking(), width=1, candidates=3, schedule=Listed(at=(4,)), branch="first", shared=2
    )
    shared(task(3), progress=Watching(Path("none")))
    assert (pools[-1][:, :2] == pools[-1][0, :2]).all() and len(pools[-1][:, 2].unique()) == 3


@pytest.mark.parametrize(("width", "candidates"), [(2, 4), (4, 2)])
def test_verifier_calls_are_counted(task, liking, width: int, candidates: int) -> None:
    layout = sequence_layout(5, Categorical(4), min_prefix=1)
    for steps in (1, 2, 5):
        verifier = liking()
        found = Beam(
            verifier,
            width=width,
            candidates=candidates,
            schedule=Even(steps),
            replacement=True,
            complete=False,
        )(task(layout=layout))
        kept = min(width, candidates)
        wanted = candidates
        if steps > 1:
            wanted += kept * candidates
        wanted += max(steps - 2, 0) * width * candidates
        assert found.calls == sum(verifier.counted) == wanted
        assert sum(step.calls for step in found.steps) == wanted
    verifier = liking()
    assert BestOfN(verifier, count=7)(task()).calls == sum(verifier.counted) == 7


def test_batches_of_the_verifier_change_nothing(task, liking) -> None:
    searches = (
        Beam(liking(), width=3, candidates=4, replacement=True),
        Lookahead(liking(), width=3, candidates=4, replacement=True, ahead=2),
        BestOfN(liking(), count=11),
        ARFree(liking(), width=2, candidates=9),
    )
    for search in searches:
        assert same(search(task()), replace(search, batch_size=2)(task()))


def test_the_best_is_named_first_and_results_are_of_the_last_pool(task, liking) -> None:
    for exact_official in (False, True):
        search = Beam(
            liking(),
            width=3,
            candidates=3,
            schedule=Listed(at=(1, 2)),
            exact_official=exact_official,
        )
        found = search(task(1), results=3)
        ordered = found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        assert found.known == 6 and found.images.shape[0] == 3
        assert ordered or exact_official
    assert not ordered  # the official order is that before the sequences were finished


def test_equal_candidates_can_be_scored_once(task, liking) -> None:
    options = {"width": 4, "candidates": 8, "schedule": Even(), "replacement": True}
    copies = Beam(liking(), **options)(task())
    single = Beam(liking(), **options, dedup=True)(task())
    assert single.calls < copies.calls
    for step in single.steps:
        assert len(step.tokens.unique(dim=0)) == len(step.tokens)


def test_one_noise_of_decoding_a_prompt(task, liking) -> None:
    given = task(seed=8)
    Lookahead(liking(), width=2, candidates=2, ahead=1)(given)
    assert {seed for seeds in given.tokenizer.seeds for seed in seeds} == {8}


def test_what_cannot_be_decoded_in_part_is_filled_with_zeros(task, liking) -> None:
    seen: list[Tensor] = []
    given = task(layout=grid_layout(2, 3, Categorical(3)))
    inner = given.tokenizer.decode
    given.tokenizer.decode = lambda tokens: seen.append(tokens) or inner(tokens)  # type: ignore[method-assign]
    Beam(liking(), width=1, candidates=2, schedule=Even(every=2))(given)
    assert seen[0].shape == (2, 6) and (seen[0][:, 2:] == 0).all()


def test_an_interrupted_search_ends_as_an_uninterrupted_one(task, liking, tmp_path: Path) -> None:
    options = {"width": 3, "candidates": 4, "schedule": Even(), "replacement": True}
    path = tmp_path / "0.json"
    whole = Lookahead(liking(), **options)(task())
    for calls in (5, 18, 30):
        with pytest.raises(KeyboardInterrupt):
            Lookahead(liking(calls), **options)(task(), progress=ImageJournal(path))
    verifier = liking()
    resumed = Lookahead(verifier, **options)(task(), progress=ImageJournal(path))
    assert same(whole, resumed) and resumed.calls == whole.calls
    assert sum(verifier.counted) == whole.calls - 40  # of four steps, 4 + 3 * 12
    with pytest.raises(UserError, match="other candidates"):
        Lookahead(liking(), **options)(task(seed=6), progress=ImageJournal(path))


def test_uniform_candidates_are_uniform_and_follow_from_the_seed(fits) -> None:
    layout = sequence_layout(2, Categorical(4), min_prefix=1)
    entities = token_order(layout)

    def draw(seed: int) -> Tensor:
        prior = UniformPrior(layout, entities, StreamNoise(seed))
        return prior.extend(prior.begin(), 2, 20_000, Branching()).tokens

    tokens = draw(3)
    counts = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16)
    assert fits(counts, torch.full((16,), 1 / 16, dtype=torch.float64))
    assert torch.equal(tokens, draw(3)) and not torch.equal(tokens, draw(4))


def test_the_likeliest_values_of_several_tokens() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = likeliest(logits, 7)
    for row in range(2):
        each = logits[row].log_softmax(-1)
        everything = sorted(
            product(range(4), repeat=3),
            key=lambda ids: -sum(float(each[t, i]) for t, i in enumerate(ids)),
        )
        assert found.values[row].tolist() == [list(ids) for ids in everything[:7]]


def test_entities_of_several_tokens_and_orders_that_are_not_the_rasters(task, liking) -> None:
    layout = sequence_layout(6, Categorical(2), min_prefix=1)
    given = task(layout=layout, entity_size=2)
    found = Beam(Likelihood(), width=9, candidates=4, schedule=Even(), sample=False)(given)
    joint = given.generator.joint(given.condition, Choice())
    assert torch.equal(found.tokens[0], given.generator.outcomes()[joint[0].argmax()])
    assert Beam(liking(), width=2, candidates=3)(given).known == 3


def test_schedules() -> None:
    assert Geometric().lengths(256) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert Geometric(steps=3, base=1.5).lengths(256) == (1, 2)  # int(1.5) repeats 1
    assert Even(4, every=32).lengths(100) == (32, 64, 96, 100)
    assert Listed(at=(1, 3, 8)).lengths(6, given=2) == (3, 5, 6)
    with pytest.raises(UserError, match="nothing to search"):
        Even().lengths(4, given=4)
    for wrong in (lambda: Listed(at=(3, 2)), lambda: Geometric(base=1.0), lambda: Even(every=0)):
        with pytest.raises(UserError):
            wrong()


def test_what_cannot_be_searched_is_said(task) -> None:
    given = task()
    with pytest.raises(UserError, match="another verifier"):
        ARFree(Likelihood()).check(given.generator, given.sampling)
    with pytest.raises(UserError, match="shared is 6"):
        Beam(shared=6).check(given.generator, given.sampling)
