"""Continuous tokenizers: posterior, KL, measured scale, both architectures, the scale pyramid, what does not fit."""

import math
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.errors import UserError
from tessellar.protocol.configured import build
from tessellar.protocol.layout import Continuous, grid_layout
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tokenizers.kl_vae import KLVAE, kl16
from tessellar.tokenizers.kl_vae.official import from_official, to_official
from tessellar.tokenizers.quantizers.gaussian import MEMORY, GaussianBottleneck, measure_scale
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.scale_pyramid import ScalePyramid
from tessellar.tokenizers.scale_pyramid.tokenizer import default_sides, pyramid
from tessellar.tokenizers.vit_vq import ViTVQ

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make(name: str) -> Tokenizer:
    torch.manual_seed(0)
    bottleneck = GaussianBottleneck(3, kl_weight=0.1)
    if name == "vit":
        made: Tokenizer = ViTVQ(bottleneck, 16, 4, 16, 1, 1, 2)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return made
    return KLVAE(bottleneck, 16, 32, (1, 2, 1), 1)


both = pytest.mark.parametrize("name", ["vit", "cnn"])


@both
def test_forward_is_decode_of_encode(name: str) -> None:
    made = make(name)
    made(IMAGES)  # measures the scale
    made.eval()
    tokens, output = made.encode(IMAGES), made(IMAGES)
    assert made.layout.grid == (4, 4) and made.layout.is_continuous and tokens.shape == (4, 16, 3)
    made.layout.check(tokens)
    assert torch.equal(tokens, output.tokens)
    torch.testing.assert_close(made.decode(tokens), output.reconstruction, atol=2e-5, rtol=0)


