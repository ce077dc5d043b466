"""A tokenizer trained for its generator's sake: between quantizer and decoder its latents are
disturbed, so that images do not hang on exact values that a generator will miss.

    images -> encoder -> quantizer -> disturbed -> decoder -> reconstruction losses
                             | quantizer's own losses, of what was not disturbed

`Interpolate` and `Mask` are l-DeTok's (arXiv 2507.15856), `Swap` is RobustTok's latent perturbation
(arXiv 2503.08354). They act where a quantizer hands its vectors on, so any tokenizer with one can be
trained so; in training alone, and tokens stay those of the images. Different from l-DeTok: `Mask`
hides latents from the decoder, which its encoder has seen, where l-DeTok's encoder does not see
those patches either (RecTok's and MingTok's own option `masked` does that).

Shapes: B images, N positions, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.protocol.arguments import AMOUNTS, SHARES, in_ranges
from tessellar.protocol.ranges import check_number
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput, Tokenizer


@in_ranges
@dataclass(frozen=True)
class Annealing:
    """A factor that is 1 until the share `start` of the run, then falls linearly to `final` at the
    share `end`, where it stays; RobustTok's is from epoch 40 to 120 of 200.
    """

    ranges: ClassVar = {"start": SHARES, "end": SHARES, "final": SHARES}

    start: float = 0.2
    end: float = 0.6
    final: float = 0.5

    def __post_init__(self) -> None:
        if not self.start < self.end:
            raise UserError(f"annealing from {self.start} to {self.end} of a run: end comes later")

    def factor(self, progress: float) -> float:
        """Factor at a share of the run in [0, 1]."""
        passed = (progress - self.start) / (self.end - self.start)
        return 1 - min(max(passed, 0.0), 1.0) * (1 - self.final)


class LatentCorruption(ABC):
    """What happens to a quantizer's vectors on their way to the decoder in training."""

    needs_codebook: ClassVar[bool] = False
    annealing: Annealing | None

    @abstractmethod
    def disturbed(
        self, quantizer: Quantizer, z: Tensor, output: QuantizerOutput, factor: float
    ) -> Tensor:
        """Vectors [B, N, C] that the decoder reads in place of `output.quantized`, of latents z;
        `factor` in [0, 1] is what annealing leaves of the disturbance.
        """


@in_ranges
@dataclass(frozen=True)
class Interpolate(LatentCorruption):
    """z' = (1 - tau) z + tau gamma noise, tau uniform in [0, `highest`] for each image (l-DeTok, gamma 3);
    `kind` "add" is z + tau gamma noise, which they found worse.

    With `relative` the noise has the root mean square of the batch's vectors for its unit, which
    codes of other norms need; without, unit variance, as the paper's latents. A share `probability`
    of the images is disturbed. gamma 0 disturbs nothing.
    """

    ranges: ClassVar = {"gamma": AMOUNTS, "highest": SHARES}

    gamma: float = 3.0
    kind: Literal["interpolate", "add"] = "interpolate"
    highest: float = 1.0
    relative: bool = False
    probability: float = 1.0
    annealing: Annealing | None = None

    def disturbed(
        self, quantizer: Quantizer, z: Tensor, output: QuantizerOutput, factor: float
    ) -> Tensor:
        vectors = output.quantized
        if self.gamma == 0 or factor == 0:
            return vectors
        per_image = (len(vectors), *[1] * (vectors.ndim - 1))
        tau = self.highest * factor * torch.rand(per_image, device=vectors.device)
        if self.probability < 1:
            chosen = torch.rand(per_image, device=vectors.device) < self.probability
            tau = torch.where(chosen, tau, 0.0)
        noise = self.gamma * torch.randn_like(vectors)
        if self.relative:
            noise = noise * vectors.detach().square().mean().sqrt()
        kept = 1 - tau if self.kind == "interpolate" else 1.0
        return kept * vectors + tau * noise


