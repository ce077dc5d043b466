"""A byte-level BPE trained on a run's own captions.

Hugging Face's `tokenizers` and `transformers` come with the extra `text`; they are imported where
they are used. A BPE is a table of pairs of ids [M, 2] and nothing else: id 0 begins a text, 1 ..
256 are the bytes, 257 + m is pair m.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError

log = logging.getLogger(__name__)


BOS = 0
BYTES = 256


FIRST_PAIR = 1 + BYTES


def require(package: str) -> Any:
    """Hugging Face's `tokenizers` or `transformers`; raises UserError, naming the extra, where it
    is not installed.

    From a checkout, without the package, `import tokenizers` finds our folder of that name.
    """
    import importlib

    try:
        module = importlib.import_module(package)
    except ImportError:
        module = None
    if module is None or getattr(module, "__version__", None) is None:
        raise UserError(
            f"captions need Hugging Face's package {package}: pip install 'tessellar[text]'"
        )
    return module


def train_bpe(captions: Iterable[str], pairs: int, lowercase: bool = True) -> Tensor:
    """Up to `pairs` merges learnt from captions, int64 [m, 2]: ids of what each merge joins."""
    library = require("tokenizers")
    learner = _pipeline(library, library.models.BPE(), lowercase)
    trainer = library.trainers.BpeTrainer(
        vocab_size=BYTES + pairs,
        min_frequency=2,
        initial_alphabet=sorted(_alphabet(library)),
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = []
    for merge in json.loads(learner.to_str())["model"]["merges"]:  # "a b", or ["a", "b"] later
        merges.append(merge.split(" ") if isinstance(merge, str) else merge)
    ids = {letter: 1 + place for place, letter in enumerate(sorted(_alphabet(library)))}
    for number, (left, right) in enumerate(merges):
        ids.setdefault(left + right, FIRST_PAIR + number)
    return torch.tensor(
        [(ids[left], ids[right]) for left, right in merges], dtype=torch.int64
    ).view(-1, 2)


class BPE:
    """Ids of texts by a table of merges (`train_bpe`), begun by BOS and cut off at `length`."""

    def __init__(self, merges: Sequence[tuple[int, int]], lowercase: bool = True) -> None:
        library = require("tokenizers")
        names = ["<begin>", *sorted(_alphabet(library))]
        pieces = []
        for left, right in merges:
            pieces.append((names[left], names[right]))
            names.append(names[left] + names[right])
        vocab: dict[str, int] = {}
        for number, name in enumerate(names):
            vocab.setdefault(name, number)
        self._codec = _pipeline(library, library.models.BPE(vocab=vocab, merges=pieces), lowercase)
        self._codec.decoder = library.decoders.ByteLevel()

    def encode(self, text: str, length: int) -> list[int]:
        return [BOS, *self._codec.encode(text).ids][:length]

    def decode(self, ids: Sequence[int]) -> str:
        return self._codec.decode([i for i in ids if i != BOS])


def _alphabet(library: Any) -> list[str]:
    return library.pre_tokenizers.ByteLevel.alphabet()


def _pipeline(library: Any, model: Any, lowercase: bool) -> Any:
    codec = library.Tokenizer(model)
    steps = [library.normalizers.NFKC(), library.normalizers.Strip()]
    if lowercase:
        steps.append(library.normalizers.Lowercase())
    codec.normalizer = library.normalizers.Sequence(steps)
    codec.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return codec


@lru_cache(maxsize=4)
def bpe_of(merges: tuple[tuple[int, int], ...], lowercase: bool) -> BPE:
    """The BPE of a table, made once."""
    return BPE(merges, lowercase)


def pad_left(rows: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows [n_i, ...] as one tensor [B, P, ...] with padding on the left, and which places are real
    [B, P].
    """
    longest = max((len(row) for row in rows), default=0) if length is None else length
    padded = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:])
    valid = torch.zeros(len(rows), longest, dtype=torch.bool, device=padded.device)
    for place, row in enumerate(rows):
        padded[place, longest - len(row) :] = row
        valid[place, longest - len(row) :] = True
    return padded, valid
