"""`train.py --dry_run`: try a config at its real size, without data and without weights.

Two updates on images of noise, at the smallest batch that works, say what the run would take:
parameters, memory, seconds, operations, hours on a device. What the config reads from files that
are not here is built from the recipe of its name, with random weights. Nothing is written.
"""

import logging
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from tessellar.absent import random_where_absent, stays_random
from tessellar.callbacks.ema import EMA
from tessellar.cli.catalogue import class_path, config_file, entries
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.sets.noise import NoiseData
from tessellar.errors import UserError
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.training.base import TrainingModule
from tessellar.training.facts import BYTES, STATES
from tessellar.training.flops import CountFlops, countable, peak_of
from tessellar.training.generator_module import ImageGeneratorModule

log = logging.getLogger(__name__)
UPDATES = 2
NUM_CLASSES = 10  # where nothing reads them
BATCHES = (1, 2, 4, 8)  # the first that works: statistics of a batch need two images
SHARE = 0.4  # of a device's peak, in the projection
DEVICE = "H100"
PROCESSES = 8  # of a config with a strategy
SPARE = 1.5  # times the weights and their states: activations come on top


class Called(Protocol):
    """What a parsed command line of `train.py` has."""

    config: Any
    model: TrainingModule
    datamodule: ImageDataModule


