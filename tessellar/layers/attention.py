"""Attention behind one function: SDPA, or an explicit matmul-softmax that is faster on CPU for
short sequences.

On two CPU cores the backward pass of SDPA in bfloat16 is half of a training step at 16 to 64
tokens; the explicit form makes the whole step 1.5 times faster, also at VAR's 130 tokens with a
mask. Both give the same values (tests/layers/test_attention.py).
"""

from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

IMPLEMENTATIONS = ("auto", "explicit", "sdpa", "flex", "float64")
# Keys, so that VAR's 130 are in; in bfloat16 SDPA with a mask wins from about 200 on.
EXPLICIT_UP_TO = 160


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: "Tensor | BlockMask | None" = None,
    is_causal: bool = False,
    implementation: str = "auto",
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend q [B, H, n, D] to k, v [B, H, S, D]; `mask` (True = visible) broadcasts to [B, H, n,
    S].

    `is_causal` hides keys after the query of the same index and needs n = S. `scale` defaults to
    D^-0.5. `dropout` is the share of attention weights that are dropped: 0 outside training. A
    FlexAttention block mask takes that kernel, which is compiled on a GPU and drops nothing; "flex"
    is "auto" where a generator gives no such mask (it decodes, or is causal).
    "float64" rounds once, at the end: for replays of what grows a rounding to something visible.
    """
    if mask is not None and not isinstance(mask, Tensor):
        assert not dropout and not is_causal, "FlexAttention has no dropout; its mask says all"
        return flex_kernel(q.device.type)(q, k, v, block_mask=mask, scale=scale)
    if implementation in ("auto", "flex"):
        implementation = (
            "explicit" if q.device.type == "cpu" and k.shape[-2] <= EXPLICIT_UP_TO else "sdpa"
        )
    if implementation == "sdpa":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, dropout_p=dropout
        )
    if implementation == "float64":
        return attention(
            q.double(),
            k.double(),
            v.double(),
            mask=mask,
            is_causal=is_causal,
            implementation="explicit",
            scale=scale,
            dropout=dropout,
        ).to(q.dtype)
    if implementation != "explicit":
        raise ValueError(
            f"attention implementation is {implementation!r}; it must be one of {IMPLEMENTATIONS}"
        )
    return explicit_attention(
        q,
        k,
        v=v,
        mask=mask,
        is_causal=is_causal,
        scale=scale or 1 / sqrt(q.shape[-1]),
        dropout=dropout,
    )


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    # The scale on q, which is smaller than the scores.
    scores = (q * scale) @ k.transpose(-1, -2)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + torch.zeros(mask.shape, dtype=scores.dtype, device=q.device).masked_fill(
            ~mask, -torch.inf
        )
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return (F.dropout(weights, dropout) if dropout else weights) @ v


@lru_cache
def flex_kernel(device: str) -> Any:
    """FlexAttention; importing it is slow, and only its compiled form is fast."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention
