"""RandAR and ARPG: orders and sizes of sets, who sees whom, guidance, sizes. (The rest: test_protocol.py.)"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.layers.llama import grid_angles
from tessellar.models.arpg import ARPG, arpg_l, arpg_sizes, arpg_xl, arpg_xxl
from tessellar.models.randar import RandAR, randar_l, randar_sizes, randar_xl, randar_xxl
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.guidance import Guidance, Linear
from tessellar.protocol.layout import Categorical, Continuous, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import SpeculativeJacobi

GRID = grid_layout(4, 4, Categorical(23))
LABELS = Condition(ids=torch.tensor([0, 3]))
ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(2))
SETS = Entities(ORDER, (1, 3, 5, 7))
BOTH = {"randar": RandAR, "arpg": ARPG}
both = pytest.mark.parametrize("name", BOTH)


def make(name: str, **options: Any) -> RandAR | ARPG:
    torch.manual_seed(0)
    made = BOTH[name](
        GRID, 32, 4, 4, 5, ffn_multiple_of=8, **{"steps": 6, "dropout": 0.0, **options}
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def tokens_of(batch: int, seed: int = 1) -> Tensor:
    return torch.randint(23, (batch, 16), generator=torch.Generator().manual_seed(seed))


def scores(generator: RandAR | ARPG, tokens: Tensor, entities: Entities) -> Tensor:
    distribution = generator.score(tokens, LABELS, entities)
    assert isinstance(distribution, Logits)
    return distribution.logits


def ends(sizes: tuple[int, ...]) -> list[int]:
    return torch.tensor(sizes).cumsum(0).tolist()


def test_sizes_of_sets_are_the_published_ones() -> None:
    found = ends(randar_sizes(256, 88))
    assert found[:3] == [1, 2, 3] and found[-3:] == [247, 252, 256]
    left = [256 - end for end in ends(arpg_sizes(256, 64))]
    assert left[:3] == [253, 250, 248] and left[-4:] == [50, 40, 28, 0]
    for length, steps in ((256, 256), (64, 12), (16, 1), (9, 9)):
        for sizes in (
            randar_sizes(length, steps),
            *(arpg_sizes(length, steps, c) for c in ("arccos", "cosine")),
        ):  # type: ignore[arg-type]
            assert (len(sizes), sum(sizes), min(sizes) >= 1) == (steps, length, True)
    assert arpg_sizes(256, 64, "cosine")[0] == 1
    for sizes_of in (randar_sizes, arpg_sizes):
        for steps in (0, 17, 10**12):  # said before anything is counted
            with pytest.raises(UserError, match="cannot be generated in .* steps: give 1 to 16"):
                sizes_of(16, steps)


@both
def test_every_image_has_an_order_of_its_own_seed(name: str) -> None:
    generator = make(name)
    together = generator.plan(Noise([3, 5]))
    assert torch.equal(together.order[1:], generator.plan(Noise([5])).order)
    assert not torch.equal(together.order[0], together.order[1])
    assert together.count == 6 and generator.plan(Noise([3]), steps=9).count == 9
    assert make(name, steps=None).plan(Noise([3])).sizes == (1,) * 16
    drawn = generator.training_order(3)
    assert drawn.sizes == (1,) * 16
    assert torch.equal(drawn.order.sort(1).values, torch.arange(16).expand(3, -1))


@both
@torch.no_grad()
def test_sets_are_drawn_and_scored_alike_and_images_do_not_depend_on_their_batch(name: str) -> None:
    """Every image in its own order: what `predict` gives set by set is what `score` gives at once."""
    generator = make(name)
    orders = torch.stack([ORDER, ORDER.flip(0)])
    entities = Entities(orders, SETS.sizes)
    tokens = tokens_of(2)
    state = generator.start(LABELS, entities=entities)
    parts = [generator.predict(state, tokens).logits for _ in SETS.sizes]  # type: ignore[attr-defined]
    torch.testing.assert_close(
        torch.cat(parts, 1), scores(generator, tokens, entities), atol=1e-4, rtol=1e-4
    )
    sampling = Sampling(2.0, algorithm=Ancestral(steps=5))
    together = sampling.tokens(generator, LABELS, [7, 8])
    alone = sampling.tokens(generator, LABELS.select(torch.tensor([1])), [8])
    assert torch.equal(together[1:], alone)


@both
@torch.no_grad()
def test_one_at_a_time_sets_are_the_sequence_of_training(name: str) -> None:
    """A set's first token has the prediction of training, whatever comes with it."""
    generator = make(name)
    tokens = tokens_of(2)
    single = scores(generator, tokens, Entities(ORDER, (1,) * 16))
    grouped = scores(generator, tokens, SETS)
    first = SETS.ends[:-1]
    torch.testing.assert_close(grouped[:, first], single[:, first], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(grouped[:, 2], single[:, 2])


@torch.no_grad()
def test_instructions_of_a_set_see_those_before_them_and_targets_of_arpg_see_no_other() -> None:
    """Two places of the set (ranks 4 .. 8) are exchanged: ARPG's other targets do not notice."""
    tokens = tokens_of(2)
    exchanged = ORDER.clone()
    exchanged[[5, 6]] = ORDER[[6, 5]]
    for name in BOTH:
        generator = make(name)
        before = scores(generator, tokens, SETS)[:, 4:9]
        after = scores(generator, tokens, Entities(exchanged, SETS.sizes))[:, 4:9]
        torch.testing.assert_close(after[:, 0], before[:, 0], atol=1e-4, rtol=1e-4)
        swapped = before[:, [0, 2, 1, 3, 4]]
        assert torch.allclose(after, swapped, atol=1e-4, rtol=1e-4) == (name == "arpg")


@torch.no_grad()
def test_an_instruction_is_one_vector_turned_by_its_place() -> None:
    generator = make("randar")
    assert isinstance(generator, RandAR)
    place = torch.arange(16)
    angles = grid_angles(place // 4, place % 4, 8)
    read = generator.embed(tokens_of(1), torch.tensor([[0, 1, 10]]), Entities(ORDER, (1,) * 16))
    vector = torch.view_as_complex(generator.query.view(4, 4, 2))
    for row, rank in ((0, 0), (2, 5)):
        turned = vector * torch.polar(torch.ones(4), angles[ORDER[rank]])
        torch.testing.assert_close(read[0, row], torch.view_as_real(turned).flatten())
    torch.testing.assert_close(read[0, 1], generator.token_embedding(tokens_of(1)[0, ORDER[0]]))


@both
@torch.no_grad()
def test_guidance_goes_by_the_share_of_tokens_before_the_set(name: str) -> None:
    generator = make(name)
    tokens = tokens_of(2)
    state = generator.start(LABELS, Guidance(Linear(5.0, reach_end=False)), SETS)
    guided = generator.predict(state, tokens, SETS.count).logits  # type: ignore[attr-defined]
    conditional = scores(generator, tokens, SETS)
    null = generator.score(tokens, generator.null(LABELS), SETS).logits  # type: ignore[attr-defined]
    known = SETS.ends[:-1].repeat_interleave(torch.tensor(SETS.sizes))
    scale = 1 + 4.0 * known[:, None] / 16
    torch.testing.assert_close(guided, null + scale * (conditional - null), atol=1e-3, rtol=1e-4)


@both
def test_without_a_plan_tokens_go_in_turn_and_speculative_decoding_works(name: str) -> None:
    generator = make(name)
    greedy = Sampling(2.0, algorithm=SpeculativeJacobi(5)).tokens(generator, LABELS, [1, 2])
    alone = Sampling(2.0, algorithm=SpeculativeJacobi(5)).tokens(
        generator, LABELS.select(torch.tensor([1])), [2]
    )
    assert torch.equal(greedy[1:], alone)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (randar_l, 342_912_000),
        (randar_xl, 774_700_800),
        (randar_xxl, 1_410_974_208),
        (arpg_l, 319_844_352),
        (arpg_xl, 718_996_480),
        (arpg_xxl, 1_302_448_128),
    ],
)
def test_sizes(preset: Any, count: int) -> None:
    with torch.device("meta"):
        made = preset(grid_layout(16, 16, Categorical(16384)))
    assert sum(p.numel() for p in made.parameters()) == count


def test_what_is_refused_in_one_line() -> None:
    for kind in BOTH.values():
        with pytest.raises(UserError, match=f"{kind.__name__} predicts categorical tokens"):
            kind(grid_layout(4, 4, Continuous(3)), 32, 2, 4, steps=2)
        with pytest.raises(UserError, match="16 tokens cannot be generated in 17 steps"):
            kind(GRID, 32, 2, 4, steps=17)
    with pytest.raises(UserError, match="depth 3 must be even"):
        ARPG(GRID, 32, 3, 4, steps=4)
    with pytest.raises(UserError, match="curve of ARPG is 'linear'"):
        ARPG(GRID, 32, 2, 4, steps=4, curve="linear")  # type: ignore[arg-type]
