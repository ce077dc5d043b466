"""TokenUnify's mixture: what is hidden, how objectives share a run, what each reads, and that a run trains on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tessellar
from tessellar.checkpoints.card import Record
from tessellar.data.sets.shapes import ShapesData
from tessellar.errors import UserError
from tessellar.models.har import HAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.rar import RAR
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, grid_layout, sequence_layout
from tessellar.training.methods.context_noise import ContextNoise
from tessellar.training.methods.mixture import (
    Alternating,
    Joint,
    Mixture,
    MixtureObjective,
    Stages,
    Weights,
    filled,
    hidden_at,
    hidden_behind,
    hiding,
    random_places,
)

GRID = grid_layout(4, 4, Categorical(16))
CLASSES = Condition(ids=torch.tensor([0, 3]))


def generator(kind: str = "llamagen") -> Any:
    torch.manual_seed(0)
    if kind == "rar":
        made = RAR(GRID, 32, 2, 4, 64, 5, dropout=0.0)
    else:
        made = LlamaGen(GRID, 32, 2, 4, 5, ffn_multiple_of=8, dropout=0.0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.conditioning.dropout = 0.0
    return made.train()


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 7, 20])
def test_context_and_targets_make_up_the_sequence(length: int) -> None:
    sequence = torch.randn(3, length, 2, 2)
    noise = torch.randn(3, length, 2, 2)
    for ratio in (0.0, 0.4, 1.0):
        places = random_places(3, length, ratio)
        hidden = hidden_at(places, length)
        assert hidden.sum(1).tolist() == [int(ratio * length)] * 3
        shown = filled(sequence, hidden, noise)
        assert torch.equal(shown[~hidden], sequence[~hidden])
        assert torch.equal(shown[hidden], noise[hidden])
    counts = torch.tensor([0, length // 2, length])
    behind = hidden_behind(counts, length)
    assert (~behind).sum(1).tolist() == counts.tolist()
    zero = filled(sequence, behind, torch.zeros(()))
    assert float(zero[behind].abs().sum()) == 0 and torch.equal(zero[~behind], sequence[~behind])


def test_schedules_share_a_run() -> None:
    assert Joint().weights(7, 0.3) == Weights(0, 1, 1)
    assert Joint(0.5, 2.0, 0.0).weights(0, 0.0) == Weights(0.5, 2, 0)
    alternating = [Alternating(2).weights(epoch, 0.0) for epoch in range(5)]
    following, all_later = Weights(0, 1, 0), Weights(0, 0, 1)
    assert alternating == [following, following, all_later, all_later, following]
    assert [Stages(0.5).weights(0, at).random for at in (0.0, 0.49, 0.5, 1.0)] == [1, 1, 0, 0]


@pytest.mark.parametrize("kind", ["llamagen", "rar"])
def test_random_tokens_see_everything_but_themselves(kind: str) -> None:
    model = generator(kind).eval()
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, 3] = True
    known = tokens()

    def scores(given: Tensor, sees: bool = True) -> Tensor:
        torch.manual_seed(5)  # the same random tokens
        with hiding(model, hidden, torch.ones(32)):
            model.sees_all = sees
            return model.score(given, CLASSES).logits[:, 3].detach()

    later = known.clone()
    later[:, 9] = (later[:, 9] + 1) % 16
    own = known.clone()
    own[:, 3] = (own[:, 3] + 1) % 16
    assert not torch.allclose(scores(known), scores(later))
    assert torch.equal(scores(known), scores(own))
    assert torch.equal(scores(known, sees=False), scores(later, sees=False))
    # Nothing of it is left behind.
    assert model.reader is None and model.veil is None and not model.sees_all
    plain = model.score(known, CLASSES).logits
    assert torch.equal(plain[:, :9], model.score(later, CLASSES).logits[:, :9])


def test_the_mark_tells_hidden_tokens() -> None:
    model = generator().eval()
    hidden = hidden_at(torch.tensor([[2, 5], [1, 8]]), 16)
    found = []
    for mark in (torch.zeros(32), torch.ones(32)):
        torch.manual_seed(5)
        with hiding(model, hidden, mark):
            found.append(model.score(tokens(), CLASSES).logits)
    assert not torch.allclose(found[0], found[1])


def test_later_tokens_are_told_by_the_prefix_alone() -> None:
    model = generator().eval()
    objective = MixtureObjective(Mixture(later=0), model)
    counts = torch.tensor([[4, 9], [4, 9]])
    ranks = torch.arange(16).expand(2, 2, 16)

    def told(given: Tensor) -> Tensor:
        hidden = model.score(given, CLASSES).hidden
        return objective.later_logits(hidden, counts, ranks, model.entities)

    known = tokens()
    later = known.clone()
    later[:, 6] = (later[:, 6] + 1) % 16
    first, second = told(known), told(later)
    assert first.shape == (2, 2, 16, 16)
    assert torch.equal(first[:, 0], second[:, 0]) and not torch.allclose(first[:, 1], second[:, 1])


@pytest.mark.parametrize("later", [0, 5])
def test_next_all_asks_for_what_lies_behind(later: int) -> None:
    """A network that knows every place's token, and nothing else, has no loss."""
    model = generator()
    objective = MixtureObjective(Mixture(later=later, prefixes=3), model)
    given = tokens()[:1].expand(2, -1)
    asked: list[tuple[Tensor, Tensor]] = []

    def knowing(hidden: Tensor, counts: Tensor, ranks: Tensor, entities: Any) -> Tensor:
        asked.append((counts, ranks))
        behind = ranks >= counts[..., None]
        right = torch.nn.functional.one_hot(given[0][ranks], 16) * 50.0
        return torch.where(behind[..., None], right, -right)

    objective.later_logits = knowing  # type: ignore[method-assign]
    loss = objective.next_all(torch.zeros(2, 16, 32), given, model.entities)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    counts, ranks = asked[0]
    assert int(counts.min()) >= 1 and int(counts.max()) <= 15
    assert ranks.shape[-1] == (later or 16)
    assert not later or bool((ranks >= counts[..., None]).all())


