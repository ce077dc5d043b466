"""Edits: which tokens of a picture are kept, and under what the others are drawn.

A user chooses one by its class (`--edit Continue --edit.keep 8`); with a mask alone it is in-painting. Masks are
for tokens that have a place: those of a grid, and of scales, each of which is a grid.

Shapes: N tokens, pictures [3, H, W] in [-1, 1], masks [H, W] that are True where a picture is drawn anew.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import take
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout
from tessellar.protocol.ranges import check_number, check_whole
from tessellar.protocol.tokenizer import Tokenizer

SCALES_SHARE = 0.5  # of a cell of a pyramid that is masked, above which its token is drawn anew


@dataclass(frozen=True)
class Material:
    """What an edit is made of: a picture, a second one, a mask, the condition of one row to draw under."""

    tokenizer: Tokenizer
    generator: Generator
    condition: Condition
    picture: Tensor | None = None
    other: Tensor | None = None
    mask: Tensor | None = None

    @torch.no_grad()
    def tokens_of(self, picture: Tensor | None, option: str) -> Tensor:
        """Tokens [N, ...] of a picture, as many as the generator reads; raises UserError without one."""
        if picture is None:
            raise UserError(f"this edit needs a picture: {option} FILE")
        tokens = self.tokenizer.encode(picture[None])[0]
        return tokens[: self.generator.layout.length].cpu()

    def kept_by_mask(self) -> Tensor:
        """[N] tokens outside the mask; raises UserError without one."""
        if self.mask is None:
            raise UserError(
                "this edit needs a mask, light where the picture is drawn anew: --mask FILE"
            )
        return kept_outside(self.mask, self.generator.layout)


@dataclass(frozen=True)
class Plan:
    """Tokens [N, ...] of which those that are `kept` [N] stay; `particles` to draw the others by; a second
    class or prompt to blend in; a picture that is pasted outside its mask. `draws`: whether anything is drawn.
    """

    tokens: Tensor
    kept: Tensor
    particles: int = 1
    other_class: str = ""
    share: float = 0.0
    pasted: tuple[Tensor, Tensor] | None = None
    draws: bool = True


@dataclass(frozen=True)
class Edit(ABC):
    """An edit with its options."""

    needs_picture: ClassVar[bool] = True

    @abstractmethod
    def plan(self, material: Material) -> Plan:
        """What is kept and what is drawn; raises UserError for material that does not fit."""


@dataclass(frozen=True)
class Inpaint(Edit):
    """What the mask shows light is drawn anew, under any class. `paste` puts the picture's own pixels outside
    the mask into the result. `particles`: see docs/editing.md; for generators of a fixed order.
    """

    particles: int = 1
    paste: bool = False

    def __post_init__(self) -> None:
        check_whole("particles of the edit", self.particles, least=1, most=100_000)

    def plan(self, material: Material) -> Plan:
        kept = material.kept_by_mask()
        tokens = material.tokens_of(material.picture, "--image")
        pasted = None
        if self.paste:
            assert material.picture is not None and material.mask is not None
            pasted = (material.picture, material.mask)
        return Plan(tokens, kept, self.particles, pasted=pasted)


@dataclass(frozen=True)
class Outpaint(Edit):
    """The picture is made smaller, and margins around it are drawn: shares of the height and width that they
    take.
    """

    left: float = 0.25
    right: float = 0.25
    top: float = 0.25
    bottom: float = 0.25
    particles: int = 1
    paste: bool = False

    def __post_init__(self) -> None:
        check_whole("particles of the edit", self.particles, least=1, most=100_000)
        for name in ("left", "right", "top", "bottom"):
            check_number(f"{name} of Outpaint", getattr(self, name), least=0, most=1)
        if self.left + self.right >= 1 or self.top + self.bottom >= 1:
            raise UserError("the margins of Outpaint leave nothing of the picture")
        if not self.left + self.right + self.top + self.bottom:
            raise UserError("Outpaint has no margin: there is nothing to draw")

    def plan(self, material: Material) -> Plan:
        if material.picture is None:
            raise UserError("this edit needs a picture: --image FILE")
        canvas, mask = self.canvas(material.picture)
        framed = Material(
            material.tokenizer,
            material.generator,
            material.condition,
            picture=canvas,
            mask=mask,
        )
        return Inpaint(self.particles, self.paste).plan(framed)

    def canvas(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The picture between its margins, into which its edges are drawn out, and the mask of the margins."""
        height, width = picture.shape[1:]
        left = round(self.left * width)
        right = round(self.right * width)
        top = round(self.top * height)
        bottom = round(self.bottom * height)
        size = (max(height - top - bottom, 1), max(width - left - right, 1))
        small = F.interpolate(picture[None], size, mode="bicubic", antialias=True).clamp(-1, 1)
        canvas = F.pad(small, (left, right, top, bottom), mode="replicate")[0, :, :height, :width]
        mask = torch.ones(height, width, dtype=torch.bool)
        mask[top : top + size[0], left : left + size[1]] = False
        return canvas, mask


