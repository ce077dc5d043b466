"""Cross-entropy of a linear layer's logits that never holds all of them.

Logits, their softmax and its gradient are three tables [N, V]: 6.4 GB at 32 x 256 tokens and 65,536
codes. Here rows are taken a part at a time, forward and again in the backward pass (the idea of
Cut Cross-Entropy, arXiv 2411.09009, and of Liger Kernel), for one more product of three. Sums are
float32 at least, whatever the precision of the products.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tessellar.layers.precision import at_least_float32

PARTS = 8  # of the rows: the tables that are held are so much smaller
LEAST_ROWS = 64  # below, a product runs no faster for fewer rows


def linear_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(states weight^T)[targets] of each row, at least float32 [N].

    `states` [N, D] and `weight` [V, D] take gradients; `targets` int64 [N] in [0, V). Under autocast
    the products have its precision.
    """
    kind = states.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = states.dtype
    return _LinearCrossEntropy.apply(states, weight, targets, dtype)  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, dtype: Any) -> Tensor:
        low = weight.to(dtype)
        losses = []
        totals = []
        for part in _parts(len(states)):
            logits = at_least_float32(states[part].to(dtype) @ low.T)
            total = logits.logsumexp(1)
            losses.append(total - logits.gather(1, targets[part, None])[:, 0])
            totals.append(total)
        ctx.save_for_backward(states, weight, targets, torch.cat(totals))
        ctx.dtype = dtype
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets, totals = ctx.saved_tensors
        low = weight.to(ctx.dtype)
        of_states = torch.empty_like(states)
        of_weight = at_least_float32(torch.zeros_like(weight)) if ctx.needs_input_grad[1] else None
        for part in _parts(len(states)):
            rows = states[part].to(ctx.dtype)
            # d loss / d logits = softmax - one-hot, times the gradient of the loss
            table = at_least_float32(rows @ low.T).sub_(totals[part, None]).exp_()
            ones = torch.ones_like(targets[part, None], dtype=table.dtype)
            table.scatter_add_(1, targets[part, None], -ones).mul_(gradient[part, None])
            table = table.to(ctx.dtype)
            of_states[part] = table @ low
            if of_weight is not None and of_weight.dtype == ctx.dtype:
                of_weight.addmm_(table.T, rows)
            elif of_weight is not None:
                of_weight += table.T @ rows
        return of_states, None if of_weight is None else of_weight.to(weight.dtype), None, None


def _parts(rows: int) -> Iterator[slice]:
    size = max(LEAST_ROWS, -(-rows // PARTS))
    for start in range(0, rows, size):
        yield slice(start, start + size)
