"""What a tokenizer makes of images, by name, as vectors that a probe reads.

- `latents`: what its quantizer is given, before it is quantized (of a KL model means and log
  variances);
- `tokens`: the vectors of its codes, as its decoder is given them (continuous tokens as they are);
- `codes`: how often each code of each codebook occurs in an image, over the number of positions;
- `semantics`: what its semantic decoder gives of its tokens (MingTok, TokenFlow, RecTok, SEED);
- `pixels`: the image itself, to compare with;
- anything else: the output of the tokenizer's module of that name, such as `encoder.norm_out`, in
  its last call while the image is encoded.

`NAME:n` is the first n positions of any of them but `codes` and `pixels`.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.measures.codes import columns
from tessellar.protocol.layout import Layout, codebooks
from tessellar.protocol.nearest import nearest
from tessellar.protocol.tokenizer import Quantizer, Tokenizer

NAMES = ("latents", "tokens", "codes", "semantics", "pixels")
MOST_CODES = 1 << 16  # of all codebooks together, whose frequencies are a vector

View = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] to vectors [B, N, C]."""


@runtime_checkable
class Semantic(Protocol):
    """A tokenizer whose tokens give features of what an image means."""

    def semantics(self, tokens: Tensor) -> Tensor:
        """Features [B, N, D] of tokens."""
        ...


class Asked(NamedTuple):
    """The feature `base`, of its first `length` positions (None: all)."""

    name: str
    base: str
    length: int | None

    def cut(self, vectors: Tensor) -> Tensor:
        """The first positions of vectors [B, N, C]; raises UserError where there are fewer."""
        if self.length is not None and self.length > vectors.shape[1]:
            raise UserError(f"{self.name}: {self.base} has {vectors.shape[1]} positions")
        return vectors[:, : self.length]


def asked(name: str) -> Asked:
    """What a name asks for: `tokens:8` are the first 8 positions of `tokens`."""
    found = re.fullmatch(r"(.+):(\d+)", name)
    if found is None:
        return Asked(name, name, None)
    base = found[1]
    length = int(found[2])
    if length < 1 or base in ("codes", "pixels"):
        raise UserError(f"{name}: a part is at least 1 of the positions, which {base} may not have")
    return Asked(name, base, length)


class _Seen(Exception):
    """All that was wanted has been seen: what would follow need not be computed."""


def view(tokenizer: Tokenizer, name: str) -> View:
    """The view of that name; raises UserError for one that this tokenizer does not have."""
    match name:
        case "pixels":
            return lambda images: images.flatten(1)[:, None]
        case "latents":
            return lambda images: latents_of(tokenizer, images)
        case "tokens":
            return lambda images: vectors_of(tokenizer, images)
        case "codes":
            check_codes(tokenizer.layout)
            return lambda images: frequencies(tokenizer.encode(images), tokenizer.layout)
        case "semantics":
            return lambda images: semantics_of(tokenizer, images)
    modules = dict(tokenizer.named_modules())
    if name not in modules or not name:
        hint = nearest(name, [*NAMES, *filter(None, modules)], listed=0)
        raise UserError(
            f"{name!r} is no feature of {type(tokenizer).__name__}; there are {', '.join(NAMES)} "
            f"and the names of its modules{hint}"
        )
    return lambda images: output_of(tokenizer, modules[name], name, images)


def outer_quantizers(tokenizer: Tokenizer) -> list[Quantizer]:
    """The quantizers that are not parts of another one."""
    found: list[Quantizer] = []
    inner: set[int] = set()
    for module in tokenizer.modules():
        if isinstance(module, Quantizer) and id(module) not in inner:
            found.append(module)
            inner |= {id(part) for part in module.modules()}
    return found


@contextmanager
def watching(
    quantizers: list[Quantizer], method: str, look: Callable[[Tensor, Tensor], None]
) -> Iterator[None]:
    """`look(argument, result)` at each call of a method of the quantizers."""
    for quantizer in quantizers:
        plain = getattr(quantizer, method)

        def watched(
            argument: Tensor, *rest: Any, plain: Callable[..., Tensor] = plain, **named: Any
        ) -> Tensor:
            result = plain(argument, *rest, **named)
            look(argument, result)
            return result

        # An instance's attribute stands before the method of its class.
        object.__setattr__(quantizer, method, watched)
    try:
        yield
    finally:
        for quantizer in quantizers:
            object.__delattr__(quantizer, method)


