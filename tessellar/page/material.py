"""Pictures and masks as the page gives them, and what is made of them: in-painting, reconstruction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from tessellar.data.pixels import fitted_pixels
from tessellar.errors import UserError
from tessellar.images import on_white, to_uint8
from tessellar.measures.paired import psnr
from tessellar.page.watching import Wish
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.layout import Layout, codebooks
from tessellar.protocol.ranges import check_whole
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.editing.edits import Inpaint
from tessellar.sampling.editing.run import Editing
from tessellar.sampling.run import as_uint8
from tessellar.text.conditioners import TextConditioner


def mask_of(layers: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """The mask bool [H, W] that was drawn: wherever a layer of the editor is not transparent.

    `size` is (height, width) of the model; layers are cut as the picture below them is. Raises
    UserError where nothing is drawn.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").convert("RGB")
        # At a small size a thin line covers little of a pixel: a tenth is enough.
        mask |= (fitted_pixels(alpha, size) > 0.1 * 2 - 1).any(0)
    if not bool(mask.any()):
        raise UserError("draw over the part of the picture that is to be drawn anew")
    return mask


def inpainted(
    model: ImageGenerator,
    picture: Image.Image,
    layers: Sequence[Image.Image],
    wish: Wish,
    particles: int = 1,
) -> tuple[Tensor, str]:
    """A picture, uint8 [3, H, W], whose masked part is drawn anew under the wish's class or prompt, and
    a line that says how many tokens were kept and whether the law of the others is exact.

    Raises UserError for a mask that is empty, and for tokens that have no place.
    """
    size = model.image_size
    editing = Editing(Inpaint(particles=particles), wish.sampling, wish.seed)
    editing.picture = fitted_pixels(on_white(picture), size)
    editing.mask = mask_of(layers, size)
    labels = [0]
    texts = None
    if isinstance(model.conditioner, TextConditioner):
        texts = [wish.subject]
    else:
        labels = model.class_ids(wish.subject)[:1]
    _, images = next(editing.batches(model, labels, [0], texts))
    facts = editing.laws
    kept = f"{facts['kept_tokens']} of {facts['tokens']} tokens kept"
    return images[0], f"{kept}; the law of the others is {facts['law']}"


class Reconstruction(NamedTuple):
    """A picture as the tokenizer sees it and what it makes of it, both uint8 [3, H, W], with a line."""

    picture: Tensor
    image: Tensor
    said: str


def least_kept(layout: Layout) -> int:
    """The fewest tokens that can be decoded."""
    return layout.length if layout.min_prefix is None else layout.min_prefix


@torch.no_grad()
def reconstructed(
    tokenizer: Tokenizer, picture: Image.Image, kept: int | None = None
) -> Reconstruction:
    """A picture from its first `kept` tokens (default: all).

    Raises UserError for a number of tokens that cannot be decoded.
    """
    layout = tokenizer.layout
    count = layout.length if kept is None else kept
    check_whole("number of tokens kept", count, least=least_kept(layout), most=layout.length)
    pixels = fitted_pixels(on_white(picture), tokenizer.image_size)
    tokens = tokenizer.encode(pixels[None])
    image = as_uint8(tokenizer.decode(tokens[:, :count]))[0]
    original = to_uint8(pixels)
    decibels = float(psnr(image[None], original[None]))
    said = f"{count} of {layout.length} tokens{bits_of(layout, count)}; PSNR {decibels:.1f} dB"
    return Reconstruction(original, image, said)


def bits_of(layout: Layout, count: int) -> str:
    """`, 288 bits`: what the first tokens hold at most; empty for real numbers."""
    if layout.is_continuous:
        return ""
    bits = 0.0
    left = count
    for segment in layout.segments:
        here = min(left, segment.length)
        for size in codebooks(segment):
            bits += here * float(torch.tensor(size, dtype=torch.float64).log2())
        left -= here
    return f", {bits:.0f} bits"


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a model, and how it draws."""

    model: ImageGenerator
    wish: Wish


@torch.no_grad()
def side_by_side(sides: Sequence[Side], count: int) -> list[list[Tensor]]:
    """`count` images, uint8 [3, H, W], of each side, for the same seeds from the wish's on."""
    check_whole("images of each side", count, least=1, most=64)
    rows = []
    for side in sides:
        wish = side.wish
        reads_text = isinstance(side.model.conditioner, TextConditioner)
        images = side.model.sample(
            None if reads_text else wish.subject,
            prompts=wish.subject if reads_text else None,
            count=count,
            sampling=wish.sampling,
            seed=wish.seed,
            output="uint8",
        )
        rows.append(list(images.cpu()))
    return rows
