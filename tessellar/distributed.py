"""The few collective operations that evaluation and training need; all of them also work in one
plain process.

Sums are float64 where evaluation gives them so. Backends that exchange only GPU memory (NCCL) get
their tensors through the current GPU. `sum_over_ranks` and `mean_over_ranks` pass gradients, for
statistics of the global batch in a loss.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def session() -> Iterator[None]:
    """Join the processes that `torchrun` started, by NCCL where there are GPUs; nothing in a
    program of one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Whether a process group of more than one process runs."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def own_share(total: int) -> range:
    """Which of `total` items this rank works on: every world_size-th, so that each item belongs to
    exactly one rank.
    """
    return range(rank(), total, world_size())


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of float64 (or integer) `x` over ranks, on the device of `x`; the argument stays as it
    is.
    """
    if not is_distributed():
        return x
    total = x.to(_exchange_device(), copy=True).contiguous()
    dist.all_reduce(total)
    return total.to(x.device)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over ranks with gradients: the derivative of the sum of all ranks' losses. All
    ranks call it.
    """
    return _Sum.apply(x) if is_distributed() else x  # type: ignore[return-value]


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of `x` over ranks, with gradients as `sum_over_ranks`."""
    return sum_over_ranks(x) / world_size() if is_distributed() else x


class _Sum(torch.autograd.Function):
    """Every rank's result depends on every rank's argument, so gradients are summed over ranks as
    well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return all_reduce_sum(gradient)


def all_finite(x: Tensor) -> Tensor:
    """Whether `x` is finite on every rank: one boolean on its device, which not every use has to
    wait for.
    """
    own = torch.isfinite(x).all()
    return all_reduce_sum((~own).long()) == 0


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [n_r, ...] of all ranks in the order of ranks, [sum n_r, ...]; numbers may differ, also
    be 0.
    """
    if not is_distributed():
        return rows
    counts = [int(n) for n in all_gather(len(rows))]
    device = _exchange_device()
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(rows.device)


def all_gather(value: Any) -> list[Any]:
    """The picklable `value` of every rank, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's picklable `value` on every rank."""
    if not is_distributed():
        return value
    content = [value if rank() == 0 else None]
    dist.broadcast_object_list(content, src=0)
    return content[0]


def _exchange_device() -> torch.device:
    """Where the backend can exchange tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )
