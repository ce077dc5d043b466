"""TokenBridge's own promises: the channel head, its cache, its ablations, sampling in any order, exact sizes."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.tokenbridge import TokenBridge, tokenbridge_b, tokenbridge_h, tokenbridge_l
from tessellar.models.tokenbridge.head import ChannelClasses, ChannelHead, ChannelLogits
from tessellar.models.tokenbridge.order import low_frequency_order, low_frequency_shares
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant, Revealed
from tessellar.protocol.layout import Continuous, Factorized, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.confidence import MaskGIT
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.settings import GREEDY, Sampling
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.tokenbridge import PostQuantized

LABELS = Condition(ids=torch.tensor([0, 3]))
HEADS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "as sampled officially": {"first_input": "official"},
    "parallel": {"parallel": True},
}


def head(sizes: tuple[int, ...] = (5, 3, 4), **options: Any) -> ChannelHead:
    torch.manual_seed(0)
    made = ChannelHead(6, sizes, width=16, depth=2, num_heads=4, dropout=0.0, **options)
    made.init_weights()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def model(**options: Any) -> TokenBridge:
    torch.manual_seed(0)
    vae = KLVAE(GaussianBottleneck(3, scale=1.0), 32, 8, (1, 1, 1, 1), 1, groups=8)
    tokenizer = PostQuantized(vae, 6)
    sizes: dict[str, Any] = {
        "head_width": 16,
        "head_depth": 2,
        "head_heads": 4,
        "num_classes": 5,
        "buffer": 3,
    }
    sizes |= {"dropout": 0.0, "condition_dropout": 0.0, "steps": 5}
    generator = TokenBridge(tokenizer.layout, 16, 2, 2, **(sizes | options))
    generator.bind(tokenizer)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


def indices(batch: int = 2) -> Tensor:
    return torch.randint(6, (batch, 16, 3), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("options", HEADS.values(), ids=list(HEADS))
@torch.no_grad()
def test_the_cached_head_is_the_whole_one(options: dict[str, Any]) -> None:
    made = head(**options)
    z = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([4, 2, 1]).expand(2, 3, 3)
    whole = made(z.flatten(0, 1), classes.flatten(0, 1), sampled=True)
    walk = made.steps(z)
    for position, size in enumerate((5, 3, 4)):
        found = walk(classes, position)
        assert found.shape == (2, 3, size)
        torch.testing.assert_close(found.flatten(0, 1), whole[position], atol=1e-5, rtol=1e-5)
    trained = made(z.flatten(0, 1), classes.flatten(0, 1))
    differs = not torch.allclose(trained[2], whole[2])
    assert differs == (options == HEADS["as sampled officially"])


@pytest.mark.parametrize("options", HEADS.values(), ids=list(HEADS))
@torch.no_grad()
def test_a_position_sees_earlier_classes_alone(options: dict[str, Any]) -> None:
    made = head((5, 5, 5, 5), **options)
    z = torch.randn(1, 6)
    before = made(z, torch.tensor([[0, 1, 2, 3]]))
    after = made(z, torch.tensor([[0, 4, 2, 3]]))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == ([True] * 4 if made.parallel else [True, True, False, False])


@torch.no_grad()
def test_all_probabilities_sum_to_one_and_draws_follow_them() -> None:
    channels = ChannelClasses((3, 2, 2), (2, 0, 1))
    distribution = ChannelLogits.of(head(channels.sizes), channels, torch.randn(1, 1, 6))
    outcomes = torch.tensor(list(product(range(3), range(2), range(2))))
    law = torch.stack([distribution.log_prob(o.view(1, 1, 3))[0, 0] for o in outcomes]).exp()
    torch.testing.assert_close(law.sum(), torch.tensor(1.0))
    draws = 4000
    many = ChannelLogits.of(
        head(channels.sizes),
        channels,
        distribution.hidden.expand(1, draws, -1),  # type: ignore[union-attr]
    )
    tokens = many.sample(Sampling(), Noise([0]))[0]
    number = tokens[:, 0] * 4 + tokens[:, 1] * 2 + tokens[:, 2]
    counts = number.bincount(minlength=12)
    chi_square = ((counts - draws * law).square() / (draws * law)).sum()
    assert float(chi_square) < 31.3  # 11 degrees of freedom: exceeded once in a thousand


def test_groups_and_orders_come_back() -> None:
    channels = ChannelClasses((3, 2, 5, 4), (3, 0, 2, 1), group=2)
    assert channels.sizes == (12, 10)
    tokens = torch.tensor(list(product(range(3), range(2), range(5), range(4))))
    classes = channels.classes(tokens)
    assert len(classes.unique(dim=0)) == len(tokens) and int(classes.max()) == 11
    assert torch.equal(channels.tokens(classes), tokens)
    with pytest.raises(UserError, match="each of the 3 channels once"):
        ChannelClasses((2, 2, 2), (0, 0, 1))
    with pytest.raises(UserError, match="groups of 2 do not divide 3 channels"):
        ChannelClasses((2, 2, 2), (0, 1, 2), group=2)


@torch.no_grad()
def test_the_loss_is_the_mean_over_masked_tokens_and_positions() -> None:
    generator = model(channel_order=(1, 2, 0))
    tokens = indices()
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, [1, 4, 11]] = True
    z = generator.vectors(tokens, ~masked, LABELS)
    distribution = ChannelLogits.of(generator.head, generator.channels, z)
    nats = -distribution.log_prob(tokens) / 3
    torch.testing.assert_close(generator.masked_loss(tokens, masked, LABELS), nats[masked].mean())
    weighted = generator.masked_loss(tokens, masked, LABELS, torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(weighted, nats[1, masked[1]].mean())


@torch.no_grad()
def test_masked_tokens_are_unseen_and_known_ones_are_read_as_what_they_stand_for() -> None:
    generator = model()
    tokens = indices()
    known = torch.arange(16).expand(2, -1) < 6
    other = torch.where(known[..., None], tokens, (tokens + 1) % 6)
    z = generator.vectors(tokens, known, LABELS)
    torch.testing.assert_close(generator.vectors(other, known, LABELS), z)
    (tokenizer,) = generator.bound
    latents = tokenizer.to_source(tokens)
    torch.testing.assert_close(generator.backbone(latents, known, LABELS), z)


@torch.no_grad()
def test_guidance_of_one_is_the_conditional_run() -> None:
    generator = model()
    plain = Ancestral(steps=4)(generator, LABELS, GREEDY, Noise([0, 1]))
    guided = Ancestral(steps=4)(generator, LABELS, GREEDY, Noise([0, 1]), Constant(1.0).guidance())
    strong = Ancestral(steps=4)(generator, LABELS, GREEDY, Noise([0, 1]), Revealed(9.0).guidance())
    assert torch.equal(plain, guided) and not torch.equal(plain, strong)


@pytest.mark.parametrize("algorithm", [Ancestral(steps=4), MaskGIT(steps=4)])
@torch.no_grad()
def test_an_image_depends_on_its_own_seed(algorithm: Ancestral | MaskGIT) -> None:
    """In random order, and the surest tokens first."""
    generator = model(group=3)
    settings = Sampling(choice=Choice(temperature=0.9))
    guidance = Revealed(2.0).guidance()
    together = algorithm(generator, LABELS, settings, Noise([3, 8]), guidance)
    alone = algorithm(generator, LABELS.select(torch.tensor([1])), settings, Noise([8]), guidance)
    generator.layout.check(together)
    assert torch.equal(together[1:], alone) and not torch.equal(together[0], together[1])


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="one grid of tokens of several indices"):
        TokenBridge(grid_layout(4, 4, Continuous(3)), 16, 1, 2)
    generator = TokenBridge(grid_layout(4, 4, Factorized((6,) * 3)), 16, 1, 2, buffer=2, steps=4)
    with pytest.raises(UserError, match="no tokenizer yet"):
        generator.loss(indices(), LABELS)
    vae = KLVAE(GaussianBottleneck(4), 32, 8, (1, 1, 1, 1), 1, groups=8)
    with pytest.raises(UserError, match="reads latents of 3 channels that tokens stand for"):
        generator.bind(PostQuantized(vae, 6))


class Waves(KLVAE):
    """Latents of 16 x 16 places: a coarse wave, a fine one, and both, on any mean."""

    def encode(self, images: Tensor) -> Tensor:
        place = torch.arange(16) / 16 * 2 * torch.pi
        both = place.cos() + (6 * place).cos()
        waves = torch.stack([(6 * place).cos(), both, place.cos()], -1) + 4.0
        return waves.repeat(16, 1).expand(len(images), -1, -1)


def test_channels_that_hold_the_coarse_picture_come_first() -> None:
    tokenizer = Waves(GaussianBottleneck(3), 64, 8, (1, 1, 1), 1, groups=8)
    images = torch.zeros(2, 3, 64, 64)
    latents = tokenizer.encode(images).view(2, 16, 16, 3)
    expected = torch.tensor([0.0, 0.5, 1.0]).double().expand(2, -1)
    torch.testing.assert_close(low_frequency_shares(latents), expected, atol=1e-6, rtol=0)
    assert low_frequency_order(tokenizer, [images, images]) == (2, 1, 0)
    with pytest.raises(UserError, match="no images"):
        low_frequency_order(tokenizer, [])
    with pytest.raises(UserError, match="needs one grid of continuous latents"):
        low_frequency_order(PostQuantized(tokenizer, 6), [images])


@pytest.mark.parametrize(
    ("preset", "whole", "inner"),
    [
        (tokenbridge_b, 218_024_704, 45_849_856),
        (tokenbridge_l, 486_889_472, 80_793_600),
        (tokenbridge_h, 910_040_576, 118_844_416),
    ],
)
def test_presets_have_their_exact_sizes(preset: Any, whole: int, inner: int) -> None:
    with torch.device("meta"):
        made = preset(grid_layout(16, 16, Factorized((64,) * 16)))
    assert sum(p.numel() for p in made.parameters()) == whole
    assert sum(p.numel() for p in made.head.parameters()) == inner
