"""RAR's own promises: orders, the target-aware embedding, annealing, published sizes. (The rest: test_protocol.py.)"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.rar import RAR, rar_b, rar_l, rar_xl, rar_xxl
from tessellar.models.rar.official import from_official, to_official
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.layout import Categorical, Continuous, grid_layout
from tessellar.training.methods.order_annealing import OrderAnnealing

GRID = grid_layout(2, 3, Categorical(11))
LABELS = Condition(ids=torch.tensor([0, 3]))


def model() -> RAR:
    torch.manual_seed(0)
    generator = RAR(GRID, 32, 2, 4, 64, 4, condition_dropout=0.0, dropout=0.0)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


def scores(generator: RAR, tokens: Tensor, order: list[list[int]]) -> Tensor:
    distribution = generator.score(tokens, LABELS, Entities(torch.tensor(order), (1,) * 6))
    assert isinstance(distribution, Logits)
    return distribution.logits


@torch.no_grad()
def test_two_orders_differ_from_where_their_targets_differ() -> None:
    """The same tokens are read up to the fifth prediction, but it is asked for another place."""
    generator, tokens = (
        model(),
        torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0)),
    )
    one = scores(generator, tokens, [[4, 0, 2, 1, 3, 5]] * 2)
    other = scores(generator, tokens, [[4, 0, 2, 1, 5, 3]] * 2)
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4], other[:, 4])


@torch.no_grad()
def test_images_may_have_orders_of_their_own() -> None:
    generator, tokens = (
        model(),
        torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(1)),
    )
    orders = [[5, 4, 3, 2, 1, 0], [2, 0, 1, 4, 3, 5]]
    mixed = scores(generator, tokens, orders)
    for i in range(2):
        torch.testing.assert_close(
            mixed[i], scores(generator, tokens, [orders[i]] * 2)[i], atol=1e-5, rtol=1e-5
        )


def test_orders_of_training() -> None:
    generator = model().train()
    generator.random_order = 0.0
    assert torch.equal(generator.training_order(5).order, torch.arange(6))
    generator.random_order = 1.0
    orders = generator.training_order(400).order
    assert torch.equal(orders.sort(1).values, torch.arange(6).expand(400, -1))
    first = orders[:, 0].bincount(minlength=6).double()
    assert (
        float(((first - 400 / 6) ** 2 / (400 / 6)).sum()) < 35
    )  # chi-square, 5 degrees: false alarms 2e-6


@pytest.mark.parametrize(
    ("update", "share"), [(0, 1.0), (10, 1.0), (15, 0.5), (20, 0.0), (99, 0.0)]
)
def test_annealing(update: int, share: float) -> None:
    generator = model()
    module: Any = SimpleNamespace(model=SimpleNamespace(generator=generator), updates=update)
    trainer: Any = None
    OrderAnnealing(10, 20).on_train_batch_start(trainer, module, None, 0)
    assert generator.random_order == pytest.approx(share)


def test_annealing_refuses_what_has_no_orders() -> None:
    raster = LlamaGen(grid_layout(2, 3, Categorical(5)), 16, 1, 2, 3, ffn_multiple_of=8)
    module: Any = SimpleNamespace(model=SimpleNamespace(generator=raster), updates=0)
    trainer: Any = None
    with pytest.raises(UserError, match="needs a generator with random orders"):
        OrderAnnealing(0, 1).on_train_batch_start(trainer, module, None, 0)
    with pytest.raises(UserError, match="give 0 <= start < end"):
        OrderAnnealing(5, 5)


@pytest.mark.parametrize(
    ("preset", "count"),
    [(rar_b, 260_923_648), (rar_l, 461_668_352), (rar_xl, 955_425_024), (rar_xxl, 1_498_520_704)],
)
def test_published_sizes(preset: Any, count: int) -> None:
    with torch.device("meta"):
        generator = preset(grid_layout(16, 16, Categorical(1024)))
    assert sum(p.numel() for p in generator.parameters()) == count


def test_official_keys_there_and_back() -> None:
    generator = model()
    official = to_official(generator)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            from_official(official, GRID).state_dict().values(),
            generator.state_dict().values(),
            strict=True,
        )
    )
    with pytest.raises(UserError, match="is for 6 tokens, but the tokenizer gives 4x4"):
        from_official(official, grid_layout(4, 4, Categorical(11)))
    with pytest.raises(UserError, match="predicts 11 codes"):
        from_official(official, grid_layout(2, 3, Categorical(12)))


def test_continuous_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="RAR predicts categorical tokens"):
        RAR(grid_layout(2, 2, Continuous(4)), 32, 1, 4, 64, 4)
