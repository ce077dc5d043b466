"""A run's folder, runs/<name>/: its config, checkpoints, pictures, metrics and export. Nothing is
written elsewhere.

Checkpoints of a run: `last.ckpt`, the one before it, and `best.ckpt` by a validation metric.

Each is written beside its place and then moved into it, so that a kill or a full disk during the
write leaves the previous one usable. Lightning's own callback writes in place, and warns about
manual optimisation at every run.
"""

import fcntl
import json
import logging
import os
import platform
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import lightning as L
import torch
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tessellar.checkpoints.card import command_line, commit
from tessellar.checkpoints.data_facts import facts_in, other_class, other_content
from tessellar.checkpoints.frozen import FILE
from tessellar.checkpoints.kinds import is_sharded, look_into
from tessellar.checkpoints.sharded import is_intact
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError, check_is_file, writing
from tessellar.places import in_runs
from tessellar.training.continuing import CONFIG, keep_config
from tessellar.training.metrics_file import MetricsFile
from tessellar.training.wandb_page import WandbOptions, WandbPage

log = logging.getLogger(__name__)


CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
BEST = "best.ckpt"
WANDB_ID = "wandb_id"
LOCK = "lock"
LONGEST_NAME = 200
INTERRUPTED = "interrupted"
RUNNING = "running"
EXPORT = "export"


#: What a run's folder may hold without a checkpoint or an export: such a run may be started again.
OF_A_BEGINNING = (
    r"checkpoints|config(\.\d+)?\.yaml|run\.json|metrics(\.\d+)?\.csv|pictures|tensorboard|wandb|wandb_id|lock|interrupted|log\.txt"
    r"|traceback.*\.txt|.*\.(tmp|part)"
)
LIBRARIES = ("torch", "lightning", "tessellar", "timm", "torchmetrics")


