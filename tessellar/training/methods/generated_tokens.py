"""Tokens that a generator draws for a real image, so that a decoder can learn to show them (RobusTok's
post-training, arXiv 2509.12474).

The generator draws the whole sequence, but at each place the true token is put back with
probability `kept` before the next one is drawn: a generated sequence that still has an image to be
compared with. Different from the released code, which makes one set of images before training and
encodes them again: tokens are drawn anew for every batch and decoded as they are (`reencode` goes
through 8-bit images and the encoder, as theirs do).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.images import from_uint8, to_uint8
from tessellar.pipeline import ImageGenerator, load_generator
from tessellar.protocol.arguments import SHARES, in_ranges
from tessellar.protocol.condition import Condition
from tessellar.protocol.noise import Noise
from tessellar.protocol.tokenizer import Quantizer, Tokenizer
from tessellar.sampling.decode import Ancestral, decode_from
from tessellar.sampling.settings import Sampling
from tessellar.training.random_state import new_seeds


@in_ranges
@dataclass(frozen=True)
class RollOut:
    """Sequences by `sampling` in which a share `kept` of the places has the true token, other places
    for each image; with `reencode` their images are encoded again.

    With `kept` 1 they are the true tokens, with 0 plain samples, which only adversarial losses can
    compare with images. Raises UserError for a decoding algorithm other than Ancestral.
    """

    ranges: ClassVar = {"kept": SHARES}

    kept: float = 0.7
    sampling: Sampling = Sampling()
    reencode: bool = False

    def __post_init__(self) -> None:
        algorithm = self.sampling.algorithm
        if not isinstance(algorithm, Ancestral) or algorithm.compile:
            raise UserError(
                f"{type(algorithm).__name__} cannot be given tokens: roll-outs with true tokens are "
                "drawn by Ancestral, not compiled"
            )

    @torch.no_grad()
    def tokens(self, model: ImageGenerator, true: Tensor, condition: Condition) -> Tensor:
        """Tokens [B, N, ...] for images whose own are `true`; random numbers are the run's."""
        generator = model.generator
        was_training = generator.training
        generator.eval()
        noise = Noise(new_seeds(len(true)), true.device)
        kept = torch.rand(true.shape[:2], device=true.device) < self.kept
        kept = kept.view(*kept.shape, *[1] * (true.ndim - 2))
        algorithm = self.sampling.algorithm
        assert isinstance(algorithm, Ancestral)
        plan = algorithm.plan(generator, noise)
        guidance = self.sampling.guidance.guidance()
        state = generator.start(condition, guidance, plan)
        tokens = generator.layout.blank(len(true)).to(true.device)
        for entity in range(plan.count):
            steps = decode_from(
                generator,
                state,
                self.sampling,
                noise,
                tokens,
                first=entity,
                last=entity + 1,
            )
            for step in steps:
                # Before the next entity is drawn, which reads these; places behind are put right too.
                tokens = torch.where(kept, true.to(step.tokens), step.tokens)
        generator.train(was_training)
        if self.reencode:
            images = to_uint8(model.decode(tokens))
            tokens = model.encode(from_uint8(images))
        return tokens


class Drawer:
    """Draws tokens for the batches of a tokenizer's run, by the generator at `source`.

    Raises UserError where that generator reads other tokens than this `tokenizer` gives.
    """

    def __init__(self, source: str, roll_out: RollOut, tokenizer: Tokenizer) -> None:
        self.roll_out = roll_out
        self.model = load_generator(source).requires_grad_(False)
        if self.model.generator.layout != tokenizer.layout:
            raise UserError(
                f"the generator of {source} draws {self.model.generator.layout}; this run's tokenizer "
                f"has {tokenizer.layout}: take the tokenizer that it was trained on, by init_from"
            )
        if not _same_codes(self.model.tokenizer, tokenizer):
            raise UserError(
                f"the generator of {source} was trained on the tokens of another tokenizer than this "
                "run's: start from that one's export, by init_from"
            )

    def tokens(self, true: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Tokens for the images of a batch, whose own are `true`."""
        self.model.to(true.device)
        with torch.autocast(true.device.type, enabled=False):
            condition = self.model.conditioner(dict(batch)).to(true.device)
            return self.roll_out.tokens(self.model, true, condition)


def _same_codes(theirs: Tokenizer, ours: Tokenizer) -> bool:
    """Whether all that is not decoder is the same, to the last bit."""
    decoder = {id(parameter) for parameter in decoder_parameters(ours)}
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if id(parameter) in decoder:
            continue
        other = others.get(name)
        if other is None or not torch.equal(other.to(parameter), parameter):
            return False
    return True


def decoder_parameters(tokenizer: Tokenizer) -> list[nn.Parameter]:
    """What images depend on when tokens are decoded, but for quantizers; raises UserError where
    that is nothing.
    """
    frozen: set[int] = set()
    for part in tokenizer.modules():
        if isinstance(part, Quantizer):
            frozen |= {id(parameter) for parameter in part.parameters()}
    candidates = [p for p in tokenizer.parameters() if id(p) not in frozen]
    before = [p.requires_grad for p in candidates]
    for parameter in candidates:
        parameter.requires_grad_(True)
    device = candidates[0].device if candidates else torch.device("cpu")
    with torch.enable_grad():
        images = tokenizer.decode(tokenizer.layout.blank(1).to(device))
    found: list[nn.Parameter] = []
    if images.requires_grad:
        gradients = torch.autograd.grad(images.sum(), candidates, allow_unused=True)
        for parameter, gradient in zip(candidates, gradients, strict=True):
            if gradient is not None:
                found.append(parameter)
    for parameter, was_trained in zip(candidates, before, strict=True):
        parameter.requires_grad_(was_trained)
    if not found:
        raise UserError(
            f"no gradient passes {type(tokenizer).__name__}.decode: its decoder cannot be tuned this way"
        )
    return found
