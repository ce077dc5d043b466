"""Text: a byte-level BPE trained on a run's own captions, and frozen text encoders with their features kept on disk.

Hugging Face's `tokenizers` and `transformers` come with the extra `text`; they are imported where they are used. A BPE
is a table of pairs of ids [M, 2] and nothing else: id 0 begins a text, 1 .. 256 are the bytes, 257 + m is pair m.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.weights import read_safetensors, write_safetensors

log = logging.getLogger(__name__)
BOS, BYTES = 0, 256
FIRST_PAIR = 1 + BYTES


def require(package: str) -> Any:
    """Hugging Face's `tokenizers` or `transformers`; raises UserError, naming the extra, where it is not installed.

    From a checkout, without the package, `import tokenizers` finds our folder of that name.
    """
    import importlib

    try:
        module = importlib.import_module(package)
    except ImportError:
        module = None
    if module is None or getattr(module, "__version__", None) is None:
        raise UserError(f"captions need Hugging Face's package {package}: pip install 'tessellar[text]'")
    return module


def train_bpe(captions: Iterable[str], pairs: int, lowercase: bool = True) -> Tensor:
    """Up to `pairs` merges learnt from captions, int64 [m, 2]: ids of what each merge joins."""
    library = require("tokenizers")
    learner = _pipeline(library, library.models.BPE(), lowercase)
    trainer = library.trainers.BpeTrainer(
        vocab_size=BYTES + pairs, min_frequency=2, initial_alphabet=sorted(_alphabet(library)), show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [m.split(" ") if isinstance(m, str) else m for m in json.loads(learner.to_str())["model"]["merges"]]
    ids = {letter: 1 + place for place, letter in enumerate(sorted(_alphabet(library)))}
    for number, (left, right) in enumerate(merges):
        ids.setdefault(left + right, FIRST_PAIR + number)
    return torch.tensor([(ids[left], ids[right]) for left, right in merges], dtype=torch.int64).view(-1, 2)


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


class FrozenEncoder:
    """Hidden states of a frozen T5 encoder or CLIP text model through `transformers`, float32.

    `source` is a local folder or a hub id. Nothing is read or downloaded before the first text that no cache holds.
    """

    def __init__(self, source: str, length: int) -> None:
        self.source, self.length = source, length
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, texts: Sequence[str], device: torch.device) -> list[Tensor]:
        """Features [n, F] of each text, n <= length its tokens (no padding)."""
        tokenizer, model = self._load(device)
        read = tokenizer(
            list(texts), max_length=self.length, padding="longest", truncation=True, return_tensors="pt"
        ).to(device)
        mask = read["attention_mask"]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            states = model(input_ids=read["input_ids"], attention_mask=mask).last_hidden_state.float()
        return [row[keep.bool()] for row, keep in zip(states, mask, strict=True)]

    def _load(self, device: torch.device) -> tuple[Any, Any]:
        if self._loaded is None:
            library = require("transformers")
            log.info("texts are read by %s", self.source)
            try:
                # Without the argument transformers asks the user whether to run code that came with the encoder.
                config = library.AutoConfig.from_pretrained(self.source, trust_remote_code=False)
                tokenizer = library.AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
                kind = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}
                if config.model_type not in kind:
                    raise UserError(f"{self.source} is a {config.model_type}; T5 and CLIP text models can be read")
                model = getattr(library, kind[config.model_type]).from_pretrained(self.source)
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0][:160]
                raise UserError(f"the text encoder {self.source} cannot be loaded ({first})") from error
            self._loaded = tokenizer, model.float().eval().requires_grad_(False)
        tokenizer, model = self._loaded
        return tokenizer, model.to(device)


class FeatureCache:
    """Features by text in bfloat16 files under `folder`, one a text; None keeps nothing.

    Features are rounded to bfloat16 whether they were read or made, so that a run does not depend on what was cached.
    """

    def __init__(self, encoder: FrozenEncoder, folder: str | None) -> None:
        self.encoder, self.folder = encoder, folder

    def __call__(self, texts: Sequence[str], device: torch.device) -> list[Tensor]:
        found = {text: self._read(text) for text in dict.fromkeys(texts)}
        missing = [text for text, features in found.items() if features is None]
        for text, made in zip(missing, self.encoder(missing, device) if missing else [], strict=True):
            found[text] = rounded = made.to(torch.bfloat16).cpu()
            self._write(text, rounded)
        return [found[text].to(device, torch.float32) for text in texts]  # type: ignore[union-attr]

    def path(self, text: str) -> Path:
        key = json.dumps([self.encoder.source, self.encoder.length, text])
        name = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
        assert self.folder is not None
        return Path(self.folder) / name[:2] / f"{name}.safetensors"

    def _read(self, text: str) -> Tensor | None:
        if self.folder is None or not self.path(text).is_file():
            return None
        return read_safetensors(self.path(text))[0]["features"]

    def _write(self, text: str, features: Tensor) -> None:
        """Whole or not at all: several processes may write the same text."""
        if self.folder is None:
            return
        target = self.path(text)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(f".{os.getpid()}")
        write_safetensors({"features": features.contiguous()}, staged)
        staged.replace(target)


def pad_left(rows: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows [n_i, ...] as one tensor [B, P, ...] with padding on the left, and which places are real [B, P]."""
    longest = max((len(row) for row in rows), default=0) if length is None else length
    padded = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:])
    valid = torch.zeros(len(rows), longest, dtype=torch.bool, device=padded.device)
    for place, row in enumerate(rows):
        padded[place, longest - len(row) :] = row
        valid[place, longest - len(row) :] = True
    return padded, valid
