"""`convert.py`: official checkpoints in, exports out, and the proof that both say the same."""

import json as json_module
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from tessellar.checkpoints.card import Record, command_line
from tessellar.checkpoints.export import WEIGHTS, export_generator, export_tokenizer
from tessellar.checkpoints.reading import read_source
from tessellar.checkpoints.staging import check_target
from tessellar.checkpoints.weights import fingerprint
from tessellar.checkpoints.zoo import (
    UNKNOWN,
    Published,
    is_published,
    looks_published,
    published,
)
from tessellar.cli.functions import Elsewhere, run_functions
from tessellar.cli.importing import import_model, import_published, name_classes
from tessellar.cli.spelling import spelled
from tessellar.errors import UserError, in_one_line
from tessellar.interop.importer import ImportOptions
from tessellar.parity.verify import Report, UnknownSystem, verify
from tessellar.pipeline import ImageGenerator, assemble
from tessellar.plain_data import read_json
from tessellar.protocol.packages import trust, trusted
from tessellar.protocol.ranges import check_number
from tessellar.protocol.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def import_official(
    system: str,
    file: str,
    out: str = "",
    tokenizer: str | None = None,
    image_size: int | None = None,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
    variant: str | None = None,
    key: str | None = None,
    license: str = "",
    package: str = "",
    overwrite: bool = False,
) -> None:
    """Make an export of an official checkpoint.

    Args:
        system: whose checkpoint it is: llamagen, or any other name that the message about a wrong one lists
        file: official file, a torch pickle or safetensors; hub:OWNER/REPO/FILE; or a published name, such as c2i-b-256
        out: folder of the export
        tokenizer: for a generator, its tokenizer: an export or the official file
        image_size: side of the images (default 256, or what the tokenizer's export says)
        num_heads: attention heads of a model of unpublished size
        decoder_heads: those of its decoder, where it has another number of them than its encoder
        variant: published variant, where the weights do not show it, such as titok_b64
        key: entry of the checkpoint to take, such as ema (default: the one that the system's paper evaluates)
        license: license of the weights, for the card
        package: packages of others that hold the system, separated by commas
        overwrite: replace an older export
    """
    trust(package)
    _check_out(out, overwrite)
    name = f"{system}/{file}"
    if is_published(name) and not Path(file).exists():  # a file here goes before
        if (tokenizer, key, image_size, num_heads, decoder_heads, variant) != (None,) * 6:
            raise UserError(f"{name} is published: its settings are known, give --out alone")
        _export(import_published(name), out, record_of(published(name), license), overwrite)
        return
    if looks_published(name) and not Path(file).exists():
        published(name)  # which there is not: names the nearest one
    source = file if file.startswith("hub:") else Path(file).name
    record = Record(title=Path(file).stem, weights="official", source=source, license=license)
    options = ImportOptions(image_size, num_heads, variant, decoder_heads=decoder_heads)
    model = import_model(system, file, tokenizer, key, options)
    if isinstance(model, ImageGenerator):
        name_classes(model)
    _export(model, out, record, overwrite)


def record_of(checkpoint: Published, license: str = "") -> Record:
    """What the card of a published checkpoint says of it."""
    known = checkpoint.license if checkpoint.license != UNKNOWN else ""
    return Record(
        title=f"{checkpoint.what} ({checkpoint.name})",
        weights="official",
        source=checkpoint.source,
        license=license or known,
        command=command_line(),
    )


def export(
    checkpoint: str,
    out: str = "",
    raw: bool = False,
    discriminator: bool = False,
    title: str = "",
    data: str = "",
    license: str = "",
    metrics: str | None = None,
    package: str = "",
    overwrite: bool = False,
) -> None:
    """Make an export of a training checkpoint (or a new one of an old one).

    Args:
        checkpoint: .ckpt of a run
        out: folder of the export
        raw: weights of the last step instead of the averaged ones
        discriminator: keep the discriminator of a tokenizer, for fine-tuning
        title: title of the card
        data: what it was trained on, for the card
        license: license of the weights, for the card
        metrics: JSON record of an evaluation, for the card
        package: packages of others whose classes may be built, separated by commas
        overwrite: replace an older export
    """
    trust(package)
    _check_out(out, overwrite)
    source = read_source(checkpoint, raw=raw)
    given = {
        "title": title,
        "data": data,
        "license": license,
        "metrics": metrics_of_record(metrics),
    }
    record = replace(source.record, **{name: value for name, value in given.items() if value})
    kept = (
        source.build("discriminator")
        if discriminator and "discriminator" in source.description
        else None
    )
    if discriminator and kept is None:
        raise UserError(f"{checkpoint} has no discriminator")
    _export(assemble(source), out, record, overwrite, kept)


def verify_recordings(
    folders: list[str], case: list[str] | None = None, json: bool = False, package: str = ""
) -> int:
    """Replay recorded official outputs with our modules; exit code 1 where anything differs or is
    left over.

    Args:
        folders: folders with meta.json, io.safetensors and weights
        case: replay only these cases
        json: print one JSON document instead of tables
        package: packages of others that hold replays and modules, separated by commas
    """
    trust(package)
    code = 0
    reports = []
    for folder in folders:
        try:
            report = verify(folder, case, trusted())
        except UnknownSystem as error:
            report = Report(folder, "unknown", leftovers=[str(error)])
            code = 2
        code = max(code, 0 if report.passed else 1)
        reports.append(report)
        if not json:
            print_report(report)
    if json:
        print(json_module.dumps([report.as_dict() for report in reports], indent=1))
    return code


