"""Explicit attention equals SDPA in values and gradients, for every kind of mask."""

from typing import Any

import pytest
import torch

from tessellar.layers import vit
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


def test_a_block_of_exact_attention_attends_in_float32_in_any_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def watch(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(q.dtype)
        return attention(q, *rest, **options)

    monkeypatch.setattr(vit, "attend", watch)
    x = torch.randn(1, 3, 8)
    for exact in (False, True):
        block = vit.ViTBlock(8, 2, exact_attention=exact)
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
    assert seen == [torch.bfloat16, torch.float32]


def test_a_causal_block_sees_nothing_behind_a_row() -> None:
    torch.manual_seed(0)
    block = vit.ViTBlock(8, 2, causal=True)
    torch.nn.init.normal_(block.proj.weight)
    x = torch.randn(1, 5, 8)
    other = x.clone()
    other[:, 3:] += 1
    assert torch.equal(block(x)[:, :3], block(other)[:, :3])
    assert not torch.equal(block(x)[:, 3:], block(other)[:, 3:])
