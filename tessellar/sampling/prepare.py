"""Prepared generators: Llama blocks as decoding wants them, with fewer kernels a step and weights
packed for few rows.

A step of one or two rows reads every weight once and is otherwise bound by the number of small
operations, so a block runs as two fused projections (q | k | v and w1 | w3) with one rotation of q
and k together. Values agree with the block's own forward up to rounding
(tests/sampling/test_prepare.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.attention import attention
from tessellar.layers.llama import LlamaBlock, Pass
from tessellar.protocol.generator import Generator

PACKED_FOR_ROWS = (
    32  # the layout that oneDNN chooses for 32 rows is also the fastest one for 2 to 256
)


MANY_ROWS = 256  # above, float32 products are faster as they are: by 7 % at 512 rows, 13 % at 2,048
STEPS_AHEAD = 16  # of which what is known beforehand is computed in one product

WeightLayout = Literal["auto", "plain", "transposed", "packed", "int8"]
INT8_COLUMNS = 32  # the kernel reads so many columns at once, and beyond the end of a row


class Product:
    """x @ weight.T + bias on copies of `weight` [out, in] and `bias` in `dtype`, laid out for few
    rows.

    `packed` is oneDNN's order: in bfloat16 the plain product rearranges the weight at every call,
    which takes half of its time at two rows; in float32 it reads the weight at 6 GB/s where the
    packed one reads 10 (2 to 16 rows, one thread). `auto` packs where the processor can. Which is
    fastest depends on the processor (benchmarks/decoding.py).

    `int8` rounds each row of the weight to 255 steps of its own, and x to bfloat16: half of
    bfloat16's bytes, for one or two rows; of many rows the product is slower than any other. On a
    CPU only; raises UserError elsewhere.
    """

    def __init__(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        layout: WeightLayout = "auto",
        bias: Tensor | None = None,
    ) -> None:
        packable = weight.device.type == "cpu" and can_pack(dtype)
        if layout == "auto":
            layout = "packed" if packable else "plain"
        if layout == "int8" and weight.device.type != "cpu":
            raise UserError(f"int8 weights are read on a CPU, not on {weight.device}")
        if layout == "packed" and not packable:
            raise ValueError(
                f"{dtype} weights on this {weight.device} cannot be packed; "
                "layout 'plain' or 'transposed' works anywhere"
            )
        self.weight = weight.detach().to(dtype)
        # The module's own weight, not a copy, for passes that are bound by arithmetic.
        own = isinstance(weight, nn.Parameter) and weight.dtype == dtype == torch.float32
        self.for_many_rows = self.weight if layout == "packed" and own else None
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.is_packed = layout == "packed"
        self.steps: Tensor | None = None
        if layout == "int8":
            self.weight, self.steps = in_8_bits(weight.detach())
        elif layout == "packed":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR_ROWS)
        elif layout == "transposed":
            self.weight = self.weight.t().contiguous().t()

    def __call__(self, x: Tensor) -> Tensor:
        if self.for_many_rows is not None and x.shape[:-1].numel() > MANY_ROWS:
            return F.linear(x, self.for_many_rows, self.bias)
        if self.steps is not None:
            rows = F.pad(x, (0, self.weight.shape[1] - x.shape[-1])).flatten(0, -2).bfloat16()
            found = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.steps)
            found = found.to(x.dtype).unflatten(0, x.shape[:-1])
            return found if self.bias is None else found + self.bias
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in], zeros behind its columns, and bfloat16 [out]: the product of both is nearest
    to `weight`.
    """
    weight = weight.float()
    # Rounded first: what is multiplied by them is then nearest for the steps that are read.
    steps = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
    rounded = (weight / steps.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return F.pad(rounded, (0, -weight.shape[1] % INT8_COLUMNS)).contiguous(), steps


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN packs weights of `dtype`: bfloat16 needs instructions that
    older ones lack.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), PACKED_FOR_ROWS)
    except RuntimeError:
        return False
    return True


