"""ImageGenerator: a frozen tokenizer, a generator and its conditioner, which together turn
conditions into images.

`load` gives one, or a Tokenizer, from an export, one safetensors file, a training checkpoint or a
hub id.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tessellar.checkpoints.reading import Source, read_source
from tessellar.errors import UserError
from tessellar.protocol.condition import ClassConditioner, Condition, Conditioner
from tessellar.protocol.generator import Generator
from tessellar.protocol.packages import trusting
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.prepare import prepared
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling


class ImageGenerator(nn.Module):
    """Raises UserError where the generator was built for another layout than the tokenizer's."""

    def __init__(
        self, tokenizer: Tokenizer, generator: Generator, conditioner: Conditioner
    ) -> None:
        super().__init__()
        if tokenizer.layout != generator.layout:
            raise UserError(
                f"the generator was built for {generator.layout}, but the tokenizer gives {tokenizer.layout}"
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.generator = generator
        self.conditioner = conditioner
        generator.bind(tokenizer)

    def train(self, mode: bool = True) -> "ImageGenerator":
        """The tokenizer stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @torch.no_grad()
    def sample(self, condition: Condition, sampling: Sampling, seeds: Sequence[int]) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1]; image b depends on `seeds[b]` and row b of the
        condition alone.
        """
        return self.decode(self.sample_tokens(condition, sampling, seeds))

    @torch.no_grad()
    def sample_tokens(
        self,
        condition: Condition,
        sampling: Sampling,
        seeds: Sequence[int],
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Tokens [B, N, ...] of the conditions, drawn by the prepared generator; a `recorder`
        counts evaluations.
        """
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
        """Condition of class ids; raises UserError for unknown ids or a generator that is not
        class-conditional.
        """
        if not isinstance(self.conditioner, ClassConditioner):
            raise UserError(
                "this generator is conditioned on text, not on class ids: give --prompts FILE"
            )
        return self.conditioner.of_labels(torch.as_tensor(labels, dtype=torch.int64))


def load(
    path: str | Path, *, raw: bool = False, trust: Sequence[str] = ()
) -> Tokenizer | ImageGenerator:
    """The model at `path`: an export's folder or safetensors file, a `.ckpt`, or a hub id
    `owner/name[@revision]`.

    Checkpoints give the averaged weights where there are any, or with `raw` those of the last step.
    Packages of others that `trust` names are imported, and their classes may be built. On the CPU,
    in eval mode. Raises UserError, in one line, for whatever cannot be loaded.
    """
    with trusting(trust):
        return assemble(read_source(path, raw=raw))


def load_generator(
    path: str | Path, *, raw: bool = False, trust: Sequence[str] = ()
) -> ImageGenerator:
    """As `load`, but only a generator will do."""
    model = load(path, raw=raw, trust=trust)
    if not isinstance(model, ImageGenerator):
        raise UserError(f"{path} is a tokenizer; a generator is needed here")
    return model


def assemble(source: Source) -> Tokenizer | ImageGenerator:
    """The model of a source."""
    source.check()
    if source.kind == "tokenizer":
        return source.tokenizer()
    return ImageGenerator(
        *(source.build(part) for part in ("tokenizer", "generator", "conditioner"))
    ).eval()