@both
def test_training_samples_the_posterior_and_encoding_does_not(name: str) -> None:
    made = make(name).train()
    assert not torch.equal(made(IMAGES).reconstruction, made(IMAGES).reconstruction)
    made.eval()
    assert torch.equal(made.encode(IMAGES), made.encode(IMAGES))
    draws = [made.draw(IMAGES, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@both
def test_posterior_is_the_law_of_draws(name: str) -> None:
    made = make(name).train()
    made(IMAGES)
    made.eval()
    mean, std = made.posterior(IMAGES)  # type: ignore[attr-defined]
    assert torch.equal(mean, made.encode(IMAGES))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        made.draw(IMAGES, torch.Generator().manual_seed(3)), mean + std * noise
    )


@both
def test_gradients_reach_every_parameter(name: str) -> None:
    made = make(name).train()
    output = made(IMAGES)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    without = [
        n for n, p in made.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not [
        n for n in without if not n.endswith("k.bias")
    ]  # a key's bias shifts all scores alike


@both
def test_config_and_state_rebuild_an_equal_tokenizer(name: str) -> None:
    made = make(name).train()
    made(IMAGES)
    again = build(made.config)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.eval().encode(IMAGES), made.eval().encode(IMAGES))


def test_posterior_kl_and_clamp() -> None:
    moments = torch.randn(2, 5, 6) * 2
    posterior = GaussianBottleneck(3).posterior(moments)
    expected = kl_divergence(
        Normal(moments[..., :3], (moments[..., 3:] / 2).exp()), Normal(0.0, 1.0)
    )
    torch.testing.assert_close(posterior.kl(), expected)
    extreme = GaussianBottleneck(1).posterior(torch.tensor([[0.0, 99.0], [0.0, -99.0]]))
    assert extreme.logvar.flatten().tolist() == [20, -30]
    loss = GaussianBottleneck(3, kl_weight=0.5).eval()(moments).losses["kl"]
    torch.testing.assert_close(loss, 0.5 * expected.mean())


def test_samples_have_the_moments_of_the_posterior() -> None:
    moments = torch.tensor([0.5, -1.0, math.log(4.0), math.log(0.25)]).expand(1, 40_000, 4)
    drawn = GaussianBottleneck(2, scale=2.0).draw(moments, torch.Generator().manual_seed(0)) / 2
    torch.testing.assert_close(drawn.mean((0, 1)), torch.tensor([0.5, -1.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std((0, 1)), torch.tensor([2.0, 0.5]), atol=0.03, rtol=0)


def test_scale_is_measured_while_training_and_gives_unit_variance() -> None:
    torch.manual_seed(1)
    bottleneck = GaussianBottleneck(3).train()
    latents = torch.cat([3 * torch.randn(8, 50, 3) + 1, torch.full((8, 50, 3), -9.0)], -1)
    for _ in range(4 * MEMORY):
        tokens = bottleneck(latents).tokens
    assert abs(float(tokens.std()) - 1) < 0.02
    fixed = bottleneck.scale.clone()
    bottleneck.eval()(100 * latents)
    assert torch.equal(bottleneck.scale, fixed)
    given = GaussianBottleneck(3, scale=0.2325).train()
    given(latents)
    assert float(given.scale) == pytest.approx(0.2325)


@both
def test_scale_measured_on_data(name: str) -> None:
    made = make(name).eval()
    scale = measure_scale(made, IMAGES.split(2))
    streams = [torch.Generator().manual_seed(n) for n in range(2)]
    drawn = torch.cat(
        [made.draw(part, stream) for part, stream in zip(IMAGES.split(2), streams, strict=True)]
    ).detach()
    assert float(drawn.std(correction=0)) == pytest.approx(1, abs=1e-4) and scale == float(
        made.quantizer.scale
    )
    assert measure_scale(made, IMAGES.split(2)) == scale
    with pytest.raises(UserError, match="no images"):
        measure_scale(made, [])
    with pytest.raises(UserError, match="no continuous latents"):
        measure_scale(ViTVQ(VectorQuantizer(8, 4), 16, 4, 16, 1, 1, 2), [IMAGES])


def test_official_keys_there_and_back() -> None:
    made = KLVAE(GaussianBottleneck(3, scale=0.5), 16, 32, (1, 2, 1), 1, (0, 2), (1,)).eval()
    again = from_official(to_official(made), 16, 0.5)
    assert torch.equal(again.encode(IMAGES), made.encode(IMAGES))
    assert torch.equal(again.decode(made.encode(IMAGES)), made.decode(made.encode(IMAGES)))
    state = to_official(made)
    with torch.device("meta"):
        assert len(to_official(kl16())) == 312
    assert "encoder.down.0.attn.0.proj_out.weight" in state
    del state["quant_conv.bias"]
    with pytest.raises(UserError, match="quant_conv.bias"):
        from_official(state, 16)
    with pytest.raises(UserError, match="not the weights of a KL VAE"):
        from_official({}, 16)


def test_parameters_of_the_published_vae() -> None:
    with torch.device("meta"):
        made = kl16()
    assert sum(p.numel() for p in made.parameters()) == 66_456_019
    assert (
        sum(p.numel() for part in (made.decoder, made.post_quant_conv) for p in part.parameters())
        == 38_189_203
    )
    assert made.layout == grid_layout(16, 16, Continuous(16), "latents")


def test_pyramid_holds_every_scale_and_decodes_the_last() -> None:
    inner = make("vit").eval()
    made = ScalePyramid(inner)
    tokens, plain = made.encode(IMAGES), inner.encode(IMAGES)
    assert (
        made.sides == (1, 2, 4)
        and tokens.shape == (4, 21, 3)
        and [s.length for s in made.layout.segments] == [1, 4, 16]
    )
    assert torch.equal(tokens[:, 5:], plain) and torch.equal(
        made.decode(tokens), inner.decode(plain)
    )
    torch.testing.assert_close(tokens[:, 0], plain.mean(1))
    quarters = plain.view(4, 2, 2, 2, 2, 3).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(tokens[:, 1:5], quarters)
    again = build(made.config).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.encode(IMAGES), tokens)
    assert not any(p.requires_grad for p in made.parameters())


def test_a_pyramid_over_an_export_holds_its_tokenizer(tmp_path: Path) -> None:
    inner = make("vit").eval()
    made = ScalePyramid(str(export_tokenizer(inner, tmp_path / "inner")), (2, 4))
    again = load_tokenizer(export_tokenizer(made, tmp_path / "pyramid"))
    (tmp_path / "inner" / "config.yaml").unlink()
    assert again.config["init_args"]["tokenizer"] == inner.config and again.layout == made.layout
    assert torch.equal(again.encode(IMAGES)[:, 4:], inner.encode(IMAGES))


def test_ways_of_resizing() -> None:
    maps = torch.randn(2, 3, 8, 8)
    nearest = pyramid(maps, (2, 8), "nearest")
    assert torch.equal(nearest[:, :4], maps[:, :, ::4, ::4].flatten(2).transpose(1, 2))
    bicubic = F.interpolate(maps, (4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(pyramid(maps, (4,), "bicubic"), bicubic)
    assert default_sides(16) == (1, 2, 4, 8, 16) and default_sides(12) == (3, 6, 12)


def test_what_does_not_fit() -> None:
    for options in ({"dim": 0}, {"dim": 2, "kl_weight": -1.0}, {"dim": 2, "scale": 0.0}):
        with pytest.raises(ValueError, match="must be positive"):
            GaussianBottleneck(**options)
    with pytest.raises(ValueError, match="does not divide"):
        kl16(100)
    with pytest.raises(UserError, match="square grid of continuous"):
        ScalePyramid(ViTVQ(VectorQuantizer(8, 4), 16, 4, 16, 1, 1, 2))
    for sides in ((1, 2), (2, 1, 4), (4, 4)):
        with pytest.raises(UserError, match="must grow"):
            ScalePyramid(make("vit"), sides)
    with pytest.raises(ValueError, match="needs"):
        make("cnn").encode(torch.zeros(1, 3, 16, 20))