@dataclass(frozen=True)
class Tried:
    """What a dry run found; memory in bytes, operations of one image. None: not run, or not
    countable.
    """

    trained: int
    frozen: int
    states: int  # bytes of weights, gradients, optimizer and averages
    where: str
    batch: int | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    operations: int | None = None
    images: int | None = None
    device: str = DEVICE
    hours: float | None = None
    absent: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For the reader."""
        told = [
            f"parameters: {self.trained:,} trained, {self.frozen:,} frozen; "
            f"{self.states / 1e9:,.2f} GB of weights, gradients, optimizer and averages"
        ]
        if self.seconds is None:
            told.append(f"not run: {self.where}")
        else:
            told.append(
                f"{UPDATES} updates of {self.batch} on {self.where}: "
                f"{self.seconds:,.2f} s an update, {(self.peak_memory or 0) / 1e9:,.2f} GB at most"
            )
        if self.operations is None:
            told.append("operations: not countable without a run")
        else:
            told.append(f"operations: {self.operations / 1e9:,.4g} GFLOP an image")
        if self.hours is not None:
            told.append(
                f"{self.images:,} images in all: about {self.hours:,.3g} hours on one {self.device} "
                f"at {SHARE:.0%} of its peak"
            )
        if self.absent:
            told.append(f"random, since not here: {', '.join(self.absent)}")
        return told


class Stopwatch(L.Callback):
    """Seconds and operations of each update; operations of the first, seconds of the last."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.operations: int | None = None
        self._count: CountFlops | None = None
        self._start = 0.0
        self._before = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Products of an optimizer (Muon's) are no images' and are left out."""
        for player in pl_module.players:
            for optimizer in player.optimizers:
                optimizer.register_step_pre_hook(self._remember)
                optimizer.register_step_post_hook(self._forget)

    def _remember(self, *_: Any) -> None:
        if self._count is not None:
            self._before = self._count.total

    def _forget(self, *_: Any) -> None:
        if self._count is not None:
            self._count.total = self._before

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.operations is None and countable(pl_module):
            self._count = CountFlops().__enter__()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._start
        self._end()

    def on_exception(self, *_: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._count is not None:
            self._count.__exit__(None, None, None)
            self.operations = self._count.total
            self._count = None


def dry_run(make: Callable[[], Called], device: str = DEVICE) -> Tried:
    """Try what `make` gives, called twice: on the meta device, and for real where that fits into
    memory. Raises UserError for a device whose peak is not known.
    """
    if peak_of(device, "bf16-mixed") is None:
        raise UserError(f"no peak rate is known of {device!r}: such as H100, H200, A100, B200")
    with random_where_absent() as absent:
        with torch.device("meta"):
            sized = make()
            operations, _ = operations_of(sized.model)
        trained, frozen = parameters(sized.model)
        averaged = 0 if sized.config.ema is None else 1
        states = BYTES * (trained * (STATES - 1 + averaged) + frozen)
        images = images_in_all(sized)
        free = free_memory()
        if states * SPARE > free:
            where = f"{states / 1e9:,.1f} GB and activations do not fit into {free / 1e9:,.1f} GB"
            found = Tried(trained, frozen, states, where, operations=operations)
        else:
            run = at_smallest_batch(make)
            found = Tried(trained, frozen, states, **run)
    hours = None
    peak = peak_of(device, "bf16-mixed")
    if found.operations is not None and images is not None and peak is not None:
        hours = found.operations * images / (SHARE * peak) / 3600
    return Tried(
        **{
            **asdict(found),
            "images": images,
            "device": device,
            "hours": hours,
            "absent": tuple(absent),
        }
    )


def at_smallest_batch(make: Callable[[], Called]) -> dict[str, Any]:
    """What UPDATES updates took, at the first of BATCHES that works."""
    for batch in BATCHES:
        cli = make()
        try:
            return run_updates(cli, batch)
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:
            if batch == BATCHES[-1]:
                raise
            log.info("a batch of %d does not work: %s", batch, " ".join(str(error).split())[:200])
    raise AssertionError("one of them returns or raises")


def run_updates(cli: Called, batch: int) -> dict[str, Any]:
    """Train on noise for UPDATES updates of `batch` images each."""
    module = cli.model
    config = cli.config
    module.accumulate = 1
    loss = getattr(module, "loss", None)
    if getattr(loss, "discriminator", None) is not None:
        loss.adversarial_start = 0  # type: ignore[union-attr]  # both sides train from the first update
    watch = Stopwatch()
    callbacks: list[L.Callback] = [watch]
    if config.ema is not None:
        callbacks.append(EMA(config.ema))
    trainer = L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,
        max_steps=UPDATES,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    conditioner = module.parts().get("conditioner")
    num_classes = getattr(conditioner, "num_classes", None) or NUM_CLASSES
    data = NoiseData(module.tokenizer.image_size, num_classes, batch)
    trainer.fit(module, data)
    return {
        "where": device_name(module.device),
        "batch": batch,
        "seconds": watch.seconds,
        "peak_memory": peak_memory(module.device),
        "operations": None if watch.operations is None else watch.operations // batch,
    }


def parameters(module: TrainingModule) -> tuple[int, int]:
    """Numbers of those that an optimizer has, and of all others."""
    trained = sum(p.numel() for player in module.make_players() for p in player.parameters)
    return trained, sum(p.numel() for p in module.parameters()) - trained


def images_in_all(cli: Called) -> int | None:
    """Updates times the batch of all processes; None for a run that counts epochs."""
    config = cli.config.trainer
    if config.max_steps is None or config.max_steps < 0:
        return None
    several = PROCESSES if cli.config.trainer.strategy != "auto" else 1
    return config.max_steps * cli.datamodule.batch_size * cli.model.accumulate * several


def operations_of(module: TrainingModule) -> tuple[int | None, bool]:
    """Operations of one image on the meta device (the frozen tokenizer forward, what is trained forward
    and backward), and whether they are those of training.

    A tokenizer that looks at values only while it trains (at its codes, at drawn lengths) is counted
    as it is used; a generator that looks at values is taken for 6 operations a parameter and token.
    """
    found = _counted(module)
    if found is not None:
        return found, True
    if isinstance(module, ImageGeneratorModule):
        trained, _ = parameters(module)
        return 6 * trained * module.tokenizer.layout.length, False
    module.eval()
    return _counted(module), False


def _counted(module: TrainingModule) -> int | None:
    images = torch.zeros(1, 3, *module.tokenizer.image_size, device="meta")
    # Autocast does not know the meta device.
    no_autocast = patch("torch.autocast", lambda *_, **__: nullcontext())
    try:
        with CountFlops() as count, no_autocast, torch.device("meta"):
            _forward(module, images).backward()
    except (RuntimeError, NotImplementedError, UserError):
        return None  # it looks at values, which the meta device does not have
    return count.total


def _forward(module: TrainingModule, images: Tensor) -> Tensor:
    """Something to differentiate: the losses of a generator, the pixels of a tokenizer."""
    if not isinstance(module, ImageGeneratorModule):
        return module.tokenizer(images).reconstruction.sum()
    labels = torch.zeros(1, dtype=torch.long, device="cpu")
    condition = module.model.conditioner({"label": labels}).to("meta")
    terms = module.model.generator.loss(module.tokens_of({"image": images}), condition)
    return torch.stack(list(terms.values())).sum()


def stand_in(arguments: Namespace, config: Path | None) -> None:
    """Put recipes of tokenizers into a run's `model.init_args` where exports are not here."""
    path = arguments.get("tokenizer")
    if isinstance(path, str) and stays_random(path):
        arguments["tokenizer"] = checked(recipe_of(path, config))
    elif isinstance(path, Namespace) and "init_args" in path:
        stand_in(path.init_args, config)
    start = arguments.get("init_from")
    if isinstance(start, str) and stays_random(start):
        arguments["init_from"] = None


def recipe_of(path: str, config: Path | None) -> dict[str, Any]:
    """The tokenizer that an export's path names, as a YAML holds it: that of the config beside this
    one which trains `runs/NAME/export`, or the preset NAME (its first size), or NAME_512 at that size.

    Raises UserError for a name that is neither.
    """
    given = Path(path)
    name = given.parent.name if given.name == "export" else given.name
    beside = None if config is None else config_beside(config, name)
    if beside is not None:
        recipe = yaml.safe_load(beside.read_text())["model"]["init_args"]["tokenizer"]
        recipe = dict(recipe) if isinstance(recipe, dict) else {"class_path": recipe}
        # A frozen tokenizer has no teacher.
        options = {k: v for k, v in recipe.get("init_args", {}).items() if k != "teacher"}
        return {**recipe, "init_args": options}
    presets = [preset for entry in entries("tokenizers") for preset in entry.offers]
    of_sizes = [preset for preset in presets if preset.startswith(f"{name}_")]
    if name in presets or of_sizes:
        found = name if name in presets else of_sizes[0]
        return {"class_path": class_path("tokenizers", found), "init_args": {}}
    stem, _, size = name.rpartition("_")
    if stem not in presets or not size.isdecimal():
        raise UserError(
            f"{path} is not here, and no config or preset is named {name}: give --model.tokenizer"
        )
    options = {"image_size": int(size)}
    return {"class_path": class_path("tokenizers", stem), "init_args": options}


def config_beside(config: Path, name: str) -> Path | None:
    """The YAML in a config's folder whose run is `name`, which may begin with the family's name and
    end with its teachers.
    """
    whole = name.partition("(")[0]
    for stem in (whole, whole.rpartition("-")[2]):
        beside = config.with_name(f"{stem}.yaml")
        if beside.exists() and beside != config:
            return beside
    return None


def checked(recipe: dict[str, Any]) -> Namespace:
    """A tokenizer's recipe as a parsed config holds it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tokenizer", type=Tokenizer)
    return parser.parse_object({"tokenizer": recipe}).tokenizer


def config_of(configs: Sequence[Any] | None) -> Path | None:
    """The file of a run's last config."""
    return config_file(str(list(configs)[-1])) if configs else None


def free_memory() -> int:
    """Bytes that a run may take: of the GPU where there is one, else of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: what is there is tried
        return sys.maxsize
    facts = dict(line.split(":") for line in lines)
    return int(facts["MemAvailable"].split()[0]) * 1024


def peak_memory(device: torch.device) -> int:
    """The most bytes that the run held: of the GPU, or of this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of this processor"
