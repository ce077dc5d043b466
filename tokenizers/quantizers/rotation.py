"""Rotation trick: gradients pass a quantizer by rotating and scaling, not straight through (arXiv
2410.06424).

Forward is the code itself. Backward is that of the rotation which takes a latent's direction to its
code's, times the ratio of their norms, both held constant: g becomes (|q| / |z|) R^T g.
"""

import torch
from torch import Tensor

EPS = 1e-6


def rotate_to(z: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` [..., C] with the gradient of the rotation from z [..., C]; none flows into
    `quantized`.
    """
    target = quantized.detach()
    # R = I - 2 w w^T + 2 q u^T turns u to q. It is applied to z by two dot products, never built.
    u = _unit(z.detach())
    q = _unit(target)
    w = _unit(u + q)
    ratio = target.norm(dim=-1, keepdim=True) / (z.detach().norm(dim=-1, keepdim=True) + EPS)
    rotated = ratio * (z - 2 * w * _dot(w, z) + 2 * q * _dot(u, z))
    # Equal up to rounding; the forward value is the code itself.
    return rotated + (target - rotated).detach()


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + EPS)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.sum(a * b, dim=-1, keepdim=True)
