"""The model card of an export: front matter that hubs read, and a page made from the run's own
record.
"""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tessellar.errors import in_one_line

MOST_CLASSES = 100

TAGS = {
    "tokenizer": ("image-feature-extraction", ("image-tokenizer", "autoregressive")),
    "generator": (
        "unconditional-image-generation",
        ("image-generation", "class-conditional", "autoregressive"),
    ),
    "text generator": ("text-to-image", ("image-generation", "autoregressive")),
}


MAX_METRIC = 1e300  # so that neither infinity nor an integer too large for a float passes


def commit() -> str:
    """Commit of the checkout that this file belongs to, 12 digits, `-dirty` where files changed;
    else `unknown`.

    An installed package that lies inside of another project's checkout is not mistaken for it.
    """
    here = Path(__file__).resolve()
    if not _git(here.parent, "ls-files", "--error-unmatch", here.name):
        return "unknown"
    return (
        _git(here.parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
        or "unknown"
    )


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command of this process, quoted so that it can be pasted into a shell; in one line."""
    script, *words = sys.argv if argv is None else argv
    name = Path(script).name
    start = ["python", script] if name.endswith(".py") else [name]
    return in_one_line(shlex.join([*start, *words]))


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; empty where it fails or is not there."""
    try:
        result = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


@dataclass(frozen=True)
class Record:
    """What is known of a model's making; everything may be left out, nothing is guessed.

    `weights` says which weights these are: `raw`, `ema` or `official`. `license` covers the weights
    and what they were made from; `metrics` are by name, as an evaluation record names them.
    """

    title: str = ""
    weights: str = ""
    license: str = ""
    source: str = ""
    data: str = ""
    steps: int | None = None
    command: str = ""
    hardware: str = ""
    commit: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data without what was left out."""
        return {key: value for key, value in asdict(self).items() if value not in ("", None, {})}


def record_from(data: Any) -> Record:
    """The record in a config; what another version wrote, or is of another kind, is left out."""
    if not isinstance(data, dict):
        return Record()
    record = Record()
    for name in Record.__dataclass_fields__:
        value = data.get(name)
        if name == "metrics":
            record = replace(record, metrics=_numbers(value))
        elif isinstance(value, int if name == "steps" else str):
            record = replace(record, **{name: value})
    return record


def _numbers(metrics: Any) -> dict[str, float]:
    found = {}
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(value, (int, float)) and abs(value) < MAX_METRIC:
            found[str(name)] = float(value)
    return found


def card(
    kind: str,
    name: str,
    record: Record,
    facts: Mapping[str, str],
    class_names: Sequence[str] = (),
) -> str:
    """Text of README.md. `kind` is a key of TAGS, `facts` are lines about the parts,
    `class_names[k]` is the name of class k.
    """
    pipeline, tags = TAGS[kind]
    front = {"library_name": "tessellar", "pipeline_tag": pipeline, "tags": ["tessellar", *tags]}
    if record.license:
        front["license"] = record.license
    if record.data:
        front["datasets"] = [record.data]
    if record.metrics:
        front["metrics"] = list(record.metrics)
    rows = {}
    for key, value in record.as_dict().items():
        if key not in ("title", "metrics"):
            rows[key] = str(value)
    metrics = {name: f"{value:g}" for name, value in record.metrics.items()}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {record.title or name}\n",
        f"{usage(kind, name, class_names)}\n",
        _table("part", facts),
        _table("record", rows),
        _table("metric", metrics),
        _classes(class_names),
        "" if record.license else "The record of this model states no license.\n",
    ]
    return "\n".join(filter(None, sections))


def usage(kind: str, name: str, class_names: Sequence[str]) -> str:
    """How the model is used from Python, as a block of Markdown."""
    classes = list(class_names[:3]) or [0, 1, 2]
    return USAGE[kind].format(name=name, classes=classes)


def _classes(names: Sequence[str]) -> str:
    """A table of ids and names, of the first MOST_CLASSES where there are more."""
    rows = {str(label): in_one_line(name) for label, name in enumerate(names[:MOST_CLASSES])}
    more = len(names) - len(rows)
    rest = f"\n{more} more are in `config.yaml`.\n" if more > 0 else ""
    return _table("class", rows) + rest


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join([f"| {title} | |", "|---|---|", *lines, ""]) if rows else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


USAGE = {
    "tokenizer": """```python
import tessellar

tokenizer = tessellar.load_tokenizer("{name}")  # this folder, or its hub id: OWNER/NAME
tokens = tokenizer.encode(images)  # PIL images, uint8, or floats [B, 3, H, W] in [-1, 1]
images = tokenizer.decode(tokens)
```""",
    "generator": """```python
import tessellar

generator = tessellar.load_generator("{name}")  # this folder, or its hub id: OWNER/NAME
images = generator.sample(classes={classes}, guidance=1.5, seed=0)  # PIL images
```""",
    "text generator": """```python
import tessellar

generator = tessellar.load_generator("{name}")  # this folder, or its hub id: OWNER/NAME
images = generator.sample(prompts=["a red circle"], guidance=1.5, seed=0)  # PIL images
```""",
}
