"""How tokens lie on disk: ids in the smallest unsigned integers, bits eight to a byte, real vectors
in float32, a posterior in bfloat16.

`pack` and `unpack` are each other's inverse, but for the rounding of a posterior. bfloat16 is
stored as its bit pattern in uint16. Of a continuous tokenizer with a posterior, mean and standard
deviation are stored, to be sampled at each visit: its noise hides the rounding. Vectors that are
tokens themselves (Semanticist's slots) have nothing that hides it; caches of earlier versions hold
them in bfloat16 too, and are read.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from tessellar.protocol.layout import Bits, Categorical, Continuous, Factorized, Layout

Kind = Literal["ids", "bits", "vectors", "posterior"]


class Storage(NamedTuple):
    """`kind` of content, `dtype` of the array, and the `shape` of one view of one image in it."""

    kind: Kind
    dtype: str
    shape: tuple[int, ...]


def storage_of(layout: Layout, posterior: bool = False) -> Storage:
    """How the tokens of a layout are stored; `posterior` asks for mean and standard deviation of
    vectors.
    """
    kinds = [segment.kind for segment in layout.segments]
    trailing = tuple(layout.blank(1).shape[2:])
    if layout.is_continuous:
        assert isinstance(kinds[0], Continuous)
        dim = kinds[0].dim
        if posterior:
            return Storage("posterior", "uint16", (layout.length, 2 * dim))
        return Storage("vectors", "float32", (layout.length, dim))
    if all(isinstance(kind, Bits) for kind in kinds):
        return Storage("bits", "uint8", (layout.length, -(-trailing[0] // 8)))
    return Storage("ids", smallest_dtype(max(vocabulary_sizes(layout))), (layout.length, *trailing))


def is_storage_of(storage: Storage, layout: Layout) -> bool:
    """Whether tokens of a layout may lie like this, in a cache of this or an earlier version."""
    expected = storage_of(layout, storage.kind == "posterior")
    rounded = expected._replace(dtype="uint16")
    return storage == expected or (storage.kind == "vectors" and storage == rounded)


def vocabulary_sizes(layout: Layout) -> list[int]:
    """Vocabulary sizes of a layout without real vectors."""
    sizes = []
    for segment in layout.segments:
        match segment.kind:
            case Categorical(vocab):
                sizes.append(vocab)
            case Factorized(vocabs):
                sizes += vocabs
            case Bits():
                sizes.append(2)
    return sizes


def smallest_dtype(vocab: int) -> str:
    for dtype in ("uint8", "uint16", "uint32"):
        if vocab <= np.iinfo(dtype).max + 1:
            return dtype
    raise ValueError(f"a vocabulary of {vocab} does not fit into 32 bits")


def pack(tokens: Tensor, storage: Storage) -> np.ndarray:
    """Tokens [B, N, ...] (of a posterior: mean and standard deviation side by side) to an array [B,
    *shape].
    """
    tokens = tokens.detach().cpu()
    match storage.kind:
        case "ids":
            packed = tokens.numpy().astype(storage.dtype)
        case "bits":
            packed = np.packbits(tokens.numpy().astype(np.uint8), axis=-1)
        case "vectors" if storage.dtype == "float32":
            packed = tokens.float().contiguous().numpy()
        case _:
            packed = (
                tokens.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
            )
    assert packed.shape[1:] == storage.shape, (
        f"tokens have shape {packed.shape[1:]}, expected {storage.shape}"
    )
    return packed


def unpack(array: np.ndarray, storage: Storage, layout: Layout) -> Tensor:
    """An array [B, *shape] to tokens: int64 or float32 [B, N, ...]; of a posterior its two halves
    side by side.
    """
    match storage.kind:
        case "ids":
            return torch.from_numpy(array.astype(np.int64))
        case "bits":
            count = layout.blank(1).shape[2]
            return torch.from_numpy(np.unpackbits(array, axis=-1, count=count).astype(np.int64))
        case "vectors" if storage.dtype == "float32":
            return torch.from_numpy(array.astype(np.float32))
        case _:
            return (
                torch.from_numpy(np.ascontiguousarray(array).view(np.int16))
                .view(torch.bfloat16)
                .float()
            )


def sample_posterior(halves: Tensor, noise: Tensor) -> Tensor:
    """mean + std * noise of [B, N, 2C], with standard normal `noise` [B, N * C]."""
    mean, std = halves.chunk(2, dim=-1)
    return mean + std * rearrange(noise.float(), "b (n c) -> b n c", c=mean.shape[-1])
