"""LPD: orders, numbers of steps, guidance by token, positions of other grids. (The rest: test_protocol.py.)"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.models.lpd import LPD, lpd_l, lpd_xl, lpd_xxl
from tessellar.models.lpd.official import OFFICIAL, from_official, to_official
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.guidance import Guidance, Linear
from tessellar.protocol.layout import Categorical, Continuous, grid_layout, sequence_layout
from tessellar.protocol.local_order import Chances, Thresholds, local_order_of, local_sizes
from tessellar.protocol.noise import Noise

GRID = grid_layout(4, 4, Categorical(23))
LABELS = Condition(ids=torch.tensor([0, 3]))


def make(**options: Any) -> LPD:
    torch.manual_seed(0)
    made = LPD(GRID, 32, 2, 4, 5, steps=6, dropout=0.0, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def tokens_of(batch: int) -> Tensor:
    return torch.randint(23, (batch, 16), generator=torch.Generator().manual_seed(1))


def scores(generator: LPD, tokens: Tensor, entities: Entities) -> Tensor:
    distribution = generator.score(tokens, LABELS, entities)
    assert isinstance(distribution, Logits)
    return distribution.logits


@torch.no_grad()
def test_the_order_inside_a_group_permutes_its_predictions() -> None:
    generator = make()
    tokens = tokens_of(2)
    sizes = (1, 3, 5, 7)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    inside = torch.tensor([0, 3, 1, 2, 6, 8, 4, 7, 5, *range(9, 16)])
    first = scores(generator, tokens, Entities(order, sizes))
    other = scores(generator, tokens, Entities(order[inside], sizes))
    torch.testing.assert_close(other, first[:, inside], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_guidance_goes_by_a_token_s_own_place() -> None:
    """w = 1 + (s - 1) p / N: the first token is the conditional one, tokens of one group differ."""
    generator = make()
    tokens = tokens_of(2)
    state = generator.start(LABELS, Guidance(Linear(5.0, reach_end=False)))
    count = generator.entities.count
    guided = generator.predict(state, tokens, count).logits  # type: ignore[attr-defined]
    conditional = scores(generator, tokens, generator.entities)
    null = generator.score(tokens, generator.null(LABELS)).logits  # type: ignore[attr-defined]
    scale = 1 + 4.0 * torch.arange(16)[:, None] / 16
    expected = null + scale * (conditional - null)
    torch.testing.assert_close(guided, expected, atol=1e-3, rtol=1e-4)


def test_every_image_has_an_order_of_its_own_seed() -> None:
    generator = make()
    together = generator.plan(Noise([3, 5]))
    alone = generator.plan(Noise([5]))
    assert torch.equal(together.order[1:], alone.order)
    assert not torch.equal(together.order[0], together.order[1])
    assert together.sizes == local_sizes(16, 6)
    assert generator.plan(Noise([3]), steps=9).sizes == local_sizes(16, 9)
    assert torch.equal(together.order.sort(1).values, torch.arange(16).expand(2, -1))
    for steps in (0, 17):
        with pytest.raises(UserError, match="give 1 to 16"):
            generator.plan(Noise([3]), steps=steps)


def test_training_draws_a_number_of_steps_and_an_order_for_each_sample() -> None:
    generator = make(trained_steps=(4, 9))
    found = {}
    torch.manual_seed(1)
    for _ in range(12):
        drawn = generator.training_order(3)
        assert torch.equal(drawn.order.sort(1).values, torch.arange(16).expand(3, -1))
        found[drawn.count] = drawn.sizes
    assert found == {4: local_sizes(16, 4), 9: local_sizes(16, 9)}
    assert [len(sizes) for sizes in make().trained_sizes] == [16, 8, 4, 2, 1]
    with torch.device("meta"):
        steps = [LPD(grid_layout(n, n, Categorical(5)), 8, 1, 1).trained_sizes for n in (16, 32)]
    assert [len(sizes) for sizes in steps[0]] == [256, 128, 64, 32, 24, 20, 16, 12, 8]
    assert [len(sizes) for sizes in steps[1]][-3:] == [48, 40, 32]


def test_without_a_class_the_loss_does_not_depend_on_it() -> None:
    generator = make(condition_dropout=1.0).train()
    losses = []
    for labels in ([0, 1], [4, 2]):
        torch.manual_seed(3)
        given = Condition(ids=torch.tensor(labels))
        losses.append(generator.loss(tokens_of(2), given)["cross_entropy"])
    assert torch.equal(*losses)


def test_sizes_of_groups_are_the_published_ones_or_follow_their_rule() -> None:
    twenty = (1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20)
    assert local_sizes(256, 20) == twenty
    assert local_sizes(256, 8) == (1, 15, 24, 32, 40, 45, 49, 50)
    assert local_sizes(1024, 48)[-8:] == (33, 33, 33, 33, 33, 33, 33, 34)
    for length, steps in ((256, 64), (256, 128), (1024, 32), (64, 12), (36, 35), (5, 1)):
        sizes = local_sizes(length, steps)
        assert (len(sizes), sum(sizes), min(sizes) >= 1) == (steps, length, True)


def test_supported_cells_of_a_group_lie_apart_and_the_rest_as_far_as_can_be() -> None:
    chances = Chances.of(torch.rand(5, 65, generator=torch.Generator().manual_seed(0)))
    order = local_order_of((8, 8), (1, 4, 3, 20, 36), chances, Thresholds(1.0, 1.0))
    assert sorted(order) == list(range(64))
    first, group = divmod(order[0], 8), [divmod(cell, 8) for cell in order[1:5]]
    beside = [cell for cell in group if abs(cell[0] - first[0]) + abs(cell[1] - first[1]) == 1]
    assert beside and all(
        max(abs(a[0] - b[0]), abs(a[1] - b[1])) > 1 for a in beside for b in beside if a != b
    )
    with pytest.raises(UserError, match="must be at least 0"):
        Thresholds(repulsion=-1.0)


@pytest.mark.parametrize(
    ("preset", "count", "larger"),
    [
        (lpd_l, 337_157_120, 337_943_552),
        (lpd_xl, 751_947_520, 752_930_560),
        (lpd_xxl, 1_412_184_576, 1_413_364_224),
    ],
)
def test_published_sizes(preset: Any, count: int, larger: int) -> None:
    for side, expected in ((16, count), (32, larger)):
        with torch.device("meta"):
            generator = preset(grid_layout(side, side, Categorical(16384)))
        assert sum(p.numel() for p in generator.parameters()) == expected


@torch.no_grad()
def test_a_larger_grid_starts_with_resized_positions() -> None:
    small = make()
    large = LPD(grid_layout(6, 6, Categorical(23)), 32, 2, 4, 5, steps=6, dropout=0.0)
    load_strict(large, large.starting_from(small.state_dict()), "the small one")
    assert torch.equal(large.position_embedding[:, 0], small.position_embedding[:, 0])
    corners = large.position_embedding[0, 1:].view(6, 6, -1)[::5, ::5].flatten(0, 1)
    of_small = small.position_embedding[0, 1:].view(4, 4, -1)[::3, ::3].flatten(0, 1)
    together = torch.nn.functional.cosine_similarity(corners, of_small, dim=-1)
    assert float(together.min()) > 0.8
    assert torch.equal(large.output.weight, small.output.weight)
    imported = from_official(to_official(small), large.layout, 4)
    assert torch.equal(imported.position_embedding, large.position_embedding)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    state = to_official(make())
    with pytest.raises(UserError, match="predicts 23 codes, but the tokenizer gives"):
        from_official(state, grid_layout(4, 4, Categorical(12)), 4)
    for lost in ("fake_latent", "blocks.1.mlp.fc1.bias"):
        with pytest.raises(UserError) as error:
            from_official({key: t for key, t in state.items() if key != lost}, GRID, 4, steps=6)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match="number of heads of width 32 is not known"):
        OFFICIAL.build(state, GRID, ImportOptions())
    with pytest.raises(UserError, match="LPD generates one grid; this tokenizer gives 16 tokens"):
        LPD(sequence_layout(16, Categorical(23)), 32, 1, 4)
    with pytest.raises(UserError, match="LPD predicts categorical tokens"):
        LPD(grid_layout(4, 4, Continuous(3)), 32, 1, 4)
    with pytest.raises(UserError, match="num_heads 5 does not divide width 32"):
        LPD(GRID, 32, 1, 5)
    with pytest.raises(UserError, match="16 tokens cannot be generated in 20 steps"):
        LPD(GRID, 32, 1, 4)
