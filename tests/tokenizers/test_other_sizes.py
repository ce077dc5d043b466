"""Every tokenizer either takes another size, as one that was made for it, or says that it has one."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.protocol.configured import build
from tessellar.protocol.tokenizer import Tokenizer
from tests.tiny.pairs import TOKENIZERS

SIZE = (32, 48)


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_another_size_is_taken_or_refused(name: str) -> None:
    torch.manual_seed(0)
    tokenizer: Tokenizer = TOKENIZERS[name]().eval()
    before = tokenizer.image_size
    try:
        tokenizer.take_size(SIZE)
    except UserError as error:
        assert type(tokenizer).__name__ in str(error) and tokenizer.image_size == before
        return
    images = torch.rand(2, 3, *SIZE) * 2 - 1
    tokens = tokenizer.encode(images)
    tokenizer.layout.check(tokens)
    shown = tokenizer.decode(tokens)
    assert shown.shape == images.shape and tokenizer.image_size == SIZE
    config = tokenizer.config
    made = build({**config, "init_args": {**config["init_args"], "image_size": list(SIZE)}})
    assert made.layout == tokenizer.layout
    state = tokenizer.state_dict()
    shapes = {key: tensor.shape for key, tensor in made.state_dict().items()}
    if any(state[key].shape != shape for key, shape in shapes.items()):
        return  # its tables of positions are resampled: tests/training/test_buckets.py
    made.load_state_dict(state)
    assert torch.equal(made.eval().encode(images), tokens)
    assert torch.equal(made.decode(tokens), shown)
