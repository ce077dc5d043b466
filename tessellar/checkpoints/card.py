"""The model card of an export: front matter that hubs read, and a page made from the run's own
record.
"""

import re
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


# Identifiers that the Hugging Face hub takes in front matter; another license is `other` with its name.
LICENSES = frozenset(
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc mpl-2.0 unlicense wtfpl zlib afl-3.0 "
    "artistic-2.0 epl-2.0 eupl-1.1 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 agpl-3.0 osl-3.0 cc cc0-1.0 cc-by-2.0 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 openrail openrail++ "
    "creativeml-openrail-m bigscience-openrail-m bigcode-openrail-m bigscience-bloom-rail-1.0 apple-ascl apple-amlr "
    "llama2 llama3 gemma odc-by odbl pddl c-uda cdla-permissive-2.0 cdla-sharing-1.0 ms-pl unknown other".split()
)
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

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
    citations: str = "",
    sections: Sequence[str] = (),
) -> str:
    """Text of README.md. `kind` is a key of TAGS, `facts` are lines about the parts,
    `class_names[k]` is the name of class k, `citations` are in BibTeX; `sections` of Markdown stand
    behind how the model is used.
    """
    pipeline, tags = TAGS[kind]
    front = {"library_name": "tessellar", "pipeline_tag": pipeline, "tags": ["tessellar", *tags]}
    if record.license:
        front |= front_license(record.license)
    if DATASET_ID.fullmatch(record.data):
        front["datasets"] = [record.data]
    if record.metrics:
        front["metrics"] = list(record.metrics)
    rows = {}
    for key, value in record.as_dict().items():
        if key not in ("title", "metrics"):
            rows[key] = str(value)
    metrics = {name: f"{value:g}" for name, value in record.metrics.items()}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {record.title or name}\n",
        f"{usage(kind, name, class_names)}\n",
        *sections,
        table("part", facts),
        table("record", rows),
        table("metric", metrics),
        _classes(class_names),
        "" if record.license else "The record of this model states no license.\n",
        f"## Citation\n\n```bibtex\n{citations}\n```\n" if citations else "",
    ]
    return "\n".join(filter(None, parts))


def front_license(license: str) -> dict[str, str]:
    """A license as hubs want it in front matter: one of their identifiers, or `other` with its name."""
    known = license.lower()
    if known in LICENSES:
        return {"license": known}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", known).strip("-")}


def usage(kind: str, name: str, class_names: Sequence[str]) -> str:
    """How the model is used from Python, as a block of Markdown."""
    classes = list(class_names[:3]) or [0, 1, 2]
    return USAGE[kind].format(name=name, classes=classes)


def _classes(names: Sequence[str]) -> str:
    """A table of ids and names, of the first MOST_CLASSES where there are more."""
    rows = {str(label): in_one_line(name) for label, name in enumerate(names[:MOST_CLASSES])}
    more = len(names) - len(rows)
    rest = f"\n{more} more are in `config.yaml`.\n" if more > 0 else ""
    return table("class", rows) + rest


def table(title: str, rows: Mapping[str, str]) -> str:
    """Two columns of Markdown, headed by `title`; empty without rows."""
    lines = []
    for key, value in rows.items():
        cell = value.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {key} | {cell} |")
    return "\n".join([f"| {title} | |", "|---|---|", *lines, ""]) if rows else ""


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
