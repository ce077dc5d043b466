"""Tables that no checkpoint holds survive a cast to bfloat16 and back; models in bfloat16 encode, decode and sample."""

import pytest
import torch
from torch import nn

from tessellar.pipeline import ImageGenerator
from tessellar.sampling.settings import Sampling
from tests.tiny.pairs import GENERATORS, TOKENIZERS, reason_against

PAIRS = {g: next(t for t in TOKENIZERS if reason_against(t, g) is None) for g in GENERATORS}


def tables(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint does not hold."""
    saved = model.state_dict()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved}


def there_and_back(model: nn.Module) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = tables(model)
    model.to(torch.bfloat16).float()
    model.load_state_dict(weights)
    after = tables(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(table, after[name]) for name, table in before.items())
    model.half().double()
    wide = tables(model)
    assert all(torch.equal(table.double(), wide[name].double()) for name, table in before.items())


@pytest.mark.parametrize("name", GENERATORS)
def test_tables_of_generators_survive(name: str) -> None:
    there_and_back(GENERATORS[name](TOKENIZERS[PAIRS[name]]().layout))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tables_of_tokenizers_survive(name: str) -> None:
    there_and_back(TOKENIZERS[name]())


@pytest.mark.parametrize("name", GENERATORS)
@torch.no_grad()
def test_a_model_in_bfloat16_samples(name: str) -> None:
    tokenizer = TOKENIZERS[PAIRS[name]]()
    generator = GENERATORS[name](tokenizer.layout)
    model = (
        ImageGenerator(tokenizer, generator, generator.make_conditioner()).eval().to(torch.bfloat16)
    )
    images = model.sample(model.class_condition([0, 1]), Sampling(), [1, 2])
    assert images.shape == (2, 3, *tokenizer.image_size) and bool(images.isfinite().all())


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_a_tokenizer_in_bfloat16_encodes_and_decodes(name: str) -> None:
    tokenizer = TOKENIZERS[name]().eval().to(torch.bfloat16)
    if name == "Hita":  # without its vision model it decodes alone
        assert bool(tokenizer.decode(tokenizer.layout.blank(2)).isfinite().all())
        return
    tokens = tokenizer.encode(torch.rand(2, 3, *tokenizer.image_size).to(torch.bfloat16) * 2 - 1)
    tokenizer.layout.check(tokens)
    assert bool(tokenizer.decode(tokens).isfinite().all())
