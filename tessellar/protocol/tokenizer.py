"""What every tokenizer is: images to tokens and back, and a training forward with named auxiliary
losses; and what every quantizer in one is: vectors to tokens and back.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.images import Pictures, from_pictures
from tessellar.layers.precision import ExactTables
from tessellar.protocol.configured import Configured
from tessellar.protocol.layout import Kind, Layout


class TokenizerOutput(NamedTuple):
    """What a training forward gives: reconstruction [B, 3, H, W], tokens, and auxiliary losses
    already weighted.

    `shorter` is a second reconstruction, from fewer tokens, where the tokenizer trains on both. A
    training pass whose losses read no image draws none: its reconstruction is empty, [B, 0, H, W].
    """

    reconstruction: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]
    shorter: Tensor | None = None


def _taking(read: Callable[..., Tensor], method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method whose first argument is first read by `read`."""

    @functools.wraps(method)
    def wrapped(self: Any, given: Any, *args: Any, **kwargs: Any) -> Tensor:
        return method(self, read(self, given), *args, **kwargs)

    return wrapped


class Tokenizer(Configured, ExactTables, ABC):
    """Images [B, 3, H, W] in [-1, 1] to tokens ([B, N], [B, N, F] or [B, N, C] as `layout` says)
    and back.
    """

    layout: Layout
    image_size: tuple[int, int]
    looks_at_range: bool = True  # a run switches it off: poisoned batches are its loss's to notice
    _has_looked: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Every tokenizer's `encode`, `draw` and `decode` take what users have (see `encode`)."""
        super().__init_subclass__(**kwargs)
        for name in ("encode", "draw"):
            if name in cls.__dict__:
                setattr(cls, name, _taking(Tokenizer._pictures, cls.__dict__[name]))
        if "decode" in cls.__dict__:
            cls.decode = _taking(Tokenizer._tokens, cls.__dict__["decode"])
        makes_of_others = "source" in cls.__dict__ or "from_source" in cls.__dict__
        if makes_of_others and "is_derived" not in cls.__dict__:
            cls.is_derived = True

    @abstractmethod
    def encode(self, images: Pictures) -> Tensor:
        """Tokens of images: PIL images, uint8, or floats [B, 3, H, W] in [-1, 1], of any device and
        precision.
        """

    def draw(self, images: Pictures, generator: torch.Generator | None = None) -> Tensor:
        """Tokens of the images as a generator is trained on them: a draw where encoding is random,
        else `encode`.
        """
        return self.encode(images)

    #: Whether tokens are made of those of another tokenizer, `source`, which a cache holds: so of a
    #: class that defines `source` or `from_source`, whether it says it or not.
    is_derived: ClassVar[bool] = False

    @property
    def source(self) -> "Tokenizer":
        """The tokenizer whose tokens, or their posterior, a cache holds: this one, or the one whose
        tokens this one quantises after training.
        """
        return self

    def from_source(self, tokens: Tensor) -> Tensor:
        """Tokens of those of `source`, wherever training or validation takes them from a cache: a
        posterior is drawn anew at each visit, then quantised here.
        """
        return tokens

    def to_source(self, tokens: Tensor) -> Tensor:
        """Tokens of `source` that these stand for; the inverse of `from_source`, up to what it
        rounds.
        """
        return tokens

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Images of the tokens, about [-1, 1], not clamped; integers of any type, on any device."""

    def decode_seeded(self, tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        """As `decode`; where decoding draws noise, image b by the stream of `seeds[b]`."""
        return self.decode(tokens)

    @abstractmethod
    def forward(self, images: Tensor) -> TokenizerOutput:
        """The training pass; its reconstruction equals `decode(encode(images))` in eval mode."""

    def of_batch(self, batch: Mapping[str, Any]) -> TokenizerOutput:
        """The training pass of a batch of data; a tokenizer that learns from more than images (from
        captions) overrides it.
        """
        return self(batch["image"])

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """Weight of the last layer, where the adaptive adversarial weight compares gradients (arXiv
        2012.09841).
        """

    def bottlenecks(self) -> "list[Quantizer]":
        """The quantizers, or Gaussian bottlenecks, whose vectors the decoder reads; none where
        latents pass through no module of their own. Those of a tokenizer within this one are its.
        """
        found: list[Quantizer] = []
        left: list[nn.Module] = list(self.children())
        while left:
            module = left.pop(0)
            if isinstance(module, Quantizer):
                found.append(module)
            elif not isinstance(module, Tokenizer):
                left += module.children()
        return found

    def starting_from(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of another instance as training goes on from them (`init_from`): as they are.

        A tokenizer of several stages overrides it, where a later one has other tensors.
        """
        return state

    def _pictures(self, images: Pictures) -> Tensor:
        """Pictures as floats of this tokenizer's device and precision; on a GPU only those of the
        first call are looked at.
        """
        waits = isinstance(images, Tensor) and images.device.type != "cpu"
        check_range = self.looks_at_range and not (waits and self._has_looked)
        pictures = from_pictures(images, check_range)
        self._has_looked = True
        return self._as_weights(pictures)

    def _tokens(self, tokens: Tensor | np.ndarray) -> Tensor:
        """Tokens on this tokenizer's device: int64, or real numbers of its precision."""
        given = torch.from_numpy(tokens) if isinstance(tokens, np.ndarray) else tokens
        if given.is_floating_point():
            return self._as_weights(given)
        weight = next(self.parameters(), given)
        whole = given.dtype != torch.bool and not given.is_complex()
        return given.to(weight.device, torch.int64 if whole else given.dtype)

    def _as_weights(self, values: Tensor) -> Tensor:
        weight = next(self.parameters(), values)
        return values.to(weight.device, weight.dtype)

    def take_size(self, image_size: tuple[int, int]) -> None:
        """Take and draw images of another size (height, width) from now on; `layout` follows, weights
        stay. For data in buckets of several sizes, and for models that were trained on it.

        A tokenizer that can overrides it. Raises UserError, naming the tokenizer, for all others.
        """
        if tuple(image_size) != tuple(self.image_size):
            raise UserError(
                f"{type(self).__name__} takes images of one size, {self.image_size}, not of {tuple(image_size)}"
            )

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless images are [B, 3, H, W] of this tokenizer's size."""
        height, width = self.image_size
        if images.shape[1:] != (3, height, width):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this tokenizer needs [B, 3, {height}, {width}]"
            )