def test_weights_of_zero_are_not_computed_and_others_weigh() -> None:
    model = generator()
    known = tokens()
    plain = model.score(known, CLASSES).cross_entropy(known)
    for schedule, names in (
        (Joint(0.0, 1.0, 0.0), {"cross_entropy"}),
        (Joint(1.0, 0.0, 0.0), {"random"}),
        (Joint(0.0, 0.0, 1.0), {"next_all"}),
        (Joint(2.0, 0.5, 1.0), {"cross_entropy", "random", "next_all"}),
    ):
        objective = MixtureObjective(Mixture(schedule), model)
        terms = objective(model, known, CLASSES, 0, 0.0)
        assert set(terms) == names
        if "cross_entropy" in names:
            weight = schedule.next_weight
            torch.testing.assert_close(terms["cross_entropy"], weight * plain)


def test_a_run_alternates_by_its_own_epochs(fit, make, tmp_path: Path) -> None:
    module = make.generator_module(mixture=Mixture(Alternating(1), hidden=16))
    seen: list[tuple[int, set[str]]] = []
    log_terms = module.log_terms

    def note(stage: Any, terms: dict[str, Tensor], size: int) -> None:
        seen.append((module.epoch, set(terms) - {"loss"}))
        log_terms(stage, terms, size)

    module.log_terms = note
    before = module.mixture.place.detach().clone()
    data = ShapesData(size=16, length=16, val_length=8, batch_size=8)
    fit(module, 4, data=data)
    expected = [(0, {"cross_entropy"})] * 2 + [(1, {"next_all"})] * 2
    assert seen == expected
    assert not torch.equal(module.mixture.place, before)
    module.export(tmp_path / "export", Record(title="mixture"))
    loaded = tessellar.load(tmp_path / "export")
    weights = module.model.generator.state_dict()
    for name, tensor in loaded.generator.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, weights[name])


def test_all_objectives_are_learnt(fit, make) -> None:
    module = make.generator_module(mixture=Mixture(Joint(1.0, 1.0, 1.0), hidden=32))
    _, losses = fit(module, 20)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.5


def test_what_the_mixture_cannot_train_says_so(make) -> None:
    layout = sequence_layout(16, Categorical(16))
    with pytest.raises(UserError, match="one token a position.*HAR does not"):
        MixtureObjective(Mixture(), HAR(layout, 32, 2, 4, 5, ffn_multiple_of=8))
    with pytest.raises(UserError, match="leave context_noise and recovery out"):
        make.generator_module(mixture=Mixture(), context_noise=ContextNoise())
    with pytest.raises(UserError, match="least_hidden 0.5 is above most_hidden 0.4"):
        MixtureObjective(Mixture(least_hidden=0.5), generator())
