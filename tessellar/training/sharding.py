"""FSDP2: parameters, gradients and optimizer state of a model spread over the processes, block by
block; with `HybridSharded` within groups of processes, with `tensor_parallel_size` the matrices of
Llama generators too.

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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import Optimizer

from tessellar.checkpoints.sharded import read_sharded
from tessellar.errors import UserError
from tessellar.layers.llama import LlamaBlock
from tessellar.models.parts.llama import LlamaGenerator
from tessellar.tensor_files import require_intact
from tessellar.training.optim import groups_of
from tessellar.training.run_files import RunFiles
from tessellar.training.speed import blocks

T = TypeVar("T", bound=Tensor)


def mesh_of(strategy: Any) -> DeviceMesh | None:
    """The processes to shard over, where the trainer's strategy asks for it: [shard], or [replicate,
    shard] of `HybridSharded`.

    Raises UserError for replicas that do not divide the processes.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    if not isinstance(strategy, Sharded):
        strategy.__class__ = Sharded  # the same but for its checkpoints
    mesh = strategy.device_mesh["data_parallel"]
    replicas = getattr(strategy, "replicas", 1)
    if replicas == 1:
        return mesh
    if mesh.size() % replicas:
        raise UserError(f"{replicas} replicas do not divide {mesh.size()} processes")
    sizes = (replicas, mesh.size() // replicas)
    return init_device_mesh(mesh.device_type, sizes, mesh_dim_names=("replicate", "shard"))


def tensor_mesh_of(strategy: Any) -> DeviceMesh | None:
    """The processes that share each matrix, where the trainer's strategy asks for tensor
    parallelism.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    mesh = strategy.device_mesh["tensor_parallel"]
    return mesh if mesh.size() > 1 else None


def split_matrices(generator: LlamaGenerator, mesh: DeviceMesh) -> None:
    """Tensor parallelism of a Llama generator by torch's plans: of SwiGLU w1 and w3 by columns, w2
    by rows; the attention's projections and the logits alike.

    The fused projection q | k | v is gathered before heads are made of it, so every process computes
    all heads, and holds its share of every matrix. Parameters are replaced and lose their tags.
    Raises UserError where sizes do not divide, and for blocks of another kind.
    """
    plan = {
        "attention.wqkv": ColwiseParallel(output_layouts=Replicate()),
        "attention.wo": RowwiseParallel(input_layouts=Replicate()),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(),
    }
    for layer in generator.layers:
        if type(layer) is not LlamaBlock:
            raise UserError(
                f"tensor parallelism knows Llama's blocks, not {type(layer).__name__}: "
                "leave tensor_parallel_size at 1"
            )
        for name in plan:
            weight = layer.get_submodule(name).weight
            if any(size % mesh.size() for size in weight.shape):  # type: ignore[union-attr]
                raise UserError(f"{name} {tuple(weight.shape)} does not divide by {mesh.size()}")  # type: ignore[arg-type]
        parallelize_module(layer, mesh, dict(plan))
    if generator.output is not None and generator.output.out_features % mesh.size() == 0:
        of_logits = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(generator, mesh, {"output": of_logits})


def data_share(strategy: Any) -> tuple[int, int] | None:
    """Rank and number of processes that read different samples; None where each process does."""
    if tensor_mesh_of(strategy) is None:
        return None
    mesh = strategy.device_mesh["data_parallel"]
    return mesh.get_local_rank(), mesh.size()


class Sharded(ModelParallelStrategy):
    """Lightning's strategy with the checkpoints of a plain run: one file, full tensors, states as
    optimizers have them.

    Lightning's own look parameters up by their place in the model, refuse optimizers that have not
    stepped, and count a step of theirs when they are saved.
    """

    lightning_restore_optimizer = True  # type: ignore[assignment]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return self.model.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        io = self.checkpoint_io
        if isinstance(io, RunFiles) and io.files != "whole":
            io.save(checkpoint, filepath, together=True)
        else:
            checkpoint = on_the_first(checkpoint)
            io.save_checkpoint(checkpoint, filepath) if self.global_rank == 0 else None
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(checkpoint_path).is_dir():
            assert self.model is not None
            return read_sharded(Path(checkpoint_path), like=self.model.state_dict().values())
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


class HybridSharded(Sharded):
    """HSDP: each of `replicas` groups of processes holds the whole model, sharded within the group,
    so that only gradients travel between groups (nodes).
    """

    def __init__(self, replicas: int = 2) -> None:
        if replicas < 1:
            raise ValueError(f"replicas is {replicas}; at least 1 is needed")
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1)
        self.replicas = replicas

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


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


def on_the_first(value: Any) -> Any:
    """A checkpoint with full tensors on the first process, which writes it; all take part."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else full[:0]
    if isinstance(value, Mapping):
        return {name: on_the_first(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([on_the_first(item) for item in value])
    return value


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` on the device of `model`, and sharded as it is."""
    if isinstance(tensor, DTensor) and not isinstance(model, DTensor):
        return whole(tensor)
    if isinstance(tensor, DTensor) and isinstance(model, DTensor):
        return tensor.redistribute(model.device_mesh, model.placements)
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


def by_kind(tensors: Iterable[T]) -> list[list[T]]:
    """Whole tensors, and sharded ones by the processes they are sharded over, apart: torch's fused
    operations take one kind at a time.
    """
    kinds: dict[DeviceMesh | None, list[T]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        kinds.setdefault(mesh, []).append(tensor)
    return list(kinds.values())


def clip_gradients(parameters: Collection[nn.Parameter], clip: float) -> Tensor:
    """As `clip_grad_norm_`, also of sharded and whole parameters together; the norm before."""
    kinds = by_kind(parameters)
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
        if len(by_kind(group["params"])) > 1 and "foreach" in group:
            group["foreach"] = group["fused"] = False
