"""One process of runs for test_parallel.py: `one_rank_of_parallel.py FOLDER TASK...`.

Each task leaves its losses (means over processes) and full tensors in FOLDER/<task>-<world>.pt.
"""

import os
import runpy
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from tessellar import distributed
from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.callbacks.ema import EMA
from tessellar.models.llamagen import LlamaGen
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.optim import OptimizerSettings
from tessellar.training.sharding import HybridSharded, data_share, on_the_first, whole

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("conftest.py"))))
GLOBAL_BATCH = 8
SAVED = "update_00000003.ckpt"
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def module() -> GeneratorModule:
    torch.manual_seed(0)
    sizes = {"width": 64, "depth": 2, "num_heads": 4, "ffn_multiple_of": 16}
    generator = partial(LlamaGen, num_classes=10, dropout=0.0, condition_dropout=0.0, **sizes)
    optimizer = OptimizerSettings("adamw", lr=1e-3, weight_decay=0.1)
    return GeneratorModule(TINY.make_tokenizer(), generator, optimizer=optimizer, clip=0.5)


class Watch(L.Callback):
    """Losses of the global batch; all tensors as they are when training starts."""

    def __init__(self, ema: EMA) -> None:
        self.losses: list[float] = []
        self.ema = ema
        self.start: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
        content = {"state_dict": module.state_dict(), "ema": self.ema.average, "states": states}
        self.start = on_the_first(content) if WORLD > 1 else content
        self.start = torch.utils._pytree.tree_map(clone, self.start)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        total = distributed.all_reduce_sum(outputs["loss"].double())
        self.losses.append(float(total) / distributed.world_size())


def clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def train(
    folder: Path, task: str, strategy: Any, steps: int, resume: Path | None = None
) -> dict[str, Any]:
    ema = EMA(0.9)
    watch = Watch(ema)
    saves = [ema, watch]
    if task == "save":
        (folder / "saved").mkdir(exist_ok=True)
        files = "sharded" if WORLD > 1 else "asynchronous"
        saves += [Checkpoints(folder / "saved", 3, "val/loss", "min", 3, files)]
    else:
        # Only to read checkpoints of either kind.
        (folder / f"{task}-{WORLD}").mkdir(exist_ok=True)
        saves += [Checkpoints(folder / f"{task}-{WORLD}", 1000, "val/loss", "min")]
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy,
        logger=False,
        callbacks=saves,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    L.seed_everything(0, verbose=False)
    made = module()
    share = 1 if WORLD == 1 else WORLD
    if task == "tensor":
        share = 2
    trainer.fit(made, TINY.make_data(GLOBAL_BATCH // share), ckpt_path=resume, weights_only=True)
    if task == "tensor":
        assert data_share(trainer.strategy) == (distributed.rank() // 2, 2)
        layer = made.model.generator.layers[0]
        assert layer.feed_forward.w1.weight.to_local().numel() * WORLD == 64 * 176
    result = {
        "losses": watch.losses,
        "start": watch.start,
        "weights": {n: whole(t).clone() for n, t in made.state_dict().items()},
    }
    if distributed.rank() == 0:
        torch.save(result, folder / f"{task}-{WORLD}.pt")
    return result


def fsdp() -> Any:
    if WORLD == 1:
        return "auto"
    return ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)


def main(folder: Path, tasks: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for task in tasks:
        if task == "save":
            train(folder, task, fsdp(), 8)
        if task == "load":
            train(folder, task, fsdp(), 8, folder / "saved" / SAVED)
        if task == "hybrid":
            train(folder, task, HybridSharded(replicas=2), 5)
        if task == "tensor":
            train(folder, task, ModelParallelStrategy(2, 2), 5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
