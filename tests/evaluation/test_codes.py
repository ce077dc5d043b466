"""Statistics of codes and the swap of codes, by hand."""

from math import log2

import pytest
import torch

from tessellar.measures.codes import code_use, entropy_bits, purity, swapped
from tessellar.protocol.layout import (
    Bits,
    Categorical,
    Factorized,
    Layout,
    Segment,
    sequence_layout,
)


def test_usage_and_entropy_by_codebook_and_position() -> None:
    tokens = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3]])
    use = code_use(tokens, sequence_layout(2, Categorical(8)))
    assert use.usage == {"tokens": 0.5}
    assert use.evenness["tokens"] == pytest.approx(1.75 / 3)  # 4, 2, 1, 1 of 8 draws
    assert use.usage_by_position == [1 / 8, 3 / 8]
    assert use.bits_by_position == pytest.approx([0, 1.5])


def test_scales_share_a_codebook_and_other_segments_do_not() -> None:
    tokens = torch.tensor([[0, 1, 1], [0, 1, 1]])
    scales = Layout(
        (Segment((1,), Categorical(4), "scale1"), Segment((2,), Categorical(4), "scale2"))
    )
    assert code_use(tokens, scales).usage == {"scales": 0.5}
    parts = Layout(
        (Segment((1,), Categorical(4), "holistic"), Segment((2,), Categorical(2), "patches"))
    )
    assert code_use(tokens, parts).usage == {"holistic": 0.25, "patches": 0.5}


@pytest.mark.parametrize("kind", [Factorized((2, 4)), Bits(2)], ids=["factors", "bits"])
def test_factors_and_bits_have_codebooks_of_their_own(kind: Factorized | Bits) -> None:
    tokens = torch.tensor([[[0, 1]], [[1, 1]]])
    use = code_use(tokens, sequence_layout(1, kind))
    assert use.usage["tokens 0"] == 1 and use.usage["tokens 1"] < 1
    assert use.bits_by_position == pytest.approx([0.5])  # one bit and none


def test_entropy_of_equal_and_of_even_codes() -> None:
    assert entropy_bits(torch.zeros(7, dtype=torch.int64)) == 0
    assert entropy_bits(torch.arange(6)) == pytest.approx(log2(6))


def test_purity_by_hand() -> None:
    codes = torch.tensor([5, 5, 5, 9, 9])
    labels = torch.tensor([0, 0, 1, 1, 1])
    found = purity(codes, labels)
    assert found.share == pytest.approx(4 / 5)
    of_labels = -(0.4 * log2(0.4) + 0.6 * log2(0.6))
    together = -(2 * 0.4 * log2(0.4) + 0.2 * log2(0.2))
    assert found.information == pytest.approx((2 * of_labels - together) / of_labels)
    assert purity(labels, labels) == pytest.approx((1, 1))
    assert purity(torch.zeros(5, dtype=torch.int64), labels) == pytest.approx((0.6, 0))


def test_a_swap_draws_among_the_nearest_codes_and_nothing_else() -> None:
    near = torch.tensor([[0, 2, 3, 1]]).expand(4000, 4)
    tokens = torch.zeros(4000, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(swapped(tokens, near[:, :1], 1.0, generator), tokens)
    assert torch.equal(swapped(tokens, near, 0.0, generator), tokens)
    counts = swapped(tokens, near[:, :3], 1.0, generator).bincount(minlength=4)
    # A third each, seven standard deviations wide: false alarms of 1 in 10^11.
    assert counts[1] == 0 and bool(((counts[[0, 2, 3]] - 4000 / 3).abs() < 210).all())
    half = swapped(tokens, near[:, :2], 0.5, generator).bincount(minlength=4)
    assert half[1] == half[3] == 0 and abs(int(half[2]) - 1000) < 200
