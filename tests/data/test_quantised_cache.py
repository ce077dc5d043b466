"""A cached posterior is drawn anew at each visit and then quantised, where the tokenizer does so after training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.data.sets.shapes import ShapesData
from tessellar.data.token_cache.cached_tokens import CachedTokens
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError
from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.training.generator_module import GeneratorModule


def vae(seed: int) -> KLVAE:
    torch.manual_seed(seed)
    return KLVAE(GaussianBottleneck(1, scale=1.0), 32, 16, (1, 1, 1, 1), 1, groups=16).eval()


class Signs(Tokenizer):
    """Two codes: the sign of the one channel of another tokenizer."""

    def __init__(self, inner: Tokenizer) -> None:
        super().__init__()
        self.inner = inner
        self.layout = grid_layout(4, 4, Categorical(2))
        self.image_size = inner.image_size

    @property
    def source(self) -> Tokenizer:
        return self.inner

    def from_source(self, tokens: Tensor) -> Tensor:
        return (tokens[..., 0] > 0).long()

    def encode(self, images: Tensor) -> Tensor:
        return self.from_source(self.inner.encode(images))

    def decode(self, tokens: Tensor) -> Tensor:
        return self.inner.decode(2.0 * tokens[..., None] - 1)

    def forward(self, images: Tensor) -> TokenizerOutput:
        tokens = self.encode(images)
        return TokenizerOutput(self.decode(tokens), tokens, {})

    @property
    def last_layer(self) -> Tensor:
        return self.inner.last_layer


def test_draws_of_a_cached_posterior_are_quantised_in_training(tmp_path: Path) -> None:
    inner = vae(0)
    data = ShapesData(size=32, length=8, val_length=4)
    header = encode_dataset(Signs(inner), data.train_dataset(), tmp_path / "train", name="shapes")
    assert header.storage.kind == "posterior" and header.token_layout == inner.layout
    cache = CachedTokens(tmp_path / "train", seed=3)
    cache.require(Signs(inner))
    cache.require(inner)
    with pytest.raises(UserError, match="was encoded by another tokenizer"):
        cache.require(Signs(vae(1)))

    module = GeneratorModule(Signs(inner), TableGenerator)
    seen = []
    for epoch in range(2):
        cache.set_epoch(epoch)
        batch: dict[str, Any] = {**cache.batch(range(8))}
        tokens = module.tokens_of(batch)
        assert torch.equal(tokens, (batch["tokens"][..., 0] > 0).long())
        seen.append(tokens)
    module.tokenizer.layout.check(seen[0])
    assert not torch.equal(seen[0], seen[1])
