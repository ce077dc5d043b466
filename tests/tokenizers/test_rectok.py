"""RecTok: clean and noisy passes, hidden patches, tokens of mean 0 and variance 1, both stages, published sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.evaluation.token_views import view
from tessellar.networks.vision import teacher
from tessellar.protocol.configured import build
from tessellar.protocol.layout import Continuous, grid_layout
from tessellar.tokenizers.parts.hidden_patches import visible
from tessellar.tokenizers.rectok import ChannelBottleneck, RecTok, rectok_b
from tessellar.tokenizers.rectok.tokenizer import Seen, as_stored
from tessellar.tokenizers.titok import ViTSize

SMALL = ViTSize(32, 2, 4)


def model(seed: int = 0, **options: Any) -> RecTok:
    torch.manual_seed(seed)
    sizes = {"encoder_size": SMALL, "decoder_size": SMALL, "semantic_size": ViTSize(16, 1, 2)}
    made = RecTok(ChannelBottleneck(6), 16, 4, **{"semantic_dim": 5, **sizes, **options})
    for parameter in made.parameters():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return made


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_forward_is_decode_of_encode() -> None:
    made = model().eval()
    made.quantizer.center.normal_()
    made.quantizer.scale.uniform_(0.5, 2.0)
    tokens, output = made.encode(images()), made(images())
    assert made.layout == grid_layout(4, 4, Continuous(6), "latents") and tokens.shape == (2, 16, 6)
    torch.testing.assert_close(tokens, output.tokens)
    torch.testing.assert_close(made.decode(tokens), output.reconstruction, atol=2e-5, rtol=0)
    mean, std = made.posterior(images())
    torch.testing.assert_close(mean, tokens)
    assert bool((std > 0).all()) and set(output.losses) == {"kl"}


def test_time_goes_from_clean_to_noise() -> None:
    made = model()
    uniform = torch.linspace(0, 1, 9)
    times = made.time(uniform)
    assert times[0] == 0 and times[-1] == pytest.approx(1) and bool((times.diff() > 0).all())
    # 16 positions of 6 channels are fewer values than 4,096: less noise; 256 of 128 are more.
    assert made.shift == pytest.approx((96 / 4096) ** 0.5) and bool(
        (times[1:-1] < uniform[1:-1]).all()
    )
    z, noise = torch.randn(2, 16, 6), torch.randn(2, 16, 6)
    assert torch.equal(made.noisy(z, torch.zeros(2, 1, 1), noise), z)
    made.gamma = 0.5
    torch.testing.assert_close(made.noisy(z, torch.ones(2, 1, 1), noise), 0.5 * noise)


@torch.no_grad()
def test_the_order_of_visible_patches_does_not_matter() -> None:
    made = model().eval()
    places = visible(torch.rand(2, 16), 0.4)
    assert places.shape == (2, 10) and all(len(set(row)) == 10 for row in places.tolist())
    shuffled = places[:, torch.randperm(10)]
    assert made.semantic_decoder is not None
    drawn = []
    for order in (places, shuffled):
        latents = made.quantizer.posterior(made.encoder(images(), order)).mean
        drawn.append((made.decoder(latents, order), made.semantic_decoder(latents, order)))
    for one, other in zip(*drawn, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    # All patches visible is no mask at all.
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(made.encoder(images(), every), made.encoder(images()))
    changed = images()
    hidden = next(place for place in range(16) if place not in places[0].tolist())
    row, column = divmod(hidden, 4)
    changed[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    torch.testing.assert_close(made.encoder(changed, places), made.encoder(images(), places))


def test_a_part_of_the_batches_hides_patches() -> None:
    made = model()
    drawn = [made.draw_places(3) for _ in range(300)]
    without = sum(places is None for places in drawn)
    kept = [places.shape[1] for places in drawn if places is not None]
    assert 35 < without < 90 and min(kept) == 10 and max(kept) in (15, 16)
    assert model(masked=(-1.0, 0.0)).draw_places(3) is None


def test_training_reaches_every_parameter_through_noisy_latents() -> None:
    frozen = teacher(
        "vit_tiny_patch16_224",
        None,
        16,
        {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    )
    frozen.model.filled = True
    made = model(semantic_dim=24, teacher=frozen, masked=(0.3, 0.4)).train()
    output = made(images())
    assert set(output.losses) == {"kl", "semantic"} and output.tokens.shape == (2, 16, 6)
    (
        output.reconstruction.square().mean() + torch.stack(list(output.losses.values())).sum()
    ).backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []
    assert made.config["init_args"]["teacher"] is None
    assert not torch.equal(made(images()).reconstruction, made(images()).reconstruction)
    with pytest.raises(UserError, match="semantic_dim is 5; the teacher's patches have 24"):
        model(teacher=frozen)


@torch.no_grad()
def test_features_of_tokens_are_those_of_clean_latents() -> None:
    made = model().eval()
    made.quantizer.center.normal_()
    made.quantizer.scale.uniform_(0.5, 2.0)
    assert made.semantic_decoder is not None
    clean = made.semantic_decoder(made.quantizer.posterior(made.latents(images())).mean, None)
    tokens = made.encode(images())
    torch.testing.assert_close(made.semantics(tokens), clean, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(view(made, "semantics")(images()), clean, atol=2e-5, rtol=1e-5)
    with pytest.raises(UserError, match="no semantic decoder: give semantic_dim"):
        model(semantic_dim=None).semantics(tokens)


@torch.no_grad()
def test_features_are_compared_at_hidden_patches_too() -> None:
    made = model().eval()
    places = visible(torch.rand(2, 16), 0.5)
    posterior = made.quantizer.posterior(made.encoder(images(), places))
    seen = Seen(posterior.mean, places, posterior)
    target = torch.randn(2, 16, 5)
    loss = made.semantic_loss(seen, target)
    torch.testing.assert_close(made.semantic_loss(seen, 3 * target), loss)
    hidden = [place for place in range(16) if place not in places[0].tolist()]
    target[0, hidden[0]] *= -1
    assert not torch.isclose(made.semantic_loss(seen, target), loss)
    stored = as_stored(torch.tensor([-1.0, 0.001, 1.0]))
    torch.testing.assert_close((stored + 1) * 127.5, torch.tensor([0.0, 128.0, 255.0]))


@torch.no_grad()
def test_tokens_have_mean_0_and_variance_1_in_every_channel() -> None:
    quantizer = ChannelBottleneck(3).train()
    draw = torch.Generator().manual_seed(0)
    offset, spread = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([0.1, 2.0, 5.0])
    latents = torch.randn(64, 50, 3, generator=draw) * spread + offset
    for part in latents.chunk(4):
        quantizer.measure(part)
    moments = torch.cat([latents, torch.zeros_like(latents)], -1)
    tokens = quantizer.encode(moments)
    torch.testing.assert_close(tokens.mean((0, 1)), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(tokens.std((0, 1)), torch.ones(3), atol=0.02, rtol=0)
    torch.testing.assert_close(quantizer.decode(tokens), latents)
    before = quantizer.center.clone()
    quantizer.measure(torch.full((2, 3), float("nan")))
    assert torch.equal(quantizer.center, before)
    fixed = ChannelBottleneck(3, measured=False)
    fixed.measure(latents)
    assert torch.equal(fixed.encode(moments), latents)
    assert {"center", "scale"} <= quantizer.state_dict().keys()


def test_the_divergence_is_a_sum_over_an_image() -> None:
    quantizer = ChannelBottleneck(3, kl_weight=0.5).eval()
    moments = torch.randn(4, 5, 6)
    posterior = quantizer.posterior(moments)
    output = quantizer(moments)
    assert torch.equal(output.losses["kl"], quantizer.loss(posterior))
    assert torch.equal(output.tokens, quantizer.encode(moments))
    torch.testing.assert_close(quantizer.loss(posterior), 0.5 * posterior.kl().sum() / 4)


def test_the_decoder_alone_is_trained_in_its_stage() -> None:
    trained, made = model(), model(seed=1, stage="decoder").train()
    made.load_state_dict(made.starting_from(trained.state_dict()))
    center = made.quantizer.center.clone()
    output = made(images())
    assert output.losses == {} and torch.equal(made.quantizer.center, center)
    output.reconstruction.square().mean().backward()
    for name, parameter in made.named_parameters():
        # No patch is hidden in this stage.
        reads = name.startswith("decoder.") and name != "decoder.hidden"
        assert (parameter.grad is not None) == parameter.requires_grad == reads, name
    plain = model(seed=2, semantic_dim=None)
    plain.load_state_dict(plain.starting_from(trained.state_dict()))
    assert torch.equal(plain.eval().encode(images()), trained.eval().encode(images()))


@torch.no_grad()
def test_a_config_rebuilds_it() -> None:
    made = model().eval()
    again = build(made.config).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.encode(images()), made.encode(images()))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="patch_size 4 does not divide image_size 18"):
        RecTok(ChannelBottleneck(6), 18, 4)
    with pytest.raises(UserError, match=r"masked is \(0.0, 1.0\); it must be a range below 1"):
        model(masked=(0.0, 1.0))
    with pytest.raises(UserError, match="stage is 'encoder'"):
        model(stage="encoder")
    made = model(semantic_dim=None).eval()
    posterior = made.quantizer.posterior(made.latents(images()))
    with pytest.raises(UserError, match="has no semantic decoder"):
        made.semantic_loss(Seen(posterior.mean, None, posterior), torch.zeros(2, 16, 5))


def test_published_sizes() -> None:
    with torch.device("meta"):
        made = rectok_b()
        without = rectok_b(semantic_dim=None)
    assert made.semantic_decoder is not None
    parts = (made.encoder, made.decoder, made.semantic_decoder, without)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [86_033_920, 85_936_980, 1_606_336, 171_970_900]
    assert made.shift == pytest.approx(2.8284, abs=1e-4) and made.layout.length == 256
