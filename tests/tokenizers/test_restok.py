"""ResTok: residuals that add up, levels that hide finer ones, prefixes, the legacy reading, published sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.networks.vision import Teacher, VisionModel
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.restok import ResTok, restok_l_128
from tessellar.tokenizers.restok.official import from_official, to_official
from tessellar.tokenizers.restok.tokenizer import keep_probabilities
from tessellar.tokenizers.restok.transformers import level_grid, level_sizes, residual_pyramid


def model(**options: Any) -> ResTok:
    torch.manual_seed(0)
    sizes = {"encoder_width": 32, "encoder_depth": 4, "encoder_heads": 2, "stages": 3}
    sizes |= {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2}
    quantizer = VectorQuantizer(24, 4)
    made = ResTok(quantizer, 16, 16, 4, 32, (1, 1, 1), 1, 32, **{**sizes, **options})
    torch.nn.init.normal_(quantizer.codebook.weight)
    for table in (*made.encoder.level_embeddings, *made.encoder.scale_embeddings):
        torch.nn.init.normal_(table)
    return made.eval()


def images(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_levels_and_their_grids() -> None:
    assert level_sizes(128) == (1, 1, 2, 4, 8, 16, 32, 64)
    assert [level_grid(s) for s in (1, 2, 4, 8, 16, 32, 64)] == [
        (1, 1),
        (1, 2),
        (2, 2),
        (2, 4),
        (4, 4),
        (4, 8),
        (8, 8),
    ]
    with pytest.raises(ValueError, match="power of two of tokens, not 48"):
        level_sizes(48)


def test_the_pyramid_adds_up_to_its_finest_average() -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    parts = residual_pyramid(x, level_sizes(128)).split(level_sizes(128), 1)
    total = torch.zeros_like(x)
    for part, size in zip(parts, level_sizes(128), strict=True):
        maps = part.transpose(1, 2).reshape(2, 3, *level_grid(size))
        total = total + F.interpolate(maps, (16, 16), mode="nearest")
    expected = F.interpolate(F.adaptive_avg_pool2d(x, 8), (16, 16), mode="nearest")
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merge", ["nearest", "average"])
def test_a_merge_loses_nothing(merge: Any) -> None:
    encoder = model(merge=merge).encoder
    x = torch.randn(2, 16 + 16, 32, generator=torch.Generator().manual_seed(0))
    split = encoder.split(x, (4, 2))
    assert split.shape == (2, 8 + 16 + 16, 32) and torch.equal(split[:, 24:], x[:, 16:])
    torch.testing.assert_close(split[:, :8].repeat_interleave(2, 1) + split[:, 8:24], x[:, :16])
    even = split[:, 8:24:2]
    assert bool((even == 0).all()) == (merge == "nearest")


@torch.no_grad()
def test_latents_see_their_own_and_coarser_levels() -> None:
    made = model()
    sequence = made.encoder.sequence(made.features(images()))
    before = made.encoder.run(sequence)
    changed = sequence.clone()
    changed[:, -8] += torch.randn(
        32, generator=torch.Generator().manual_seed(1)
    )  # first token of the last level
    after = made.encoder.run(changed)
    torch.testing.assert_close(before.latents[:, :8], after.latents[:, :8])
    torch.testing.assert_close(before.coarsest, after.coarsest)
    assert bool((before.latents[:, 8:] != after.latents[:, 8:]).any(-1).all())


@torch.no_grad()
def test_only_the_legacy_reading_mixes_levels() -> None:
    for legacy in (False, True):
        made = model(legacy=legacy)
        encoded = made.encoder(made.features(images()))
        changed = encoded._replace(latents=encoded.latents.clone())
        changed.latents[:, 8:] += 1.0
        before, after = made.latents(encoded), made.latents(changed)
        assert torch.equal(before[:, :8], after[:, :8]) != legacy


@torch.no_grad()
def test_prefixes_do_not_look_further() -> None:
    made = model()
    output = made(images())
    tokens = output.tokens
    torch.testing.assert_close(made.decode(tokens), output.reconstruction, atol=1e-4, rtol=1e-4)
    short = made.decode(tokens[:, :4])
    codes = made.quantizer.decode((tokens + 5) % 24)
    codes[:, :4] = made.quantizer.decode(tokens[:, :4])
    torch.testing.assert_close(made.render(codes, torch.tensor([4, 4])), short)
    assert not torch.allclose(short, made.decode(tokens))
    with pytest.raises(ValueError, match="tokens have shape"):
        made.decode(tokens[:, :3])


def test_kept_lengths() -> None:
    kept = keep_probabilities(128, 4, 0.2)
    assert list(kept) == [4, 8, 16, 32, 64, 128] and kept[128] == pytest.approx(0.8)
    assert kept[64] == pytest.approx(16 * kept[4])
    made = model(drop=0.5)
    drawn = made.draw_keep(4000).bincount(minlength=17)[[4, 8, 16]].double()
    expected = 4000 * torch.tensor([0.5 / 3, 1.0 / 3, 0.5])
    assert (
        float(((drawn - expected) ** 2 / expected).sum()) < 28
    )  # chi-square, 2 degrees: false alarms 1e-6


def test_a_teacher_is_followed_and_left_out() -> None:
    torch.manual_seed(1)
    vision = VisionModel("test_vit", image_size=32)
    vision.filled = True
    made = model(teacher=Teacher(vision), vision_dim=vision.dim).train()
    output = made(images())
    assert (
        set(output.losses) == {"codebook", "commitment", "vision"}
        and float(output.losses["vision"]) > 0
    )
    (
        output.reconstruction.square().mean() + torch.stack(list(output.losses.values())).sum()
    ).backward()
    missing = {n for n, p in made.named_parameters() if p.grad is None}
    assert missing == set() and not any("teacher" in name for name in made.state_dict())
    assert "vision" not in made.eval()(images()).losses


@pytest.mark.parametrize("vision_dim", [None, 12])
def test_official_keys_there_and_back(vision_dim: int | None) -> None:
    made = model(legacy=True, vision_dim=vision_dim)
    again = from_official(to_official(made), 16, (2, 2))
    for key, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
    with pytest.raises(UserError, match="not the weights of a ResTok tokenizer"):
        from_official({}, 16)


def test_published_size() -> None:
    with torch.device("meta"):
        made = restok_l_128()
        whole = ResTok(VectorQuantizer(8192, 8), vision_dim=1024)
    assert sum(p.numel() for p in made.parameters()) == 659_693_771
    assert sum(p.numel() for p in whole.parameters()) == 661_791_947


def test_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="stride 4 does not divide image_size 18"):
        ResTok(VectorQuantizer(8, 4), 18, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match="3 merges do not divide 4 columns"):
        model(stages=4)