@in_ranges
@dataclass(frozen=True)
class Mask(LatentCorruption):
    """A share max(0, U(`least`, `most`)) of the positions of each image is 0 for the decoder: one
    draw of the share for a batch, as l-DeTok's, other positions for each image.
    """

    ranges: ClassVar = {"most": SHARES}

    least: float = -0.1
    most: float = 0.7
    annealing: Annealing | None = None

    def __post_init__(self) -> None:
        check_number("least of Mask", self.least, least=-1, most=1)
        if self.least > self.most:
            raise UserError(f"Mask of a share from {self.least} to {self.most}: the first is less")

    def disturbed(
        self, quantizer: Quantizer, z: Tensor, output: QuantizerOutput, factor: float
    ) -> Tensor:
        vectors = output.quantized
        drawn = self.least + (self.most - self.least) * float(torch.rand(()))
        share = factor * max(0.0, drawn)
        if share == 0:
            return vectors
        positions = vectors.shape[1]
        ranks = torch.rand(vectors.shape[:2], device=vectors.device).argsort(1).argsort(1)
        hidden = ranks < round(share * positions)
        return vectors.masked_fill(hidden[..., None], 0.0)


@in_ranges
@dataclass(frozen=True)
class Swap(LatentCorruption):
    """Of the first floor(B `beta`) images of a batch each token is replaced, with probability
    `alpha`, by a uniform draw among the `delta` codes that are nearest to its latent.

    The gradient is that of the token itself. Annealing scales `alpha` and `delta`. Raises UserError
    for a tokenizer without one codebook.
    """

    ranges: ClassVar = {"alpha": SHARES, "beta": SHARES}
    needs_codebook: ClassVar[bool] = True

    alpha: float = 1.0
    beta: float = 0.1
    delta: int = 100
    annealing: Annealing | None = Annealing()

    def __post_init__(self) -> None:
        if self.delta < 1:
            raise UserError(f"delta of Swap is {self.delta}; it is a number of codes, at least 1")

    def disturbed(
        self, quantizer: Quantizer, z: Tensor, output: QuantizerOutput, factor: float
    ) -> Tensor:
        count = int(len(z) * self.beta)
        nearest = max(1, int(self.delta * factor))
        if count == 0 or self.alpha * factor == 0:
            return output.quantized
        with torch.no_grad():
            near = quantizer.neighbours(z[:count], nearest)
            rank = torch.randint(near.shape[-1], (*near.shape[:-1], 1), device=z.device)
            drawn = near.gather(-1, rank)[..., 0]
            replaced = torch.rand(drawn.shape, device=z.device) < self.alpha * factor
            tokens = torch.where(replaced, drawn, output.tokens[:count])
            codes = quantizer.decode(tokens).to(output.quantized.dtype)
            moved = torch.zeros_like(output.quantized)
            moved[:count] = codes - output.quantized[:count]
            # Tokens that stay are to the last bit what they were.
            moved[:count].masked_fill_((tokens == output.tokens[:count])[..., None], 0.0)
        return output.quantized + moved


class Disturbance:
    """`corruptions`, one after the other, at every bottleneck of a tokenizer; `progress` is how far
    the run is, in [0, 1], told before each training pass.

    Raises UserError for a tokenizer without a bottleneck, and where one cannot be disturbed so.
    """

    def __init__(self, corruptions: Sequence[LatentCorruption], tokenizer: Tokenizer) -> None:
        self.corruptions = tuple(corruptions)
        self.progress = 0.0
        quantizers = tokenizer.bottlenecks()
        if not quantizers:
            raise UserError(
                f"{type(tokenizer).__name__} has no quantizer that hands trained vectors to its decoder, "
                "or disturbs them itself: leave corruptions out"
            )
        for quantizer in quantizers:
            for corruption in self.corruptions:
                if corruption.needs_codebook and not quantizer.has_neighbours:
                    raise UserError(
                        f"{type(corruption).__name__} draws among the nearest codes of one codebook, "
                        f"which {type(quantizer).__name__} has not: take Interpolate or Mask"
                    )
            quantizer.register_forward_hook(self._after)

    def _after(
        self, quantizer: nn.Module, args: tuple[Any, ...], output: QuantizerOutput
    ) -> QuantizerOutput:
        """Forward hook: what the quantizer gave, with disturbed vectors in training."""
        if not quantizer.training:
            return output
        assert isinstance(quantizer, Quantizer)
        for corruption in self.corruptions:
            annealing = corruption.annealing
            factor = 1.0 if annealing is None else annealing.factor(self.progress)
            vectors = corruption.disturbed(quantizer, args[0], output, factor)
            output = output._replace(quantized=vectors)
        return output
