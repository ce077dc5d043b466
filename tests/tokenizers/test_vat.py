"""VAT: a Gaussian space before ids, sequences that add up scale by scale, previews, VAR's inputs, published bytes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.models.har import HAR
from tessellar.models.var import VAR
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.layout import Categorical, Segment
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck, GaussianSpace
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok import ViTSize
from tessellar.tokenizers.var import MultiScaleQuantizer
from tessellar.tokenizers.vat import VAT, SequenceScales, vat_b256

LENGTHS = (1, 1, 2, 4, 8)
TOTAL = sum(LENGTHS)
LABELS = Condition(ids=torch.tensor([0, 2]))


def quantizer(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, **options: Any) -> SequenceScales:
    torch.manual_seed(seed)
    return SequenceScales(30, 4, lengths, **options).eval()


def latents(batch: int = 2, count: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, count, 4, generator=torch.Generator().manual_seed(seed))


def model() -> VAT:
    """Shaken, so that every part of it shows."""
    made = VAT(GaussianSpace(quantizer()), 16, 4, ViTSize(32, 2, 4), ViTSize(24, 1, 2))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return made.eval()


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_what_was_taken_and_what_is_left_add_up() -> None:
    made = quantizer()
    z = latents()
    output = made(z)
    assert output.tokens.shape == (2, TOTAL)
    assert torch.equal(output.tokens, made.encode(z))
    torch.testing.assert_close(made.decode(output.tokens), output.quantized, atol=1e-5, rtol=1e-5)
    taken = torch.stack([added[:, :, 0].transpose(1, 2) for _, _, added in made.scan(z)]).cumsum(0)
    for (rest, _, _), before in zip(list(made.scan(z))[1:], taken, strict=False):
        small = F.adaptive_avg_pool1d((z - before).transpose(1, 2), rest.shape[1])
        torch.testing.assert_close(rest, small.transpose(1, 2))


@torch.no_grad()
def test_a_sequence_is_a_map_of_one_row() -> None:
    """The same as two-dimensional averages and bilinear maps of 1 x n."""
    made = quantizer()
    z = latents()
    rest = z.transpose(1, 2)[:, :, None]
    tokens = []
    for length in LENGTHS:
        small = F.interpolate(rest, (1, length), mode="area")[:, :, 0].transpose(1, 2)
        distances = (small[:, :, None] - made.codebook.weight).square().sum(-1)
        tokens.append(distances.argmin(-1))
        codes = made.codebook(tokens[-1]).transpose(1, 2)[:, :, None]
        rest = rest - F.interpolate(codes, (1, 8), mode="bilinear")
    assert torch.equal(made.encode(z), torch.cat(tokens, 1))


@torch.no_grad()
def test_the_finest_scale_alone_is_plain_vector_quantization() -> None:
    made = quantizer((8,))
    plain = VectorQuantizer(30, 4, l2_normalize=False).eval()
    plain.load_state_dict(made.state_dict())
    z = latents()
    found = made(z)
    expected = plain(z)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.quantized, expected.quantized)
    for name, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[name], loss)


def test_gradients_pass_once_to_the_latents() -> None:
    z = latents().requires_grad_()
    (through,) = torch.autograd.grad((quantizer()(z).quantized * 3).sum(), z)
    torch.testing.assert_close(through, torch.full_like(z, 3.0))


def test_codes_come_from_the_rests_of_all_scales() -> None:
    made = quantizer(init_step=1, restart_every=2).train()
    z = 5 + latents(4)
    made(z)
    norms = made.codebook.weight.detach().norm(dim=1)
    assert float(norms.max()) > 8, "the mean of z, of the coarsest scale"
    assert float(norms.min()) < 5, "and what finer scales have left of it"
    unused = made.counts == 0
    before = made.codebook.weight.detach().clone()
    made(z)
    assert bool(unused.any())
    assert not torch.equal(made.codebook.weight[unused], before[unused])
    assert torch.equal(made.codebook.weight[~unused], before[~unused])


@pytest.mark.parametrize("inner", [quantizer, lambda: MultiScaleQuantizer(30, 4, (1, 2))])
def test_a_draw_is_quantized_in_training_and_the_mean_outside_of_it(inner: Any) -> None:
    """Whatever ids stand behind the Gaussian: VAR's maps too."""
    space = GaussianSpace(inner(), kl_weight=0.5)
    assert space.in_dim == 8
    mean = latents(2, 8 if inner is quantizer else 4)
    moments = torch.cat([mean, torch.full_like(mean, math.log(4.0))], -1)
    space.eval()
    assert torch.equal(space(moments).tokens, space.inner.encode(mean))
    assert torch.equal(space.encode(moments), space.inner.encode(mean))
    space.train()
    torch.manual_seed(5)
    output = space(moments)
    torch.manual_seed(5)
    drawn = mean + 2 * torch.randn_like(mean)
    assert torch.equal(output.tokens, space.inner.encode(drawn))
    # KL of N(m, 4) to N(0, 1): (m^2 + 4 - 1 - ln 4) / 2.
    expected = 0.5 * (0.5 * (mean.square() + 3 - math.log(4.0))).mean()
    torch.testing.assert_close(output.losses["kl"], expected)


