"""Semanticist's generator: a flow head on each slot, the first slots of a longer tokenizer, the SDE, sizes, keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.semanticist import (
    SemanticistAR,
    semanticist_ar_b,
    semanticist_ar_l,
    semanticist_ar_xl,
)
from tessellar.models.semanticist.official import from_official, to_official
from tessellar.pipeline import ImageGenerator
from tessellar.processes.flow import Euler, EulerMaruyama
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import ImplicitFlow
from tessellar.protocol.entities import token_order
from tessellar.protocol.guidance import Constant, Guidance, Linear
from tessellar.protocol.layout import Categorical, Continuous, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.semanticist import Semanticist, SlotDecoding
from tessellar.tokenizers.titok import ViTSize

C = 3
LAYOUT = sequence_layout(12, Continuous(C), min_prefix=1)
LABELS = Condition(ids=torch.tensor([0, 3]))


def make(shaken: bool = True, **options: Any) -> SemanticistAR:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_tokens": 5, "head_width": 24, "head_depth": 2}
    sizes |= {"dropout": 0.0, "ffn_multiple_of": 8, **options}
    made = SemanticistAR(LAYOUT, 32, 2, 4, 5, **sizes).eval()
    if shaken:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return made


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(2, 12, C, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_new_head_predicts_nothing_and_its_loss_says_so() -> None:
    made = make(shaken=False)
    t = torch.rand(4, 2, 5)
    noise = torch.randn(4, 2, 5, C)
    loss = made.flow_loss(tokens(), LABELS, t, noise)
    torch.testing.assert_close(loss, (tokens()[:, :5] - noise).square().mean())


@torch.no_grad()
def test_only_the_first_tokens_are_read() -> None:
    made = make()
    t = torch.rand(2, 2, 5)
    noise = torch.randn(2, 2, 5, C)
    changed = tokens()
    changed[:, 5:] += 1
    expected = made.flow_loss(tokens(), LABELS, t, noise)
    assert torch.equal(made.flow_loss(changed, LABELS, t, noise), expected)
    # The last of them is a target, but no input.
    distribution = made.score(tokens(), LABELS)
    last = tokens()
    last[:, 4] += 1
    hidden = made.score(last, LABELS).hidden
    assert hidden is not None and distribution.hidden is not None
    assert torch.equal(hidden, distribution.hidden)
    with pytest.raises(UserError, match="num_tokens is 13; the first 13 positions of .* cannot"):
        make(num_tokens=13)
    with pytest.raises(UserError, match="predicts continuous tokens"):
        SemanticistAR(sequence_layout(12, Categorical(7)))


@torch.no_grad()
def test_the_loss_is_that_of_the_velocity_that_is_integrated() -> None:
    """The distribution's velocity at time t is what `flow_loss` compares with noise - data."""
    made = make()
    noise = torch.randn(1, 2, 5, C)
    clean = tokens()[:, :5]
    t = torch.full((1, 2, 5), 0.3)
    times: list[Tensor] = []
    made.flow_head.time.register_forward_pre_hook(lambda _, given: times.append(given[0]))
    distribution = made.score(tokens(), LABELS)
    assert isinstance(distribution, ImplicitFlow) and distribution.shape == (5, C)
    velocity = distribution.model(
        (0.7 * clean + 0.3 * noise[0]).double(), torch.tensor(0.3).double()
    )
    expected = (velocity - (noise[0] - clean)).square().mean()
    found = made.flow_loss(tokens(), LABELS, t, noise)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    # The head is told the share of data, not scaled.
    for given in times:
        torch.testing.assert_close(given, torch.full_like(given, 0.7))
    each = made.flow_loss(tokens(), LABELS, t, noise, torch.tensor([1.0, 0.0]))
    of_first = (velocity - (noise[0] - clean))[0].square().mean()
    torch.testing.assert_close(each, of_first, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_guidance_grows_with_the_number_of_the_token_and_acts_on_the_velocity() -> None:
    entities = token_order(sequence_layout(32, Continuous(C)))
    scales = Linear(6.0, start=1 + 5 / 32)(torch.arange(32)[None], entities)
    torch.testing.assert_close(scales, (1 + 5 * (torch.arange(32) + 1) / 32)[None])
    made = make()
    state = made.start(LABELS, Guidance(Constant(3.0)))
    guided = made.predict(state, tokens())
    assert isinstance(guided, ImplicitFlow)
    x = torch.randn(2, 1, C).double()
    t = torch.tensor(0.4).double()
    parts = []
    for condition in (LABELS, made.null(LABELS)):
        alone = made.predict(made.start(condition), tokens())
        assert isinstance(alone, ImplicitFlow)
        parts.append(alone.model(x, t))
    expected = parts[1] + 3 * (parts[0] - parts[1])
    torch.testing.assert_close(guided.model(x, t), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_the_sde_of_a_normal_has_the_variance_of_its_recursion(temperature: float) -> None:
    """For data N(0, 1) the exact velocity to data is (2 s - 1) x / (s^2 + (1 - s)^2), s the share of data."""
    solver = EulerMaruyama(250, temperature=temperature)

    def coefficient(s: float) -> float:
        return (2 * s - 1) / (s**2 + (1 - s) ** 2)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return -coefficient(1 - float(t)) * x

    variance = 1.0
    dt = 0.96 / 249
    for step in range(249):
        s = step * dt
        variance = (1 + ((1 + s) * coefficient(s) - 1) * dt) ** 2 * variance
        variance += 2 * (1 - s) * dt * temperature**2
    variance *= (1 + (1.96 * coefficient(0.96) - 1) * 0.04) ** 2
    drawn = solver.integrate(model, (100, 400), Noise([0]))
    assert float(drawn.var()) == pytest.approx(variance, rel=0.03)


def test_images_are_sampled_of_the_first_slots_of_a_longer_tokenizer() -> None:
    torch.manual_seed(0)
    size = ViTSize(16, 1, 2)
    tokenizer = Semanticist(16, 4, 12, C, None, 4, size, size, decoding=SlotDecoding(2, 1.0))
    made = make()
    model = ImageGenerator(tokenizer, made, made.make_conditioner())
    settings = Sampling(Linear(4.0), flow=Euler(2))
    images = model.sample(LABELS, settings, [0, 1])
    assert images.shape == (2, 3, 16, 16) and bool(images.isfinite().all())
    assert model.sample_tokens(LABELS, settings, [0, 1]).shape == (2, 5, C)
    other = SemanticistAR(
        sequence_layout(9, Continuous(C)), 32, 1, 4, 5, head_width=8, head_depth=1
    )
    with pytest.raises(UserError, match="was built for 9 tokens .* but the tokenizer gives 12"):
        ImageGenerator(tokenizer, other, other.make_conditioner())


@pytest.mark.parametrize(
    ("preset", "total", "head", "keys"),
    [
        (semanticist_ar_l, 488_566_800, 179_125_264, 283),
        (semanticist_ar_b, 264_518_416, 178_732_048, 199),
        (semanticist_ar_xl, 912_381_200, 179_518_480, 367),
    ],
)
def test_sizes(preset: Any, total: int, head: int, keys: int) -> None:
    with torch.device("meta"):
        made = preset(sequence_layout(256, Continuous(16), min_prefix=1))
    assert made.layout == sequence_layout(32, Continuous(16), min_prefix=1)
    assert sum(p.numel() for p in made.parameters()) == total
    assert sum(p.numel() for p in made.flow_head.parameters()) == head
    assert len(to_official(made)) == keys


def test_official_weights_of_another_layout_or_head_are_refused() -> None:
    made = make()
    state = to_official(made)
    again = from_official(state, LAYOUT, 4)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[key]), key
    with pytest.raises(UserError, match="is for 5 tokens of 3 channels, but the tokenizer gives 4"):
        from_official(state, sequence_layout(4, Continuous(C)), 4)
    width = state["diffloss.net.final_layer.linear.weight"].shape[1] // 2
    linear = state["diffloss.net.final_layer.linear.weight"][:, :width]
    with pytest.raises(UserError, match="fit"):
        from_official({**state, "diffloss.net.final_layer.linear.weight": linear}, LAYOUT, 4)


@torch.no_grad()
def test_the_other_head_is_modulated_by_the_condition_and_reads_nothing_beside() -> None:
    """`adaln`: h += gate MLP(LN(h) (1 + scale) + shift), every vector of time + condition; official files say so."""
    made = make(head_conditioning="adaln")
    head = made.flow_head
    x, z, t = torch.randn(4, C), torch.randn(4, 32), torch.rand(4)
    silu = torch.nn.functional.silu
    condition = silu(head.time(t) + head.condition(z))
    h = head.input(x)
    blocks: Any = head.blocks
    for block in blocks:
        shift, scale, gate = block.modulation.linear(condition).chunk(3, -1)
        inner = block.norm(h) * (1 + scale) + shift
        h = h + gate * block.fc2(silu(block.fc1(inner)))
    shift, scale = head.modulation.linear(condition).chunk(2, -1)
    expected = head.output(head.norm(h) * (1 + scale) + shift)
    torch.testing.assert_close(head(x, t, z), expected)
    again = from_official(to_official(made), LAYOUT, 4)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[key]), key
    # The halves of the concatenation are gone: 2 W x W a block less, W C of the output.
    sizes = [sum(p.numel() for p in m.flow_head.parameters()) for m in (make(), made)]
    assert sizes[0] - sizes[1] == 2 * 24 * 24 + 24 * C
    with pytest.raises(UserError, match="conditioning of the head is 'film'"):
        make(head_conditioning="film")
