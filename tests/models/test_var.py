"""VAR through a real tokenizer: block-causality, cached = fresh, guidance from the second scale on, published sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.var import VAR, var_d16, var_d20, var_d24, var_d30, var_d36_s
from tessellar.models.var.official import from_official, to_official
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner, Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import Guidance, Linear
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.var import VARVQVAE, MultiScaleQuantizer
from tessellar.tokenizers.var.tokenizer import scales
from tessellar.tokenizers.vit_vq import ViTVQ

LABELS = Condition(ids=torch.tensor([0, 3, 1]))


def vqvae() -> VARVQVAE:
    torch.manual_seed(1)
    made = VARVQVAE(MultiScaleQuantizer(30, 4, (1, 2, 4)), 8, 32, (1, 1), 1).eval()
    torch.nn.init.normal_(made.quantizer.codebook.weight)
    return made


def model(shared: bool = False, l2_norm: bool = True) -> VAR:
    tokenizer = vqvae()
    torch.manual_seed(0)
    made = VAR(tokenizer.layout, 32, 2, 4, 5, 4, 2.0, 0.0, 0.0, shared, l2_norm).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.bind(tokenizer)
    return made


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 30, (3, 21), generator=torch.Generator().manual_seed(seed))


def scores(made: VAR, ids: Tensor, condition: Condition = LABELS) -> Tensor:
    distribution = made.score(ids, condition)
    assert isinstance(distribution, Logits)
    return distribution.logits


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_a_scale_depends_on_coarser_ones_alone(shared: bool) -> None:
    made, ids = model(shared), tokens()
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 30
    before, after = scores(made, ids), scores(made, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert bool((before[:, 5:] != after[:, 5:]).any(-1).all())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_cached_equals_uncached(shared: bool, l2_norm: bool, guided: bool) -> None:
    made, ids = model(shared, l2_norm), tokens()
    guidance = Guidance(Linear(2.5) if guided else None)
    state, parts = made.start(LABELS, guidance), []
    for _ in range(3):
        predicted = made.predict(state, ids)
        assert isinstance(predicted, Logits)
        parts.append(predicted.logits)
    plain = scores(made, ids)
    if guided:
        scale = torch.tensor([1.0] + [1.75] * 4 + [2.5] * 16)[:, None]
        null = scores(made, ids, made.null(LABELS))
        plain = null + scale * (plain - null)
    torch.testing.assert_close(torch.cat(parts, 1), plain, atol=1e-4, rtol=1e-4)


def test_training_reaches_every_parameter() -> None:
    made = model().train()
    made.loss(tokens(), LABELS)["cross_entropy"].backward()
    names = {n for n, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert names == set()


def test_a_picture_is_drawn_in_three_evaluations() -> None:
    tokenizer, made = vqvae(), model()
    whole = ImageGenerator(tokenizer, made, ClassConditioner(5))
    calls: list[int] = []
    made.output.register_forward_hook(lambda *_: calls.append(1))
    images = whole.sample(LABELS, Sampling(), [0, 1, 2])
    assert images.shape == (3, 3, 8, 8) and len(calls) == 3


def test_attention_ignores_scales_above_the_largest() -> None:
    made, ids = model(), tokens()
    with torch.no_grad():
        for layer in made.layers:
            layer.attention.log_scale.fill_(4.7)  # type: ignore[union-attr, operator]
        one = scores(made, ids)
        for layer in made.layers:
            layer.attention.log_scale.fill_(9.0)  # type: ignore[union-attr, operator]
        assert torch.equal(one, scores(made, ids))


def test_tokenizers_that_do_not_fit() -> None:
    made = VAR(vqvae().layout, 32, 1, 4, 5, 8)
    with pytest.raises(UserError, match="built for inputs of 8 channels, the tokenizer has 4"):
        made.bind(vqvae())
    with pytest.raises(
        UserError, match="reads the summed maps of a multi-scale tokenizer; ViTVQ has none"
    ):
        made.bind(ViTVQ(VectorQuantizer(8, 4), 8, 4, 16, 1, 1, 2))
    with pytest.raises(
        UserError, match="scales need a layout of grids, or of sequences, from coarse to fine"
    ):
        VAR(grid_layout(4, 4, Categorical(9)), 32, 1, 4)
    with pytest.raises(UserError, match="VAR has no tokenizer yet"):
        made.score(tokens(), LABELS)


def test_official_keys_there_and_back() -> None:
    made = model(shared=True)
    again = from_official(to_official(made), made.layout)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), made.parameters(), strict=True)
    )
    with pytest.raises(UserError, match="is for 21 tokens, but the tokenizer gives"):
        from_official(to_official(made), grid_layout(4, 4, Categorical(30)))


@pytest.mark.parametrize(
    ("preset", "sides", "count"),
    [
        (var_d16, scales(256), 310_283_520),
        (var_d20, scales(256), 600_917_136),
        (var_d24, scales(256), 1_033_399_360),
        (var_d30, scales(256), 2_010_020_356),
        (var_d36_s, scales(512), 2_353_893_904),
    ],
)
def test_published_sizes(preset: Any, sides: tuple[int, ...], count: int) -> None:
    layout = Layout(tuple(Segment((p, p), Categorical(4096), f"scale{p}") for p in sides))
    with torch.device("meta"):
        made = preset(layout)
    assert sum(p.numel() for p in made.parameters()) == count
