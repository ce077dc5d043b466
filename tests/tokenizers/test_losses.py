"""Losses of tokenizer training: terms, start step, adaptive weight, LPIPS with injected weights."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tessellar.errors import UserError
from tessellar.protocol.tokenizer import TokenizerOutput
from tessellar.tokenizers.losses.adversarial import (
    AdaptiveWeight,
    adaptive_weight,
    discriminator_adversarial,
    generator_adversarial,
)
from tessellar.tokenizers.losses.diff_augment import DiffAugment
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.losses.gram import GramDistance
from tessellar.tokenizers.losses.jittered import Jittered
from tessellar.tokenizers.losses.perceptual import LPIPS, VGGFeatures
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import Onset, TokenizerLoss


def output(images: torch.Tensor, weight: nn.Parameter) -> TokenizerOutput:
    return TokenizerOutput(
        images * weight, torch.zeros(len(images), 1), {"codebook": weight * 0 + 0.25}
    )


def test_pixel_losses() -> None:
    a, b = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    b[..., 2:] = 0.5
    pixels = Reconstruction(l1=1.0, l2=2.0, gradient=4.0)
    terms = pixels(a, b)
    expected = {"l1": 0.25, "l2": 0.125, "gradient": 0.5 / 3}
    assert {k: float(v) for k, v in terms.items()} == pytest.approx(expected)
    assert float(pixels.weighted(terms)) == pytest.approx(0.25 + 2 * 0.125 + 4 * 0.5 / 3)


def test_hinge_and_non_saturating_point_the_right_way() -> None:
    good, bad = torch.full((4,), 2.0), torch.full((4,), -2.0)
    for kind in ("hinge", "non_saturating"):
        assert generator_adversarial(good, kind) < generator_adversarial(bad, kind)
    for kind in ("hinge", "vanilla", "non_saturating"):
        assert discriminator_adversarial(good, bad, kind) < discriminator_adversarial(
            bad, good, kind
        )
    assert float(discriminator_adversarial(good, bad, "hinge")) == 0.0


def test_non_saturating_of_an_image_takes_its_mean_logit() -> None:
    """softplus of -1 and of 2, not of the four logits."""
    logits = torch.tensor([[3.0, -1.0], [-2.0, -2.0]]).view(2, 1, 1, 2)
    found = float(generator_adversarial(logits, "non_saturating_image"))
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != pytest.approx(float(generator_adversarial(logits, "non_saturating")), rel=1e-2)


def test_adversarial_terms_begin_at_the_start_step() -> None:
    torch.manual_seed(0)
    loss = TokenizerLoss(Reconstruction(), discriminator=PatchGAN(8, 2), adversarial_start=10)
    images, weight = torch.rand(2, 3, 16, 16), nn.Parameter(torch.tensor(0.5))
    before, after = (
        loss.generator_loss(images, output(images, weight), step, weight) for step in (9, 10)
    )
    assert "adversarial" not in before.terms and "adversarial" in after.terms
    expected = before.total + 0.5 * after.terms["adversarial"]
    torch.testing.assert_close(after.total, expected)
    assert float(loss.discriminator_loss(images, images * 0, 9).total.detach()) == 0.0
    assert float(loss.discriminator_loss(images, images * 0, 10).total.detach()) > 0.0


def test_the_discriminator_can_have_a_weight_of_its_own() -> None:
    torch.manual_seed(0)
    images, network = torch.rand(2, 3, 16, 16), PatchGAN(8, 2).eval()
    as_tokenizer, own = (
        TokenizerLoss(Reconstruction(), None, 1.0, network, 0.1, 0, discriminator_weight=weight)
        .discriminator_loss(images, images * 0, 0)
        .total
        for weight in (None, 1.0)
    )
    torch.testing.assert_close(own, 10 * as_tokenizer)


def test_the_generator_side_leaves_no_gradient_in_the_discriminator() -> None:
    loss = TokenizerLoss(Reconstruction(), discriminator=PatchGAN(8, 2), adversarial_start=0)
    images, weight = torch.rand(2, 3, 16, 16), nn.Parameter(torch.tensor(0.5))
    loss.generator_loss(images, output(images, weight), 0, weight).total.backward()
    assert loss.discriminator is not None and weight.grad is not None
    assert all(p.grad is None and p.requires_grad for p in loss.discriminator.parameters())


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    ratio = adaptive_weight(weight.square().sum(), 0.5 * weight.sum(), weight)
    assert float(ratio) == pytest.approx(10.0 / (0.5 * 2**0.5 + 1e-4), rel=1e-6)
    assert float(adaptive_weight(1e9 * weight.sum(), 0 * weight.sum(), weight)) == 1e4


def test_ldm_bounds_the_weight_of_a_sum() -> None:
    """LDM (contperceptual.py) weighs against a loss summed over the image and clamps at 1e4; ours is the mean."""
    images = torch.rand(2, 3, 16, 16)
    values, weight = images[0].numel(), nn.Parameter(torch.tensor(0.5))
    mean = (images * weight - images).abs().mean()
    for strength in (1e-6, 1.0, 1e3):
        adversarial = strength * weight
        expected = adaptive_weight(values * mean, adversarial, weight) / values
        found = AdaptiveWeight(summed=True)(mean, adversarial, weight, values)
        # |a| + eps is the same on both sides, so the ratio of a sum is that of the mean times the number of values.
        torch.testing.assert_close(found, expected)
    assert float(AdaptiveWeight(summed=True)(mean, 1e-6 * weight, weight, values)) == pytest.approx(
        1e4 / values
    )
    assert float(
        AdaptiveWeight(lowest=0.015, eps=1e-6)(1e-9 * mean, weight * 1.0, weight, values)
    ) == pytest.approx(0.015)
    with pytest.raises(ValueError, match="bounds are at least 0 and in order"):
        AdaptiveWeight(lowest=2.0, highest=1.0)


def test_the_loss_uses_the_bounds_it_is_given() -> None:
    torch.manual_seed(0)
    images, weight = torch.rand(2, 3, 16, 16), nn.Parameter(torch.tensor(0.5))
    critic = PatchGAN(8, 2).eval()
    for adaptive, highest in ((True, 1e4), (AdaptiveWeight(summed=True), 1e4 / 768)):
        loss = TokenizerLoss(
            Reconstruction(l2=1e9), discriminator=critic, adversarial_start=0, adaptive=adaptive
        )
        found = loss.generator_loss(images, output(images, weight), 0, weight).terms[
            "adaptive_weight"
        ]
        assert float(found) == pytest.approx(highest)


def test_networks_of_the_loss_run_in_float32_unless_told_otherwise() -> None:
    torch.manual_seed(0)
    images, weight = torch.rand(2, 3, 16, 16), nn.Parameter(torch.tensor(0.5))

    class Seen(nn.Module):
        """Distances by a convolution that notes its precision."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.types = nn.Conv2d(3, 1, 1), set()

        def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
            found = self.layer(fake) - self.layer(real)
            self.types.add(found.dtype)
            return found.square().mean((1, 2, 3))

    for autocast, expected in ((False, torch.float32), (True, torch.bfloat16)):
        perceptual, critic, logits = Seen(), PatchGAN(8, 2), []
        critic.register_forward_hook(lambda _, __, out, seen=logits: seen.append(out.dtype))
        loss = TokenizerLoss(
            Reconstruction(),
            perceptual,
            discriminator=critic,
            adversarial_start=0,
            autocast=autocast,
        )
        with torch.autocast("cpu", torch.bfloat16):
            made = output(images, weight)
            loss.generator_loss(images, made, 0, weight)
            loss.discriminator_loss(images, made.reconstruction, 0)
        assert perceptual.types == {expected} and set(logits) == {expected}


