"""Explicit attention equals SDPA in values and gradients, for every kind of mask."""

import pytest
import torch

from tessellar.layers.attention import attention


@pytest.mark.parametrize("kind", ["full", "causal", "mask"])
def test_explicit_equals_sdpa(kind: str) -> None:
    torch.manual_seed(0)
    mask = (
        (torch.rand(2, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool) if kind == "mask" else None
    )
    results = []
    for implementation in ("explicit", "sdpa"):
        torch.manual_seed(1)
        q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
        out = attention(q, k, v, mask, is_causal=kind == "causal", implementation=implementation)
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_unknown_implementation_is_named() -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="flash"):
        attention(x, x, x, implementation="flash")
