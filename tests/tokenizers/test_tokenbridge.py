"""Channels quantised after training: the grid, any continuous tokenizer under it, and the official files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.data.sets.shapes import ShapesData
from tessellar.data.token_cache.cached_tokens import CachedTokens
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError
from tessellar.protocol.layout import Factorized
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok import TiTok, ViTSize
from tessellar.tokenizers.tokenbridge import ChannelGrid, PostQuantized, tokenbridge_kl16
from tessellar.tokenizers.tokenbridge import official as tokenbridge
from tessellar.tokenizers.vit_vq import ViTVQ

GRIDS = [
    ChannelGrid(64),
    ChannelGrid(8, -3.0, 3.0),
    ChannelGrid(17, -2.0, 6.0, spread=2.5),
    ChannelGrid(16, spacing="uniform"),
]
TINY = ViTSize(16, 1, 2)


def vae(channels: int = 4) -> KLVAE:
    torch.manual_seed(0)
    return KLVAE(GaussianBottleneck(channels, scale=1.0), 16, 32, (1, 1, 1), 1).eval()


def sequence() -> TiTok:
    torch.manual_seed(0)
    return TiTok(GaussianBottleneck(4, scale=1.0), 16, 4, 8, TINY, TINY).eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("grid", GRIDS, ids=["64", "range 3", "uneven", "uniform"])
def test_levels_are_their_own_nearest_and_the_grid_is_symmetric(grid: ChannelGrid) -> None:
    index = torch.arange(grid.levels)
    assert torch.equal(grid.quantize(grid.dequantize(index)), index)
    assert bool((grid.values.diff() > 0).all())
    torch.testing.assert_close(grid.values, -grid.values.flip(0), atol=1e-5, rtol=0)
    x = torch.linspace(2 * grid.lowest, 2 * grid.highest, 3001)
    nearest = (x[:, None] - grid.dequantize(index)).abs().argmin(1)
    exact = (x - grid.dequantize(grid.quantize(x))).abs()
    torch.testing.assert_close(exact, (x - grid.dequantize(nearest)).abs(), atol=1e-5, rtol=0)


def test_the_published_grid_gives_every_bin_its_share() -> None:
    """Of a normal that the mapping to +-3 makes standard; the error falls as levels are added."""
    values = ChannelGrid(64).values
    below = torch.special.ndtr((values[1:] + values[:-1]) / 2)
    share = 64 * torch.cat([below[:1], below.diff(), 1 - below[-1:]])
    assert 0.849 < float(share.min()) and float(share.max()) < 1.08
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) / 0.6
    errors = []
    for levels in (8, 16, 32, 64):
        grid = ChannelGrid(levels)
        errors.append(float((grid.dequantize(grid.quantize(x)) - x).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"levels": 1}, "levels is 1"),
        ({"lowest": 5.0}, "highest is 5.0; it must be a finite number above 5.0"),
        ({"spread": 0.5}, "leave bins empty"),
        ({"spacing": "linear"}, "one of gaussian, uniform"),
    ],
)
def test_numbers_that_make_no_grid_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        PostQuantized(vae(), **options)


@pytest.mark.parametrize("make", [vae, sequence])
@torch.no_grad()
def test_any_continuous_tokenizer_gets_indices_of_its_channels(
    make: Callable[[], Tokenizer],
) -> None:
    inner = make()
    made = PostQuantized(inner, 32).eval()
    tokens = made.encode(images())
    made.layout.check(tokens)
    assert made.layout.segments[0].kind == Factorized((32,) * 4)
    assert made.layout.segments[0].shape == inner.layout.segments[0].shape
    assert not any(parameter.requires_grad for parameter in made.parameters())
    output = made(images())
    assert output.losses == {} and torch.equal(output.tokens, tokens)
    torch.testing.assert_close(output.reconstruction, made.decode(tokens))
    fine = PostQuantized(inner, 8192, -40.0, 40.0, spacing="uniform").eval()
    torch.testing.assert_close(
        fine.decode(fine.encode(images())), inner.decode(inner.encode(images())), atol=0.05, rtol=0
    )
    draws = [made.draw(images(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_tokenizer_with_ids_is_refused() -> None:
    with pytest.raises(UserError, match="quantised of continuous latents; this tokenizer gives"):
        PostQuantized(ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2))


def test_it_is_made_of_an_export_and_is_complete_in_its_own(tmp_path: Path) -> None:
    inner = export_tokenizer(vae(), tmp_path / "vae")
    made = PostQuantized(str(inner), 16).eval()
    again = load_tokenizer(export_tokenizer(made, tmp_path / "channels"))
    assert torch.equal(again.encode(images()), made.encode(images()))
    assert "vae" not in (tmp_path / "channels" / "config.yaml").read_text().replace("kl_vae", "")


def test_one_cache_of_the_posterior_serves_every_grid(tmp_path: Path) -> None:
    inner = vae()
    data = ShapesData(size=16, length=6, val_length=2)
    encode_dataset(PostQuantized(inner, 8), data.train_dataset(), tmp_path / "c", name="shapes")
    cache = CachedTokens(tmp_path / "c", seed=1)
    drawn = cache.batch(range(6))["tokens"]
    for levels in (8, 64):
        made = PostQuantized(inner, levels)
        cache.require(made)
        made.layout.check(made.from_source(drawn))
    cache.set_epoch(1)
    assert not torch.equal(drawn, cache.batch(range(6))["tokens"])


def test_the_official_vae_goes_in_and_out() -> None:
    made = tokenbridge.from_official(
        tokenbridge.to_official(PostQuantized(vae().train(), 64)), image_size=16
    )
    again = tokenbridge.from_official(tokenbridge.to_official(made), image_size=16)
    assert made.grid.levels == 64
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_published_tokenizer_has_the_sizes_of_kl16() -> None:
    with torch.device("meta"):
        made = tokenbridge_kl16()
    assert sum(p.numel() for p in made.parameters()) == 66_456_019
    assert made.layout.grid == (16, 16)
    assert made.layout.segments[0].kind == Factorized((64,) * 16)
