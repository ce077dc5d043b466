"""TiTok: both stages, pixels and latents, old models that mix tokens; the VQGAN, discriminator, LeCam, clustering."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tessellar
from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.importing import import_model
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.protocol.layout import Categorical, Continuous, sequence_layout
from tessellar.tokenizers.losses import logit_distance
from tessellar.tokenizers.losses.blur_discriminator import BlurDiscriminator
from tessellar.tokenizers.losses.lecam import LeCam
from tessellar.tokenizers.losses.logit_distance import LogitDistance, WeightedDistances
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.maskgit_vqgan import (
    MaskGITVQGAN,
    PixelDecoder,
    ProxyCodes,
    maskgit_vqgan,
    proxy_codes,
)
from tessellar.tokenizers.maskgit_vqgan.official import vqgan_from_official, vqgan_to_official
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok import TiTok, ViTSize
from tessellar.tokenizers.titok import tokenizer as presets
from tessellar.tokenizers.titok.official import OFFICIAL, to_official, tokenizer_from_official

N, SMALL = 6, ViTSize(32, 2, 4)


def shake(module: torch.nn.Module) -> None:
    """Weights large enough that mistakes show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def make(seed: int = 0, quantizer: Any = None, **options: Any) -> TiTok:
    torch.manual_seed(seed)
    made = TiTok(quantizer or VectorQuantizer(24, 5), 16, 4, N, SMALL, ViTSize(24, 2, 2), **options)
    shake(made)
    return made


def small_vqgan(seed: int = 3) -> MaskGITVQGAN:
    torch.manual_seed(seed)
    vqgan = MaskGITVQGAN(VectorQuantizer(20, 8, l2_normalize=False), 16, 32, (1, 1, 2), 1)
    shake(vqgan)
    return vqgan.eval()


def two_stage(stage: Any, vqgan: MaskGITVQGAN | None = None, **options: Any) -> TiTok:
    target = ProxyCodes(vqgan) if vqgan else None
    pixels = PixelDecoder(20, 8, 32, (1, 1, 2), 1)
    return make(pixels=pixels, mixes=True, stage=stage, target=target, **options)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", ["pixels", "proxy", "decoder"])
def test_forward_is_decode_of_encode(images: Tensor, kind: str) -> None:
    tokenizer = (make() if kind == "pixels" else two_stage(kind)).eval()
    tokens, output = tokenizer.encode(images), tokenizer(images)
    assert tokenizer.layout == sequence_layout(N, Categorical(24))
    assert torch.equal(tokens, output.tokens) and tokens.shape == (3, N)
    torch.testing.assert_close(
        tokenizer.decode(tokens), output.reconstruction, atol=2e-5, rtol=1e-5
    )
    vectors = [tokenizer.quantizer.decode(t) for t in (tokens, (tokens + 1) % 24)]
    said = [tokenizer.decoder(v).cells.detach() for v in vectors]
    assert float((said[0] - said[1]).abs().max()) > 1e-3


def test_continuous_tokens(images: Tensor) -> None:
    tokenizer = make(quantizer=GaussianBottleneck(5, scale=2.0)).eval()
    assert tokenizer.layout == sequence_layout(N, Continuous(5))
    tokens = tokenizer.encode(images)
    mean = tokenizer.latents(images)[..., :5]
    torch.testing.assert_close(tokens, 2 * mean)
    torch.testing.assert_close(
        tokenizer.decode(tokens), tokenizer(images).reconstruction, atol=2e-5, rtol=1e-5
    )
    drawn = [tokenizer.draw(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2], atol=1e-3)


def test_old_models_mix_tokens_and_new_ones_do_not(images: Tensor) -> None:
    turned = [1, 2, 3, 4, 5, 0]
    for mixes in (False, True):
        encoder = make(mixes=mixes).encoder
        hidden = encoder.hidden((images + 1) / 2)
        same = torch.allclose(
            encoder.project(hidden[:, turned]), encoder.project(hidden)[:, turned], atol=1e-5
        )
        assert same is not mixes
        changed = hidden.clone()
        changed[:, 0] += 1
        moved = (encoder.project(changed) - encoder.project(hidden)).abs().amax((0, 2)) > 1e-5
        assert moved.sum() == (N if mixes else 1)  # every latent reads every token


