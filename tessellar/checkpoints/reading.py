"""Reading a model from an export, one safetensors file, a training checkpoint or a hub id, and
building its parts.

Strict and safe: every tensor must be there and fit, files are safetensors or opened with
`weights_only=True`, classes are built only from this package, and no larger than the tensors that
the file holds for them (`building.py`). A checkpoint gives its averaged
(EMA) weights unless `raw` is asked for.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tessellar.checkpoints.building import build_filled
from tessellar.checkpoints.card import Record, record_from
from tessellar.checkpoints.data_facts import DataFacts, facts_in
from tessellar.checkpoints.description import (
    CLASS_NAMES,
    HEADER_KEY,
    PARTS,
    check_config,
    checkpoint_tensors,
    left_out_of,
)
from tessellar.checkpoints.differences import differences
from tessellar.checkpoints.export import CONFIG, WEIGHTS
from tessellar.checkpoints.fitting import ClassTable, Fitted, Sizes, load_fitting
from tessellar.checkpoints.frozen import put_back
from tessellar.checkpoints.hub import fetch, is_hub_id
from tessellar.checkpoints.kinds import is_sharded
from tessellar.checkpoints.weights import load_strict, part_of, with_current_names
from tessellar.checkpoints.zoo import is_published, published
from tessellar.errors import UserError
from tessellar.places import in_runs
from tessellar.plain_data import parse_json, read_yaml
from tessellar.protocol.condition import ClassConditioner, Conditioner
from tessellar.protocol.configured import build
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tensor_files import (
    SHOWN,
    listing,
    read_pickle,
    read_safetensors,
    require_file,
    say_unchecked,
)

log = logging.getLogger(__name__)


TYPES: dict[str, type] = {
    "tokenizer": Tokenizer,
    "generator": Generator,
    "conditioner": Conditioner,
}


@dataclass(frozen=True)
class Source:
    """A model as read from a file: its description and its tensors under `tokenizer.`,
    `generator.`, ...
    """

    where: str
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: str  # raw, ema, official; empty where the file does not say
    # What a checkpoint holds besides the model: losses, optimizer states.
    left_out: tuple[str, ...] = ()
    data: DataFacts | None = None  # what a checkpoint says it was trained on

    @property
    def kind(self) -> str:
        return self.description["kind"]

    @property
    def record(self) -> Record:
        return record_from(self.description.get("record"))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the generator's classes, of a checkpoint those of its data; empty where they are
        not known, or the generator has no classes.

        Raises UserError where a file names another number of classes than the generator has.
        """
        count = _num_classes(self.description.get("conditioner"))
        if count is None:
            return ()
        names = tuple(self.description.get(CLASS_NAMES, ()))
        if not names and self.data is not None and len(self.data.class_names) == count:
            names = self.data.class_names
        if len(names) not in (0, count):
            raise UserError(f"{self.where} names {len(names)} classes, its generator has {count}")
        return names

    def state(self, part: str) -> dict[str, Tensor]:
        """State dict of one part."""
        return part_of(self.tensors, f"{part}.")

    def arguments(self, part: str) -> dict[str, Any]:
        """Constructor arguments of one part, as the file gives them; raises UserError where it
        gives none.
        """
        config = self.description[part]
        if not isinstance(config, dict) or not isinstance(config.get("init_args"), dict):
            raise UserError(f"{self.where}: the config of the {part} has no init_args")
        return config["init_args"]

    def check(self) -> None:
        """Raise UserError for tensors that belong to no part."""
        known = set(PARTS) & self.description.keys()
        stray = [name for name in self.tensors if name.split(".")[0] not in known]
        if stray:
            raise UserError(f"{self.where} holds tensors of no part: {listing('unknown', stray)}")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        self.check()
        return self.build("tokenizer")

    def build(self, part: str) -> Any:
        """One part, rebuilt from its config and filled with its tensors; raises UserError where
        they do not fit.
        """
        expected = TYPES.get(part, nn.Module)
        where = f"{self.where}: the {part}"

        def make() -> nn.Module:
            module = build(self.description[part], expected, where)
            if not isinstance(module, expected):
                raise UserError(f"{self.where}: {type(module).__name__} is not a {part}")
            return module

        return build_filled(make, self.state(part), where, f"{self.where} ({part})").eval()


