"""An image's tokens, and the image that tokens become, do not depend on what else is in the batch."""

import pytest
import torch
from torch import Tensor

from tests.tiny.pairs import TOKENIZERS

VECTORS = (
    "BAR-FSQ",
    "BAR-FSQ's bits as one id",
    "BAR-FSQ's bits as sub-tokens",
    "BitDance's autoencoder",
    "IBQ",
    "Open-MAGVIT2",
    "TokenBridge's of a KL VAE",
    "UniWeTok",
    "VAT",
)


@pytest.mark.parametrize("name", VECTORS)
@torch.no_grad()
def test_images_of_a_batch_do_not_touch_each_other(name: str) -> None:
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name]().eval()
    for parameter in tokenizer.parameters():
        if parameter.ndim > 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    height, width = tokenizer.image_size
    images = torch.rand(3, 3, height, width) * 2 - 1
    tokens = tokenizer.encode(images)
    shown = tokenizer.decode(tokens)
    for index in range(3):
        own = slice(index, index + 1)
        assert torch.equal(tokenizer.encode(images[own]), tokens[own])
        torch.testing.assert_close(tokenizer.decode(tokens[own]), shown[own], atol=1e-4, rtol=1e-3)
    changed = without(images, 0)
    assert torch.equal(tokenizer.encode(changed)[1:], tokens[1:])
    assert not torch.equal(shown[0], shown[1])


def without(images: Tensor, index: int) -> Tensor:
    """The batch with another image in one place."""
    other = images.clone()
    other[index] = -other[index]
    return other
