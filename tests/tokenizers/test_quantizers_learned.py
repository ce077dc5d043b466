"""Learned codes: running means, restarts, SimVQ's common map, IBQ's gradients to all codes."""

import pytest
import torch
from torch.nn import functional as F

from tessellar import distributed
from tessellar.tokenizers.quantizers.ema_vq import EMAVectorQuantizer
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.simvq import SimVQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer, draw_rows


def ema(**options) -> EMAVectorQuantizer:
    torch.manual_seed(0)
    made = EMAVectorQuantizer(8, 3, **{"l2_normalize": False, **options})
    torch.nn.init.normal_(made.codebook.weight)
    made.sums.copy_(made.codebook.weight)
    return made


def test_codes_become_the_means_of_their_latents() -> None:
    quantizer, z = ema(decay=0.0), torch.randn(4, 25, 3)
    tokens = quantizer(z).tokens
    assert len(tokens.unique()) > 3
    for code in tokens.unique():
        torch.testing.assert_close(
            quantizer.codebook.weight[code], z[tokens == code].mean(0), atol=1e-4, rtol=1e-4
        )


def test_codes_of_the_sphere_stay_on_it() -> None:
    quantizer, z = ema(l2_normalize=True, decay=0.5), torch.randn(4, 25, 3)
    quantizer(z)
    torch.testing.assert_close(quantizer.codebook.weight.norm(dim=-1), torch.ones(8))


def test_a_decay_of_one_and_evaluation_leave_the_codes() -> None:
    frozen, evaluated = ema(decay=1.0), ema(decay=0.5).eval()
    for quantizer in (frozen, evaluated):
        before = quantizer.codebook.weight.clone()
        quantizer(torch.randn(2, 9, 3))
        torch.testing.assert_close(quantizer.codebook.weight, before, atol=1e-5, rtol=1e-4)
        assert torch.equal(quantizer.sizes, torch.ones(8))


def test_the_pass_itself_uses_the_codes_before_the_update() -> None:
    quantizer, z = ema(decay=0.0), torch.randn(2, 9, 3)
    before = quantizer.codebook.weight.clone()
    out = quantizer(z)
    torch.testing.assert_close(out.quantized, before[out.tokens])
    assert not torch.allclose(quantizer.codebook.weight, before)


def test_no_gradient_reaches_running_means_and_the_commitment_moves_latents() -> None:
    quantizer, z = ema(), torch.randn(2, 9, 3, requires_grad=True)
    losses = quantizer(z).losses
    assert set(losses) == {"commitment"} and not [
        p for p in quantizer.parameters() if p.requires_grad
    ]
    assert float(torch.autograd.grad(losses["commitment"], z)[0].abs().max()) > 0


def test_unused_codes_become_latents() -> None:
    quantizer = ema(threshold=0.5, decay=0.1)
    z = 10 + 0.1 * torch.randn(1, 40, 3)  # far from all codes: one of them is chosen
    chosen = quantizer(z).tokens.unique()
    assert len(chosen) == 1 and not quantizer.expired().any()
    others = [code for code in range(8) if code != int(chosen)]
    assert all(bool((z[0] == code).all(-1).any()) for code in quantizer.codebook.weight[others])
    assert len(quantizer(z).tokens.unique()) > 1


def test_processes_average_over_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same share do what one does with both."""
    z = torch.randn(2, 9, 3)
    alone, one_of_two = ema(), ema()
    alone(torch.cat([z, z]))
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda x: 2 * x)
    one_of_two(z)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(one_of_two.state_dict()[name], value)


def test_rows_are_drawn_without_replacement_while_there_are_enough() -> None:
    torch.manual_seed(0)
    assert len(draw_rows(10, 10).unique()) == 10 and len(draw_rows(50, 7).unique()) == 7
    counts = draw_rows(4, 10).bincount(minlength=4)
    assert len(draw_rows(4, 10)) == 10 and int(counts.min()) >= 2 and int(counts.max()) <= 3


def test_codes_from_data_are_distinct_latents() -> None:
    quantizer, z = VectorQuantizer(8, 3, False, init_step=1), torch.randn(1, 8, 3)
    quantizer(z)
    same = (quantizer.codebook.weight[:, None] == z).all(-1)
    assert sorted(same.int().argmax(1).tolist()) == list(range(8)) and bool(same.any(1).all())


def test_one_latent_moves_every_code_of_simvq() -> None:
    torch.manual_seed(0)
    quantizer = SimVQ(16, 4)
    table, before = quantizer.codebook.weight.clone(), quantizer.codes().detach()
    z = torch.randn(1, 1, 4)
    torch.stack(list(quantizer(z).losses.values())).sum().backward()
    torch.optim.SGD([p for p in quantizer.parameters() if p.requires_grad], 0.1).step()
    assert torch.equal(quantizer.codebook.weight, table)
    assert bool((quantizer.codes() != before).any(-1).all())
    torch.testing.assert_close(quantizer.decode(torch.arange(16)), quantizer.codes())


def test_simvq_takes_the_nearest_mapped_code() -> None:
    quantizer, z = SimVQ(16, 4), torch.randn(2, 7, 4)
    assert torch.equal(quantizer.encode(z), torch.cdist(z, quantizer.codes()).argmin(-1))


def test_one_latent_gives_gradients_to_every_code_of_ibq() -> None:
    torch.manual_seed(0)
    quantizer, cotangent = IBQ(16, 4), torch.randn(1, 1, 4)
    z = torch.randn(1, 1, 4, requires_grad=True)
    out = quantizer(z)
    torch.testing.assert_close(out.quantized, quantizer.decode(out.tokens))
    assert torch.equal(out.tokens, (z @ quantizer.codebook.weight.T).argmax(-1))
    gradient, codes = torch.autograd.grad(
        (out.quantized * cotangent).sum(), [z, quantizer.codebook.weight]
    )
    assert bool((codes != 0).any(-1).all())
    mean_code = (z @ quantizer.codebook.weight.T).softmax(-1) @ quantizer.codebook.weight.detach()
    (expected,) = torch.autograd.grad((mean_code * cotangent).sum(), z)
    torch.testing.assert_close(gradient, expected)
    assert not torch.allclose(
        gradient, F.normalize(cotangent, dim=-1) * gradient.norm()
    )  # not straight through
