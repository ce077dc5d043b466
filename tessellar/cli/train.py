"""`train.py`: LightningCLI in subclass mode; everything a run writes goes to runs/<name>/.

    python train.py --config fashion_mnist/tokenizer --name tok --data.root DIR
    python train.py validate --config fashion_mnist/tokenizer --name tok --resume auto
    python train.py --config imagenet256/llamagen_b --dry_run H100

Any key of the YAML can be given as an option; `--print_config` shows them all, `--model.help CLASS`
explains a class.
"""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError
from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.callbacks.codebook_usage import CodebookUsage
from tessellar.callbacks.companions import Companions, lost_process, meeting, processes_beside
from tessellar.callbacks.ema import EMA
from tessellar.callbacks.grids import Grids
from tessellar.callbacks.interruption import Interrupted, Interruption
from tessellar.callbacks.run_progress import RunProgress
from tessellar.callbacks.throughput import Throughput
from tessellar.checkpoints.card import Record, command_line, commit
from tessellar.checkpoints.description import PARTS
from tessellar.checkpoints.export import export_parts
from tessellar.checkpoints.hub import is_hub_id
from tessellar.checkpoints.kinds import look_into
from tessellar.checkpoints.reading import read_source
from tessellar.cli.catalogue import class_path, config_file, entries
from tessellar.cli.dry_run import DEVICE, config_of, dry_run, stand_in
from tessellar.cli.errors import put_tracebacks_into
from tessellar.cli.functions import check_words
from tessellar.cli.mistakes import cause_of, explain, nearest
from tessellar.cli.next_steps import Called, next_steps
from tessellar.cli.nulls import read_none_as_null, refuse_nulls, refuse_nulls_within
from tessellar.cli.older_sampling import refuse_older
from tessellar.cli.report import REPORT, write_report
from tessellar.cli.spelling import spelled
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.layers.precision import computes_bfloat16
from tessellar.networks.vision import stand_ins
from tessellar.places import in_runs, put_runs_into, runs_root, runs_stay
from tessellar.protocol.configured import Configured, check_buildable
from tessellar.protocol.packages import trust, trusting
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.settings import Sampling
from tessellar.training.base import NonFiniteGradients, TrainingModule
from tessellar.training.continuing import CONFIG, compare_settings, flat, say_where
from tessellar.training.run_log import LOG, RunLog, logging_into
from tessellar.training.runs import BEST, CHECKPOINTS, LAST, Run, check_data, restoring
from tessellar.training.wandb_page import WandbOptions, WandbPage

log = logging.getLogger(__name__)
PRECISIONS = ("bf16-mixed", "32-true")
TAKING_TURNS = "ddp_find_unused_parameters_true"
QUIET = (
    "LightningCLI's args parameter",
    ".*isinstance\\(treespec, LeafSpec\\)",
    "Found .* in eval mode",
    ".*does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",
    "It is recommended to use `self.log",
    "You're resuming from a checkpoint that ended before the epoch ended",
)


