"""FlexAR: text by cross-attention, null conditions, the official slip with the null class, import and its inverse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.flextok import (
    FlexAR,
    flexar_1b_t2i,
    flexar_3b_t2i,
    flexar_113m_t2i,
    flexar_382m_t2i,
)
from tessellar.models.flextok.model import positions_1d
from tessellar.models.flextok.official import MODEL, OFFICIAL, generator_from_official, to_official
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.layout import Categorical, sequence_layout

LINE = sequence_layout(8, Categorical(19), min_prefix=1)


def make(**options: Any) -> FlexAR:
    torch.manual_seed(0)
    generator = FlexAR(LINE, **{"width": 32, "depth": 2, "num_heads": 4, **options}).eval()
    for parameter in generator.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return generator


def make_text() -> FlexAR:
    return make(num_classes=None, text_dim=6, text_length=3)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(19, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompt() -> Condition:
    features = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    return Condition(
        valid=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]).bool(), features=features
    )


def scores(generator: FlexAR, tokens: Tensor, condition: Condition) -> Tensor:
    found = generator.score(tokens, condition)
    assert isinstance(found, Logits)
    return found.logits.detach()


def test_text_is_read_where_it_is_real(tokens: Tensor, prompt: Condition) -> None:
    generator = make_text()
    assert prompt.features is not None and prompt.valid is not None
    padding = torch.where(prompt.valid[..., None], prompt.features, 9.0)
    first = scores(generator, tokens, prompt)
    torch.testing.assert_close(first, scores(generator, tokens, prompt._replace(features=padding)))
    assert not torch.allclose(
        first, scores(generator, tokens, prompt._replace(features=prompt.features + 1))
    )


@torch.no_grad()
def test_guidance_against_the_empty_prompt(tokens: Tensor, prompt: Condition) -> None:
    generator = make_text()
    with pytest.raises(UserError, match="empty prompt are not known"):
        generator.start(prompt, Guidance(Constant(2.0)))
    empty, valid = torch.randn(3, 6), torch.tensor([False, True, True])
    generator.set_empty_prompt(empty, valid)
    state = generator.start(prompt, Guidance(Constant(2.0)))
    guided = generator.predict(state, tokens, 8)
    null = scores(
        generator, tokens, Condition(valid=valid.expand(2, -1), features=empty.expand(2, -1, -1))
    )
    conditional = scores(generator, tokens, prompt)
    assert isinstance(guided, Logits)
    torch.testing.assert_close(guided.logits, null + 2 * (conditional - null), atol=1e-4, rtol=1e-4)


def test_no_class_adds_nothing(tokens: Tensor) -> None:
    generator = make(num_classes=5)
    labels = Condition(ids=torch.tensor([1, 4]))
    bare = generator.start_token + generator.positions[0]
    assert torch.equal(generator.prefix(generator.null(labels)).embeddings, bare.expand(2, 1, -1))
    assert not torch.equal(generator.prefix(labels).embeddings, bare.expand(2, 1, -1))
    slip = make(num_classes=5, null_class=0)
    assert slip.null(labels).ids is not None and slip.null(labels).ids.tolist() == [0, 0]  # type: ignore[union-attr]


def test_gradients_reach_every_parameter_of_the_text_model(
    tokens: Tensor, prompt: Condition
) -> None:
    generator = make_text().train()
    generator.set_empty_prompt(torch.randn(3, 6), torch.ones(3, dtype=torch.bool))
    generator.loss(tokens, prompt)["cross_entropy"].backward()
    trained = [(n, p) for n, p in generator.named_parameters() if p.requires_grad]
    assert not [n for n, p in trained if p.grad is None or not p.grad.abs().max() > 0]
    assert not generator.positions.requires_grad


def test_positions_are_a_column_of_a_grid() -> None:
    table = positions_1d(6, 8)
    assert torch.equal(table[0], torch.zeros(8))
    assert torch.equal(table[1:, :4], torch.tensor([0.0, 0, 1, 1]).expand(5, -1))
    assert (
        torch.equal(table[1, 4:], torch.tensor([0.0, 0, 1, 1]))
        and abs(float(table[3, 4] - torch.sin(torch.tensor(2.0)))) < 1e-6
    )


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_export_to_official_is_the_inverse_of_import(
    tokens: Tensor, text: bool, qk_norm: bool
) -> None:
    options: dict[str, Any] = (
        {"num_classes": None, "text_dim": 6, "text_hidden": 10} if text else {"num_classes": 5}
    )
    generator = make(qk_norm=qk_norm, **options)
    state = to_official(generator)
    extra = {"models.image_tokenizer.flextok_model.x": torch.zeros(1)}
    again = generator_from_official({**state, **extra}, LINE, 4)
    assert OFFICIAL.holds(state) and to_official(again).keys() == state.keys()
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in generator.state_dict().items())
    with pytest.raises(UserError, match="unknown: models.ar_image_model.other"):
        generator_from_official({**state, f"{MODEL}other": torch.zeros(1)}, LINE, 4)
    with pytest.raises(UserError, match="reads 8 tokens; the tokenizer gives 4"):
        generator_from_official(state, sequence_layout(4, Categorical(19)), 4)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="either num_classes or text_dim"):
        FlexAR(LINE, 32, 1, 4, 5, 6)
    with pytest.raises(ValueError, match="num_heads 5 does not divide width 32"):
        FlexAR(LINE, 32, 1, 5)
    with pytest.raises(UserError, match="not the weights of a FlexAR generator"):
        generator_from_official({"weight": torch.zeros(1)}, LINE)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (flexar_113m_t2i, 113_246_208),
        (flexar_382m_t2i, 382_205_952),
        (flexar_1b_t2i, 1_151_860_736),
        (flexar_3b_t2i, 3_057_647_616),
    ],
)
def test_matrices_of_the_published_blocks(preset: Any, count: int) -> None:
    with torch.device("meta"):
        made = preset(sequence_layout(256, Categorical(64000), 1))
    assert sum(p.numel() for p in made.layers.parameters() if p.ndim == 2) == count
    assert f"{count:,}" in str(preset.__doc__) and made.head_dim == 64