def test_the_adversarial_part_comes_in_slowly() -> None:
    loss = TokenizerLoss(
        discriminator=PatchGAN(8, 2),
        adversarial_weight=0.4,
        adversarial_start=10,
        onset=Onset(warmup=20, blur=40),
    )
    assert [loss.weight_at(step) for step in (9, 10, 20, 30, 99)] == pytest.approx(
        [0, 0, 0.2, 0.4, 0.4]
    )
    images = torch.rand(1, 3, 32, 32)
    roughness = [
        float(loss.onset.blurred(images, step).diff(dim=-1).abs().mean())
        for step in (0, 20, 30, 40)
    ]
    assert roughness == sorted(roughness) and roughness[0] < 0.05 * roughness[-1]
    assert loss.onset.blurred(images, 40) is images
    flat = torch.full((1, 3, 32, 32), 0.25)
    torch.testing.assert_close(loss.onset.blurred(flat, 5), flat)
    with pytest.raises(ValueError, match="count updates"):
        Onset(warmup=-1)


def test_consistency_compares_two_augmentations_of_the_same_images() -> None:
    torch.manual_seed(0)

    class Critic(nn.Module):
        def __init__(self, augment: nn.Module | None) -> None:
            super().__init__()
            self.augment, self.slope = augment, nn.Parameter(torch.tensor(2.0))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            shown = images if self.augment is None else self.augment(images)
            return self.slope * shown.mean((2, 3))

    images, fake = torch.rand(2, 4, 3, 16, 16)
    loss = TokenizerLoss(
        discriminator=Critic(DiffAugment(1.0)), adversarial_start=0, consistency=4.0
    )
    found = loss.discriminator_loss(images, fake, 0)
    assert loss.discriminator is not None
    torch.manual_seed(1)
    found = loss.discriminator_loss(images, fake, 0)
    torch.manual_seed(1)
    first, second = (torch.stack([loss.discriminator(x) for x in (images, fake)]) for _ in range(2))
    torch.testing.assert_close(found.terms["consistency"], 4 * (first - second).square().mean())
    expected = discriminator_adversarial(*first) + found.terms["consistency"]
    torch.testing.assert_close(found.total, 0.5 * expected)
    found.total.backward()
    with pytest.raises(UserError, match="consistency compares two augmentations"):
        TokenizerLoss(discriminator=Critic(None), consistency=4.0)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(VGGFeatures().state_dict(), path)
    return path


