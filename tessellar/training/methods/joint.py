"""What joins a tokenizer to the generator that is trained with it: soft tokens forth, predictions
back (EOSTok, arXiv 2605.00503).

    z -> p = softmax(quantizer's logits) -> Ind = one-hot + p - sg(p) -> Ind Emb -> generator
    generator -> p^ of every token, given the true ones before it -> p^ codes -> decoder

Shapes: B images, N positions, V codes, C channels of a code, D the generator's width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.arguments import AMOUNTS, COUNTS, in_ranges
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.protocol.tokenizer import QuantizedTokenizer, QuantizerOutput, Tokenizer


@in_ranges
@dataclass(frozen=True)
class Ramp:
    """A weight that is 0 before update `start` and rises linearly to `weight` over `warmup` updates."""

    ranges: ClassVar = {"weight": AMOUNTS, "start": COUNTS, "warmup": COUNTS}

    weight: float = 1.0
    start: int = 0
    warmup: int = 0

    def at(self, update: int) -> float:
        """The weight at an update, from 0."""
        if update < self.start:
            return 0.0
        if not self.warmup:
            return self.weight
        return self.weight * min(1.0, (update - self.start + 1) / self.warmup)


class Watched:
    """The latents z [B, N, C] of a tokenizer's last training pass."""

    def __init__(self, tokenizer: QuantizedTokenizer) -> None:
        self._z: Tensor | None = None
        tokenizer.quantizer.register_forward_hook(self._after)

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: QuantizerOutput) -> None:
        self._z = args[0]

    def taken(self) -> Tensor:
        """z, which is then forgotten."""
        z = self._z
        assert z is not None, "the quantizer was not called"
        self._z = None
        return z


def assignment(tokenizer: QuantizedTokenizer, z: Tensor, temperature: float) -> Tensor:
    """The soft assignment p [B, N, V] of latents z [B, N, C] to codes, whose arg max the tokens are."""
    with torch.autocast(z.device.type, enabled=False):
        return (tokenizer.quantizer.logits(z) / temperature).softmax(-1)


@contextmanager
def soft_inputs(generator: PrefixTransformer, p: Tensor, weight: float) -> Iterator[None]:
    """Inside, teacher forcing reads Ind Emb with Ind = one-hot + weight (p - sg(p)), p [B, N, V].

    Values are those of the hard tokens to the last bit. The gradient of the assignment is `weight`
    times that of p Emb, that of the table is the one of a look-up.
    """
    vectors = weight * (p - p.detach()) @ generator.token_table().detach().to(p.dtype)
    orders: list[Entities] = []

    def note(tokens: Tensor, entities: Entities) -> Tensor:
        orders.append(entities)
        return tokens

    def add(inputs: Tensor, index: Tensor) -> Tensor:
        entities = orders[-1]
        rows, ranks = generator.context_rows(entities)
        order = entities.order.expand(len(vectors), -1).to(vectors.device)
        places = order[:, ranks.to(order.device)]
        read = vectors.gather(1, places[..., None].expand(-1, -1, vectors.shape[-1]))
        rows = (rows + inputs.shape[1]).to(inputs.device)  # they are counted from the end
        return inputs.index_add(1, rows, read.to(inputs.dtype))

    generator.reader = note
    generator.veil = add
    try:
        yield
    finally:
        generator.reader = None
        generator.veil = None


def codes_of(tokenizer: QuantizedTokenizer) -> Tensor:
    """Vectors [V, C] of all codes as the decoder reads them; gradients reach the codebook."""
    vocab = int(tokenizer.layout.vocab()[0])
    device = next(tokenizer.parameters()).device
    return tokenizer.quantizer.decode(torch.arange(vocab, device=device)[None])[0]


def expected_vectors(tokenizer: QuantizedTokenizer, probs: Tensor) -> Tensor:
    """Mean code vectors [B, N, C] under probabilities [B, N, V], in float32."""
    with torch.autocast(probs.device.type, enabled=False):
        return at_least_float32(probs) @ at_least_float32(codes_of(tokenizer))


def require_joint(
    tokenizer: Tokenizer, generator: Generator
) -> tuple[QuantizedTokenizer, PrefixTransformer]:
    """Both, where gradients can pass between them; raises UserError, saying which part and why, where not."""
    if (
        not isinstance(tokenizer, QuantizedTokenizer)
        or type(tokenizer).decode is not QuantizedTokenizer.decode
        or not tokenizer.quantizer.has_neighbours
    ):
        raise UserError(
            f"joint training needs a tokenizer with one codebook right in front of its decoder, such as "
            f"ViTVQ, TiTok or IBQ's; {type(tokenizer).__name__} with {tokenizer.layout} has none"
        )
    if (
        not isinstance(generator, PrefixTransformer)
        or type(generator).loss is not PrefixTransformer.loss
    ):
        raise UserError(
            "joint training needs a generator that scores all tokens by teacher forcing, such as LlamaGen; "
            f"{type(generator).__name__} does not"
        )
    generator.token_table()
    generator.context_rows(generator.entities)
    return tokenizer, generator
