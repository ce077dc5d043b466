"""What a search chose, written down after each step, so that an interrupted one goes on where it was.

Only choices are kept. A search that goes on proposes the same candidates again, since they follow from its seed
alone, and takes the remembered choices in place of decoding and scoring, which cost most. So its result is that
of an uninterrupted search bit by bit. A digest of each step's candidates tells where that does not hold.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tessellar.errors import UserError, writing
from tessellar.plain_data import read_json
from tessellar.sampling.search.searching import Choices

REQUEST = "request.json"


@dataclass
class Journal:
    """A folder of the choices of a set of searches; `request` says what they are made of.

    Raises UserError where the folder holds another request's.
    """

    folder: Path
    request: dict[str, Any]

    def open(self) -> None:
        """Make the folder, or go on with what it holds."""
        path = self.folder / REQUEST
        if path.is_file():
            if read_json(path) != json.loads(json.dumps(self.request)):
                raise UserError(
                    f"{self.folder} holds an interrupted search with other settings: repeat its command to "
                    "finish it, or remove the folder"
                )
            return
        with writing(path, unfinished=path):
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, self.request)

    def of(self, image: int) -> "ImageJournal":
        """The journal of an image of the set."""
        return ImageJournal(self.folder / f"{image:06d}.json")

    def remove(self) -> None:
        """Forget everything: the set is finished."""
        for path in sorted(self.folder.glob("*.json")):
            path.unlink()
        with suppress(OSError):  # what others put there stays
            self.folder.rmdir()


@dataclass
class ImageJournal:
    """The choices of one image's search, by step."""

    path: Path
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.is_file():
            found = read_json(self.path)
            if not isinstance(found, list) or not all(isinstance(step, dict) for step in found):
                raise UserError(f"{self.path} is not the journal of a search: remove it")
            self.steps = found

    def recall(self, step: int, tokens: Tensor) -> Choices | None:
        if step >= len(self.steps):
            return None
        kept = self.steps[step]
        try:
            choices = Choices(tuple(kept["best"]), tuple(kept["scores"]), kept["calls"])
            digest = kept["candidates"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path} is not the journal of a search: remove it") from error
        if digest != digest_of(tokens):
            raise UserError(
                f"{self.path} is of other candidates than this machine draws: finish the search where it "
                "began, or remove its folder"
            )
        return choices

    def record(self, step: int, tokens: Tensor, choices: Choices) -> None:
        self.steps = [*self.steps[:step], {"candidates": digest_of(tokens), **asdict(choices)}]
        _write(self.path, self.steps)


def digest_of(tokens: Tensor) -> str:
    """16 hex digits over the values of tokens."""
    values = tokens.detach().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(values).hexdigest()[:16]


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path, unfinished=staged):
        staged.write_text(json.dumps(content) + "\n", encoding="utf-8")
        staged.replace(path)