def _num_classes(conditioner: Any) -> int | None:
    """Number of classes in the config of a conditioner; None for one that reads something else."""
    arguments = conditioner.get("init_args") if isinstance(conditioner, dict) else None
    count = arguments.get("num_classes") if isinstance(arguments, dict) else None
    return count if isinstance(count, int) else None


def load_tokenizer(path: str | Path, *, raw: bool = False) -> Tokenizer:
    """The tokenizer of an export, a checkpoint or a hub id; raises UserError for anything else."""
    source = read_source(path, raw=raw)
    if source.kind != "tokenizer":
        raise UserError(f"{path} is a generator; a tokenizer is needed here")
    return source.tokenizer()


def init_tokenizer(
    path: str | Path,
    tokenizer: Tokenizer,
    discriminator: nn.Module | None = None,
    fresh: Sequence[str] = (),
) -> None:
    """Start fine-tuning: weights at `path` into a tokenizer and, where the file has one, its
    discriminator.

    Tables of positions are resampled for another size of images; the tensors or modules `fresh`,
    and a discriminator that the file lacks, stay as they were made. That, settings that differ and
    whatever else the file holds is logged, in one line each. Raises UserError where other sizes
    differ.
    """
    source = read_source(path)
    fitted = load_fitting(
        tokenizer,
        tokenizer.starting_from(_current(source, "tokenizer", tokenizer)),
        f"{source.where} (tokenizer)",
        theirs=Sizes(image_size=_image_size(source.arguments("tokenizer"))),
        ours=Sizes(image_size=tokenizer.image_size),
        fresh=fresh,
    )
    _tell_fitted(source, fitted)
    _tell_settings(source, "tokenizer", tokenizer.config)
    taken = ["tokenizer"]
    if discriminator is not None and "discriminator" in source.description:
        load_strict(discriminator, source.state("discriminator"), f"{source.where} (discriminator)")
        taken.append("discriminator")
    elif discriminator is not None:
        log.info("%s has no discriminator: training starts with a fresh one", source.where)
    _tell_left(source, taken)


class Start(NamedTuple):
    """What a generator was started from: names of the source's classes (empty where they are not
    known), how many there are, and the rows of classes that fit by name.
    """

    class_names: tuple[str, ...]
    num_classes: int | None
    tables: Sequence[ClassTable]


def init_generator(
    path: str | Path,
    generator: Generator,
    conditioner: Conditioner | None = None,
    tokenizer: Tokenizer | None = None,
    fresh: Sequence[str] = (),
) -> Start:
    """Start fine-tuning: weights at `path` into a generator, and what its conditioner has learnt
    into `conditioner`.

    Of another number of classes the rows stay as they were made until their names are known
    (`fitting.place_classes`); tables of positions are resampled for another size; the tensors or
    modules `fresh` stay as they were made. `tokenizer` is the one whose tokens the run will see:
    another one than the source's is warned of, as are settings that differ. Raises UserError where
    other sizes differ, and for a conditioner that means other things by its conditions.
    """
    source = read_source(path)
    if source.kind != "generator":
        raise UserError(f"{path} is a tokenizer; a generator is needed here")
    there = _num_classes(source.description["conditioner"])
    here = conditioner.num_classes if isinstance(conditioner, ClassConditioner) else there
    fitted = load_fitting(
        generator,
        generator.starting_from(_current(source, "generator", generator)),
        f"{source.where} (generator)",
        theirs=Sizes(_layout(source), num_classes=there),
        ours=Sizes(generator.layout, num_classes=here),
        fresh=fresh,
    )
    _tell_layout(source, generator.layout, fitted)
    _tell_fitted(source, fitted)
    _tell_settings(source, "generator", generator.config, besides=("layout", "num_classes"))
    taken = ["generator"]
    if conditioner is not None:
        init_conditioner(source, conditioner)
        taken.append("conditioner")
    if tokenizer is not None:
        compare_tokenizer(source, tokenizer)
        taken.append("tokenizer")  # the run brings its own
    _tell_left(source, taken)
    return Start(source.class_names, there, fitted.classes)


