"""VAR's tokenizer: maps that add up, coarse previews, which phi serves which scale, learned codes, published size."""

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.tokenizers.var import VARVQVAE, MultiScaleQuantizer, var_vqvae
from tessellar.tokenizers.var.official import vqvae_from_official, vqvae_to_official
from tessellar.tokenizers.var.quantizer import phi_of_scale

SIDES = (1, 2, 3, 4)


def quantizer(**options) -> MultiScaleQuantizer:
    torch.manual_seed(0)
    made = MultiScaleQuantizer(30, 4, SIDES, **options)
    torch.nn.init.normal_(made.codebook.weight)
    return made.eval()


def model() -> VARVQVAE:
    torch.manual_seed(0)
    return VARVQVAE(quantizer(), 8, 32, (1, 1), 1).eval()


def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("cosine", [False, True])
@torch.no_grad()
def test_what_was_taken_and_what_is_left_add_up(cosine: bool) -> None:
    made, z = (
        quantizer(cosine=cosine),
        torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(1)),
    )
    output, tokens = made(z), made.encode(z)
    assert torch.equal(output.tokens, tokens) and tokens.shape == (2, 30)
    torch.testing.assert_close(made.decode(tokens), output.quantized, atol=1e-5, rtol=1e-5)
    *_, total = made.sums(tokens)
    added = sum(m for _, _, m in made.scan(z))
    torch.testing.assert_close(total, added)


@torch.no_grad()
def test_each_scale_takes_what_is_nearest_of_the_rest() -> None:
    made, z = quantizer(), torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(1))
    mean = z.mean(1, keepdim=True)
    first = (mean - made.codebook.weight).square().sum(-1).argmin()
    assert int(made.encode(z)[0, 0]) == int(first)


@torch.no_grad()
def test_previews_use_complete_scales_alone() -> None:
    made = model()
    tokens = made.encode(images())
    assert torch.equal(made.decode(tokens[:, :5]), made.decode(tokens[:, :8]))
    assert not torch.equal(made.decode(tokens[:, :5]), made.decode(tokens[:, :14]))
    assert made.decode(tokens[:, :1]).shape == (2, 3, 8, 8)


@torch.no_grad()
def test_inputs_of_a_scale_do_not_depend_on_it() -> None:
    made = model()
    tokens = made.encode(images())
    inputs = made.next_inputs(tokens, 4)
    assert inputs.shape == (2, 4 + 9 + 16, 4)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 30
    after = made.next_inputs(changed, 4)
    assert torch.equal(inputs[:, : 4 + 9], after[:, : 4 + 9]) and not torch.equal(
        inputs[:, 13:], after[:, 13:]
    )
    torch.testing.assert_close(made.next_inputs(tokens, 3), inputs[:, :13])


@torch.no_grad()
def test_decoding_what_was_encoded_is_the_reconstruction() -> None:
    made = model()
    output = made(images())
    torch.testing.assert_close(
        made.decode(output.tokens), output.reconstruction, atol=1e-4, rtol=1e-4
    )


def test_gradients_reach_everything() -> None:
    made = model().train()
    output = made(images())
    (
        output.reconstruction.square().mean() + torch.stack(list(output.losses.values())).sum()
    ).backward()
    assert [n for n, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_phis_of_published_scales() -> None:
    assert phi_of_scale(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert phi_of_scale(14, 4) == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert phi_of_scale(5, 5) == [0, 1, 2, 3, 4] and phi_of_scale(3, 1) == [0, 0, 0]


def test_codes_come_from_the_rests_of_all_scales() -> None:
    made = quantizer(init_step=1, restart_every=2).train()
    z = 5 + torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(1))
    made(z)
    assert (
        float(made.codebook.weight.detach().norm(dim=1).max()) > 8
    )  # the mean of z, from the coarsest scale
    unused = made.counts == 0
    before = made.codebook.weight.detach().clone()
    made(z)
    assert bool(unused.any()) and not bool((made.codebook.weight[unused] == before[unused]).all())
    assert torch.equal(made.codebook.weight[~unused], before[~unused])


def test_official_keys_there_and_back() -> None:
    made = model()
    again = vqvae_from_official(vqvae_to_official(made), SIDES)
    for key, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
    with pytest.raises(UserError, match="not the weights of a multi-scale VQVAE"):
        vqvae_from_official({}, SIDES)


def test_sizes() -> None:
    with torch.device("meta"):
        made = var_vqvae()
    assert sum(p.numel() for p in made.parameters()) == 108_948_355 and made.layout.length == 680
    with torch.device("meta"):
        assert var_vqvae(512).layout.length == 2240
    with pytest.raises(UserError, match="published for 256, 512, 1024 pixels, not 300"):
        var_vqvae(300)
    with pytest.raises(UserError, match="image_size 12 at stride 2 has no grid of 4"):
        VARVQVAE(quantizer(), 12, 32, (1, 1))
    with pytest.raises(ValueError, match="must grow from at least 1"):
        MultiScaleQuantizer(30, 4, (1, 3, 3))