class TrainCLI(LightningCLI):
    """Adds the run's own options to Lightning's."""

    run_folder: Run
    log_file: RunLog
    asked: str  # the whole config as it was given

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="folder under runs/ (default: the YAML's name)",
        )
        parser.add_argument(
            "--runs_root",
            type=str | None,
            default=None,
            help="where runs lie (default: what TESSELLAR_RUNS names, or runs)",
        )
        parser.add_argument(
            "--package",
            type=str | None,
            default=None,
            help="packages of others whose classes may be built",
        )
        parser.add_argument(
            "--resume", type=str | None, default=None, help="auto, or a checkpoint to continue from"
        )
        parser.add_argument(
            "--ema", type=float | None, default=None, help="decay of averaged weights; null is none"
        )
        parser.add_argument(
            "--ema_also",
            type=list[float],
            default=[],
            help="further decays to keep averages of, which evaluate.py sweep RUN.ckpt --ema compares",
        )
        parser.add_argument(
            "--wandb",
            type=str | None,
            default=None,
            help="a project switches Weights & Biases on; with --wandb_entity, --wandb_group, "
            "--wandb_tags a,b, --wandb_notes",
        )
        for option in ("entity", "group", "tags", "notes"):
            parser.add_argument(f"--wandb_{option}", type=str | None, default=None)
        parser.add_argument(
            "--wandb_export", type=bool, default=False, help="true: send the export there too"
        )
        parser.add_argument(
            "--log_every", type=PositiveInt, default=50, help="batches between lines of the logs"
        )
        parser.add_argument(
            "--save_every", type=PositiveInt, default=1000, help="updates between checkpoints"
        )
        parser.add_argument(
            "--keep_every",
            type=PositiveInt | None,  # type: ignore[operator]
            default=None,
            help="updates between checkpoints that stay, for curves over training",
        )
        parser.add_argument(
            "--checkpoint",
            type=Literal["whole", "sharded", "asynchronous"],
            default="whole",
            help="one file; or a folder to which all processes write, also while training goes on",
        )
        parser.add_argument(
            "--export",
            type=Literal["last", "best"],
            default="last",
            help="which weights are exported at the end: those of the end, or of best.ckpt",
        )
        parser.add_argument(
            "--best_metric",
            type=str | None,
            default=None,
            help="what best.ckpt is chosen by (default: the model's)",
        )
        parser.add_argument(
            "--best_mode",
            type=Literal["min", "max"],
            default="min",
            help="which value of it is best",
        )
        parser.add_argument(
            "--sampling", type=Sampling, default=Sampling(), help="how sample grids are drawn"
        )

    def _set_seed(self) -> None:
        """Lightning takes another seed, in a warning, for one out of range."""
        seed = self.config.get("seed_everything")
        if not isinstance(seed, bool) and seed is not None:
            check_whole("seed_everything", seed, least=0, most=2**32 - 1)
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        config: Any = self.config
        trust(config.package or "")
        self._refuse_nulls()
        name = with_teachers(
            config.name or _default_name(config.config), stand_ins(config.model.as_dict())
        )
        if config.runs_root:
            put_runs_into(config.runs_root)
        self.run_folder = Run(name, runs_root(), resume=config.resume)
        self.log_file = RunLog(self.run_folder.folder)
        check_devices(config.trainer)
        _leave_emulated_bfloat16(config.trainer)
        self.asked = self.parser.dump(self.config, skip_unset=False)
        stand_in(config.model.init_args, config_of(config.config))
        if self.run_folder.checkpoint is not None:
            self._read_no_start_files(config.model.init_args, self.run_folder.checkpoint)

    def _refuse_nulls(self) -> None:
        """Raise UserError for a key of null where that is no value of it."""
        given = self.config.as_dict()  # type: ignore[union-attr]
        for action in self.parser._actions:
            name = action.dest
            # A seed of null is one that Lightning draws.
            if name in given and given[name] is None and name != "seed_everything":
                if action.default is not None:
                    raise UserError(f"{name} is null; leave it out for its default")
        refuse_nulls(given["trainer"], L.Trainer, "trainer")
        for part in ("model", "data"):
            refuse_nulls_within(given[part], None, part)
        refuse_nulls_within(given["sampling"], Sampling, "sampling")

    def _read_no_start_files(self, model: Any, checkpoint: Path) -> None:
        """What a checkpoint replaces anyway is not asked for: the source of a fine-tuning or of an
        alignment, a tokenizer that is gone.
        """
        if "init_from" in model:
            model.init_from = None
        if "source" in model:
            model.source = str(checkpoint)
        path = model.get("tokenizer")
        if isinstance(path, str) and not in_runs(path).exists() and not is_hub_id(path):
            log.info("%s is not there any more: the tokenizer of %s is taken", path, checkpoint)
            model.tokenizer = read_source(checkpoint).tokenizer()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config: Any = self.config_init
        run = self.run_folder
        if isinstance(config.seed_everything, int):  # true is a seed that Lightning draws
            self.datamodule.follow(int(os.environ.get("PL_GLOBAL_SEED", config.seed_everything)))
        best_metric, best_mode = self.model.best_by
        _refuse_decided(config.trainer)
        callbacks: list[L.Callback] = [
            LambdaCallback(on_train_start=lambda trainer, _: self.begin(trainer)),
            Throughput(config.log_every),
            RunProgress(),
            CodebookUsage(config.log_every, self.model.least_codes_used),
            Grids(run, config.sampling),
            Companions(),
            Interruption(run.interrupted),
            Checkpoints(
                run.folder / CHECKPOINTS,
                config.save_every,
                config.best_metric or best_metric,
                config.best_mode if config.best_metric else best_mode,
                config.keep_every,
                config.checkpoint,
            ),
        ]
        if config.ema is not None:
            callbacks.insert(0, EMA(config.ema, also=config.ema_also))
        return super().instantiate_trainer(
            **kwargs,
            **(
                {"strategy": TAKING_TURNS}
                if config.trainer.strategy == "ddp" and self.model.takes_turns
                else {}
            ),
            logger=run.loggers(config.wandb, _wandb_options(config)),
            callbacks=[*(config.trainer.callbacks or []), *callbacks],
            default_root_dir=run.folder,
            log_every_n_steps=config.log_every,
            enable_progress_bar=False,  # RunProgress shows the run, not its epochs
            enable_model_summary=False,
        )

    def begin(self, trainer: L.Trainer) -> None:
        """Nothing of the run's folder changes before: whatever can be refused has been."""
        if trainer.is_global_zero:
            self.run_folder.begin(self.asked, run_facts(self))
            self.log_file.open()
            settings = flat(yaml.safe_load(self.asked))
            settings.pop("config", None)
            for logger in trainer.loggers:
                logger.log_hyperparams(settings)