def _image_size(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) in the arguments of a tokenizer; None where they do not say it."""
    size = arguments.get("image_size")
    if isinstance(size, int):
        return (size, size)
    pair = isinstance(size, (list, tuple)) and len(size) == 2
    return (int(size[0]), int(size[1])) if pair and size is not None else None


def _layout(source: Source) -> Layout | None:
    """The layout that a source's generator was built for; None where it does not say it."""
    described = source.arguments("generator").get("layout")
    if not isinstance(described, dict):
        return None
    return build(described, Layout, f"{source.where}: the layout")


def _tell_layout(source: Source, layout: Layout, fitted: Fitted) -> None:
    """One line where a generator goes on with segments of other shapes: rotations and other tables
    that are no weights follow by themselves.
    """
    theirs = _layout(source)
    if theirs is None or theirs == layout or not theirs.differs_in_shapes(layout):
        return
    shapes = []
    for one in (theirs, layout):
        shapes.append(" + ".join(" x ".join(map(str, s.shape)) for s in one.segments))
    told = "" if fitted.resampled else "; no weight depends on it"
    log.info("%s: tokens %s to %s%s", source.where, *shapes, told)


def _tell_fitted(source: Source, fitted: Fitted) -> None:
    """One line each on tensors that were resampled, and that stay as they were made."""
    if fitted.resampled:
        log.info("%s: %s", source.where, listing("resampled to another size", fitted.resampled))
    if fitted.fresh:
        log.info("%s: %s", source.where, listing("new, not taken along", fitted.fresh))


def _current(source: Source, part: str, module: nn.Module) -> dict[str, Tensor]:
    """The weights of a part of a source under the names that a module's tensors have today."""
    return with_current_names(module, source.state(part))


def init_conditioner(source: Source, conditioner: Conditioner) -> None:
    """The state of the source's conditioner into this one; raises UserError where they mean
    different things.
    """
    theirs: Conditioner = source.build("conditioner")
    there = type(theirs).__name__
    here = type(conditioner).__name__
    if there != here and (theirs.gives != conditioner.gives or not theirs.gives):
        raise UserError(
            f"the generator of {source.where} reads {theirs.gives or 'conditions'} ({there}); this run gives it "
            f"{conditioner.gives or 'conditions'} ({here})"
        )
    if isinstance(theirs, ClassConditioner):
        return  # rows of classes are found by their names
    theirs_arguments = theirs.config["init_args"]
    arguments = conditioner.config["init_args"]
    for name in theirs.meaning:
        if name in arguments and theirs_arguments[name] != arguments[name]:
            raise UserError(
                f"the conditioner of {source.where} ({there}) has {name} {theirs_arguments[name]}, this run's has "
                f"{arguments[name]}: its {theirs.gives} would mean other things to the generator"
            )
    _tell_settings(
        source, "conditioner", conditioner.config, besides=(*theirs.meaning, *theirs.free)
    )
    if theirs.is_prepared:
        load_strict(conditioner, source.state("conditioner"), f"{source.where} (conditioner)")
    else:
        log.warning(
            "the conditioner of %s has learnt nothing yet: this run's captions are learnt",
            source.where,
        )