class Run:
    """The folder of one run. A run never writes into another run's folder.

    `resume` is a checkpoint's path, `auto` (continue this run where it has a checkpoint, else start
    it) or None. Raises UserError where the name is taken or the checkpoint does not exist.
    """

    def __init__(self, name: str, root: str | Path = "runs", resume: str | None = None) -> None:
        # A surrogate is no UTF-8, and not printable.
        if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
            raise UserError(f"--name {name!r} must be a plain folder name")
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise UserError(
                f"--name {name[:20]!r}... is longer than the {LONGEST_NAME} bytes of a folder's name"
            )
        self.name = name
        self.folder = Path(root) / name
        self._wandb_id: str | None = None
        self._damaged: list[Path] = []
        self._lock: IO[str] | None = None
        self.parts: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {}  # what run.json says
        self.require_files()
        self.checkpoint = self.find_checkpoint(resume)
        self.begun = False
        # Folders that are taken away again where the run does not begin.
        self._made: list[Path] = []
        if not self.continues and rank_zero_only.rank == 0:
            self.require_free(resume)

    @property
    def continues(self) -> bool:
        """Whether this run's own checkpoint is continued."""
        return self.checkpoint is not None and self.folder in self.checkpoint.parents

    def require_free(self, resume: str | None) -> None:
        """Raise UserError where the folder holds anything that a start would replace; a run without
        results is free.
        """
        results = [self.folder / EXPORT, *sorted((self.folder / CHECKPOINTS).glob("*"))]
        found = None
        for path in results:
            beside = path.suffix == ".part" or FILE.fullmatch(
                path.name
            )  # of a first one that failed
            if found is None and path.exists() and not beside:
                found = path
        if resume == "auto" and found is not None:
            raise UserError(
                f"--resume auto: {self.folder} has no {LAST} to continue from, but {found.relative_to(self.folder)}; "
                f"use another --name, with --model.init_from {found} where its weights shall be taken along"
            )
        taken = found is not None or (self.folder.exists() and not self.folder.is_dir())
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if re.fullmatch(OF_A_BEGINNING, path.name):
                continue
            taken = True
            if resume == "auto":
                raise UserError(
                    f"--resume auto: {self.folder} has no {LAST} to continue from, but {path.name}; "
                    "use another --name"
                )
        if taken:
            raise UserError(
                f"{self.folder} exists; choose another --name, or continue that run with --resume auto"
            )

    def find_checkpoint(self, resume: str | None) -> Path | None:
        """The checkpoint to continue from; for `auto` the one before the last where the last is
        damaged.

        Raises UserError where all are damaged: to start anew would overwrite what is left of the
        run.
        """
        if resume is None:
            return None
        if resume != "auto":
            chosen = in_runs(resume)
            if not (chosen.is_file() or is_sharded(chosen)):
                raise UserError(f"--resume {resume}: there is no such checkpoint")
            if not is_intact(chosen):
                raise UserError(f"--resume {resume}: this checkpoint is damaged, or it is none")
            return chosen
        for name in (LAST, PREVIOUS):
            path = self.folder / CHECKPOINTS / name
            if path.exists() and is_intact(path):
                return path
            if path.exists():
                log.warning("%s is damaged and is left aside", path)
                self._damaged.append(path)
        if self._damaged:
            names = " and ".join(map(str, self._damaged))
            raise UserError(
                f"{names} cannot be read: remove them to start this run from its beginning, or use --name"
            )
        return None

    def loggers(
        self,
        wandb: str | None = None,
        options: WandbOptions = WandbOptions(),  # noqa: B008
    ) -> list[Logger]:
        """CSV always, TensorBoard where it is installed, wandb where a project is named. Nothing is
        written yet.
        """
        loggers: list[Logger] = [MetricsFile(self.folder / "metrics.csv")]
        if find_spec("tensorboard") is not None:
            loggers.append(LateTensorBoard(self, name="", version="tensorboard"))
        if wandb:
            loggers.append(self._wandb(wandb, options))
        return loggers

    def _wandb(self, project: str, options: WandbOptions) -> Logger:
        """Its id lies in the run's folder, so that a resumed run continues its page."""
        if find_spec("wandb") is None:
            raise UserError("--wandb needs the package wandb: pip install wandb")
        if len(project) > 128 or set(project) & set("/\\#?%:"):
            raise UserError(
                f"--wandb {project[:140]!r} is no name of a project: up to 128 characters without /\\#?%:"
            )
        kept = self.folder / WANDB_ID
        self._wandb_id = kept.read_text() if kept.exists() else secrets.token_hex(4)
        return WandbPage(
            lambda: self.begun,
            project=project,
            name=self.name,
            id=self._wandb_id,
            save_dir=self.folder,
            **options.given(),
        )

    def create(self) -> None:
        """Make the folder and lock it: this process alone writes there. Raises UserError where
        another one does.
        """
        checkpoints = self.folder / CHECKPOINTS
        for path in (checkpoints, self.folder, self.folder.parent):
            if not path.exists():
                self._made.append(path)
        with writing(self.folder):
            checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
        try:
            # The system lets go of it however the process ends.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is training in {self.folder}; wait for it or use another --name"
            ) from error

    def abandon(self) -> None:
        """Take away what `create` made, where training did not begin: a refused run leaves no
        trace.
        """
        if self.begun or self._lock is None:
            return
        self._lock.close()
        if self._made:
            (self.folder / LOCK).unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # something else has come to lie there
                folder.rmdir()

    def begin(self, config: str, facts: dict[str, Any]) -> None:
        """Write what the folder says of the part that begins now: its config and facts.

        Damaged checkpoints are renamed, so that none takes the place of a whole one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.continues:
            for path in self.folder.glob("config*.yaml"):
                path.unlink()  # of a start that came to nothing
        number = keep_config(self.folder, config, facts["command"])
        self.begun = True  # and not before: on a full disk nothing has changed
        for path in self._damaged:
            path.replace(path.with_suffix(".damaged"))
        self.unmark()
        if self._wandb_id is not None:
            self._write_text(WANDB_ID, self._wandb_id)
        since = None if self.checkpoint is None else str(self.checkpoint)
        part = {
            "config": CONFIG,
            "command": facts["command"],
            "commit": facts["commit"],
            "from": since,
            "host": facts.get("host"),
            "started": now(),
            "status": RUNNING,
        }
        self.parts = self.earlier_parts()[:number]
        for place, earlier in enumerate(self.parts):
            earlier["config"] = f"config.{place}.yaml"
        self.parts.append(part)
        self.record = {**facts, "status": RUNNING, "started": part["started"]}
        self.write("run.json", self.record)

    def end(self, status: str, facts: Mapping[str, Any] | None = None) -> None:
        """Say in run.json how the part that began has ended: finished, interrupted or failed."""
        if not self.begun:
            return
        ended = {"status": status, "ended": now()}
        if not self.parts:  # it failed while it began
            return
        self.parts[-1] |= ended
        self.record |= {**(facts or {}), **ended}
        self.write("run.json", self.record)

    def ended_at(self, update: int) -> bool:
        """Whether this part had nothing left to do: the run came to its end at `update` before."""
        said = self.said()
        return not self.begun and said.get("updates") == update and (self.folder / EXPORT).exists()

    def said(self) -> dict[str, Any]:
        """What run.json holds; nothing where it cannot be read."""
        try:
            said = json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return said if isinstance(said, dict) else {}

    def require_files(self) -> None:
        """Raise UserError for a pipe or a device among what a run reads and writes: opening one may
        never end.
        """
        for folder in (self.folder, self.folder / CHECKPOINTS):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                check_is_file(path)

    def earlier_parts(self) -> list[dict[str, Any]]:
        """The parts that run.json lists; of an older one that lists none, what it says of the run."""
        if not self.continues:
            return []
        said = self.said()
        if not said:
            return []
        parts = said.get("parts")
        if isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts):
            return parts
        if parts:
            log.warning("%s: its parts cannot be read and are left out", self.folder / "run.json")
        facts = ("config", "command", "commit", "from")
        return [{name: said.get(name) for name in facts}]

    def interrupted(self, line: str) -> None:
        """Leave a mark that the run was ended by a signal and wants to be continued; it goes when
        that is done.
        """
        self._write_text(INTERRUPTED, f"{line}\n")

    def unmark(self) -> None:
        """The run goes on, or has come to its end all the same."""
        (self.folder / INTERRUPTED).unlink(missing_ok=True)

    def write(self, file: str, content: dict[str, Any]) -> None:
        """Write JSON into the run's folder, with the parts of the run, beside and then in place."""
        self._write_text(file, json.dumps({**content, "parts": self.parts}, indent=2))

    def _write_text(self, file: str, text: str) -> None:
        target = self.folder / file
        staged = target.with_name(f"{file}.tmp")
        with writing(target, unfinished=staged):
            staged.write_text(text)
            staged.replace(target)

    def facts(self, trainer: L.Trainer) -> dict[str, Any]:
        """What a later reader wants to know of the machine and the code."""
        return {
            "name": self.name,
            "command": command_line(),
            "commit": commit(),
            "python": platform.python_version(),
            "versions": {
                **{name: version(name) for name in LIBRARIES},
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
            },
            "host": platform.node(),
            "process": os.getpid(),
            "precision": trainer.precision,
            "devices": trainer.num_devices,
            "processes": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "device_names": device_names(),
        }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_names() -> list[str]:
    """The GPUs that this process sees; without any, the processor and its cores."""
    count = torch.cuda.device_count()
    if count:
        return [torch.cuda.get_device_name(number) for number in range(count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [f"{platform.processor() or platform.machine()}, {cores} cores"]


class LateTensorBoard(TensorBoardLogger):
    """Makes its file when training begins, not when a trainer is set up: a refused run writes
    nothing.
    """

    def __init__(self, run: Run, **options: Any) -> None:
        super().__init__(run.folder, **options)
        self._run = run

    @property
    def experiment(self) -> Any:
        if not self._run.begun and rank_zero_only.rank == 0:
            return _DummyExperiment()  # takes whatever it is given, and Lightning asks for it early
        return super().experiment

    @rank_zero_only
    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Raise UserError where an earlier one could not be written: that is done in a thread."""
        with writing(self._run.folder / "tensorboard"):
            try:
                super().log_metrics(*args, **kwargs)
            except ValueError as error:  # Lightning takes whatever fails for a value of no number
                raise error.__cause__ or error from None

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged; raises UserError as `log_metrics` does."""
        with writing(self._run.folder / "tensorboard"):
            super().save()

    @rank_zero_only
    def log_picture(self, name: str, image: Tensor, step: int) -> None:
        """A uint8 picture [3, H, W]; raises UserError as `log_metrics` does."""
        with writing(self._run.folder / "tensorboard"):
            self.experiment.add_image(name, image, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; of a run that failed it is its own error that is told."""
        try:
            with writing(self._run.folder / "tensorboard"):
                super().finalize(status)
        except UserError:
            if status != "failed":
                raise

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Settings of this part of the run; Lightning keeps those of the first one otherwise."""
        if not self._run.begun:
            return
        with writing(self._run.folder / "tensorboard"):
            (self._run.folder / "tensorboard" / self.NAME_HPARAMS_FILE).unlink(missing_ok=True)
            super().log_hyperparams(params)
        self.save()


@contextmanager
def restoring(checkpoint: Path | None) -> Iterator[None]:
    """Raise UserError, in one line, where `checkpoint` turns out not to be one of this model."""
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"{checkpoint} holds more than tensors and plain data; it is not opened"
        ) from error
    except RuntimeError as error:
        first, _, rest = str(error).partition("\n")
        if checkpoint is None or "loading state_dict" not in first:
            raise
        raise UserError(
            f"{checkpoint} is of another model: {' '.join(rest.split())[:160]}"
        ) from error


#: What Lightning and our modules look for in a checkpoint, and of which kind it is.
ENTRIES: dict[str, type | tuple[type, ...]] = {
    "state_dict": Mapping,
    "global_step": int,
    "epoch": int,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "pytorch-lightning_version": str,
}


def require_whole(content: Any, checkpoint: Path) -> None:
    """Raise UserError, naming the entry, for what no training of ours wrote."""
    if not isinstance(content, Mapping):
        raise UserError(f"{checkpoint} holds a {type(content).__name__}, not a checkpoint")
    for name, kind in ENTRIES.items():
        if not isinstance(content.get(name), kind):
            said = f"is a {type(content[name]).__name__}" if name in content else "is missing"
            raise UserError(f"{checkpoint} is not a checkpoint of training: its {name} {said}")
    steps = content["global_step"]
    if steps < 0 or content["epoch"] < 0:
        raise UserError(f"{checkpoint} is not a checkpoint of training: it is of update {steps}")


def check_data(checkpoint: Path, data: ImageDataModule, names_matter: bool = True) -> None:
    """Compare the data with what the run of `checkpoint` was trained on.

    Raises UserError where a class has another id or name, which without `names_matter` is only
    warned of, as is other content and a checkpoint that does not tell.
    """
    try:
        with restoring(checkpoint):
            # Mapped, so that no tensor is read.
            content = look_into(checkpoint)
    except UserError:
        raise
    except Exception as error:  # of an archive that is no torch file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{checkpoint} is truncated or not a torch file ({reason})") from error
    require_whole(content, checkpoint)
    then = facts_in(content, str(checkpoint))
    if then is None:
        log.warning(
            "%s does not say what it was trained on: classes and data are not compared", checkpoint
        )
        return
    difference = other_class(then.class_names, tuple(data.class_names))
    if difference is not None and names_matter:
        raise UserError(
            f"{checkpoint} was trained on other classes: {difference}; continue it with the data of {then.name} as it "
            "was, or start anew from it with --model.init_from"
        )
    changed = other_content(then, data.facts())
    if difference is not None:
        log.warning("%s was trained on other classes: %s", checkpoint, difference)
    elif changed is not None:
        log.warning(
            "%s: the %s is not what it was trained on (%s): other files or rows",
            checkpoint,
            changed,
            then.name,
        )
