"""Residual, product and projected quantizers; official keys there and back."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.protocol.layout import Factorized
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.quantizers import official
from tessellar.tokenizers.quantizers.ema_vq import EMAVectorQuantizer
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.official import load_official, to_official
from tessellar.tokenizers.quantizers.product_vq import ProductQuantizer
from tessellar.tokenizers.quantizers.projected import Projected
from tessellar.tokenizers.quantizers.residual_vq import ResidualQuantizer
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


def vq(vocab: int = 16, dim: int = 4, **options) -> VectorQuantizer:
    made = VectorQuantizer(vocab, dim, False, **options)
    torch.nn.init.normal_(made.codebook.weight)
    return made


def residual(**options) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer((vq(16), vq(8), vq(4)), **options)


def latents() -> torch.Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_each_layer_quantizes_what_is_left() -> None:
    quantizer, rest = residual().eval(), latents()
    tokens = quantizer.encode(rest)
    assert quantizer.kind == Factorized((16, 8, 4)) and tokens.shape == (2, 5, 3)
    for i in range(3):
        layer = quantizer.layer(i)
        assert torch.equal(layer.encode(rest), tokens[..., i])
        rest = rest - layer.decode(tokens[..., i])
    torch.testing.assert_close(latents() - quantizer.decode(tokens), rest)


@pytest.mark.parametrize(("pass_each", "times"), [(False, 1), (True, 3)])
def test_gradients_pass_once_or_once_a_layer(pass_each: bool, times: int) -> None:
    z, cotangent = latents().requires_grad_(), torch.randn(2, 5, 4)
    quantizer = residual(pass_each=pass_each)
    out = quantizer(z)
    torch.testing.assert_close(out.quantized, quantizer.decode(out.tokens))
    (gradient,) = torch.autograd.grad((out.quantized * cotangent).sum(), z)
    torch.testing.assert_close(gradient, times * cotangent)


def test_losses_are_sums_over_layers() -> None:
    quantizer, z = residual(), latents()
    whole = quantizer(z).losses
    layers = [out.losses for out in quantizer.scan(z)]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([losses[name] for losses in layers]).sum())
    assert set(whole) == {"codebook", "commitment"}


def test_dropped_layers_add_nothing_but_give_tokens() -> None:
    quantizer, z = residual(dropout=1.0), latents()
    tokens = quantizer.encode(z)
    parts, seen = quantizer.parts(tokens), set()
    for seed in range(30):
        torch.manual_seed(seed)
        out = quantizer(z)
        assert torch.equal(out.tokens, tokens)
        sums = [torch.stack(parts[:count]).sum(0) for count in (1, 2, 3)]
        seen |= {
            n for n, total in enumerate(sums, 1) if torch.allclose(out.quantized, total, atol=1e-6)
        }
    assert seen == {1, 2, 3}
    kept = residual(dropout=1.0, keep=3)
    torch.testing.assert_close(kept(z).quantized, kept.decode(tokens))
    torch.testing.assert_close(quantizer.eval()(z).quantized, quantizer.decode(tokens))


@torch.no_grad()
def test_a_shared_layer_is_the_same_codebook_at_every_depth() -> None:
    torch.manual_seed(0)
    shared = ResidualQuantizer((vq(16),), depth=3).eval()
    copies = ResidualQuantizer((vq(16), vq(16), vq(16))).eval()
    for layer in copies.layers:
        layer.load_state_dict(shared.layers[0].state_dict())
    assert len(list(shared.parameters())) == 1
    assert torch.equal(shared.encode(latents()), copies.encode(latents()))


@torch.no_grad()
def test_layers_of_a_ratio_are_finer() -> None:
    """Binary digits: the error of values in [-2, 2] halves with every layer."""
    z = torch.rand(100, 2, generator=torch.Generator().manual_seed(0)) * 4 - 2
    for depth in (1, 2, 5):
        quantizer = ResidualQuantizer(tuple(LFQ(2) for _ in range(depth)), ratio=2.0)
        assert (
            float((quantizer.decode(quantizer.encode(z)) - z).abs().max())
            <= 2 ** (1 - depth) + 1e-6
        )


def test_a_product_of_one_is_the_quantizer_itself() -> None:
    torch.manual_seed(0)
    single = vq(entropy_weight=0.1)
    product, z = ProductQuantizer((single,)), latents()
    ours, theirs = product(z), single(z)
    assert torch.equal(ours.tokens[..., 0], theirs.tokens) and torch.equal(
        ours.quantized, theirs.quantized
    )
    assert all(torch.equal(ours.losses[name], value) for name, value in theirs.losses.items())


@torch.no_grad()
def test_groups_of_a_product_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    product = ProductQuantizer((vq(16, 3), ResidualQuantizer((vq(8, 2), vq(4, 2))))).eval()
    z = torch.randn(2, 5, 5)
    tokens = product.encode(z)
    assert product.kind == Factorized((16, 8, 4)) and product.dim == 5
    z[..., :3] = torch.randn(2, 5, 3)
    changed = product.encode(z)
    assert torch.equal(changed[..., 1:], tokens[..., 1:]) and not torch.equal(
        changed[..., 0], tokens[..., 0]
    )


def test_losses_of_a_product_are_means_over_groups() -> None:
    torch.manual_seed(0)
    groups = (vq(16, 2), EMAVectorQuantizer(8, 2))
    z = latents()
    losses = ProductQuantizer(groups)(z).losses
    expected = groups[0](z[..., :2]).losses["codebook"] / 2  # the other group has none
    torch.testing.assert_close(losses["codebook"], expected)


def test_projections_surround_the_quantizer() -> None:
    torch.manual_seed(0)
    quantizer, z = Projected(LFQ(3), 4), latents()
    out = quantizer(z)
    assert torch.equal(out.tokens, quantizer.quantizer.encode(quantizer.project_in(z)))
    torch.testing.assert_close(
        out.quantized, quantizer.project_out(quantizer.quantizer.decode(out.tokens))
    )
    out.quantized.sum().backward()
    assert (
        quantizer.project_in.weight.grad is not None
        and float(quantizer.project_in.weight.grad.abs().max()) > 0
    )


LUCID = {"codebook_size": 8, "dim": 4, "num_quantizers": 2}


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: official.simvq({"n_e": 8, "e_dim": 4, "beta": 0.25}), official.SIMVQ),
        (lambda: official.lucid_ema(LUCID), official.LUCID_EMA),
        (
            lambda: official.lucid_residual({**LUCID, "learnable_codebook": True}),
            official.LUCID_RESIDUAL,
        ),
        (lambda: official.lucid_grouped_residual({**LUCID, "groups": 2}), official.LUCID_GROUPED),
        (lambda: Projected(LFQ(3), 4), official.PROJECTED),
    ],
)
def test_official_weights_there_and_back(make, keys) -> None:
    torch.manual_seed(0)
    trained: Quantizer = make()
    for parameter in (*trained.parameters(), *trained.buffers()):
        if parameter.is_floating_point():
            torch.nn.init.uniform_(parameter)
    again = load_official(make(), keys, to_official(trained, keys))
    z = torch.randn(2, 5, trained.dim)
    assert torch.equal(again.encode(z), trained.encode(z))
    for name, value in to_official(trained, keys).items():
        assert torch.equal(to_official(again, keys)[name], value)


def test_a_codebook_of_several_heads_is_refused() -> None:
    state = {f"_codebook.{name}": torch.zeros(2, 8, 4) for name in ("embed", "embed_avg")}
    with pytest.raises(UserError, match="2 heads"):
        load_official(official.lucid_ema(LUCID), official.LUCID_EMA, state)


def test_a_codebook_of_another_size_is_refused() -> None:
    state = {"embedding.weight": torch.zeros(9, 4)}
    with pytest.raises(UserError, match="codebook.weight"):
        load_official(
            official.taming({"n_e": 8, "e_dim": 4, "beta": 0.25}), official.CODEBOOK, state
        )
