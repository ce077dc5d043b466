"""Laws of training draws that a recipe states in words: which tokens are masked."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessellar.models.mar import MAR
from tessellar.models.maskgit import MaskGIT
from tessellar.models.tokenbridge import TokenBridge
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import (
    Categorical,
    Continuous,
    Factorized,
    grid_layout,
    sequence_layout,
)

LENGTH = 64


def masked_counts(generator: MaskGIT | MAR | TokenBridge, tokens: Tensor, draws: int) -> Tensor:
    """How many tokens each of `draws` losses hides from the generator, first sample of each batch."""
    counts: list[Tensor] = []
    inner = generator.masked_loss

    def watch(tokens: Tensor, masked: Tensor, *rest: object, **options: object) -> Tensor:
        counts.append(masked.sum(1))
        return torch.zeros(())

    generator.masked_loss = watch  # type: ignore[method-assign, assignment]
    for _ in range(draws):
        generator.loss(tokens, Condition(ids=torch.zeros(len(tokens), dtype=torch.long)))
    generator.masked_loss = inner  # type: ignore[method-assign]
    return torch.stack(counts)


def test_maskgit_masks_by_the_arccosine_of_a_uniform_draw() -> None:
    """max(1, round(N arccos(u) 2 / pi)): at least one, on average N 2 / pi, every sample by its own draw."""
    torch.manual_seed(0)
    generator = MaskGIT(sequence_layout(LENGTH, Categorical(8)), "vit", 8, 1, 1, 8, 3)
    counts = (
        masked_counts(generator, torch.zeros(500, LENGTH, dtype=torch.long), 8).flatten().double()
    )
    assert counts.min() >= 1 and counts.max() <= LENGTH
    uniform = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    law = (uniform.arccos() * 2 / math.pi * LENGTH).round().clamp(min=1)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(counts.quantile(share) - law.quantile(share)) <= 3
    assert abs(counts.mean() - law.mean()) < 1


def mar() -> tuple[MAR, Tensor]:
    generator = MAR(grid_layout(8, 8, Continuous(4)), 8, 1, 1, None, 8, 1, 3)
    return generator, torch.zeros(2, LENGTH, 4)


def tokenbridge() -> tuple[TokenBridge, Tensor]:
    layout = grid_layout(8, 8, Factorized((4, 4)))
    generator = TokenBridge(layout, 8, 1, 1, head_width=8, head_depth=1, num_classes=3)
    return generator, torch.zeros(2, LENGTH, 2, dtype=torch.long)


@pytest.mark.parametrize("make", [mar, tokenbridge])
def test_mar_masks_by_a_truncated_normal_draw_a_batch(
    make: Callable[[], tuple[MAR | TokenBridge, Tensor]],
) -> None:
    """ceil(N r), r of N(1, 0.25) within [0.7, 1], the same for all samples of a batch; TokenBridge's too."""
    torch.manual_seed(0)
    counts = masked_counts(*make(), 3000)
    assert bool((counts[:, 0] == counts[:, 1]).all())
    ratios = counts[:, 0].double() / LENGTH
    assert ratios.min() >= 0.7 and ratios.max() <= 1
    # The density rises to 1: its mean is 1 - 0.25 (phi(0) - phi(1.2)) / (Phi(0) - Phi(-1.2)).
    density = (1 - math.exp(-0.72)) / math.sqrt(2 * math.pi)
    share = 0.5 * math.erf(1.2 / math.sqrt(2))
    mean = 1 - 0.25 * density / share
    assert abs(float(ratios.mean()) - mean - 0.5 / LENGTH) < 0.01