def test_lpips_agrees_with_torchmetrics(vgg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same random backbone, same heads; their epsilon sits inside the root, hence the tolerance."""
    from torchmetrics.functional.image.lpips import _LPIPS

    ours = LPIPS(str(vgg))
    for initialise in (
        "kaiming_normal_",
        "kaiming_uniform_",
        "normal_",
    ):  # slow for VGG's classifier, which is not used
        monkeypatch.setattr(nn.init, initialise, lambda tensor, *_, **__: tensor)
    theirs = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    layers = [
        m for s in range(1, 6) for m in getattr(theirs.net, f"slice{s}") if isinstance(m, nn.Conv2d)
    ]
    mine = [m for m in ours.backbone.features if isinstance(m, nn.Conv2d)]
    for a, b in zip(layers, mine, strict=True):
        a.load_state_dict(b.state_dict())
    x, y = (
        torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (1, 2)
    )
    torch.testing.assert_close(ours(x, y), theirs.eval()(x, y).flatten(), atol=1e-5, rtol=1e-3)


def test_lpips_is_frozen_and_passes_gradients(vgg: Path) -> None:
    lpips = LPIPS(str(vgg)).train()
    assert not any(m.training for m in lpips.modules()) and not any(
        p.requires_grad for p in lpips.parameters()
    )
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32, requires_grad=True)
    lpips(x, y).sum().backward()
    assert y.grad is not None and float(y.grad.abs().max()) > 0
    assert float(lpips(x, x)) == 0.0


def test_lpips_is_computed_in_float32_under_autocast(vgg: Path) -> None:
    lpips, x, y = LPIPS(str(vgg)), torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lpips(x, y)
    assert mixed.dtype == torch.float32 and mixed.shape == (2,)
    torch.testing.assert_close(mixed, lpips(x, y), rtol=0.02, atol=0)


def test_other_networks_are_refused_as_backbone(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match="does not fit VGGFeatures: 26 missing"):
        LPIPS(str(tmp_path / "resnet.safetensors"))


def test_a_loss_without_pixels() -> None:
    weight, images = nn.Parameter(torch.tensor(0.5)), torch.rand(2, 3, 8, 8)
    loss = TokenizerLoss(Reconstruction(l2=0.0))
    terms = loss.generator_loss(images, output(images, weight), 0, weight)
    assert float(terms.total.detach()) == 0.25 and set(terms.terms) == {"codebook"}


def test_absent_vgg_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="VGG-16.*nowhere.pth"):
        LPIPS(str(tmp_path / "nowhere.pth"))


class Pair(nn.Module):
    """Keeps what it is shown."""

    def forward(self, images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        self.seen = images, reconstruction
        return (images - reconstruction).square().mean((1, 2, 3))


def test_jittered_distances_move_both_pictures_alike() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 32).expand(2, 3, 32, 32)
    distance, scales, shifts = Jittered(Pair(), 6), set(), set()
    for _ in range(20):
        assert float(distance(ramp, ramp).abs().max()) == 0
        row = distance.distance.seen[0][0, 0, 0]
        inside = row[(row > -0.9) & (row < 0.9)]
        slope = float((inside[-1] - inside[0]) / (len(inside) - 1) * 31 / 2)
        assert 1 - 1e-3 <= slope <= (32 + 12) / 32 + 1e-3
        scales.add(round(slope, 2))
        shifts.add(round(float(row[16]), 2))
    assert len(scales) > 5 and len(shifts) > 5
    images, moved = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    distance(images, moved).sum().backward()
    assert moved.grad is not None and moved.grad.abs().sum() > 0
    torch.testing.assert_close(Jittered(Pair(), 0)(images, moved), Pair()(images, moved))
    with pytest.raises(UserError, match="pad is -1"):
        Jittered(Pair(), -1)


def gram_by_hand(backbone: VGGFeatures, images: torch.Tensor) -> list[torch.Tensor]:
    """Of a list of layers that is torchvision's, whose activations overwrite what they read."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = ((images + 1) / 2 - mean) / std
    kept = []
    for layer in [*backbone.features, nn.MaxPool2d(2)]:
        x = torch.relu_(x) if isinstance(layer, nn.ReLU) else layer(x)
        kept.append(x)
    found = []
    for features in kept:
        flat = features.flatten(2)
        found.append(torch.einsum("bcn,bdn->bcd", flat, flat) / flat[0].numel())
    return found


@torch.no_grad()
def test_the_gram_loss_is_the_official_sum_over_31_layers(vgg: Path) -> None:
    loss = GramDistance(str(vgg), size=32)
    a, b = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    pairs = list(zip(gram_by_hand(loss.backbone, a), gram_by_hand(loss.backbone, b), strict=True))
    assert len(pairs) == 31
    wanted = sum((x - y).square().mean((1, 2)) for x, y in pairs)
    torch.testing.assert_close(loss(a, b), wanted, rtol=1e-4, atol=0)
    assert not loss(a, a).any() and bool((loss(a, b) > 0).all())


def test_the_gram_loss_resizes_is_frozen_and_passes_gradients(vgg: Path, tmp_path: Path) -> None:
    loss = GramDistance(str(vgg), size=48).train()
    assert not loss.training and not any(p.requires_grad for p in loss.parameters())
    image = torch.rand(1, 3, 24, 24, requires_grad=True)
    loss(torch.rand(1, 3, 24, 24), image).sum().backward()
    assert image.grad is not None and image.grad.any()
    with pytest.raises(UserError, match="the Gram loss needs torchvision's VGG-16 weights"):
        GramDistance(str(tmp_path / "absent.pth"))


def test_reconstructions_are_shown_as_pictures_of_8_bits_where_that_is_asked() -> None:
    seen = []

    class Network(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return images.mean((1, 2, 3))

    images = torch.rand(1, 3, 4, 4) * 2 - 1
    fakes = torch.full((1, 3, 4, 4), 1.5)
    fakes[..., 0] = 0.1
    loss = TokenizerLoss(Reconstruction(), discriminator=Network(), round_fakes=True)
    loss.discriminator_loss(images, fakes, 0)
    assert torch.equal(seen[0], images)  # images stay as they are
    assert float(seen[1][..., 1:].min()) == 1.0  # clamped
    assert float(seen[1][0, 0, 0, 0]) == pytest.approx(round(0.1 * 127.5 + 127.5) / 127.5 - 1)
