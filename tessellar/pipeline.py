"""ImageGenerator: a frozen tokenizer, a generator and its conditioner, which together turn conditions into images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.models.condition import Condition
from tessellar.models.conditioners import ClassConditioner, Conditioner
from tessellar.models.generator import Generator
from tessellar.sampling.prepare import prepared
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.base import Tokenizer


class ImageGenerator(nn.Module):
    """Raises UserError where the generator was built for another layout than the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, generator: Generator, conditioner: Conditioner) -> None:
        super().__init__()
        if tokenizer.layout != generator.layout:
            raise UserError(
                f"the generator was built for {generator.layout}, but the tokenizer gives {tokenizer.layout}"
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.generator, self.conditioner = generator, conditioner
        generator.bind(tokenizer)

    @property
    def sampler(self) -> str:
        """The field of `Sampling` that draws this generator's tokens."""
        return self.generator.sampler

    def train(self, mode: bool = True) -> "ImageGenerator":
        """The tokenizer stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @torch.no_grad()
    def sample(self, condition: Condition, sampling: Sampling, seeds: Sequence[int]) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1]; image b depends on `seeds[b]` and row b of the condition alone."""
        return self.decode(self.sample_tokens(condition, sampling, seeds))

    @torch.no_grad()
    def sample_tokens(
        self, condition: Condition, sampling: Sampling, seeds: Sequence[int], recorder: Recorder | None = None
    ) -> Tensor:
        """Tokens [B, N, ...] of the conditions, drawn by the prepared generator; a `recorder` counts evaluations."""
        mode = self.generator.training
        self.generator.eval()
        try:
            with prepared(self.generator):
                return sampling.tokens(self.generator, condition, seeds, recorder)
        finally:
            self.generator.train(mode)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens."""
        return self.tokenizer.decode(tokens)

    def class_condition(self, labels: Sequence[int]) -> Condition:
        """Condition of class ids; raises UserError for unknown ids or a generator that is not class-conditional."""
        if not isinstance(self.conditioner, ClassConditioner):
            raise UserError("this generator is conditioned on text, not on class ids: give --prompts FILE")
        return self.conditioner.of_labels(torch.as_tensor(labels, dtype=torch.int64))
