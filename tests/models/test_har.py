"""HAR's own promises: which token each place reads, levels, nine evaluations, sizes. See also test_protocol.py."""

from typing import Any

import pytest
import torch

from tessellar.errors import UserError
from tessellar.models.har import HAR, har_b, har_l, har_xl, har_xxl
from tessellar.models.har.model import input_sources, level_sizes
from tessellar.models.har.official import from_official, to_official
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.layout import Categorical, Continuous, sequence_layout
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling

LINE = sequence_layout(16, Categorical(11))
LABELS = Condition(ids=torch.tensor([0, 3]))


def model() -> HAR:
    torch.manual_seed(0)
    made = HAR(LINE, 32, 2, 4, 5, condition_dropout=0.0, dropout=0.0, ffn_multiple_of=8)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def test_levels_double() -> None:
    assert level_sizes(128, 4) == (1, 1, 1, 1, 4, 8, 16, 32, 64) and level_sizes(32, 4) == (
        1,
        1,
        1,
        1,
        4,
        8,
        16,
    )


@pytest.mark.parametrize(("length", "first"), [(12, 4), (16, 3), (4, 4), (16, 0)])
def test_other_lengths_are_refused(length: int, first: int) -> None:
    with pytest.raises(UserError, match="needs a power of two of tokens"):
        level_sizes(length, first)


def test_a_level_reads_the_one_before_it_then_special_tokens() -> None:
    token, special = input_sources(16, 4)
    read = [
        f"t{t}" if t >= 0 else f"s{s}"
        for t, s in zip(token.tolist(), special.tolist(), strict=True)
    ]
    assert read == "t0 t1 t2 t3 s0 s1 s2 t4 t5 t6 t7 s3 s4 s5 s6".split()


@torch.no_grad()
def test_tokens_of_a_level_do_not_see_each_other() -> None:
    made = model()
    tokens = torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0))
    before = made.score(tokens, LABELS)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    after = made.score(changed, LABELS)
    assert isinstance(before, Logits) and isinstance(after, Logits)
    assert torch.equal(before.logits, after.logits)  # the last level feeds nothing
    changed[:, 5] = (changed[:, 5] + 1) % 11
    after = made.score(changed, LABELS)
    assert isinstance(after, Logits)
    torch.testing.assert_close(before.logits[:, :8], after.logits[:, :8])
    assert bool((before.logits[:, 8:] != after.logits[:, 8:]).any(-1).all())


def test_a_picture_takes_as_many_evaluations_as_levels() -> None:
    recorder = Recorder()
    Sampling().tokens(model(), LABELS, [0, 1], recorder)
    assert recorder.report().evaluations_per_image == 6


def test_official_keys_there_and_back() -> None:
    made = model()
    again = from_official(to_official(made), LINE, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), made.parameters(), strict=True)
    )
    with pytest.raises(UserError, match="is for 16 tokens of 11 codes, but the tokenizer gives 32"):
        from_official(to_official(made), sequence_layout(32, Categorical(11)), 4)
    with pytest.raises(UserError, match="HAR predicts categorical tokens"):
        HAR(sequence_layout(16, Continuous(3)), 32, 1, 4)


@pytest.mark.parametrize(
    ("preset", "count"),
    [(har_b, 98_403_072), (har_l, 326_263_808), (har_xl, 753_890_560), (har_xxl, 1_386_001_920)],
)
def test_published_sizes(preset: Any, count: int) -> None:
    with torch.device("meta"):
        made = preset(sequence_layout(128, Categorical(8192)))
    assert sum(p.numel() for p in made.parameters()) == count