def latents_of(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """What the quantizers are given [B, N, C]; several stand one behind the other."""
    quantizers = outer_quantizers(tokenizer)
    seen: list[Tensor] = []

    def look(given: Tensor, _: Tensor) -> None:
        seen.append(given)
        if len(seen) == len(quantizers):
            raise _Seen

    with watching(quantizers, "encode", look):
        _until_seen(lambda: tokenizer.encode(images))
    if not seen:
        raise UserError(
            f"{type(tokenizer).__name__} quantises nothing while it encodes: it has no `latents`; "
            "probe `tokens`, or a module by its name"
        )
    return joined(seen, images)


def vectors_of(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """The vectors of the codes of images, [B, N, C]; continuous tokens are vectors already."""
    tokens = tokenizer.encode(images)
    if tokenizer.layout.is_continuous:
        return tokens
    quantizers = outer_quantizers(tokenizer)
    seen: list[Tensor] = []

    def look(_: Tensor, found: Tensor) -> None:
        seen.append(found)
        if len(seen) == len(quantizers):
            raise _Seen

    with watching(quantizers, "decode", look):
        _until_seen(lambda: tokenizer.decode(tokens))
    if not seen:
        raise UserError(
            f"{type(tokenizer).__name__} reads its codes without a quantizer: it has no vectors of "
            "`tokens`; probe `codes`, or a module by its name"
        )
    return joined(seen, images)


def semantics_of(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """What a semantic decoder gives of the tokens of images, [B, N, D]."""
    if not isinstance(tokenizer, Semantic):
        raise UserError(
            f"{type(tokenizer).__name__} has no semantic decoder, whose `semantics` could be probed; "
            "probe `latents` or `tokens`"
        )
    return tokenizer.semantics(tokenizer.encode(images)).float()


def _until_seen(run: Callable[[], Any]) -> None:
    try:
        run()
    except _Seen:
        return


def output_of(tokenizer: Tokenizer, module: nn.Module, name: str, images: Tensor) -> Tensor:
    """What a module of the tokenizer gives while images are encoded: [B, N, C]."""
    seen: list[Tensor] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else next(iter(output), None)
        if isinstance(first, Tensor):
            seen.append(first)

    handle = module.register_forward_hook(look)
    try:
        tokenizer.encode(images)
    finally:
        handle.remove()
    if not seen:
        raise UserError(
            f"{name} of {type(tokenizer).__name__} gives no tensor while an image is encoded"
        )
    return joined(seen[-1:], images)


def check_codes(layout: Layout) -> None:
    """Raise UserError where codes cannot be counted, or are too many to."""
    if layout.is_continuous:
        raise UserError("continuous tokens have no `codes`; probe `tokens`")
    count = sum(sum(codebooks(segment)) for segment in layout.segments)
    if count > MOST_CODES:
        raise UserError(f"the frequencies of {count} codes are too long a vector; probe `tokens`")


def frequencies(tokens: Tensor, layout: Layout) -> Tensor:
    """How often each code occurs in each image over the number of positions, [B, 1, codes of all
    codebooks]: codebooks one behind the other.
    """
    counts: dict[str, Tensor] = {}
    for column in columns(tokens, layout):
        found = F.one_hot(column.codes, column.size).to(torch.float32)
        counts[column.book] = counts.get(column.book, torch.zeros_like(found)) + found
    return torch.cat(list(counts.values()), dim=1)[:, None] / layout.length


def joined(parts: list[Tensor], images: Tensor) -> Tensor:
    """Vectors or maps of a batch of images, one behind the other [B, N, C]; the narrower ones are
    filled with zeros.
    """
    sequences = [as_sequence(part, len(images)) for part in parts]
    width = max(part.shape[-1] for part in sequences)
    filled = [F.pad(part, (0, width - part.shape[-1])) for part in sequences]
    return torch.cat(filled, dim=1).float()


def as_sequence(values: Tensor, count: int) -> Tensor:
    """[B, C], [B, N, C] or a map [B, C, h, w] as a sequence of vectors [B, N, C]."""
    if len(values) != count or values.ndim not in (2, 3, 4):
        raise UserError(
            f"a feature of {count} images has shape {tuple(values.shape)}; needed is [B, C], "
            "[B, N, C] or [B, C, h, w]"
        )
    if values.ndim == 2:
        return values[:, None]
    if values.ndim == 4:
        return rearrange(values, "b c h w -> b (h w) c")
    return values
