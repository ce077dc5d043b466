"""Binary quantizers: forms and order of bits, entropies against brute force, gradients, scales of signs."""

from itertools import product
from math import log

import pytest
import torch
from torch.nn import functional as F

from tessellar.protocol.layout import Bits, Categorical, Factorized
from tessellar.tokenizers.quantizers.bits import BitCode
from tessellar.tokenizers.quantizers.bsq import BSQ
from tessellar.tokenizers.quantizers.entropy import GUARDED_LOG, all_signs, entropies
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.multi_scale_bsq import MultiScaleBSQ


@pytest.mark.parametrize("big_endian", [False, True])
def test_ids_and_bits_are_a_bijection(big_endian: bool) -> None:
    code = BitCode((6,), big_endian=big_endian)
    ids = torch.arange(64)
    bits = code.bits(ids)
    assert torch.equal(code.tokens(bits), ids) and len(bits.unique(dim=0)) == 64
    first = BitCode((6,), big_endian=big_endian).tokens(torch.tensor([1, 0, 0, 0, 0, 0]))
    assert int(first) == (32 if big_endian else 1)


def test_ids_beyond_the_integers_of_floats() -> None:
    bits = torch.randint(2, (100, 62), generator=torch.Generator().manual_seed(0))
    for big_endian in (False, True):
        code = BitCode((62,), big_endian=big_endian)
        assert torch.equal(code.bits(code.tokens(bits)), bits)


def test_forms_say_the_same_bits() -> None:
    z = torch.randn(2, 5, 6)
    bits, whole = LFQ(6, form="bits"), LFQ(6)
    parts, groups = LFQ(6, split=(2, 4)), LFQ(6, groups=3)
    assert [q.kind for q in (bits, whole, parts)] == [Bits(6), Categorical(64), Factorized((4, 16))]
    assert groups.kind == Factorized((4, 4, 4))
    assert torch.equal(bits.encode(z), (z > 0).long())
    weights = torch.tensor([1, 2])
    assert torch.equal(groups.encode(z), (z > 0).long().view(2, 5, 3, 2) @ weights)
    pre, post = parts.encode(z).unbind(-1)
    assert torch.equal(pre + 4 * post, whole.encode(z))
    for quantizer in (bits, whole, parts, groups):
        assert torch.equal(quantizer.decode(quantizer.encode(z)), z.sign())


def test_zero_is_minus_one_and_codes_quantize_to_themselves() -> None:
    quantizer = LFQ(4).eval()
    assert torch.equal(quantizer(torch.zeros(1, 1, 4)).quantized, -torch.ones(1, 1, 4))
    codes = quantizer(torch.randn(3, 5, 4)).quantized
    assert torch.equal(quantizer(codes).quantized, codes)
    sphere = BSQ(4, 2).eval()
    unit = sphere(torch.randn(3, 5, 4)).quantized
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3, 5))
    assert torch.equal(sphere(unit).quantized, unit)


def test_entropies_of_uniform_and_of_certain_logits() -> None:
    uniform = entropies(torch.zeros(5, 1, 8))
    torch.testing.assert_close(torch.cat(uniform), torch.full((2,), log(8)), atol=2e-4, rtol=0)
    certain = entropies(1e4 * torch.eye(8)[:4, None])  # 4 distinct codes of 8
    torch.testing.assert_close(torch.cat(certain), torch.tensor([0.0, log(4)]), atol=2e-4, rtol=0)
    assert float(certain.loss()) < float(uniform.loss())


@pytest.mark.parametrize("guard", GUARDED_LOG)
def test_entropies_equal_a_sum_over_all_codes(guard: str) -> None:
    """Every code of 4 signs by hand, in float64; the guards differ by no more than they add."""
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    found = LFQ(4, temperature=2.0, entropy_guard=guard).entropies(z)
    codes = [torch.tensor(signs, dtype=torch.float64) for signs in product((-1.0, 1.0), repeat=4)]
    weights = torch.stack([torch.exp(2 * (z.flatten(0, 1) * c).sum(-1) / 2.0) for c in codes], -1)
    probs = weights / weights.sum(-1, keepdim=True)
    sample = torch.special.entr(probs).sum(-1).mean()
    batch = torch.special.entr(probs.mean(0)).sum()
    torch.testing.assert_close(torch.cat(found), torch.stack([sample, batch]), atol=3e-4, rtol=0)


