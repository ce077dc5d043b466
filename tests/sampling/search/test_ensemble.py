"""Ensembles: ranks, weights, and what they do not depend on."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.sampling.search.verifiers import Candidates, Ensemble, Subject, Verifier

VALUES = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass(frozen=True)
class Column(Verifier):
    """A column of what stands for images."""

    number: int
    scale: float = 1.0

    def check(self, subject: Subject) -> None:
        pass

    def measure(self, candidates: Candidates) -> Tensor:
        assert candidates.images is not None
        return (self.scale * candidates.images[:, self.number]).exp()[:, None]


def scored(ensemble: Ensemble, values: Tensor = VALUES) -> Tensor:
    return ensemble.scores(ensemble.measure(Candidates(values, Subject(0))))


def test_ranks_are_weighted_and_do_not_depend_on_scales_or_on_the_order_of_candidates() -> None:
    weights = (1.0, 2.0, 0.5)
    ensemble = Ensemble([Column(i) for i in range(3)], weights)
    found = scored(ensemble)
    ranks = VALUES.argsort(0, descending=True).argsort(0).double()
    assert torch.allclose(found, 1 - (ranks * torch.tensor(weights)).sum(1) / (3.5 * 8))
    assert found.min() >= 0 and found.max() <= 1
    scaled = Ensemble([Column(i, 2.0 + i) for i in range(3)], weights)
    assert torch.equal(scored(scaled), found)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(scored(ensemble, VALUES[order]), found[order])


def test_a_weight_of_zero_leaves_a_verifier_out_and_the_others_keep_theirs() -> None:
    members: list[Verifier] = [Column(0), Column(1), Column(2)]
    assert torch.equal(
        scored(Ensemble(members, (0.0, 2.0, 1.0))), scored(Ensemble(members[1:], (2.0, 1.0)))
    )
    official = scored(Ensemble(members, (0.0, 2.0, 1.0), exact_official=True))
    assert torch.equal(official, scored(Ensemble([Column(2)])))  # weights 0 and 2 met 1 and 2


def test_by_weight_scores_are_brought_to_one_range() -> None:
    found = scored(Ensemble([Column(0), Column(1)], (1.0, 3.0), by="weighted"))
    unit = (VALUES[:, :2].exp() - VALUES[:, :2].exp().amin(0)) / (
        VALUES[:, :2].exp().amax(0) - VALUES[:, :2].exp().amin(0)
    )
    assert torch.allclose(found, unit @ torch.tensor([1.0, 3.0], dtype=torch.float64))
    same = scored(Ensemble([Column(0)], by="weighted"), torch.zeros(4, 1))
    assert same.tolist() == [0.0] * 4


def test_ensembles_in_ensembles() -> None:
    inner = Ensemble([Column(0), Column(1)], by="weighted")
    outer = Ensemble([inner, Column(2)], (1.0, 1.0))
    alone = scored(inner)
    ranks = (
        alone.argsort(descending=True).argsort() + VALUES[:, 2].argsort(descending=True).argsort()
    )
    assert torch.allclose(scored(outer), 1 - ranks.double() / (2 * 8))


def test_wrong_weights() -> None:
    one: list[Verifier] = [Column(0)]
    with pytest.raises(UserError, match="at least one verifier"):
        Ensemble([])
    for weights in ((1.0, 2.0), (-1.0,), (0.0,)):
        with pytest.raises(UserError):
            Ensemble(one, weights)
