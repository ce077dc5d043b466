"""Muon for processors without bfloat16 arithmetic.

torch's Muon orthogonalises in bfloat16. Where a processor only emulates that, the same iterations
take some fifty times longer than in float32, and nearly all of a small run's time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):  # of one name, by which checkpoints know it
    """`torch.optim.Muon` (Keller Jordan, 2024) with Newton-Schulz iterations in float32; equal to
    it but for bfloat16's rounding. Steps are scaled by max(1, rows / columns)^0.5 (`original`).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        momentum = group["momentum"]
        buffer.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
        update = orthogonalised(
            update.float(), group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"]
        )
        rows, columns = parameter.shape
        scale = max(1.0, rows / columns) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-float(group["lr"]) * scale)


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of `matrix` [R, C], by `steps` of the
    quintic x <- a x + (b g + c g^2) x with g = x x^T.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # the smaller Gram matrix
    x = x / x.norm().clamp(min=eps)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
