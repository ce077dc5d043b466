"""FSDP2: parameters, gradients and optimizer state of a model spread over the processes, block by block.

Training gathers one block at a time. Outside of it a model is used through other methods than its forward (sampling,
encoding), by one process alone or by processes with unequal shares; so `gathered` puts all parameters in place there.
Checkpoints hold full tensors and load in any number of processes.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from tessellar.errors import UserError
from tessellar.layers.tags import tag, tags
from tessellar.training.speed import blocks


def mesh_of(strategy: Any) -> DeviceMesh | None:
    """The processes to shard over, where the trainer's strategy asks for it.

    Raises UserError for tensor parallelism.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() != 1:
        raise UserError(
            f"ModelParallelStrategy shards over data_parallel_size={dist.get_world_size()}, tensor_parallel_size=1; "
            f"it was given {mesh['data_parallel'].size()} and {mesh['tensor_parallel'].size()}"
        )
    strategy._save_distributed_checkpoint = False  # one file with full tensors, for any number of processes
    return mesh["data_parallel"]


def shard(module: nn.Module, mesh: DeviceMesh, methods: Collection[str] = (), whole: nn.Module | None = None) -> None:
    """Shard a module: each of its blocks, and the rest of it together; tags of parameters stay.

    `methods` are entered in training as `forward` is. The parameters of `whole` stay whole on every process.
    """
    named = {name: tags(parameter) for name, parameter in module.named_parameters()}
    kept = set() if whole is None else set(whole.parameters())
    for block in blocks(module):
        if not kept & set(block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=kept)
    for method in methods:
        register_fsdp_forward_method(module, method)
    for name, parameter in module.named_parameters():
        tag(parameter, *named[name])


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """All parameters on every process inside, for whatever use without gradients; all processes enter and leave."""
    gather(module)
    try:
        yield
    finally:
        scatter(module)


def gather(module: nn.Module) -> None:
    """Put every sharded parameter in place, until `scatter`; nothing where none is sharded."""
    for part in _sharded(module):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def scatter(module: nn.Module) -> None:
    """Undo `gather`."""
    roots = {id(m) for m in _roots(module)}
    for part in _sharded(module):
        part.set_reshard_after_forward(id(part) not in roots, recurse=False)
        part.reshard()


def _sharded(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _roots(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _roots(child)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; all processes ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` on the device of `model`, and sharded as it is."""
    if not isinstance(model, DTensor) or isinstance(tensor, DTensor):
        return tensor.to(model.device)
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def average_gradients(parameters: Collection[nn.Parameter]) -> None:
    """Mean over processes of the gradients of parameters that stay whole, which no wrapper averages."""
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad / dist.get_world_size()
            dist.all_reduce(gradient)
            parameter.grad.copy_(gradient)


def clip_gradients(parameters: Collection[nn.Parameter], clip: float) -> Tensor:
    """As `clip_grad_norm_`, also of sharded and whole parameters together; the norm before."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
    kinds = [kind for kind in kinds if kind]
    if len(kinds) == 1:
        return whole(nn.utils.clip_grad_norm_(kinds[0], clip))
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = torch.stack(norms).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, clip, norm)
    return norm


def settle(optimizers: Collection[Optimizer]) -> None:
    """Have optimizers of sharded and whole parameters update them one by one: torch cannot do both in one call."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if len({isinstance(p, DTensor) for p in group["params"]}) == 2 and "foreach" in group:
            group["foreach"] = group["fused"] = False


def number_by_model(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's state with parameters numbered as in the model, which is how sharded runs look them up.

    A plain `load_state_dict` goes by the order within groups, so it takes either numbering.
    """
    place = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    own = [place[id(p)] for group in optimizer.param_groups for p in group["params"]]
    ids = [number for group in state["param_groups"] for number in group["params"]]
    new = dict(zip(ids, own, strict=True))
    groups = [{**group, "params": [new[n] for n in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {new[n]: value for n, value in state["state"].items()}, "param_groups": groups}