def compare_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    """Warn, in one line, where a generator goes on with other tokens than it was trained on."""
    layout = _layout(source)
    if layout is not None and layout != tokenizer.layout:
        log.warning(
            "%s was trained on %s; this run's tokenizer gives %s",
            source.where,
            layout,
            tokenizer.layout,
        )
    elif not _equal(
        with_current_names(tokenizer, source.state("tokenizer")), tokenizer.state_dict()
    ):
        log.warning(
            "%s was trained on the tokens of another tokenizer than this run's: a token may mean something else here",
            source.where,
        )
    _tell_settings(source, "tokenizer", tokenizer.config)


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are the same once they have the precision of `b`."""
    if a.keys() != b.keys():
        return False
    for name, tensor in b.items():
        if not torch.equal(a[name].to(tensor.dtype), tensor.detach().cpu()):
            return False
    return True


def _tell_settings(
    source: Source, part: str, config: dict[str, Any], besides: tuple[str, ...] = ()
) -> None:
    """One line on arguments in which a source's part differs from this run's, `besides` left aside."""
    kept = {name: value for name, value in source.arguments(part).items() if name not in besides}
    found = differences({**source.description[part], "init_args": kept}, config, part)
    if found:
        rest = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        log.warning("%s has other settings: %s%s", source.where, "; ".join(found[:SHOWN]), rest)


def _tell_left(source: Source, taken: list[str]) -> None:
    """One line on what a source holds and fine-tuning does not take."""
    left = [part for part in PARTS if part in source.description and part not in taken]
    left += source.left_out
    if left:
        log.info("%s: %s taken, not its %s", source.where, " and ".join(taken), ", ".join(left))


def read_source(path: str | Path, *, raw: bool = False, ema: float | None = None) -> Source:
    """What is at `path`, read but not built; of a training checkpoint that keeps averages of several
    decays, those of `ema`.
    """
    local = in_runs(path)
    if not local.exists():
        if is_published(path):
            raise UserError(
                f"{path} is a published checkpoint: make an export of it first, `{published(str(path)).importing()}`"
            )
        if not is_hub_id(str(path)):
            raise UserError(f"{path} does not exist")
        local = fetch(str(path))
    if is_sharded(local):
        return read_checkpoint(local, raw, ema)
    if local.is_dir():
        source = read_export(local)
    elif local.suffix == ".safetensors":
        source = read_single_file(local)
    elif local.suffix == ".ckpt":
        return read_checkpoint(local, raw, ema)
    else:
        raise UserError(
            f"{path} is none of: export folder, .safetensors, .ckpt. An official file is read by `convert.py import`"
        )
    if ema is not None:
        raise UserError(
            f"{path} holds one set of weights; averages of several decays are in the run's checkpoint (.ckpt)"
        )
    if raw and source.weights == "ema":
        raise UserError(
            f"{path} holds averaged weights only; the raw ones are in the run's checkpoint"
        )
    return source


def read_export(folder: Path) -> Source:
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        inside = [p.parent for p in folder.glob(f"*/{WEIGHTS}")]
        for pattern in ("*.ckpt", "*/*.ckpt"):  # deeper, a whole disk would be searched
            inside = inside or sorted(folder.glob(pattern))
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise UserError(f"{folder} is not an export: it needs {CONFIG} and {WEIGHTS}{hint}")
    config = read_yaml(folder / CONFIG)
    tensors, metadata = read_safetensors(folder / WEIGHTS)
    say_unchecked(folder / WEIGHTS, metadata)
    return _source(folder, check_config(config, str(folder / CONFIG)), tensors)


def read_single_file(path: Path) -> Source:
    tensors, metadata = read_safetensors(path)
    if HEADER_KEY not in metadata:
        raise UserError(
            f"{path} was not exported by tessellar; an official file is read by `convert.py import`"
        )
    say_unchecked(path, metadata)
    return _source(path, _description(metadata[HEADER_KEY], path), tensors)


def _source(path: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> Source:
    return Source(str(path), description, tensors, record_from(description.get("record")).weights)


def read_checkpoint(path: Path, raw: bool, ema: float | None = None) -> Source:
    if path.is_dir():
        # Its libraries take half a second to import.
        from tessellar.checkpoints.sharded import read_sharded

        content: Any = read_sharded(path)
    else:
        require_file(path)
        content = read_pickle(path)
    if not isinstance(content, dict) or HEADER_KEY not in content:
        raise UserError(
            f"{path} is not a checkpoint of this project's training: it does not describe its model"
        )
    description = _description(content[HEADER_KEY], path)
    if isinstance(content.get("state_dict"), dict):
        put_back(content, path, path.parent)
    tensors, weights = checkpoint_tensors(content, description, raw, str(path), ema=ema)
    steps = content.get("global_step")
    record = (
        {"weights": weights, "steps": steps} if isinstance(steps, int) else {"weights": weights}
    )
    left_out = left_out_of(content, description)
    data = facts_in(content, str(path))
    return Source(str(path), {**description, "record": record}, tensors, weights, left_out, data)


def _description(text: Any, path: Path) -> dict[str, Any]:
    where = f"{path}: its description"
    if not isinstance(text, str):
        raise UserError(f"{where} is a {type(text).__name__}, not a JSON text")
    return check_config(parse_json(text, where), str(path))
