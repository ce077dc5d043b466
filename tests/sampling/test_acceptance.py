"""Acceptance rules and clusters: against a stable sort, against GSD's closed form, and at the edges of the order."""

import pytest
import torch
from torch import Tensor

from tessellar.protocol.choice import race
from tessellar.sampling.acceptance import GroupedRatio, distance_quantile, neighbours, plain_ratio
from tessellar.sampling.couplings import COUPLINGS, Reuse, fresh, verify


def laws(*shape: int, seed: int = 0, kept: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(*shape, generator=generator)
    removed = torch.rand(*shape, generator=generator) > kept
    return logits.masked_fill(removed, -torch.inf).softmax(-1)


def draws(law: Tensor, count: int, seed: int) -> Tensor:
    noise = torch.empty(count, *law.shape).exponential_(
        generator=torch.Generator().manual_seed(seed)
    )
    return race(law, noise)


@pytest.mark.parametrize("kept", [1.0, 0.4])
@pytest.mark.parametrize(("below", "above"), [(3, 2), (0, 0), (7, 6), (30, 30)])
def test_neighbours_are_those_of_a_stable_sort(kept: float, below: int, above: int) -> None:
    p = laws(50, 20, kept=kept)
    p[:, 7] = p[:, 3]  # a tie
    draft = torch.randint(0, 20, (50,), generator=torch.Generator().manual_seed(1))
    near = neighbours(p, draft, below, above)
    order = p.sort(dim=-1, stable=True).indices
    rank = (order == draft[:, None]).int().argmax(-1)
    assert torch.equal(near.rank, rank)
    for row in range(50):
        start, stop = max(0, int(rank[row]) - below), int(rank[row]) + above + 1
        found = [token for token in near.tokens[row].tolist() if token >= 0]
        assert found == order[row, start:stop].tolist()


def test_a_cluster_holds_the_draft_and_passes_both_filters() -> None:
    p, table = (
        laws(200, 30, kept=0.7),
        torch.randn(30, 2, generator=torch.Generator().manual_seed(2)),
    )
    draft = draws(p, 1, seed=3)[0]
    near, inside = GroupedRatio(9, 0.02, 1.0, table).cluster(p, draft)
    assert bool((inside & (near.tokens == draft[:, None])).any(-1).all())
    assert 200 < int(inside.sum()) < 200 * 9
    rows, places = inside.nonzero(as_tuple=True)
    tokens, own = near.tokens[rows, places], draft[rows]
    assert bool((p[rows, tokens] > 0).all()) and bool(
        ((p[rows, tokens] - p[rows, own]).abs() < 0.02).all()
    )
    assert bool(((table[tokens] - table[own]).square().sum(-1) < 1.0).all())


def test_a_token_that_filters_removed_is_never_accepted() -> None:
    p = torch.tensor([[0.0, 0.0, 0.01, 0.99]])
    q = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    draft = torch.tensor([1])
    assert float(GroupedRatio(4)(p, q, draft)) == 0
    assert float(GroupedRatio(3, exact_official=True)(p, q, draft)) == pytest.approx(
        0.01
    )  # the released rules do


@pytest.mark.parametrize(
    "rule", [plain_ratio, GroupedRatio(4), GroupedRatio(4, exact_official=True)]
)
def test_a_slot_without_a_draft_is_never_kept(rule) -> None:
    p = laws(40, 6)
    assert not bool(rule(p, torch.zeros_like(p), p.argmax(-1)).any())


def test_clusters_accept_more_on_average() -> None:
    """GSD's theorem is about an average: the acceptance of draws from q."""
    p, q = laws(40, 64, seed=4), laws(40, 64, seed=5)
    draft = draws(q, 500, seed=6)
    p, q = p.expand(500, -1, -1), q.expand(500, -1, -1)
    plain, grouped = plain_ratio(p, q, draft).mean(), GroupedRatio(14)(p, q, draft).mean()
    assert float(grouped) > float(plain) + 0.05


@pytest.mark.parametrize(
    "rule",
    [plain_ratio, GroupedRatio(3), GroupedRatio(4, 0.05), GroupedRatio(4, exact_official=True)],
)
def test_one_step_follows_the_closed_form(rule, fits) -> None:
    """out(x) = q(x) a(x) + (1 - sum q a) r(x) with the token-level residual r; for the plain ratio that is p."""
    p, q = laws(1, 9, seed=7)[0], laws(1, 9, seed=8)[0]
    acceptance = rule(p.expand(9, -1), q.expand(9, -1), torch.arange(9))
    residual = (p - q).clamp(min=0)
    law = q * acceptance + (1 - (q * acceptance).sum()) * residual / residual.sum()
    if rule is plain_ratio:
        torch.testing.assert_close(law, p)
    n, stream = 100_000, torch.Generator().manual_seed(9)
    verdict = verify(
        p.expand(n, 1, 1, -1),
        q.expand(n, 1, 1, -1),
        draws(q, n, seed=10).view(n, 1, 1),
        torch.rand(n, 1, 1, generator=stream),
        torch.empty(n, 1, 1, 9).exponential_(generator=stream),
        rule,
        fresh,
    )
    counts = torch.bincount(verdict.tokens.flatten(), minlength=9)
    assert fits(counts, law.double())
    assert fits(counts, p.double()) == (rule is plain_ratio)


@pytest.mark.parametrize("coupling", [*COUPLINGS.values(), Reuse()])
def test_equal_laws_keep_every_draft(coupling) -> None:
    """No residual is left to draw from, whatever rounding does to the ratio."""
    p, stream = laws(300, 1, 1, 7), torch.Generator().manual_seed(11)
    draft = draws(p, 1, seed=12)[0]
    noise = torch.empty(300, 1, 1, 7).exponential_(generator=stream)
    verdict = verify(
        p, p.clone(), draft, torch.full((300, 1, 1), 1 - 1e-7), noise, plain_ratio, coupling, noise
    )
    assert torch.equal(verdict.tokens, draft) and bool((verdict.accepted == 1).all())


def test_distance_quantile_splits_the_pairs() -> None:
    table = torch.randn(300, 8, generator=torch.Generator().manual_seed(13))
    distances = torch.pdist(table).square()
    for quantile in (0.1, 0.5, 1.0):
        threshold = distance_quantile(table, quantile)
        assert float((distances <= threshold).float().mean()) == pytest.approx(quantile, abs=0.01)
