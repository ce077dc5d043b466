"""FSDP2: parameters, gradients and optimizer state of a model spread over the processes, block by
block.

Training gathers one block at a time. Outside of it a model is used through other methods than its
forward (sampling, encoding), by one process alone or by processes with unequal shares; so
`gathered` puts all parameters in place there. Checkpoints hold full tensors and load in any number
of processes.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from tessellar.errors import UserError
from tessellar.tensor_files import require_intact
from tessellar.training.optim import groups_of
from tessellar.training.speed import blocks

T = TypeVar("T", bound=Tensor)


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
    strategy.__class__ = Sharded  # the same but for its checkpoints
    return mesh["data_parallel"]


class Sharded(ModelParallelStrategy):
    """Lightning's strategy with the checkpoints of a plain run: one file, full tensors, states as
    optimizers have them.

    Lightning's own look parameters up by their place in the model, refuse optimizers that have not
    stepped, and count a step of theirs when they are saved.
    """

    lightning_restore_optimizer = True  # type: ignore[assignment]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return self._kept_all(self.model.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        saved = getattr(optimizer, "_optimizer", optimizer).state_dict()
        state = {}
        for number, values in saved["state"].items():
            state[number] = self._kept_all(values)
        return {**saved, "state": state}

    def _kept_all(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Full tensors on the first process, which writes them; all take part."""
        kept = {}
        for name, value in values.items():
            if isinstance(value, DTensor):
                full = value.full_tensor()
                value = full.cpu() if self.global_rank == 0 else full[:0]
            kept[name] = value
        return kept

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath) if self.global_rank == 0 else None
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        require_intact(Path(checkpoint_path))  # torch.load compares no checksums
        return torch.load(
            checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only is not False
        )

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        own = self.model.state_dict()
        placed = {}
        for name, tensor in checkpoint["state_dict"].items():
            placed[name] = like(tensor, own[name]) if name in own else tensor
        self.model.load_state_dict(placed, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            model: dict[int, Tensor] = {}  # parameters by the numbers of their states
            settings = []
            for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                model |= zip(group["params"], own["params"], strict=True)
                here = {option: own[option] for option in ("foreach", "fused") if option in own}
                settings.append({**group, **here})
            state = {}
            for number, values in saved["state"].items():
                state[number] = dict(values)
                for name, value in values.items():
                    # moments, as the parameter.
                    if name != "step" and isinstance(value, Tensor):
                        state[number][name] = like(value, model[number])
            optimizer.load_state_dict({**saved, "state": state, "param_groups": settings})


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    methods: Collection[str] = (),
    whole: nn.Module | None = None,
) -> None:
    """Shard a module: each of its blocks, and the rest of it together. Its parameters are replaced
    and lose their tags.

    `methods` are entered in training as `forward` is. The parameters of `whole` stay whole on every
    process.
    """
    kept = set() if whole is None else set(whole.parameters())
    chosen = [block for block in blocks(module) if not kept & set(block.parameters())]
    for block in chosen:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=kept)
    # By default a backward pass gathers ahead in the order of the forward passes before it. Those
    # of validation are among them, and processes make unequal numbers of these: they would wait for
    # each other for ever.
    for before, part in zip([*chosen[-1:], module, *chosen], [module, *chosen], strict=False):
        part.set_modules_to_backward_prefetch([before])  # type: ignore[operator, list-item]
    for method in methods:
        register_fsdp_forward_method(module, method)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """All parameters on every process inside, for whatever use without gradients; all processes
    enter and leave.
    """
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
    roots = set(_roots(module))
    for part in _sharded(module):
        part.set_reshard_after_forward(part not in roots, recurse=False)
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
    return distribute_tensor(
        tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None
    )


def average_gradients(parameters: Collection[nn.Parameter]) -> None:
    """Mean over processes of the gradients of parameters that stay whole, which no wrapper
    averages.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad / dist.get_world_size()
            dist.all_reduce(gradient)
            parameter.grad.copy_(gradient)


def by_kind(tensors: Iterable[T]) -> tuple[list[T], list[T]]:
    """Sharded tensors and whole ones apart: torch's fused operations take one kind at a time."""
    sharded: list[T] = []
    plain: list[T] = []
    for tensor in tensors:
        (sharded if isinstance(tensor, DTensor) else plain).append(tensor)
    return sharded, plain


def clip_gradients(parameters: Collection[nn.Parameter], clip: float) -> Tensor:
    """As `clip_grad_norm_`, also of sharded and whole parameters together; the norm before."""
    kinds = [kind for kind in by_kind(parameters) if kind]
    if len(kinds) == 1:
        return whole(nn.utils.clip_grad_norm_(kinds[0], clip))
    norms = []
    for kind in kinds:
        gradients = [p.grad for p in kind if p.grad is not None]
        norms.append(whole(nn.utils.get_total_norm(gradients)))
    # |g| = sqrt(|g_sharded|^2 + |g_whole|^2), so that both kinds shrink by one factor.
    norm = torch.stack(norms).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, clip, norm)
    return norm


def settle(optimizers: Collection[Optimizer]) -> None:
    """Have optimizers of sharded and whole parameters update them one by one: torch cannot do both
    in one call.
    """
    for group in groups_of(optimizers):
        if all(by_kind(group["params"])) and "foreach" in group:
            group["foreach"] = group["fused"] = False