def print_report(report: Report, console: Console | None = None) -> None:
    """A table of all outputs, then what was left over, then the verdict."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if report.comparisons:
        console.print(_table(report))
    for line in report.leftovers:
        console.print(f"[red]left over[/red] {escape(line)}")
    for case in report.out_of_scope:
        console.print(f"out of scope: {escape(str(case))}")
    failed = sum(not c.passed for c in report.comparisons)
    counts = f"{len(report.comparisons)} outputs compared, {failed} failed, {len(report.leftovers)} left over"
    outside = sum(case.outputs for case in report.out_of_scope)
    counts += f", {outside} out of scope" if outside else ""
    console.print(f"{'passed' if report.passed else '[red]FAILED[/red]'}: {counts}")


def _table(report: Report) -> Table:
    table = Table(
        "case", "output", "worst error", "tolerance", "", title=f"{report.system}: {report.folder}"
    )
    for c in report.comparisons:
        exact = "exact" if c.tolerance == 0 else f"{c.tolerance:.2e}"
        verdict = "ok" if c.passed else f"[red]FAILED[/red] {escape(c.note)}"
        table.add_row(c.case, c.name, f"{c.error:.2e}", exact, verdict)
    return table


def info(path: str, json: bool = False, package: str = "") -> None:
    """Say what an export or a checkpoint holds.

    Args:
        path: export folder, .safetensors, .ckpt or hub id
        json: print the description as JSON
        package: packages of others whose classes may be built, separated by commas
    """
    trust(package)
    source = read_source(path)
    model = assemble(source)
    parts = {"tokenizer": model} if isinstance(model, Tokenizer) else dict(model.named_children())
    facts = {
        "kind": source.kind,
        "weights": source.weights or "not stated",
        "fingerprint": fingerprint(model),
    }
    for name, part in parts.items():
        facts[name] = (
            f"{type(part).__name__}, {sum(p.numel() for p in part.parameters()):,} parameters"
        )
    facts["layout"] = str(parts["tokenizer"].layout)
    if json:
        described = {"description": source.description, "class_names": list(source.class_names)}
        print(json_module.dumps({**facts, **described}, indent=1))
        return
    if isinstance(model, ImageGenerator) and model.num_classes:
        facts["classes"] = told_classes(model.num_classes, model.class_names)
    for name, value in facts.items():
        print(f"{name:<12} {value}")
    for name, value in source.record.as_dict().items():
        print(f"{name:<12} {value}")


def told_classes(count: int, names: Sequence[str], most: int = 20) -> str:
    """`3: 0 circle, 1 square, 2 triangle`, the first `most` of them; the number alone where names
    are not known.
    """
    if not names:
        return f"{count}, without names"
    told = [f"{label} {in_one_line(name)}" for label, name in enumerate(names[:most])]
    rest = f", and {count - most} more (--json lists all)" if count > most else ""
    return f"{count}: {', '.join(told)}{rest}"


def _export(
    model: Tokenizer | ImageGenerator,
    out: str,
    record: Record,
    overwrite: bool,
    discriminator: nn.Module | None = None,
) -> None:
    if isinstance(model, Tokenizer):
        export_tokenizer(
            model, out, discriminator=discriminator, record=record, overwrite=overwrite
        )
    else:
        export_generator(model, out, record=record, overwrite=overwrite)
    print(f"wrote {out}")
    place = shlex.quote(out)
    if isinstance(model, ImageGenerator):
        log.info("next: %s %s --out outputs/samples", spelled("sample"), place)
    else:
        log.info("next: %s model %s --data CLASS --data.root FOLDER", spelled("evaluate"), place)


def _check_out(out: str, overwrite: bool) -> None:
    """Before the work, not after it."""
    if not out:
        raise UserError("say where to write: --out FOLDER")
    check_target(Path(out), WEIGHTS, overwrite)


def metrics_of_record(path: str | None) -> dict[str, float]:
    """Numbers under `metrics` of an evaluation's JSON record."""
    if path is None:
        return {}
    try:
        metrics = read_json(Path(path))["metrics"]
        numbers = {}
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                check_number(f"{name} of {path}", value)
                numbers[name] = float(value)
        return numbers
    except UserError as error:
        raise UserError(f"{path} is not an evaluation record with metrics: {error}") from error
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is not an evaluation record with metrics ({error!r})") from error


COMMANDS = {
    "import": import_official,
    "verify": verify_recordings,
    "export": export,
    "info": info,
    "cache": Elsewhere("tessellar.cli.cache", "cache"),
    "scale": Elsewhere("tessellar.cli.scale", "scale"),
    "record": Elsewhere("tessellar.cli.record", "record"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `convert.py` and `tessellar convert`."""
    return run_functions(COMMANDS, argv, "convert")