@dataclass(frozen=True)
class Continue(Edit):
    """The first `keep` entities of the picture stay (rows of tokens of a grid, the first of ordered tokens,
    coarse scales), the rest is drawn: exact for every order.
    """

    keep: int = 1

    def __post_init__(self) -> None:
        check_whole("keep of Continue", self.keep, least=0)

    def plan(self, material: Material) -> Plan:
        entities = material.generator.entities
        if self.keep >= entities.count:
            raise UserError(
                f"keep is {self.keep}; a picture has {entities.count} entities, and one must be free"
            )
        tokens = material.tokens_of(material.picture, "--image")
        kept = torch.zeros(entities.length, dtype=torch.bool)
        kept[entities.order.view(-1, entities.length)[0, : int(entities.ends[self.keep])]] = True
        return Plan(tokens, kept)


@dataclass(frozen=True)
class ClassEdit(Edit):
    """Another class over the same picture: the `share` of the tokens that speak most against the class, by
    their likelihood under it less that under none, are drawn anew; or those of the mask, where there is one.
    """

    share: float = 0.5
    particles: int = 1

    def __post_init__(self) -> None:
        check_number("share of ClassEdit", self.share, above=0, most=1)
        check_whole("particles of the edit", self.particles, least=1, most=100_000)

    @torch.no_grad()
    def plan(self, material: Material) -> Plan:
        if material.mask is not None:
            return Inpaint(self.particles).plan(material)
        generator = material.generator
        tokens = material.tokens_of(material.picture, "--image")
        evidence = log_probs_of(generator, tokens, material.condition) - log_probs_of(
            generator, tokens, generator.null(material.condition)
        )
        count = max(1, round(self.share * len(evidence)))
        kept = torch.ones(len(evidence), dtype=torch.bool)
        kept[evidence.argsort(stable=True)[:count]] = False
        return Plan(tokens, kept, self.particles)


@dataclass(frozen=True)
class Interpolate(Edit):
    """Between two classes: predictions are (1 - share) of the class and share of `other` (a class, or a prompt),
    then guided. Of logits that is the geometric mean of both laws. With a picture and a mask, inside the mask.
    """

    other: str = ""
    share: float = 0.5

    needs_picture: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("share of Interpolate", self.share, least=0, most=1)
        if not self.other:
            raise UserError("Interpolate needs a second class: --edit.other CLASS")

    def plan(self, material: Material) -> Plan:
        length = material.generator.layout.length
        if material.picture is None:
            tokens = material.generator.layout.blank(1)[0]
            kept = torch.zeros(length, dtype=torch.bool)
        else:
            kept = material.kept_by_mask()
            tokens = material.tokens_of(material.picture, "--image")
        return Plan(tokens, kept, other_class=self.other, share=self.share)


@dataclass(frozen=True)
class Swap(Edit):
    """Tokens of a second picture (`--other`) in the place of the picture's: inside the mask, or behind the first
    `keep` tokens. Nothing is drawn.
    """

    keep: int | None = None

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_whole("keep of Swap", self.keep, least=0)

    def plan(self, material: Material) -> Plan:
        mine = material.tokens_of(material.picture, "--image")
        theirs = material.tokens_of(material.other, "--other")
        if (self.keep is None) == (material.mask is None):
            raise UserError(
                "Swap takes the other picture's tokens inside a mask (--mask FILE) or behind the first "
                "(--edit.keep K): give one of the two"
            )
        if self.keep is None:
            kept = material.kept_by_mask()
        elif self.keep > len(mine):
            raise UserError(f"keep is {self.keep}; a picture has {len(mine)} tokens")
        else:
            kept = torch.arange(len(mine)) < self.keep
        tokens = torch.where(kept.view(-1, *(1,) * (mine.ndim - 1)), mine, theirs)
        return Plan(tokens, torch.ones_like(kept), draws=False)


EDITS = (Inpaint, Outpaint, Continue, ClassEdit, Interpolate, Swap)


def kept_outside(mask: Tensor, layout: Layout) -> Tensor:
    """[N] tokens whose cells lie outside a mask [H, W].

    On one grid a token is drawn anew if any pixel of its cell is masked; on scales if more than half of it is,
    since a cell of a coarse scale covers much. Tokens without a place beside a grid (Hita's) are drawn anew.
    Raises UserError where no token has a place.
    """
    grids = [segment for segment in layout.segments if len(segment.shape) == 2]
    if not grids:
        raise UserError(
            f"tokens of {layout} have no place in the picture, so a mask says nothing of them: take --edit Continue"
        )
    pixels = mask.float()[None, None]
    kept = []
    for segment in layout.segments:
        if len(segment.shape) != 2:
            kept.append(torch.zeros(segment.length, dtype=torch.bool))
        elif len(grids) == 1:
            kept.append(F.adaptive_max_pool2d(pixels, segment.shape).flatten() == 0)
        else:
            kept.append(F.adaptive_avg_pool2d(pixels, segment.shape).flatten() <= SCALES_SHARE)
    return torch.cat(kept)


def log_probs_of(generator: Generator, tokens: Tensor, condition: Condition) -> Tensor:
    """Log-probability [N] of each token of an image given those before it; raises UserError without one."""
    device = next(generator.parameters()).device
    rows = tokens[None].to(device)
    entities = generator.entities
    scores = generator.predict(generator.start(condition.to(device)), rows, entities.count)
    generated = take(rows, entities.order.expand(1, -1))
    found = scores.log_prob(generated)
    if found is None:
        raise UserError(
            f"{type(generator).__name__} tells no likelihood of tokens: give ClassEdit a mask (--mask FILE)"
        )
    ordered = torch.empty(entities.length)
    ordered[entities.order.view(-1, entities.length)[0]] = found[0].float().cpu()
    return ordered