def main(argv: Sequence[str]) -> int:
    """`[fit | validate] options`: train or validate as the arguments say; returns the exit code.

    It is 128 + n where signal n ended the run.
    """
    actions = {"fit": fit, "validate": validate}
    word = argv[0] if argv and not argv[0].startswith("-") else "fit"
    if word not in actions:
        raise UserError(_no_action(word, list(actions)))
    given = list(argv[1:] if argv[:1] == [word] else argv)
    if not given:
        raise UserError(
            f"give a config: {spelled('train')} --config demo/tokenizer, or the path of a YAML; "
            "`tessellar list configs` lists ours, --help says more"
        )
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # its table
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message=message)
        try:
            with trusting(_given(given, "--package")), runs_stay():
                if "--dry_run" in given:
                    try_out(given)
                else:
                    actions[word](parse(given))
        except Interrupted as signal:
            if rank_zero_only.rank == 0:
                print(signal, file=sys.stderr)
            return 128 + signal.number
        except SystemExit as leaving:
            # Lightning's answer before and after training.
            if isinstance(leaving.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from leaving
            raise
        except MisconfigurationException as error:
            raise UserError(" ".join(str(error).split())) from error
    return 0


def try_out(given: Sequence[str]) -> None:
    """Print what the run would take (`--dry_run`), on the device that `--dry_run DEVICE` names."""
    words = list(given)
    place = words.index("--dry_run")
    named = len(words) > place + 1 and not words[place + 1].startswith("-")
    device = words.pop(place + 1) if named else DEVICE
    words.pop(place)
    for line in dry_run(lambda: parse(words), device).lines():
        print(line)


def fit(cli: TrainCLI) -> None:
    """Train with log.txt and run.json as witnesses: what was said, and how it ended."""
    run = cli.run_folder
    if not cli.trainer.is_global_zero:
        _fit(cli)
        return
    try:
        with logging_into(cli.log_file):
            _fit(cli)
    except (Interrupted, KeyboardInterrupt):
        run.end("interrupted")
        raise
    except BaseException as error:
        facts: dict[str, Any] = {"error": " ".join(str(error).split())[:500]}
        if isinstance(error.__cause__, NonFiniteGradients):
            facts["diverged"] = True
        with suppress(UserError):  # the disk is full: the first error is the one to tell
            run.end("failed", facts)
        raise


def _fit(cli: TrainCLI) -> None:
    """Train, then write the run's export and what it cost."""
    run = cli.run_folder
    trainer = cli.trainer
    check(cli)
    if run.checkpoint is not None and trainer.is_global_zero:
        compare_settings(run.checkpoint.parent.parent / CONFIG, cli.asked)
        say_where(run.checkpoint, trainer.max_steps)
    if trainer.is_global_zero:
        run.create()
        log.info("data: %s: %s", cli.datamodule.name, cli.datamodule.found())
        log.info("model: %s", cli.model.facts())
        log.info("writes %s: checkpoints, metrics.csv, pictures, %s, export", run.folder, LOG)
    put_tracebacks_into(run.folder)
    last = run.folder / CHECKPOINTS / LAST
    companions = next(c for c in trainer.callbacks if isinstance(c, Companions))  # type: ignore[attr-defined]
    try:
        with restoring(run.checkpoint), meeting(trainer, run.abandon):
            trainer.fit(cli.model, cli.datamodule, ckpt_path=run.checkpoint, weights_only=True)
    except NonFiniteGradients as error:
        raise UserError(
            f"{error}. Last checkpoint: {last if last.exists() else 'none yet'}"
        ) from error
    except Interrupted:
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        lost = lost_process(error, processes_beside(trainer))
        if lost is None:
            raise
        if companions.first_lives:
            sys.exit(2)
        raise UserError(
            f"{lost}; {'continue with --resume auto' if last.exists() else 'nothing was saved'}"
        ) from error
    finally:
        if trainer.is_global_zero and not trainer.state.finished:
            run.abandon()
    if trainer.is_global_zero and trainer.state.finished and not run.ended_at(cli.model.updates):
        finish(cli)


def validate(cli: TrainCLI) -> None:
    """Print the validation metrics of a checkpoint, of the averaged weights where it has some."""
    run = cli.run_folder
    trainer = cli.trainer
    if run.checkpoint is None:
        raise UserError(
            "validate needs --resume auto (this run's last checkpoint) or --resume FILE"
        )
    check(cli, training=False)
    trainer.logger = None
    kept = [c for c in trainer.callbacks if not isinstance(c, (Grids, EMA))]  # type: ignore[attr-defined]
    trainer.callbacks = [EMA(), *kept]  # type: ignore[attr-defined]
    with restoring(run.checkpoint):
        (metrics,) = trainer.validate(
            cli.model, cli.datamodule, ckpt_path=run.checkpoint, verbose=False, weights_only=True
        )
    if trainer.is_global_zero:
        for name, value in sorted(metrics.items()):
            if name != "step":
                print(f"{name} {value:.6g}")


def parse(argv: Sequence[str]) -> TrainCLI:
    """The instantiated command line; raises UserError, in one line, for whatever does not fit."""
    torch.set_float32_matmul_precision("high")
    check_words(argv)
    argv = with_models(with_config_files(argv))
    refuse_older(argv)
    try:
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
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
        )
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    except (ArgumentError, ValueError, TypeError) as error:
        raise cause_of(error) or UserError(
            explain(str(error), _options(), _given(argv, "--config"), argv)
        ) from error


