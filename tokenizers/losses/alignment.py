"""Feature alignment: distances between a tokenizer's features and those of a frozen vision model.

One number an image, so that weights may differ between the images of a batch. The cosine term is
that of ReToK, Hita, TokenFlow and REPA (arXiv 2410.06940); with a margin it is VA-VAE's (arXiv
2501.01423), which ResTok uses.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32


def cosine_distance(
    features: Tensor, target: Tensor, margin: float = 0.0, eps: float = 1e-8
) -> Tensor:
    """Mean over positions of max(0, 1 - margin - cos), of features and targets [B, n, D]: [B].

    A margin leaves alone what is similar enough; gradients flow into both arguments. Raises
    ValueError where the shapes differ.
    """
    if features.shape != target.shape:
        raise ValueError(
            f"features have shape {tuple(features.shape)}, their targets {tuple(target.shape)}"
        )
    cosine = F.cosine_similarity(
        at_least_float32(features), at_least_float32(target), dim=-1, eps=eps
    )
    distance = 1 - margin - cosine
    return (distance.relu() if margin else distance).flatten(1).mean(1)


def projection(width: int, out: int) -> nn.Sequential:
    """REPA's head from a tokenizer's features to a teacher's: three layers, SiLU, 4 x width inside."""
    hidden = 4 * width
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, out),
    )


def regrid(features: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """Features [B, h * w, D] in raster order to those of another grid, bilinear (averaged where it
    is coarser).
    """
    if grid == other:
        return features
    maps = rearrange(at_least_float32(features), "b (h w) d -> b d h w", h=grid[0])
    resized = F.interpolate(maps, other, mode="bilinear", antialias=True)
    return rearrange(resized, "b d h w -> b (h w) d")
