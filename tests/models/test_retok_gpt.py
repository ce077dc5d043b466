"""ReToK's generator: learned positions, its guidance schedule, prefixes, sizes; the rest is in test_protocol.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.keys import KeyTable
from tessellar.models.retok import ReToKGPT, retok_gpt_b, retok_gpt_l, retok_gpt_xl, retok_gpt_xxl
from tessellar.models.retok.official import GPT_KEYS, gpt_from_official
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import token_order
from tessellar.protocol.guidance import Constant, Guidance, LateLinear, LateStep
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from
from tessellar.sampling.settings import GREEDY


def make(length: int = 8, seed: int = 0) -> ReToKGPT:
    torch.manual_seed(seed)
    generator = ReToKGPT(
        sequence_layout(length, Categorical(13)), 16, 2, 2, 5, ffn_multiple_of=8
    ).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return generator


def logits(generator: ReToKGPT, tokens: Tensor, ids: Tensor) -> Tensor:
    scores = generator.score(tokens, Condition(ids=ids))
    assert isinstance(scores, Logits)
    return scores.logits


def greedy(generator: ReToKGPT, guidance: Guidance) -> Tensor:
    tokens = generator.layout.blank(2)
    state = generator.start(Condition(ids=torch.tensor([1, 3])), guidance)
    for step in decode_from(generator, state, GREEDY, Noise(range(2)), tokens):
        tokens = step.tokens
    return tokens


@torch.no_grad()
def test_position_i_plus_1_is_read_at_token_i() -> None:
    generator, tokens, ids = make(), torch.randint(13, (2, 8)), torch.tensor([0, 4])
    before = logits(generator, tokens, ids)
    for row, first in ((0, 0), (4, 4), (7, 7)):
        moved = make()
        moved.position_embedding[row] += 1
        changed = (logits(moved, tokens, ids) - before).abs().amax((0, 2)) > 1e-5
        assert changed.tolist() == [n >= first for n in range(8)]
    last = make()
    last.position_embedding[8] += 1  # behind the last token nothing is predicted
    assert torch.equal(logits(last, tokens, ids), before)


@torch.no_grad()
def test_order_matters_only_through_positions() -> None:
    """Without position embeddings a causal sum over earlier tokens: swapping two leaves the later ones almost alone."""
    generator, tokens, ids = make(), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), torch.tensor([0])
    swapped = tokens[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert not torch.allclose(
        logits(generator, tokens, ids)[:, -1], logits(generator, swapped, ids)[:, -1]
    )
    generator.position_embedding.zero_()
    generator.layers = generator.layers[:1]  # the tokens before the last are read once, in no order
    assert torch.allclose(
        logits(generator, tokens, ids)[:, -1], logits(generator, swapped, ids)[:, -1], atol=1e-5
    )


@torch.no_grad()
def test_shorter_generation_is_a_prefix_under_constant_guidance() -> None:
    long, short = make(8), make(4)
    state = {**long.state_dict(), "position_embedding": long.position_embedding[:5]}
    short.load_state_dict(state)
    constant = Guidance(Constant(2.0))
    assert torch.equal(greedy(long, constant)[:, :4], greedy(short, constant))


def test_late_step_schedule() -> None:
    entities = token_order(sequence_layout(24, Categorical(4)))
    scale = LateStep(1.5, 0.18, 1.0001)(torch.arange(24)[None], entities)[0]
    expected = [1.5 if n == 0 or n / 23 >= 0.18 else 1.0001 for n in range(24)]
    torch.testing.assert_close(scale, torch.tensor(expected))
    assert scale[0] == 1.5 and scale[4] < 1.01 and scale[5] == 1.5
    made = LateStep(1.5, start=0.5).guidance()
    assert made.schedule == LateStep(1.5, 0.5)


def test_linear_schedules_guide_the_first_token_in_full() -> None:
    entities = token_order(sequence_layout(5, Categorical(4)))
    number = torch.arange(5)[None]
    rising = LateLinear(3.0, start=1.0001)(number, entities)[0]
    falling = LateLinear(3.0, start=1.0001, falling=True)(number, entities)[0]
    torch.testing.assert_close(rising, torch.tensor([3.0, 1.5001, 2.0001, 2.5001, 3.0001]))
    torch.testing.assert_close(falling, torch.tensor([3.0, 2.5001, 2.0001, 1.5001, 1.0001]))


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        (retok_gpt_b, 111_085_824),
        (retok_gpt_l, 343_174_144),
        (retok_gpt_xl, 775_028_480),
        (retok_gpt_xxl, 1_411_367_424),
    ],
)
def test_parameters_of_the_published_variants(preset: Any, parameters: int) -> None:
    with torch.device("meta"):
        made = preset(sequence_layout(256, Categorical(16384)))
    assert sum(p.numel() for p in made.parameters()) == parameters


def test_official_weights_come_back_and_must_fit() -> None:
    generator, tokens, ids = make(), torch.randint(13, (2, 8)), torch.tensor([0, 4])
    assert isinstance(GPT_KEYS, KeyTable)
    official = GPT_KEYS.to_official(generator.state_dict())
    again = gpt_from_official(official, generator.layout, 2, 8)
    assert torch.equal(logits(again, tokens, ids), logits(generator, tokens, ids))
    with pytest.raises(UserError, match="of another shape"):
        gpt_from_official(official, sequence_layout(6, Categorical(13)), 2, 8)
    with pytest.raises(UserError, match="width 16: give --num_heads"):
        gpt_from_official(official, generator.layout)
    with pytest.raises(UserError, match="not the weights of a ReToK generator"):
        gpt_from_official({}, generator.layout)