def with_config_files(argv: Sequence[str]) -> list[str]:
    """`argv` with the paths of the configs that it names; raises UserError where there are none."""
    words = list(argv)
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        if before == "--config" and not word.startswith("-"):
            words[place] = str(config_file(word))
        elif word.startswith("--config="):
            words[place] = f"--config={config_file(word.partition('=')[2])}"
    return words


#: Options that take a model, and the list in which its short name stands.
MODELS = {"--model.tokenizer": "tokenizers", "--model.generator": "generators"}


def with_models(argv: Sequence[str]) -> list[str]:
    """`argv` with the class paths of models that are given by their short names, such as titok_b64.

    Raises UserError for a name that nothing has; those of other packages are left to the parser.
    """
    words = list(argv)
    ours = not _given(argv, "--package")
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        before = words[place - 1] if place else ""
        if equals and option in MODELS:
            words[place] = f"{option}={_model(option, value, ours)}"
        elif before in MODELS:
            words[place] = _model(before, word, ours)
    return words


def _model(option: str, name: str, ours: bool) -> str:
    """The class path of a model of ours; anything else, such as an export's folder, as it is."""
    if not name.isidentifier() or name in ("null", "None") or Path(name).exists():
        return name
    kind = MODELS[option]
    path = class_path(kind, name)
    if path is None and ours:
        known = [offered for entry in entries(kind) for offered in entry.offers]
        hint = nearest(name, known, listed=0)
        raise UserError(
            f"{option} {name}: there is no model of that name{hint}; `tessellar list {kind}` lists them"
        )
    return path or name


def _no_action(word: str, actions: list[str]) -> str:
    """What is wrong with a first word that is no action: often it is a config."""
    try:
        config_file(word)
    except UserError:
        return f"{word!r} is not an action; there are {', '.join(actions)}{nearest(word, actions, listed=0)}"
    return f"{word} is a config: {spelled('train')} --config {word}"