class QuantizerOutput(NamedTuple):
    """Quantized vectors [B, N, C] (straight-through), tokens [B, N] or [B, N, F], weighted losses."""

    quantized: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]


class Quantizer(Configured, nn.Module, ABC):
    """Channel-last vectors [..., C] to discrete tokens. Works in float32, whatever the precision
    around it.
    """

    kind: Kind
    dim: int

    @property
    def in_dim(self) -> int:
        """Channels of what is quantized; `dim` unless the encoder says more than a vector."""
        return self.dim

    @abstractmethod
    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, N, C] for training; gradients pass straight through to z."""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """Tokens of z [..., C]."""

    def draw(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens of z as a generator is trained on them: a draw where encoding is random, else
        `encode`.
        """
        return self.encode(z)

    #: Whether tokens are ids of one codebook, whose codes can be told near from far.
    has_neighbours: bool = False

    def logits(self, z: Tensor) -> Tensor:
        """How near z [..., C] is to every code, [..., V]: the token of z is the arg max. Only where
        `has_neighbours`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no codebook")

    @torch.no_grad()
    def neighbours(self, z: Tensor, count: int) -> Tensor:
        """The `count` tokens [..., count], nearest first, of the codes nearest to z [..., C]; all where
        there are fewer.
        """
        with torch.autocast(z.device.type, enabled=False):
            logits = self.logits(z)
        return logits.topk(min(count, logits.shape[-1])).indices

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Vectors [..., C] of tokens; what `forward` returned as `quantized`, up to rounding."""


class QuantizedTokenizer(Tokenizer):
    """A quantizer between an encoder and a decoder, with one vector a position of the layout."""

    quantizer: Quantizer

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """What is quantized of images [B, 3, H, W]: vectors [B, N, C]."""

    @abstractmethod
    def render(self, vectors: Tensor) -> Tensor:
        """Images [B, 3, H, W], at least float32, of quantized vectors [B, N, C]."""

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer.encode(self.latents(images))

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.quantizer.draw(self.latents(images), generator)

    def decode(self, tokens: Tensor) -> Tensor:
        self.layout.check(tokens)
        return self.render(self.quantizer.decode(tokens))


class GridTokenizer(QuantizedTokenizer):
    """Of a layout that is one grid, in raster order, whose images come from the vectors alone."""

    def forward(self, images: Tensor) -> TokenizerOutput:
        quantized = self.quantizer(self.latents(images))
        return TokenizerOutput(self.render(quantized.quantized), quantized.tokens, quantized.losses)
