"""How recordings hold what we hold otherwise: pictures in [0, 1], vectors as maps or as rows, the
channels first.
"""

from einops import rearrange
from torch import Tensor


def to_unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]."""
    return (images + 1) / 2


def from_unit(images: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return 2 * images - 1


def as_map(vectors: Tensor, height: int) -> Tensor:
    """[B, h w, C] as [B, C, h, w]."""
    return rearrange(vectors, "b (h w) c -> b c h w", h=height)


def as_row(vectors: Tensor) -> Tensor:
    """[B, N, C] as [B, C, 1, N]."""
    return rearrange(vectors, "b n c -> b c 1 n")


def as_vectors(maps: Tensor) -> Tensor:
    """[B, C, h, w], or a row [B, C, 1, N], as [B, h w, C]."""
    return rearrange(maps, "b c h w -> b (h w) c")
