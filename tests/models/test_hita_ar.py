"""Hita's generator: heads by position, the official look-up, in-painting, sizes. See also test_protocol.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.hita import HitaAR, hita_ar_2b, hita_ar_b, hita_ar_l, hita_ar_xl, hita_ar_xxl
from tessellar.models.hita.official import from_official, to_official
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from
from tessellar.sampling.settings import Sampling

LABELS = Condition(ids=torch.tensor([0, 3]))


def layout(first: int = 11, second: int = 17) -> Layout:
    return Layout(
        (
            Segment((3,), Categorical(first), "holistic"),
            Segment((2, 3), Categorical(second), "patches"),
        )
    )


def model(lookup: Any = "train_consistent", first: int = 11, second: int = 17) -> HitaAR:
    torch.manual_seed(0)
    made = HitaAR(layout(first, second), 32, 2, 4, 5, 0.0, 0.0, 8, lookup=lookup)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def tokens(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            torch.randint(0, 11, (2, 3), generator=draw),
            torch.randint(0, 17, (2, 6), generator=draw),
        ],
        1,
    )


def scores(made: HitaAR, ids: Tensor) -> Tensor:
    distribution = made.score(ids, LABELS)
    assert isinstance(distribution, Logits)
    return distribution.logits


def cached(made: HitaAR, ids: Tensor) -> Tensor:
    state, parts = made.start(LABELS), []
    for _ in range(9):
        predicted = made.predict(state, ids)
        assert isinstance(predicted, Logits)
        parts.append(
            torch.nn.functional.pad(
                predicted.logits, (0, 17 - predicted.logits.shape[-1]), value=-torch.inf
            )
        )
    return torch.cat(parts, 1)


@torch.no_grad()
def test_each_part_has_its_vocabulary() -> None:
    logits = scores(model(), tokens())
    assert bool(logits[:, :3, 11:].isinf().all()) and bool(logits[:, 3:].isfinite().all())


@torch.no_grad()
def test_the_official_sampler_differs_behind_the_boundary_only() -> None:
    ids = tokens()
    expected = scores(model(), ids)
    torch.testing.assert_close(cached(model(), ids), expected, atol=1e-4, rtol=1e-4)
    official = cached(model("official", 17, 17), ids)
    right = scores(model("official", 17, 17), ids)
    torch.testing.assert_close(official[:, :3], right[:, :3], atol=1e-4, rtol=1e-4)
    assert float((official[:, 3] - right[:, 3]).abs().max()) > 0.1


@torch.no_grad()
def test_forced_tokens_stay() -> None:
    made, ids = model(), tokens()
    state = made.start(LABELS)
    result = ids
    for step in decode_from(made, state, Sampling(), Noise([1, 2]), ids, first=5):
        result = step.tokens
    assert torch.equal(result[:, :5], ids[:, :5])
    made.layout.check(result)


def test_an_untrained_generator_knows_nothing() -> None:
    made = HitaAR(layout(), 32, 2, 4, 5, 0.0, 0.0, 8).eval()
    losses = made.loss(tokens(), LABELS)
    torch.testing.assert_close(losses["holistic"], torch.tensor(11.0).log())
    torch.testing.assert_close(losses["patches"], torch.tensor(17.0).log())


def test_official_keys_there_and_back() -> None:
    made = model()
    official = to_official(made)
    assert official["output.weight"].shape == (28, 32)
    again = from_official(official, layout(), 4)
    assert (
        torch.equal(again.holistic_output.weight, made.holistic_output.weight)
        and again.lookup == "official"
    )
    with pytest.raises(UserError, match=r"predicts \(11, 17\) codes, but the tokenizer gives"):
        from_official(official, layout(second=18), 4)


def test_other_layouts_are_refused() -> None:
    with pytest.raises(UserError, match="reads a categorical sequence, then a grid"):
        HitaAR(grid_layout(3, 3, Categorical(9)), 32, 1, 4)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (hita_ar_b, 136_152_576),
        (hita_ar_l, 376_596_480),
        (hita_ar_xl, 816_806_400),
        (hita_ar_xxl, 1_461_500_928),
        (hita_ar_2b, 2_251_549_440),
    ],
)
def test_published_sizes(preset: Any, count: int) -> None:
    kind = Categorical(16384)
    with torch.device("meta"):
        made = preset(
            Layout((Segment((128,), kind, "holistic"), Segment((21, 21), kind, "patches")))
        )
    assert sum(p.numel() for p in made.parameters()) == count