def test_groups_add_up_to_the_joint_sample_entropy() -> None:
    """Bits are independent given z: exact for a sample, an upper bound for the mean assignment."""
    u = F.normalize(torch.randn(4, 5, 6, dtype=torch.float64), dim=-1)
    options = {"analytical": False, "inv_temperature": 3.0}
    joint, halves = BSQ(6, 6, **options).entropies(u), BSQ(6, 3, **options).entropies(u)
    bitwise = BSQ(6, 3, inv_temperature=3.0).entropies(u)
    for found in (halves, bitwise):
        torch.testing.assert_close(found.sample.sum(), joint.sample.sum(), atol=1e-5, rtol=0)
        assert float(found.batch.sum()) > float(joint.batch.sum())
    assert [len(e.sample) for e in (joint, halves, bitwise)] == [1, 2, 6]


def test_a_shared_histogram_counts_all_groups_together() -> None:
    """Group 0 always takes one code, group 1 another: each alone is collapsed, together they use two."""
    z = 50 * torch.tensor([-1.0, -1, 1, 1]).expand(2, 3, 4)
    apart = LFQ(4, groups=2, shared_histogram=False).entropies(z)
    shared = LFQ(4, groups=2).entropies(z)
    torch.testing.assert_close(apart.batch, torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(shared.batch, torch.tensor([log(2)]), atol=1e-4, rtol=0)


def test_all_signs_are_distinct() -> None:
    signs = all_signs(5, torch.zeros(1))
    assert len(signs.unique(dim=0)) == 32 and set(signs.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_pass_to_the_direction_of_the_latent(scaled: bool) -> None:
    quantizer, cotangent = BSQ(6, 3, scaled_gradient=scaled), torch.randn(2, 5, 6)
    z = torch.randn(2, 5, 6, requires_grad=True)
    out = quantizer(z)
    torch.testing.assert_close(out.quantized, quantizer.decode(out.tokens))
    (gradient,) = torch.autograd.grad((out.quantized * cotangent).sum(), z)
    direction = F.normalize(z, dim=-1) / (6**0.5 if scaled else 1)
    (expected,) = torch.autograd.grad((direction * cotangent).sum(), z)
    torch.testing.assert_close(gradient, expected)


def test_lfq_gradients_pass_straight_through() -> None:
    z, cotangent = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    (gradient,) = torch.autograd.grad((LFQ(4)(z).quantized * cotangent).sum(), z)
    torch.testing.assert_close(gradient, cotangent)


SIDES = (1, 2, 4)


@torch.no_grad()
def test_scales_of_signs_add_up() -> None:
    quantizer, z = MultiScaleBSQ(6, SIDES).eval(), torch.randn(2, 16, 6)
    tokens = quantizer.encode(z)
    assert tokens.shape == (2, 21, 6) and [s.shape for s in quantizer.segments] == [
        (1, 1),
        (2, 2),
        (4, 4),
    ]
    out = quantizer(z)
    assert torch.equal(out.tokens, tokens) and torch.equal(out.quantized, quantizer.decode(tokens))
    maps = [added for _, _, added in quantizer.scan(z)]
    for count, total in enumerate(quantizer.sums(tokens), 1):
        torch.testing.assert_close(total, torch.stack(maps[:count]).sum(0))
    assert torch.equal(quantizer.decode(tokens[:, :5]).mT.reshape(2, 6, 4, 4), maps[0] + maps[1])


@torch.no_grad()
def test_one_scale_is_bsq() -> None:
    z = torch.randn(2, 16, 6)
    single, plain = MultiScaleBSQ(6, (4,)), BSQ(6, 6).eval()
    assert torch.equal(single.encode(z), plain.encode(z))
    torch.testing.assert_close(single.eval()(z).quantized, plain(z).quantized)


@torch.no_grad()
def test_inputs_of_the_next_scale_know_only_coarser_ones() -> None:
    quantizer = MultiScaleBSQ(6, SIDES)
    tokens = quantizer.encode(torch.randn(1, 16, 6))
    inputs, changed = quantizer.next_inputs(tokens, 3), tokens.clone()
    changed[:, 1:5] = 1 - changed[:, 1:5]
    again = quantizer.next_inputs(changed, 3)
    assert inputs.shape == (1, 20, 6) and torch.equal(inputs[:, :4], again[:, :4])
    assert not torch.allclose(inputs[:, 4:], again[:, 4:])
    assert torch.equal(quantizer.next_inputs(tokens, 2), inputs[:, :4])


def test_scales_must_grow() -> None:
    with pytest.raises(ValueError, match="must grow"):
        MultiScaleBSQ(6, (1, 4, 2))