#: Trainer options that a run decides itself, and what says the same here.
DECIDED = {
    "log_every_n_steps": "set --log_every",
    "logger": "metrics.csv and TensorBoard are always written, --wandb PROJECT adds Weights & Biases",
    "default_root_dir": "set --name and --runs_root",
    "enable_checkpointing": "checkpoints are always written; --save_every says how often",
    "enable_progress_bar": "a bar is shown on a terminal, lines elsewhere",
    "enable_model_summary": "the parameters are counted in one line; `convert.py info` tells more of an export",
    "accumulate_grad_batches": "set --model.accumulate",
    "gradient_clip_val": "set --model.clip",
    "gradient_clip_algorithm": "gradients are clipped by their norm: set --model.clip",
    "use_distributed_sampler": "the order of the data is the same on any number of processes",
    "barebones": "it switches off what a run writes",
    "model_registry": "exports are folders; docs/checkpoints.md says how to share them",
}
DEFAULTS = inspect.signature(L.Trainer.__init__).parameters


def try_integers_first(make: Callable[..., Any]) -> None:
    """Have a parser take 1 for a number of batches, not for the share 1.0 of all of them.

    A parser tries the types of a union in their order, and `typing` keeps one object for
    Optional[Union[float, int]] and Optional[Union[int, float]]: whichever a package made first.
    """
    for name, kind in get_type_hints(make).items():
        kinds = set(get_args(kind))
        if kinds == {int, float}:
            make.__annotations__[name] = int | float
        elif kinds == {int, float, NoneType}:
            make.__annotations__[name] = int | float | None


try_integers_first(L.Trainer.__init__)
read_none_as_null()


def _refuse_decided(trainer: Any) -> None:
    """Raise UserError for a trainer option that would be overridden."""
    for name, instead in DECIDED.items():
        if trainer.get(name) != DEFAULTS[name].default:
            raise UserError(f"trainer.{name} is decided by the run: {instead}")


def _options() -> list[str]:
    """Names of the options outside of classes."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_argument("--config", "--seed_everything", "--model", "--data")
    TrainCLI.add_arguments_to_parser(None, parser)  # type: ignore[arg-type]
    return [option.lstrip("-") for option in parser._option_string_actions]


def _given(argv: Sequence[str], option: str) -> list[str]:
    """Values of an option on the command line."""
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    return [
        b if a == option else a.partition("=")[2] for a, b in pairs if a.split("=")[0] == option
    ]


def _default_name(configs: Any) -> str:
    if not configs:
        raise UserError("give a --config, and --name for the folder under runs/")
    path = Path(str(configs[-1]))
    # A config right here lies in no folder that has a name.
    return "-".join(filter(None, (path.parent.name, path.stem)))


def with_teachers(name: str, teachers: list[str]) -> str:
    """A run's name, saying by which networks of our own it is taught in place of published ones."""
    suffix = f"(teacher={'+'.join(sorted(set(teachers)))})"
    return name if not teachers or name.endswith(suffix) else name + suffix


def run_facts(cli: TrainCLI) -> dict[str, Any]:
    """What run.json says from the start: the machine, the code and the data."""
    return {**cli.run_folder.facts(cli.trainer), "data": cli.datamodule.facts().as_dict()}


def on_processor(trainer: Any) -> bool:
    """Whether a run's trainer options take the processor, not a GPU."""
    graphics = torch.cuda.is_available() or torch.backends.mps.is_available()
    return trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not graphics)


def check_devices(trainer: Any) -> None:
    """Raise UserError for more processes on the processor than a slip of the hand can mean: Lightning
    starts any number.
    """
    devices = str(trainer.devices)
    cores = os.cpu_count() or 1
    if devices.isdecimal() and int(devices) > max(8, 2 * cores) and on_processor(trainer):
        raise UserError(
            f"trainer.devices is {devices}: that many processes would share {cores} processor cores; give at most "
            f"{max(8, 2 * cores)}, or --trainer.accelerator gpu"
        )