def test_first_stage_learns_the_codes_of_the_vqgan(images: Tensor) -> None:
    vqgan = small_vqgan()
    tokenizer = two_stage("proxy", vqgan).train()
    output = tokenizer(images)
    codes, scores = (
        vqgan.encode(images),
        tokenizer.scores(tokenizer.quantizer(tokenizer.latents(images)).quantized),
    )
    expected = -scores.log_softmax(-1).flatten(1, 2).gather(-1, codes[..., None]).mean()
    torch.testing.assert_close(output.losses["proxy"], expected)
    assert output.reconstruction.shape == (len(images), 0, 16, 16)
    sum(output.losses.values(), torch.zeros(())).backward()
    without = {
        n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    }
    assert without == {n for n, _ in tokenizer.named_parameters() if n.startswith("pixels.")}
    assert "proxy" not in tokenizer.eval()(images).losses
    tokenizer.double()
    assert vqgan.encoder.conv_in.weight.dtype == torch.float64  # it moves with its pupil


def test_first_stage_draws_the_likeliest_codes_and_starts_with_the_vqgan(images: Tensor) -> None:
    vqgan = small_vqgan()
    torch.manual_seed(0)
    pixels = PixelDecoder(20, 8, 32, (1, 1, 2), 1)
    tokenizer = TiTok(
        VectorQuantizer(24, 5), 16, 4, N, SMALL, SMALL, pixels, True, "proxy", ProxyCodes(vqgan)
    ).eval()
    likeliest = (
        tokenizer.scores(tokenizer.quantizer.decode(tokenizer.encode(images))).argmax(-1).flatten(1)
    )
    torch.testing.assert_close(
        tokenizer(images).reconstruction, vqgan.decode(likeliest), atol=1e-5, rtol=1e-5
    )


def test_first_stage_draws_no_pixels_while_it_trains(images: Tensor) -> None:
    tokenizer, drawn = two_stage("proxy", small_vqgan()).train(), []
    assert tokenizer.pixels is not None
    tokenizer.pixels.register_forward_hook(lambda *_: drawn.append(1))
    output = tokenizer(images)
    terms = TokenizerLoss(Reconstruction(l2=0.0)).generator_loss(
        images, output, 0, tokenizer.last_layer
    )
    assert not drawn and set(terms.terms) == set(output.losses)
    assert tokenizer.eval()(images).reconstruction.shape == images.shape and drawn


def test_pixel_losses_of_the_first_stage_are_refused(images: Tensor) -> None:
    tokenizer = two_stage("proxy", small_vqgan()).train()
    critic = BlurDiscriminator(32, 1, 2)
    for loss in (
        TokenizerLoss(Reconstruction(l2=1.0)),
        TokenizerLoss(Reconstruction(l2=0.0), discriminator=critic),
    ):
        with pytest.raises(
            UserError, match="draws no image in training .* set the pixel losses to 0"
        ):
            loss.generator_loss(images, tokenizer(images), 0, tokenizer.last_layer)


def test_first_stage_needs_its_target(images: Tensor) -> None:
    with pytest.raises(ValueError, match="give `target`"):
        two_stage("proxy").train()(images)


