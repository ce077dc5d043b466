"""Hita: what the shift of the read-out hides, who sees whom, what a missing vision model allows, published sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tessellar
from tessellar.checkpoints.export import export_tokenizer
from tessellar.errors import UserError
from tessellar.tokenizers.hita import Hita, HitaVision, hita_u, hita_v
from tessellar.tokenizers.hita.official import from_official, to_official
from tessellar.tokenizers.hita.vision import blurred
from tessellar.tokenizers.quantizers.vq import VectorQuantizer

HOLISTIC, SHIFT, PATCHES = 6, 2, 16


def vision() -> HitaVision:
    torch.manual_seed(1)
    made = HitaVision("test_vit", image_size=32)
    made.filled = True
    return made


def model(with_vision: bool = True, vision_loss: float = 1.0) -> Hita:
    torch.manual_seed(0)
    quantizers = VectorQuantizer(24, 4), VectorQuantizer(20, 4)
    made = Hita(
        *quantizers, vision() if with_vision else None, 16, 32, (1, 1, 1), 1, 32, 1, 4, 48, HOLISTIC, SHIFT, 0.0,
        vision_dim=64, vision_loss=vision_loss,
    )  # fmt: skip
    for quantizer in quantizers:
        torch.nn.init.normal_(quantizer.codebook.weight)
    return made.eval()


def images(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tokens(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            torch.randint(0, 24, (2, HOLISTIC), generator=draw),
            torch.randint(0, 20, (2, PATCHES), generator=draw),
        ],
        1,
    )


def fused(made: Hita, ids: Tensor) -> Tensor:
    holistic, patches = ids[:, :HOLISTIC], ids[:, HOLISTIC:]
    return made.fuse(made.holistic_quantizer.decode(holistic), made.quantizer.decode(patches))


@torch.no_grad()
def test_decoding_what_was_encoded_is_the_reconstruction() -> None:
    made = model()
    output = made(images())
    assert torch.equal(output.tokens, made.encode(images()))
    torch.testing.assert_close(
        made.decode(output.tokens), output.reconstruction, atol=1e-4, rtol=1e-4
    )
    made.layout.check(output.tokens)


@torch.no_grad()
def test_the_last_patches_are_never_painted() -> None:
    made, ids = model(), tokens()
    changed = ids.clone()
    changed[:, -SHIFT:] = (changed[:, -SHIFT:] + 1) % 20
    assert torch.equal(made.decode(ids), made.decode(changed))
    changed[:, -SHIFT - 1] = (changed[:, -SHIFT - 1] + 1) % 20
    assert not torch.equal(made.decode(ids), made.decode(changed))


@pytest.mark.parametrize(
    ("place", "first"),
    [(HOLISTIC + 3, 3 + SHIFT), (HOLISTIC - 1, SHIFT - 1), (HOLISTIC - SHIFT, 0)],
)
@torch.no_grad()
def test_a_token_reaches_only_what_is_read_behind_it(place: int, first: int) -> None:
    made, ids = model(), tokens()
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % 20
    before, after = fused(made, ids), fused(made, changed)
    torch.testing.assert_close(before[:, :first], after[:, :first])
    assert bool((before[:, first:] != after[:, first:]).any(-1).all())


@torch.no_grad()
def test_features_are_predicted_from_holistic_tokens() -> None:
    made = model()
    predicted = made.predict_vision(made.holistic_quantizer.decode(tokens()[:, :HOLISTIC]))
    target = made.read_vision(images())[:, 1:]
    assert predicted.shape == target.shape
    other = made.predict_vision(made.holistic_quantizer.decode(tokens(1)[:, :HOLISTIC]))
    assert not torch.allclose(predicted, other)


@torch.no_grad()
def test_vision_tokens_have_no_order() -> None:
    made, features = model(), torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    one, other = made.latents(images(), features), made.latents(images(), features.flip(1))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(one[0], made.latents(images(), -features)[0])


def test_gradients_reach_everything_but_the_vision_model() -> None:
    made = model().train()
    output = made(images())
    total = output.reconstruction.square().mean() + torch.stack(list(output.losses.values())).sum()
    total.backward()
    assert set(output.losses) == {"codebook", "commitment", "vision"}
    missing = {
        n
        for n, p in made.named_parameters()
        if p.requires_grad and (p.grad is None or not bool(p.grad.any()))
    }
    assert missing == set()
    assert all(p.grad is None for p in made.vision.parameters())  # type: ignore[union-attr]


@torch.no_grad()
def test_swapped_holistic_tokens() -> None:
    made, host, donor = model(), tokens(), tokens(1)
    mixed = torch.cat([donor[:, :HOLISTIC], host[:, HOLISTIC:]], 1)
    assert torch.equal(made.swap_holistic(host, donor), made.decode(mixed))
    assert not torch.equal(made.swap_holistic(host, donor), made.decode(host))


def test_an_export_holds_the_vision_model(tmp_path: Path) -> None:
    made = model()
    again = tessellar.load(export_tokenizer(made, tmp_path / "hita"))
    assert isinstance(again, Hita)
    with torch.no_grad():
        assert torch.equal(again.encode(images()), made.encode(images()))


def test_without_a_vision_model_it_decodes_only() -> None:
    made = model(with_vision=False)
    assert made.decode(tokens()).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="has no vision model, which its encoder reads"):
        made.encode(images())


def test_official_keys_there_and_back() -> None:
    made = model(with_vision=False)
    again = from_official(to_official(made), 16, 4, SHIFT)
    assert torch.equal(again.decode(tokens()), made.decode(tokens()))
    with pytest.raises(UserError, match="does not know; 1 unknown: encode_transformer.extra"):
        from_official(
            {**to_official(made), "encode_transformer.extra": torch.zeros(1)}, 16, 4, SHIFT
        )


def test_impossible_sizes() -> None:
    quantizers = VectorQuantizer(24, 4), VectorQuantizer(20, 4)
    with pytest.raises(UserError, match="stride 4 does not divide image_size 18"):
        Hita(*quantizers, None, 18, 32, (1, 1, 1))
    with pytest.raises(UserError, match=r"shift is 9; it must be in \[0, 6\]"):
        Hita(*quantizers, None, 16, 32, (1, 1, 1), holistic=6, shift=9)


@pytest.mark.parametrize(("preset", "count"), [(hita_v, 104_240_839), (hita_u, 104_767_687)])
def test_published_sizes(preset: Any, count: int) -> None:
    with torch.device("meta"):
        made = preset()
    assert sum(p.numel() for p in made.parameters()) == count and made.layout.length == 569


def test_blur_keeps_the_mean_and_only_when_shrinking() -> None:
    flat = torch.full((1, 3, 20, 20), 0.3)
    torch.testing.assert_close(blurred(flat, 3.0), flat)
    noise = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert blurred(noise, 1.0) is noise and float(blurred(noise, 3.0).std()) < 0.6 * float(
        noise.std()
    )