def _leave_emulated_bfloat16(trainer: Any) -> None:
    """Set float32 where a run on the processor asks for bfloat16 that this one only emulates."""
    if on_processor(trainer) and trainer.precision == "bf16-mixed" and not computes_bfloat16():
        log.warning(
            "this processor has no bfloat16 arithmetic and emulates it very slowly: "
            "trainer.precision is 32-true instead of bf16-mixed"
        )
        trainer.precision = "32-true"


def check(cli: TrainCLI, training: bool = True) -> None:
    """Raise UserError for what would stop the run later: trainer options we do not take, data that
    does not fit.

    Data of other classes than the checkpoint's may be measured, where no label is read, but not
    trained on.
    """
    model = cli.model
    data = cli.datamodule
    trainer = cli.trainer
    check_buildable([part.config for part in model.modules() if isinstance(part, Configured)])
    precision = trainer.precision
    if str(cli.config.trainer.precision) in ("16", "16-mixed"):  # type: ignore[union-attr]
        precision = "16-mixed"  # on a CPU Lightning takes it for bf16-mixed
    if precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision {precision} is not supported: use {' or '.join(PRECISIONS)}"
        )
    data.check_files()  # raises where files are missing, before the run's folder exists
    if cli.run_folder.checkpoint is not None and trainer.is_global_zero:
        check_data(cli.run_folder.checkpoint, data, names_matter=training or model.reads_labels)
    model.check_data(data)


def finish(cli: TrainCLI) -> None:
    """Write the export of the run (averaged weights where they are kept) and its costs."""
    module = cli.model
    run = cli.run_folder
    trainer = cli.trainer
    if not run.begun:  # all updates were made before, and a kill came before the export
        cli.begin(trainer)
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    speed = next(c for c in trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]
    export, steps = _exported(cli)
    costs = {"updates": module.updates, "exported": export, **speed.costs()}
    run.unmark()
    record = Record(
        title=run.name,
        weights="raw" if ema is None else "ema",
        data=cli.datamodule.name,
        steps=steps,
        command=command_line(),
        commit=commit(),
    )
    if module.is_sharded or export == BEST:
        _export_checkpoint(run, record, export)
    elif ema is not None:
        with ema.swapped(module):
            module.export(run.folder / "export", record)
    else:
        module.export(run.folder / "export", record)
    run.end("finished", costs)
    print(f"export: {run.folder / 'export'}")
    print(f"report: {write_report([run.folder], run.folder / REPORT)}")
    pages = [logger for logger in trainer.loggers if isinstance(logger, WandbPage)]
    for page in pages if cli.config_init.wandb_export else []:  # type: ignore[union-attr]
        page.send_export(run.folder / "export")
    for line in next_steps(module, run.folder, _called(cli)):
        log.info("%s", line)


def _called(cli: TrainCLI) -> Called:
    """How the run was called, for what comes next."""
    config: Any = cli.config
    options = (yaml.safe_load(cli.asked).get("data") or {}).get("init_args") or {}
    last = config.config[-1] if config.config else "config.yaml"
    return Called(str(last), type(cli.datamodule), options)


def _exported(cli: TrainCLI) -> tuple[str, int]:
    """Which checkpoint the export is of, and its number of updates."""
    best = cli.run_folder.folder / CHECKPOINTS / BEST
    if cli.config_init.export == "best" and best.exists():  # type: ignore[union-attr]
        content = look_into(best)
        return BEST, int(content["global_step"])
    if cli.config_init.export == "best":  # type: ignore[union-attr]
        log.warning("there is no %s, since no validation measured it: the last is exported", BEST)
    return LAST, cli.model.updates


def _wandb_options(config: Any) -> WandbOptions:
    """What the run's options say of its page."""
    tags = tuple(tag.strip() for tag in (config.wandb_tags or "").split(",") if tag.strip())
    return WandbOptions(
        entity=config.wandb_entity,
        group=config.wandb_group,
        tags=tags,
        notes=config.wandb_notes,
        export=config.wandb_export,
    )


def _export_checkpoint(run: Run, record: Record, name: str = LAST) -> None:
    """The export of one of a run's checkpoints: of a sharded run no process holds all weights."""
    source = read_source(run.folder / CHECKPOINTS / name)
    source.check()
    parts = {part: source.build(part) for part in PARTS if part in source.description}
    names = source.class_names
    export_parts(parts, run.folder / "export", record=record, overwrite=True, class_names=names)
