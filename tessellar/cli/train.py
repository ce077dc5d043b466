"""`train.py`: LightningCLI in subclass mode; everything a run writes goes to runs/<name>/.

    python train.py --config configs/fashion_mnist/tokenizer.yaml --name tok --data.init_args.root DIR

Any key of the YAML can be given as an option; `--print_config` shows them all, `--model.help CLASS` explains a class.
"""

import difflib
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from tessellar.callbacks.codebook_usage import CodebookUsage
from tessellar.callbacks.ema import EMA
from tessellar.callbacks.grids import Grids
from tessellar.callbacks.throughput import Throughput
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.interop.card import Record
from tessellar.interop.export import export_generator, export_tokenizer
from tessellar.sampling.settings import Sampling
from tessellar.training.base import TrainingModule
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.runs import Run, commit
from tessellar.training.tokenizer_module import TokenizerModule


class TrainCLI(LightningCLI):
    """Adds the run's own options to Lightning's."""

    run_folder: Run

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str | None, default=None, help="folder under runs/ (default: the YAML's name)"
        )
        parser.add_argument("--resume", type=str | None, default=None, help="auto, or a checkpoint to continue from")
        parser.add_argument("--ema", type=float | None, default=None, help="decay of averaged weights; null is none")
        parser.add_argument("--wandb", type=str | None, default=None, help="a project name switches wandb on")
        parser.add_argument("--log_every", type=int, default=50, help="batches between lines of the logs")
        parser.add_argument("--sampling", type=Sampling, default=Sampling(), help="how sample grids are drawn")

    def before_instantiate_classes(self) -> None:
        name = self.config.name or _default_name(self.config.config)
        self.run_folder = Run(name, resume=self.config.resume)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config, run = self.config_init, self.run_folder
        run.create()
        checkpoints = ModelCheckpoint(run.folder / "checkpoints", filename="{step:08d}", save_last="link")
        callbacks = [Throughput(config.log_every), CodebookUsage(), Grids(run, config.sampling), checkpoints]
        if config.ema is not None:
            callbacks.insert(0, EMA(config.ema))
        return super().instantiate_trainer(
            **kwargs,
            logger=run.loggers(config.wandb),
            callbacks=[*(config.trainer.callbacks or []), *callbacks],
            default_root_dir=run.folder,
            log_every_n_steps=config.log_every,
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
        )


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say; returns the exit code."""
    cli = parse(argv)
    run, trainer = cli.run_folder, cli.trainer
    if trainer.is_global_zero:
        cli.parser.save(cli.config, run.folder / "config.yaml", overwrite=True, skip_none=False)
        run.write("run.json", run.facts(trainer))
    _check_classes(cli.model, cli.datamodule)
    trainer.fit(cli.model, cli.datamodule, ckpt_path=run.checkpoint, weights_only=True)
    if trainer.is_global_zero and trainer.state.finished:
        _finish(cli)
    return 0


def parse(argv: Sequence[str]) -> TrainCLI:
    """The instantiated command line; raises UserError, in one line, for whatever does not fit."""
    torch.set_float32_matmul_precision("high")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            return _cli(argv)
    except ArgumentError as error:
        raise UserError(shorten(str(error), argv)) from error


def _cli(argv: Sequence[str]) -> TrainCLI:
    return TrainCLI(
        TrainingModule,
        ImageDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        run=False,
        args=list(argv),
        parser_kwargs={"exit_on_error": False},
    )


def shorten(message: str, argv: Sequence[str]) -> str:
    """The deepest cause in a parser's message, with the nearest valid name where a key is unknown."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    unknown = re.findall(
        r"[Kk]ey[s]? ['\"]?([\w.]+)['\"]? (?:is|are) not expected|Unrecognized arguments: --([\w.]+)", message
    )
    cause = lines[-1] if lines else message
    if unknown:
        key = next(part for part in unknown[-1] if part)
        known = set(re.findall(r"[A-Za-z_]\w+", " ".join(lines)))
        close = difflib.get_close_matches(key.split(".")[-1], known - {key.split(".")[-1]}, n=1)
        cause = f"key {key!r} is not known" + (f"; did you mean {close[0]!r}?" if close else "")
    files = [a for a in argv if a.endswith((".yaml", ".yml"))]
    return f"{', '.join(files)}: {cause}" if files else cause


def _default_name(configs: Any) -> str:
    if not configs:
        raise UserError("give a --config, and --name for the folder under runs/")
    path = Path(str(configs[-1]))
    return f"{path.parent.name}-{path.stem}"


def _check_classes(model: L.LightningModule, data: ImageDataModule) -> None:
    if isinstance(model, GeneratorModule):
        wanted, size = getattr(model.model.conditioner, "num_classes", None), model.model.tokenizer.image_size
        if wanted is not None and wanted != data.num_classes:
            raise UserError(f"the generator has {wanted} classes; the data set {data.name} has {data.num_classes}")
    else:
        assert isinstance(model, TokenizerModule)
        size = model.tokenizer.image_size
    if tuple(size) != tuple(data.image_size):
        raise UserError(f"the tokenizer takes images of {size}; the data set {data.name} gives {data.image_size}")


def _finish(cli: TrainCLI) -> None:
    """Write the export of the run (averaged weights where they are kept) and its costs."""
    module, run, trainer = cli.model, cli.run_folder, cli.trainer
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
    speed = next(c for c in trainer.callbacks if isinstance(c, Throughput))
    costs = {
        "updates": module.updates,
        "samples_seen": speed.samples,
        "cpu_seconds": round(speed.cpu_seconds, 1),
        "wall_seconds": round(speed.wall_seconds, 1),
    }
    run.write("run.json", {**run.facts(trainer), **costs})
    record = Record(
        title=run.name,
        weights="raw" if ema is None else "ema",
        data=cli.datamodule.name,
        steps=module.updates,
        command=" ".join(["python", *sys.argv]),
        commit=commit(),
    )
    if ema is not None:
        with ema.swapped(module):
            _export(module, run, record)
    else:
        _export(module, run, record)
    print(f"export: {run.folder / 'export'}")


def _export(module: L.LightningModule, run: Run, record: Record) -> None:
    folder = run.folder / "export"
    if isinstance(module, GeneratorModule):
        export_generator(module.model, folder, record=record, overwrite=True)
    elif isinstance(module, TokenizerModule):
        export_tokenizer(module.tokenizer, folder, discriminator=module.discriminator, record=record, overwrite=True)