class FusedBlock:
    """The forward pass of a `LlamaBlock` without dropout and gradients, on copies of its weights in
    `dtype`.
    """

    def __init__(
        self, block: LlamaBlock, dtype: torch.dtype, layout: WeightLayout = "auto"
    ) -> None:
        own = block.attention
        feed = block.feed_forward
        self.norms = (block.attention_norm, block.ffn_norm)
        self.num_heads = own.num_heads
        self.dtype = dtype
        # `auto` prefers the explicit form on CPU for its backward pass; going forward SDPA is up to
        # 7 times faster.
        self.implementation = "sdpa" if own.implementation == "auto" else own.implementation
        self.wqkv = Product(own.wqkv.weight, dtype, layout)
        self.wo = Product(own.wo.weight, dtype, layout)
        self.w2 = Product(feed.w2.weight, dtype, layout)
        self.w13 = Product(torch.cat([feed.w1.weight, feed.w3.weight]), dtype, layout)

    def __call__(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        """x [R, n, D] to [R, n, D]."""
        x = x + self.wo(self.attend(self._normed(x, 0), layer, shared))
        gate, value = self.w13(self._normed(x, 1)).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate).mul_(value))

    def _normed(self, x: Tensor, which: int) -> Tensor:
        norm = self.norms[which]
        return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps).to(
            self.dtype
        )

    def attend(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        """Attention output [R, n, D] before the last projection."""
        positions = shared.positions
        heads = self.num_heads
        qkv = self.wqkv(x).float().unflatten(-1, (3, heads, -1))  # [R, n, 3, H, d]
        if positions.bias is not None:
            qkv[:, :, :2] += positions.bias.unflatten(-1, (1, heads, -1))
        pairs = torch.view_as_complex(qkv.unflatten(-1, (-1, 2)))
        pairs[:, :, :2] *= torch.complex(positions.cos, positions.sin)[:, :, None, None]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [R, H, n, d]
        keys, values = shared.cache.write(layer, shared.slots, k, v)
        slots = shared.slots
        out = attention(
            q.to(keys.dtype), keys, values, slots.mask, slots.is_causal, self.implementation
        )
        return out.transpose(1, 2).flatten(2).to(self.dtype)


class FusedLinear:
    """A linear layer on a copy of its weight in `dtype`; the output has the precision of the input."""

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, layout: WeightLayout = "auto"
    ) -> None:
        self.product = Product(linear.weight, dtype, layout, bias=linear.bias)
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.to(self.dtype)).to(x.dtype)


@contextmanager
def prepared(
    generator: Generator,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    layout: WeightLayout = "auto",
) -> Iterator[None]:
    """Within it, the generator's Llama blocks and other linear layers run fused, in `dtype`; inside
    of another one it does nothing.

    The default is autocast's precision where that is on, else the weights'.

    `compile` hands the fused blocks to torch.compile (worth it on a GPU; minutes of start-up). For
    sampling only: weights are copied when it is entered, and dropout and gradients are gone until
    it is left. `layout` is that of the weights (`Product`).
    """
    if any("forward" in module.__dict__ for module in generator.modules()):
        yield
        return
    replaced: list[nn.Module] = []
    kind = next(generator.parameters()).device.type
    if dtype is None and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    inside: set[nn.Module] = set()  # what blocks hold is fused with them
    for block in generator.modules():
        if isinstance(block, LlamaBlock):
            inside.update(block.modules())
    try:
        for module in generator.modules():
            fused = (
                fused_form(module, dtype, layout)
                if isinstance(module, LlamaBlock) or module not in inside
                else None
            )
            if fused is not None:
                object.__setattr__(
                    module, "forward", torch.compile(fused, dynamic=True) if compile else fused
                )
                replaced.append(module)
        generator.steps_ahead = STEPS_AHEAD
        yield
    finally:
        generator.steps_ahead = 1
        for module in replaced:
            object.__delattr__(module, "forward")


def fused_form(
    module: nn.Module, dtype: torch.dtype | None, layout: WeightLayout
) -> Callable[..., Tensor] | None:
    if any(isinstance(p, DTensor) for p in module.parameters(recurse=True)):
        return None  # sharded over processes: gathered by the module's own forward
    if type(module) is LlamaBlock and module.attention.group == 1:
        return FusedBlock(module, dtype or module.attention.wo.weight.dtype, layout)
    if type(module) is nn.Linear:
        return FusedLinear(module, dtype or module.weight.dtype, layout)
    return None
