"""Siblings of a draft: which there are, which stays, greedy, batches, and what they are worth."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, grid_layout, sequence_layout
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.sampling.siblings import further_drafts, judge_siblings
from tessellar.sampling.speculative import SiblingJacobi, SpeculativeJacobi

LABELS = Condition(ids=torch.tensor([0, 3, 2]))


def llamagen() -> LlamaGen:
    torch.manual_seed(0)
    made = LlamaGen(grid_layout(3, 4, Categorical(11)), 32, 2, 4, 5, ffn_multiple_of=8)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def test_siblings_are_drawn_without_replacement_of_what_the_law_allows() -> None:
    law = torch.tensor([[0.5, 0.3, 0.0, 0.2]]).expand(20_000, -1)
    draw = torch.Generator().manual_seed(1)
    noise = -torch.rand(law.shape, generator=draw).log()
    drafts, there = further_drafts(law, torch.zeros(20_000, dtype=torch.int64), 4, noise)
    assert there[0].tolist() == [True, True, True, False]
    assert bool((drafts[:, 0] == 0).all()) and bool(
        (drafts[:, :3].sort(1).values == torch.tensor([0, 1, 3])).all()
    )
    # The second one is drawn of 0.3 : 0.2.
    assert float((drafts[:, 1] == 1).float().mean()) == pytest.approx(0.6, abs=0.02)
    certain = torch.tensor([[0.0, 1.0, 0.0]])
    _, there = further_drafts(certain, torch.tensor([1]), 3, torch.ones(1, 3))
    assert there.tolist() == [[True, False, False]]


def test_the_first_sibling_that_what_is_left_of_p_allows_stays() -> None:
    """p = (0.2, 0.5, 0.3), q = (0.8, 0.1, 0.1): behind the first, (0, 4, 2) / 6 is left, and of q (0, 1, 1) / 2."""
    p = torch.tensor([[0.2, 0.5, 0.3]]).expand(4, -1)
    law = torch.tensor([[0.8, 0.1, 0.1]]).expand(4, -1)
    drafts = torch.tensor([[0, 2, 1]]).expand(4, -1)
    there = torch.ones_like(drafts, dtype=torch.bool)
    # Chances: 0.25, then (1 / 3) / (1 / 2); then p is left with (0, 1, 0) and the last one stays.
    uniform = torch.tensor([[0.24, 0, 0], [0.26, 0.66, 0], [0.26, 0.67, 0.99], [0.26, 0.67, 0.99]])
    there = there.clone()
    there[3, 2] = False
    chosen = judge_siblings(p, law, drafts, there, uniform, torch.ones(4, 3))
    assert chosen.branch.tolist() == [0, 1, 2, 0]
    assert chosen.accepted.tolist() == [True, True, True, False]
    assert chosen.token.tolist() == [0, 2, 1, 1]


def test_greedy_is_plain_greedy_and_an_image_does_not_depend_on_its_batch() -> None:
    generator = llamagen()
    algorithm = SiblingJacobi(5, siblings=3)
    plain = Sampling(2.0, Choice(0), Ancestral()).tokens(generator, LABELS, [4, 5, 6])
    assert torch.equal(
        Sampling(2.0, Choice(0), algorithm).tokens(generator, LABELS, [1, 2, 3]), plain
    )
    sampling = Sampling(2.0, Choice(0.5), algorithm)
    together = sampling.tokens(generator, LABELS, [4, 5, 6])
    for i, seed in enumerate((4, 5, 6)):
        alone = sampling.tokens(generator, LABELS.select(torch.tensor([i])), [seed])
        assert torch.equal(alone[0], together[i])


def test_siblings_need_fewer_evaluations_and_tokens_of_one_id() -> None:
    table = TableGenerator(sequence_layout(6, Categorical(3)), num_classes=4, spread=1.0)
    many = Condition(ids=torch.arange(400) % 4)
    counts = []
    for algorithm in (SpeculativeJacobi(4, "uniform", "maximal"), SiblingJacobi(4, siblings=3)):
        recorder = Recorder()
        Sampling(algorithm=algorithm).tokens(table, many, range(400), recorder)
        counts.append(recorder.evaluations)
    assert counts[1] < 0.97 * counts[0]
    pairs = TableGenerator(sequence_layout(6, Categorical(2)), num_classes=4, entity_size=2)
    with pytest.raises(UserError, match="siblings of drafts need tokens of one id, one by one"):
        Sampling(algorithm=SiblingJacobi(4)).tokens(pairs, LABELS, [1, 2, 3])
