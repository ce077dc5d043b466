"""One process of training runs, for test_processes_of_training.py: `one_rank_of_training.py FOLDER`.

Every run leaves its losses (means over processes), weights and averages in FOLDER/<run>-<world>.pt.
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
from safetensors.torch import save_file

from tessellar import distributed
from tessellar.callbacks.ema import EMA
from tessellar.callbacks.fid import FID
from tessellar.callbacks.grids import Grids
from tessellar.cli import sample
from tessellar.evaluation.networks.timm_network import network_of
from tessellar.models.llamagen import LlamaGen
from tessellar.networks.facts import NetworkFacts
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.losses.adversarial import AdaptiveWeight
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.training.base import TrainingModule
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.optim import OptimizerSettings
from tessellar.training.sharding import whole

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("conftest.py"))))
GLOBAL_BATCH, SAVE_AT = (
    8,
    3,
)  # batches before a checkpoint; in the middle of an update of the tokenizer


def tokenizer() -> TrainingModule:
    """With all that looks at a whole batch: batch norm, adaptive weight, codes made from data, entropy."""
    torch.manual_seed(0)
    module = TINY.make_tokenizer_module(
        PatchGAN(8, 1),
        optimizer=OptimizerSettings("adamw", lr=1e-3, weight_decay=0.1),
        accumulate=2,
        clip=0.5,
    )
    module.loss.adaptive = AdaptiveWeight()
    quantizer = module.tokenizer.quantizer
    quantizer.init_step, quantizer.restart_every, quantizer.entropy_weight = 2, 3, 0.1
    quantizer.entropy_temperature = 0.5
    return module


def generator() -> TrainingModule:
    """Of two blocks, so that one may be gathered ahead while the other runs; nothing is dropped."""
    torch.manual_seed(0)
    settings = {
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
        "ffn_multiple_of": 8,
        "dropout": 0.0,
    }
    optimizer = OptimizerSettings("adamw", lr=1e-2, weight_decay=0.1)
    module = GeneratorModule(
        TINY.make_tokenizer(), partial(LlamaGen, **settings), optimizer=optimizer, clip=0.5
    )
    module.model.generator.conditioning.dropout = 0.0
    return module


KINDS = {"tokenizer": tokenizer, "generator": generator}


def write_network(folder: Path) -> None:
    """A feature network with random weights."""
    torch.manual_seed(1)
    facts = NetworkFacts("tiny", "test_resnet", 4, (32, 32), resize="torch-bicubic")
    state = network_of(facts).state_dict()
    save_file(state, folder / "tiny.safetensors", metadata=facts.to_metadata())


class Measure(FID):
    """Measures after the first update, where the weights of all runs are equal up to rounding."""

    distances: dict[str, float]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if module.batches != 1:
            return
        self.measure(trainer, module)
        found = trainer.callback_metrics.items()
        self.distances = {name: float(value) for name, value in found if "FD(" in name}


def measured(name: str) -> bool:
    """Whether a metric is of `Measure`, which resumed runs are without."""
    return name.startswith(("val/FD", "val/distance", "val/evaluation"))


class Watch(L.Callback):
    """Losses of the global batch, samples seen by each process, and a checkpoint after batch `save_at`."""

    def __init__(self, save_at: int | None, path: Path) -> None:
        self.losses: list[float] = []
        self.seen: list[float] = []
        self.save_at, self.path = save_at, path

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.losses.append(
            float(distributed.all_reduce_sum(outputs["loss"].double())) / distributed.world_size()
        )
        self.seen += batch["image"].double().flatten(1).mean(1).tolist()
        if module.batches == self.save_at:
            trainer.save_checkpoint(self.path)


def train(
    kind: str, strategy: str, folder: Path, name: str, save_at: int | None = None, resume: str = ""
) -> dict[str, Any]:
    """Train four updates, with validation and pictures; what came out, with full tensors."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    strategies = {
        "fsdp": lambda: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    }
    module, ema, watch = KINDS[kind](), EMA(0.9), Watch(save_at, folder / f"{name}.ckpt")
    measure = Measure(
        str(folder / "tiny.safetensors"),
        num_samples=7,
        every_n_epochs=None,
        every_n_updates=1000,
        batch_size=3,
        cache=str(folder / f"cache-{world}-{name}"),
        weights="both",
    )
    own = [measure] if kind == "generator" and not resume else []
    root = folder / f"{name}-{world}"
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=world,
        strategy=strategies.get(strategy, lambda: strategy)(),
        logger=False,
        callbacks=[ema, watch, Grids(SimpleNamespace(folder=folder), Sampling(), columns=1), *own],  # type: ignore[arg-type]
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        use_distributed_sampler=False,
    )
    L.seed_everything(0, verbose=False)
    data = TINY.make_data(GLOBAL_BATCH // world)
    data.val_length = 9  # two batches for one process, one for the other
    trainer.fit(module, data, ckpt_path=folder / resume if resume else None)
    result = {
        "losses": watch.losses,
        "seen": distributed.all_gather(watch.seen),
        "weights": {n: whole(t).clone() for n, t in module.state_dict().items()},
        "ema": {n: whole(t).clone() for n, t in ema.average.items()},
        "metrics": {n: float(v) for n, v in trainer.callback_metrics.items() if not measured(n)},
    }
    if own:
        result["distances"] = measure.distances
    if distributed.rank() == 0:
        torch.save(result, folder / f"{name}-{world}.pt")
    return result


def draw(folder: Path, name: str) -> None:
    """Images of the sharded run's checkpoint, 7 of them, so that shares are uneven."""
    model, out = str(folder / "generator-fsdp.ckpt"), str(folder / name)
    sample.main([model, "--out", out, "--count", "7", "--batch-size", "3", "--device", "cpu"])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for kind, ddp in (("tokenizer", "ddp_find_unused_parameters_true"), ("generator", "ddp")):
        for name, strategy in (("ddp", ddp), ("fsdp", "fsdp")):
            train(kind, strategy, folder, f"{kind}-{name}", save_at=SAVE_AT)
            train(kind, strategy, folder, f"{kind}-{name}-again", resume=f"{kind}-{name}.ckpt")
            train(kind, strategy, folder, f"{kind}-{name}-from-one", resume=f"{kind}-one.ckpt")
    draw(folder, "two")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
