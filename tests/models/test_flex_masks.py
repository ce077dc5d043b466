"""FlexAttention's masks, run eagerly, against the dense ones: every block-causal generator over its own blocks."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.layers import attention
from tessellar.layers.llama import AttentionKind
from tessellar.models.har import HAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.next_entity import NextEntity
from tessellar.models.parts.llama import LlamaGenerator
from tessellar.models.var import VAR
from tessellar.protocol.condition import Condition
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Categorical, grid_layout, sequence_layout
from tessellar.tokenizers.var import VARVQVAE, MultiScaleQuantizer

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


def var(kind: str) -> VAR:
    torch.manual_seed(1)
    tokenizer = VARVQVAE(MultiScaleQuantizer(23, 4, (1, 2, 4)), 8, 32, (1, 1), 1).eval()
    made = VAR(tokenizer.layout, 32, 2, 2, 10, latent_dim=4, attention=kind)
    made.bind(tokenizer)
    return made


def next_entity(kind: str) -> NextEntity:
    layout = grid_layout(4, 4, Categorical(23))
    return NextEntity(layout, "cell:2", 32, 2, 2, 10, ffn_multiple_of=8, attention=kind)


def har(kind: str) -> HAR:
    layout = sequence_layout(16, Categorical(23))
    return HAR(layout, 32, 2, 2, 10, ffn_multiple_of=8, attention=kind)


@pytest.mark.parametrize("make", [var, next_entity, har])
@torch.no_grad()
def test_logits_are_those_of_the_dense_mask(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward alone: FlexAttention has no backward pass on a CPU."""
    calls: list[str] = []
    original = attention.flex_kernel
    monkeypatch.setattr(attention, "flex_kernel", lambda d: calls.append(d) or original(d))
    found = []
    for implementation in ("flex", "explicit"):
        torch.manual_seed(0)
        generator: Generator = make(implementation)
        for parameter in generator.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        generator.eval()
        draws = torch.Generator().manual_seed(1)
        tokens = torch.randint(23, (2, generator.layout.length), generator=draws)
        found.append(generator.score(tokens, Condition(ids=torch.tensor([1, 2]))).logits)  # type: ignore[attr-defined]
    assert calls == ["cpu", "cpu"]  # both layers of the first
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_dropout_of_weights_is_refused() -> None:
    class Tiny(LlamaGen):
        def __init__(self, **options) -> None:
            LlamaGenerator.__init__(self, 32, 1, 2, **options)

    with pytest.raises(UserError, match="FlexAttention has no dropout"):
        Tiny(attention="flex", attention_kind=AttentionKind(dropout=0.1))