def test_a_gaussian_at_the_prior_costs_nothing() -> None:
    space = GaussianSpace(quantizer())
    assert float(space(torch.zeros(1, 8, 8)).losses["kl"]) == 0.0


@torch.no_grad()
def test_decoding_what_was_encoded_is_the_reconstruction() -> None:
    made = model()
    output = made(images())
    assert made.layout.min_prefix == 1
    assert made.layout.segments == tuple(
        Segment((length,), Categorical(30), f"scale{n}") for n, length in enumerate(LENGTHS)
    )
    assert torch.equal(made.encode(images()), output.tokens)
    assert len(output.tokens.unique()) > 3
    torch.testing.assert_close(
        made.decode(output.tokens), output.reconstruction, atol=1e-5, rtol=1e-5
    )
    alone = made.encode(images()[1:])
    assert torch.equal(alone, output.tokens[1:]), "a batch changes nothing"


@torch.no_grad()
def test_previews_use_complete_scales_alone() -> None:
    made = model()
    tokens = made.encode(images())
    assert torch.equal(made.decode(tokens[:, :4]), made.decode(tokens[:, :7]))
    assert not torch.equal(made.decode(tokens[:, :4]), made.decode(tokens[:, :8]))
    assert made.decode(tokens[:, :1]).shape == (2, 3, 16, 16)


def test_gradients_reach_everything() -> None:
    made = model().train()
    output = made(images())
    total = output.reconstruction.square().mean() + sum(output.losses.values())
    total.backward()
    assert [n for n, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@torch.no_grad()
def test_inputs_of_a_scale_do_not_depend_on_it() -> None:
    made = model()
    tokens = made.encode(images())
    inputs = made.next_inputs(tokens, 5)
    assert inputs.shape == (2, 1 + 2 + 4 + 8, 4)
    changed = tokens.clone()
    changed[:, 4:8] = (changed[:, 4:8] + 1) % 30
    after = made.next_inputs(changed, 5)
    assert torch.equal(inputs[:, :7], after[:, :7]) and not torch.equal(inputs[:, 7:], after[:, 7:])
    torch.testing.assert_close(made.next_inputs(tokens, 4), inputs[:, :7])


@torch.no_grad()
def test_var_predicts_its_scales_and_har_its_levels() -> None:
    made = model()
    tokens = made.encode(images())
    var = VAR(made.layout, 32, 2, 4, 5, latent_dim=4).eval()
    var.bind(made)
    har = HAR(made.layout, 32, 1, 4, 5, first=2, dropout=0.0, ffn_multiple_of=8).eval()
    for generator, sizes in ((var, LENGTHS), (har, (1, 1, 2, 4, 8))):
        assert generator.entities.sizes == sizes
        for parameter in generator.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        changed = tokens.clone()
        changed[:, 2:4] = (changed[:, 2:4] + 1) % 30
        before = generator.score(tokens, LABELS)
        after = generator.score(changed, LABELS)
        assert isinstance(before, Logits) and isinstance(after, Logits)
        torch.testing.assert_close(before.logits[:, :4], after.logits[:, :4])
        assert not torch.allclose(before.logits[:, 4:], after.logits[:, 4:])


def test_sizes() -> None:
    with torch.device("meta"):
        made = vat_b256()
        large = vat_b256(65536)
    assert sum(p.numel() for p in made.parameters()) == 172_030_068
    # "3D representation in 512-Byte"; 256 tokens of 8 bits are its smaller code.
    assert made.layout.length == large.layout.length == 256
    assert made.layout.length * 8 // 8 == 256 and large.layout.length * 16 // 8 == 512
    with pytest.raises(ValueError, match=r"lengths \(1, 4, 2\) must grow"):
        SequenceScales(30, 4, (1, 4, 2))
    with pytest.raises(ValueError, match="SequenceScales in a GaussianSpace, not by Gaussian"):
        VAT(GaussianSpace(VectorQuantizer(30, 4)), 16, 4)
    with pytest.raises(ValueError, match="GaussianBottleneck does not quantize vectors to ids"):
        GaussianSpace(GaussianBottleneck(4))
    with pytest.raises(UserError, match="built for inputs of 7 channels, the tokenizer has 4"):
        VAR(model().layout, 32, 1, 4, 5, latent_dim=7).bind(model())
