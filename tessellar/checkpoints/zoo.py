"""The zoo: published checkpoints by name, such as `llamagen/c2i-b-256`: `zoo.yaml` beside this file.

Imports nothing heavy, so that lists of it are there at once. (Their files: `mirror.py`.)
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tessellar.errors import UserError
from tessellar.protocol.nearest import nearest

FILE = Path(__file__).with_name("zoo.yaml")
UNKNOWN = "unknown"
ITSELF = "itself"
NAME = re.compile(r"[\w-]+/[\w-]+")
REFERENCE_OF_NONE = "REFERENCE.npz"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published checkpoint; `unknown` where our notes do not say it.

    Fields are those of `zoo.yaml`, which explains them; `parameters` is None where it is unknown.
    """

    name: str
    what: str
    arxiv: str
    repository: str
    file: str
    model: str
    license: str
    license_source: str = ""
    size: str = UNKNOWN
    code_license: str = UNKNOWN
    parameters: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    config: str = ""
    sampling: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    protocol: str = UNKNOWN
    reference: str = UNKNOWN
    note: str = ""

    @property
    def system(self) -> str:
        """What `convert.py import` takes."""
        return self.name.partition("/")[0]

    @property
    def kind(self) -> str:
        return "generator" if self.tokenizer else "tokenizer"

    @property
    def source(self) -> str:
        """`hub:OWNER/REPO/FILE`, or the name of a file that is not known to be on the hub."""
        return f"hub:{self.repository}/{self.file}" if self.on_hub else self.file

    @property
    def on_hub(self) -> bool:
        return UNKNOWN not in (self.repository, self.file)

    @property
    def export(self) -> str:
        """Where the commands below put it."""
        return f"runs/{self.name.replace('/', '-')}/export"

    def importing(self) -> str:
        """The command that makes an export of it."""
        variant = self.name.partition("/")[2]
        return f"python convert.py import {self.system} {variant} --out {self.export}"

    def evaluation(self) -> str:
        """The command that measures the published number; "" where its protocol is unknown."""
        if not self.published or self.protocol == UNKNOWN:
            return ""
        words = ["python", "evaluate.py", "model", self.export]
        if self.kind == "tokenizer":
            size = self.options.get("image_size", 256)
            words += ["--data", "tessellar.data.ImageFolderData", "--data.size", str(size)]
            words += ["--data.root", "IMAGENET/train", "--data.val_root", "IMAGENET/val"]
        if self.sampling:
            words += ["--config", f"configs/{self.sampling}.yaml"]
        words += ["--protocol", self.protocol]
        if self.kind == "generator":
            known = self.reference != UNKNOWN
            words += ["--reference", self.reference if known else REFERENCE_OF_NONE]
        return shlex.join(words)


@cache
def _facts() -> dict[str, Any]:
    # The loader in C where there is one: ten times as fast.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(FILE.read_text(encoding="utf-8"), Loader=loader)


@cache
def zoo() -> dict[str, Published]:
    """All of `zoo.yaml` by name, in its order."""
    found = {}
    for name, facts in _facts()["checkpoints"].items():
        count = facts["parameters"]
        known = {
            **facts,
            "parameters": None if count == UNKNOWN else count,
            "beside": tuple(facts.get("beside", ())),
        }
        found[name] = Published(name=name, **known)
    return found


def not_read() -> dict[str, str]:
    """What is published beside, and why nothing here reads it."""
    return _facts()["not_read"]


def is_published(name: object) -> bool:
    """Whether this is a name of the zoo rather than a path that exists."""
    text = str(name)
    return bool(NAME.fullmatch(text)) and not Path(text).exists() and text in zoo()


def looks_published(name: str) -> bool:
    """Whether this reads as a name of the zoo, of a system that has some."""
    return bool(NAME.fullmatch(name)) and name.partition("/")[0] in {
        checkpoint.system for checkpoint in zoo().values()
    }


def published(name: str) -> Published:
    """The checkpoint of that name; raises UserError with the nearest one where there is none."""
    if name not in zoo():
        hint = nearest(name, zoo(), listed=0)
        raise UserError(
            f"no published checkpoint is called {name!r}{hint}; `list weights` names them"
        )
    return zoo()[name]