def test_second_stage_trains_the_decoders_alone(images: Tensor) -> None:
    tokenizer = two_stage("decoder").train()
    assert (
        not tokenizer.encoder.training
        and not tokenizer.quantizer.training
        and tokenizer.decoder.training
    )
    output = tokenizer(images)
    assert output.losses == {}
    output.reconstruction.square().mean().backward()
    trained = {
        n for n, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert trained == {
        n for n, _ in tokenizer.named_parameters() if n.startswith(("decoder.", "pixels."))
    }
    assert "pixels.codebook.weight" in trained


def test_gradients_reach_every_parameter(images: Tensor) -> None:
    tokenizer = make().train()
    output = tokenizer(images)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    without = [
        n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not without


def test_the_stages_share_their_weights_and_exports_have_no_target(
    images: Tensor, tmp_path: Path
) -> None:
    first = two_stage("proxy", small_vqgan()).eval()
    back = tessellar.load(export_tokenizer(first, tmp_path / "first"))
    assert isinstance(back, TiTok) and back.target is None and back.stage == "proxy"
    torch.testing.assert_close(
        back.decode(back.encode(images)), first(images).reconstruction, atol=2e-5, rtol=1e-5
    )
    assert two_stage("decoder").load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, "patch_size 4 does not divide image_size 18"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        (
            {"pixels": PixelDecoder(20, 8, 32, (1, 1), 1)},
            "enlarges 2 times; decoder_patch_size is 4",
        ),
        ({"stage": "proxy"}, "stage is 'proxy'"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_tokens": N}
    with pytest.raises(ValueError, match=message):
        TiTok(
            VectorQuantizer(8, 4),
            **{**given, "encoder_size": SMALL, "decoder_size": SMALL, **options},
        )


def test_inputs_that_do_not_fit(images: Tensor) -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match="images have shape"):
        tokenizer.encode(images[..., :12])
    for tokens in (
        torch.zeros(1, N - 1, dtype=torch.int64),
        torch.zeros(1, N + 1, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="tokens have shape"):
            tokenizer.decode(tokens)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode(torch.full((1, N), 24))


@pytest.mark.parametrize(
    ("preset", "parameters", "length"),
    [
        ("titok_s128", 83_674_639, 128),
        ("titok_b64", 204_814_095, 64),
        ("titok_l32", 641_054_735, 32),
        ("titok_bl64_vq8k", 390_016_148, 64),
        ("titok_bl128_vq8k", 390_179_988, 128),
        ("titok_sl256_vq8k", 330_260_884, 256),
        ("titok_ll32_vae_c16", 606_879_604, 32),
        ("titok_bl64_vae_c16", 389_418_100, 64),
        ("titok_bl128_vae_c16", 389_581_940, 128),
    ],
)
def test_parameters_of_the_published_variants(preset: str, parameters: int, length: int) -> None:
    with torch.device("meta"):
        made = getattr(presets, preset)()
    assert sum(p.numel() for p in made.parameters()) == parameters and made.layout.length == length
    if made.pixels is not None:
        assert sum(p.numel() for p in made.pixels.parameters()) == 30_478_339 + 262_144
    else:
        assert isinstance(made.quantizer, (VectorQuantizer, GaussianBottleneck))


def test_parameters_of_the_vqgan_and_the_discriminator() -> None:
    with torch.device("meta"):
        vqgan, critic = maskgit_vqgan(), BlurDiscriminator()
        assert proxy_codes("absent.safetensors").model.layout == vqgan.layout
    counts = [
        sum(p.numel() for p in part.parameters()) for part in (vqgan.encoder, vqgan.decoder, critic)
    ]
    assert counts == [23_775_104, 30_478_339, 1_909_889]
    assert vqgan.layout.grid == (16, 16)


def test_vqgan_is_a_tokenizer(images: Tensor) -> None:
    vqgan = small_vqgan()
    tokens, output = vqgan.encode(images), vqgan(images)
    assert torch.equal(tokens, output.tokens) and vqgan.layout.grid == (4, 4)
    torch.testing.assert_close(vqgan.decode(tokens), output.reconstruction, atol=2e-5, rtol=1e-5)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vqgan.parameters())


def test_weights_tell_sizes_and_return_as_they_came(images: Tensor) -> None:
    for made in (make(), make(quantizer=GaussianBottleneck(5, scale=1.0)), two_stage("decoder")):
        state = to_official(made.eval())
        l2 = (
            None
            if made.pixels or isinstance(made.quantizer, GaussianBottleneck)
            else VectorQuantizer(24, 5)
        )
        again = tokenizer_from_official(state, (4, 2), l2)
        assert torch.equal(again.encode(images), made.encode(images))
        assert all(torch.equal(tensor, state[key]) for key, tensor in to_official(again).items())
        with pytest.raises(UserError, match="width 32 is not known: give --num_heads"):
            OFFICIAL.build(state, ImportOptions())
        short = {**state, "latent_tokens": state["latent_tokens"][:4]}
        with pytest.raises(UserError, match="positions"):
            tokenizer_from_official(short, (4, 2), l2)
    vqgan = small_vqgan()
    again = vqgan_from_official(vqgan_to_official(vqgan), 16)
    assert torch.equal(again.encode(images), vqgan.encode(images))
    torch.testing.assert_close(again(images).reconstruction, vqgan(images).reconstruction)


def test_import_refuses_other_weights(tmp_path: Path) -> None:
    first = {
        k: v.contiguous()
        for k, v in to_official(two_stage("decoder")).items()
        if not k.startswith("pixel_")
    }
    save_file(first, tmp_path / "first.safetensors")
    with pytest.raises(UserError, match="weights of the first stage"):
        import_model("titok", str(tmp_path / "first.safetensors"))
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for system in ("titok", "one_d_piece", "maskgit_vqgan"):
        with pytest.raises(UserError, match="not the weights of"):
            import_model(system, str(tmp_path / "other.safetensors"))


def test_weighted_distances_add_up(images: Tensor) -> None:
    class Gap(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    found = WeightedDistances([Gap(), Gap()], [1.0, 0.5])(images, -images)
    torch.testing.assert_close(found, 3 * images.abs().mean((1, 2, 3)))
    with pytest.raises(UserError, match="2 distances and 1 weights"):
        WeightedDistances([Gap(), Gap()], [1.0])


def test_distance_of_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        network = logit_distance.classifier()
    assert sum(p.numel() for p in network.parameters()) == 50_223_688
    small = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 10)
    )
    monkeypatch.setattr(logit_distance, "classifier", lambda: small)
    path = tmp_path / "convnext.pth"
    torch.save(small.state_dict(), path)
    distance, images = LogitDistance(str(path)).train(), torch.rand(1, 3, 32, 32) * 2 - 1
    other = (-images).requires_grad_()
    assert not distance.training and float(distance(images, images)) == 0.0
    apart = distance(images, other)
    logits = distance.logits(torch.cat([images, other]))
    torch.testing.assert_close(
        apart, (logits[:1] - logits[1:]).square().mean(1), atol=1e-6, rtol=1e-3
    )
    apart.sum().backward()
    assert apart.shape == (1,) and other.grad is not None and float(other.grad.abs().max()) > 0
    with pytest.raises(UserError, match="there is no file"):
        LogitDistance(str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("side", [8, 20, 48])
def test_discriminator_says_as_much_of_any_size(side: int) -> None:
    critic = BlurDiscriminator(32, 2, pool=4)
    shape = critic(torch.zeros(2, 3, side, side)).shape
    assert shape == (2, 1, 4, 4)


def test_lecam_compares_with_means_of_the_past() -> None:
    lecam = LeCam(weight=0.5, decay=0.9)
    lecam.means = torch.tensor([0.4, -0.2])
    real, fake = torch.tensor([0.1, 0.3]), torch.tensor([0.0, 0.2])
    torch.testing.assert_close(lecam(real, fake), torch.tensor(0.5 * (0.4**2 + 0.3**2)))
    torch.testing.assert_close(lecam.means, torch.tensor([0.4 * 0.9 + 0.02, -0.2 * 0.9 + 0.01]))
    assert float(lecam(torch.tensor([-9.0]), torch.tensor([9.0]))) == 0.0


def test_lecam_joins_the_discriminators_loss(images: Tensor) -> None:
    critic = BlurDiscriminator(32, 1, pool=2)
    plain = TokenizerLoss(Reconstruction(), discriminator=critic, adversarial_start=0)
    lecam = LeCam(10.0)
    lecam.means = torch.tensor([9.0, -9.0])  # further apart than any logit of an untrained critic
    regular = TokenizerLoss(
        Reconstruction(), discriminator=critic, adversarial_start=0, lecam=lecam
    )
    without, terms = (
        loss.discriminator_loss(images, -images, 0).terms for loss in (plain, regular)
    )
    assert float(terms["lecam"].detach()) > 0
    torch.testing.assert_close(terms["discriminator"], without["discriminator"] + terms["lecam"])


def test_clustering_moves_what_is_not_used() -> None:
    quantizer = ClusteringVQ(4, 2).train()
    z = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [3.0, 3.0]]])
    with torch.no_grad():
        quantizer.codebook.weight.copy_(
            torch.tensor([[1.0, 0.0], [2.5, 2.5], [-5.0, -5.0], [9.0, 9.0]])
        )
        quantizer.shares.copy_(torch.tensor([0.5, 0.5, 0.0, 0.5]))
    before = quantizer.codebook.weight.detach().clone()
    output = quantizer(z)
    assert output.tokens.tolist() == [[0, 0, 1]]
    after = quantizer.codebook.weight.detach().clone()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    torch.testing.assert_close(after[2], torch.tensor([0.9, 0.1]), atol=0.01, rtol=0)
    torch.testing.assert_close(
        quantizer.shares, torch.tensor([0.495 + 0.02 / 3, 0.495 + 0.01 / 3, 0.0, 0.495])
    )
    assert quantizer.eval()(z).tokens.tolist() == [[0, 2, 1]] and torch.equal(
        quantizer.codebook.weight, after
    )
