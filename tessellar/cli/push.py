"""`tessellar push EXPORT OWNER/NAME`: an export onto the Hugging Face hub, with a card made for it."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from tessellar.checkpoints.card import Record, card, table
from tessellar.checkpoints.citations import bibtex, papers_of
from tessellar.checkpoints.export import CARD, CONFIG, WEIGHTS, facts_of
from tessellar.checkpoints.hub import HUB_ID
from tessellar.checkpoints.reading import read_source
from tessellar.checkpoints.zoo import UNKNOWN, Published, zoo
from tessellar.cli.functions import run_functions
from tessellar.errors import UserError, in_one_line
from tessellar.evaluation.record import read_record
from tessellar.images import to_pil
from tessellar.pipeline import ImageGenerator, assemble
from tessellar.places import in_runs
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.packages import trust
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.grid import picture_grid

log = logging.getLogger(__name__)

GRID = "samples.png"
MOST_ROWS = 8


@dataclass(frozen=True)
class Upload:
    """Files of a repository by their names: paths, or what they hold."""

    repository: str
    files: Mapping[str, Path | bytes]

    @property
    def card(self) -> str:
        text = self.files[CARD]
        assert isinstance(text, bytes)
        return text.decode()

    def listing(self) -> str:
        """Every file with its size."""
        lines = []
        for name, content in self.files.items():
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            lines.append(f"  {name:<20} {size:,} bytes")
        return "\n".join(lines)


def push(
    export: str,
    repository: str,
    license: str = "",
    data_license: str = "",
    title: str = "",
    records: list[str] | None = None,
    samples: str = "",
    columns: int = 4,
    guidance: float = 1.5,
    seed: int = 0,
    private: bool = False,
    package: str = "",
    yes: bool = False,
) -> None:
    """Show what would be uploaded to the hub: the files of an export and its card; with --yes upload it.

    Args:
        export: folder of the export
        repository: OWNER/NAME on the hub, made where there is none
        license: license of the weights (default: that of the export's record)
        data_license: license of the data that it was trained on, for the card
        title: title of the card
        records: JSON records of evaluations, whose numbers go into the card
        samples: picture for the card (default: samples of each class of a generator, 8 classes at most)
        columns: samples of each class
        guidance: classifier-free guidance of the samples
        seed: seed of the first sample
        private: make a private repository
        package: packages of others whose classes may be built, separated by commas
        yes: upload
    """
    trust(package)
    check_whole("columns", columns, least=1, most=16)
    drawn = Drawn(samples, columns, guidance, seed)
    stated = {"license": license, "title": title}
    upload = prepared(export, repository, stated, data_license, records or [], drawn)
    print(f"{upload.repository}:\n{upload.listing()}\n")
    print(upload.card)
    if not yes:
        print("nothing was uploaded: --yes does")
        return
    if "license:" not in upload.card.split("---")[1]:
        raise UserError("the license of these weights is not stated: --license NAME")
    from huggingface_hub import HfApi

    print(f"uploaded: {send(upload, HfApi(), private)}")


@dataclass(frozen=True)
class Drawn:
    """Where the picture of a card comes from: a file, or samples."""

    file: str
    columns: int
    guidance: float
    seed: int


def prepared(
    export: str,
    repository: str,
    stated: Mapping[str, str],
    data_license: str,
    records: Sequence[str],
    drawn: Drawn,
) -> Upload:
    """The files of an export and its card; raises UserError for what is no export or no name of the hub."""
    match = HUB_ID.fullmatch(repository)
    if match is None or match["revision"]:
        raise UserError(f"{repository!r} is no name on the hub: OWNER/NAME")
    folder = in_runs(export)
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise UserError(f"{export} is no export: it needs {CONFIG} and {WEIGHTS}")
    source = read_source(folder)
    model = assemble(source)
    record = replace(source.record, **{name: text for name, text in stated.items() if text})
    measured = [read_record(path) for path in records]
    files: dict[str, Path | bytes] = {WEIGHTS: folder / WEIGHTS, CONFIG: folder / CONFIG}
    sections = []
    picture = grid_of(model, drawn)
    if picture is not None:
        files[GRID] = picture
        sections.append(picture_section(drawn))
    sections += [
        commands(model, repository),
        measurements(measured),
        licenses(record, data_license),
    ]
    is_generator = isinstance(model, ImageGenerator)
    parts = dict(model.named_children()) if is_generator else {"tokenizer": model}
    text = card(
        kind_of(model),
        repository,
        record,
        facts=facts_of(parts),
        class_names=source.class_names,
        citations=bibtex(papers_of(source.description)),
        sections=[section for section in sections if section],
    )
    return Upload(repository, {**files, CARD: text.encode()})


def kind_of(model: Any) -> str:
    """The kind of a card."""
    if not isinstance(model, ImageGenerator):
        return "tokenizer"
    return "generator" if isinstance(model.conditioner, ClassConditioner) else "text generator"


def grid_of(model: Any, drawn: Drawn) -> bytes | None:
    """A PNG: the user's own picture, or rows of samples, one a class; None where there is neither."""
    if drawn.file:
        try:
            with Image.open(drawn.file) as picture:
                return _png(picture.convert("RGB"))
        except OSError as error:
            raise UserError(f"{drawn.file} is no picture ({in_one_line(str(error))})") from error
    if kind_of(model) != "generator":
        log.info("the card has no picture: --samples FILE gives one")
        return None
    labels = list(range(min(model.num_classes, MOST_ROWS)))
    wanted = [label for label in labels for _ in range(drawn.columns)]
    images: Tensor = model.sample(
        wanted, guidance=drawn.guidance, seed=drawn.seed, output="uint8", batch_size=16
    )
    names = [model.class_names[label] if model.class_names else str(label) for label in labels]
    grid = picture_grid(list(images.split(drawn.columns)), row_labels=names)
    return _png(to_pil(grid[None])[0])


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def picture_section(drawn: Drawn) -> str:
    told = ""
    if not drawn.file:
        told = f"\nNot chosen: seeds from {drawn.seed} on, guidance {drawn.guidance:g}.\n"
    return f"![samples]({GRID})\n{told}"


def commands(model: Any, repository: str) -> str:
    """How it is used from a shell."""
    lines = [f"tessellar convert info {repository}"]
    if kind_of(model) == "generator":
        lines.append(
            f"tessellar sample {repository} --classes 0 --count 4 --guidance.scale 1.5 --out outputs/samples"
        )
    return "\n".join(["```bash", *lines, "```", ""])


def measurements(records: Sequence[dict[str, Any]]) -> str:
    """A row a number: what it was measured with, so that another can be compared with it."""
    if not records:
        return ""
    lines = [
        "| measured | | samples | reference | fingerprint | commit |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        reference = record.get("reference") or {}
        images = (record.get("samples") or {}).get("images", "")
        commit = (record.get("code") or {}).get("commit", "")
        for name, value in record["metrics"].items():
            cells = [
                name,
                f"{value:.4g}",
                images,
                reference.get("name", ""),
                record["fingerprint"],
                commit,
            ]
            lines.append(f"| {' | '.join(in_one_line(str(cell)) for cell in cells)} |")
    return "\n".join([*lines, ""])


def licenses(record: Record, data_license: str) -> str:
    """Of the weights, of the data, and of the official weights that they came from."""
    rows = {
        "weights": record.license or "not stated",
        "data": data_license or "not stated",
    }
    upstream = upstream_of(record.source)
    if upstream is not None:
        unknown = "not known to us"
        of_weights = unknown if upstream.license == UNKNOWN else upstream.license
        of_code = unknown if upstream.code_license == UNKNOWN else upstream.code_license
        rows["official weights"] = f"{of_weights} ({upstream.source}, arXiv {upstream.arxiv})"
        rows["official code"] = of_code
    elif record.weights == "official":
        rows["official weights"] = f"not known to us ({record.source})"
    return table("license of", rows)


def upstream_of(source: str) -> Published | None:
    """The published checkpoint that an import came from; None for a file that is none, or several."""
    found = [entry for entry in zoo().values() if source in (entry.source, entry.file)]
    return found[0] if len(found) == 1 else None


def send(upload: Upload, hub: Any, private: bool = False) -> str:
    """Make the repository where there is none and put all files into it in one commit; its address.

    `hub` has `create_repo` and `create_commit`, as `huggingface_hub.HfApi`.

    Raises UserError, in one line, where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    operations = []
    for name, content in upload.files.items():
        given = str(content) if isinstance(content, Path) else content
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=given))
    try:
        hub.create_repo(upload.repository, private=private, exist_ok=True)
        made = hub.create_commit(
            upload.repository, operations, commit_message="Upload with tessellar"
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = in_one_line(str(error))[:200]
        raise UserError(f"the hub did not take {upload.repository} ({reason})") from error
    return str(getattr(made, "commit_url", upload.repository))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of `tessellar push`."""
    run_functions(push, argv, "push")
