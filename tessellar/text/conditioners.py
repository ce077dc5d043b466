"""Conditioners of captions: ids of a byte-level BPE, features of a frozen encoder, features that
the data set gives.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tessellar import distributed
from tessellar.errors import UserError
from tessellar.protocol.condition import Condition, Conditioner
from tessellar.protocol.configured import from_a_file
from tessellar.text.bpe import BPE, FIRST_PAIR, bpe_of, pad_left, train_bpe
from tessellar.text.encoders import (
    FeatureCache,
    FrozenEncoder,
    published_vocabulary,
    require_known,
)

UNTRAINED = -1


TEXT_CACHE = "runs/.cache/text"


class FeatureConditioner(Conditioner):
    """Caption features [B, P, D] that the data set gives, left-padded, with `valid` [B, P]."""

    gives = "caption features"

    def forward(self, batch: dict[str, Any]) -> Condition:
        if "caption_features" not in batch or "caption_valid" not in batch:
            raise UserError(
                "the data set gives no caption_features and caption_valid, which this generator reads"
            )
        return Condition(valid=batch["caption_valid"].bool(), features=batch["caption_features"])


class TextConditioner(Conditioner):
    """Reads captions; `of_texts` serves prompts."""

    @abstractmethod
    def of_texts(self, texts: Sequence[str]) -> Condition:
        """Condition of B texts."""

    def prepare(self, captions: Callable[[], list[str]]) -> None:
        """Told once before training how to get the captions of the training set; for what is learnt
        from them.
        """

    def forward(self, batch: dict[str, Any]) -> Condition:
        if "caption" not in batch:
            raise UserError("the data set gives no captions, which this generator reads")
        return self.of_texts(batch["caption"])


class CaptionConditioner(TextConditioner):
    """Caption tokens [B, P], left-padded, of a byte-level BPE with `vocab_size` ids learnt from the
    run's captions.

    The BPE is a buffer, so checkpoints and exports carry it. Texts are cut off at `length` tokens,
    the first of which begins the text.
    """

    gives = "caption tokens"
    meaning = ("vocab_size", "lowercase")

    def __init__(self, vocab_size: int = 1024, length: int = 64, lowercase: bool = True) -> None:
        super().__init__()
        if vocab_size < FIRST_PAIR or length < 2:
            raise UserError(
                f"vocab_size {vocab_size} and length {length} must be at least {FIRST_PAIR} and 2"
            )
        self.length = length
        self.lowercase = lowercase
        self.register_buffer("merges", torch.full((vocab_size - FIRST_PAIR, 2), UNTRAINED))
        self.register_buffer("trained", torch.tensor(False))
        self.merges: Tensor
        self.trained: Tensor

    @property
    def is_prepared(self) -> bool:
        return bool(self.trained)

    def prepare(self, captions: Callable[[], list[str]]) -> None:
        if self.is_prepared:
            return
        learnt = (
            train_bpe(captions(), len(self.merges), self.lowercase)
            if distributed.rank() == 0
            else None
        )
        merges = distributed.broadcast(learnt)
        self.merges[: len(merges)] = merges.to(self.merges.device)
        self.trained.fill_(True)

    @property
    def bpe(self) -> BPE:
        """Raises UserError before `prepare`."""
        if not bool(self.trained):
            raise UserError(
                "this generator's BPE has not been learnt yet: train.py does so from the run's captions"
            )
        pairs = [(a, b) for a, b in self.merges.tolist() if a != UNTRAINED]
        return bpe_of(tuple(pairs), self.lowercase)

    def of_texts(self, texts: Sequence[str]) -> Condition:
        bpe = self.bpe
        ids, valid = pad_left([torch.tensor(bpe.encode(text, self.length)) for text in texts])
        return Condition(ids=ids, valid=valid).to(self.merges.device)


class EncoderConditioner(TextConditioner):
    """Features [B, length, F] of a frozen T5 or CLIP (a local folder or hub id), left-padded; kept
    in `cache`.

    The encoder is no part of checkpoints: it is read again from `source`, which is the one thing
    that an export reaches outside of itself (at the first prompt, as tensors, never as code). There
    it must be one of KNOWN, which no export chooses, or one that the user named in ALLOWED.
    `cache` is the user's own: from an export's config the default is taken.
    """

    gives = "caption features"
    free = ("cache",)

    def __init__(self, source: str, length: int = 120, cache: str | None = TEXT_CACHE) -> None:
        super().__init__()
        if from_a_file():
            cache = TEXT_CACHE
            require_known(source)
        self.length = length
        self.features = FeatureCache(FrozenEncoder(source, length), cache)
        # Where features go.
        self.register_buffer("place", torch.zeros(0), persistent=False)
        self.place: Tensor

    def of_texts(self, texts: Sequence[str]) -> Condition:
        features, valid = pad_left(self.features(texts, self.place.device), self.length)
        return Condition(valid=valid, features=features)


class PublishedIds(TextConditioner):
    """Caption tokens [B, P], left-padded, by the vocabulary of a published text model (Llama's for
    TokenFlow), of at most `length` tokens with those that it adds itself.

    `source` is a local folder or a hub id, read at the first text; an export reaches it as
    EncoderConditioner reaches its encoder.
    """

    gives = "caption tokens"
    meaning = ("source",)

    def __init__(self, source: str, length: int = 128) -> None:
        super().__init__()
        if from_a_file():
            require_known(source)
        if length < 1:
            raise UserError(f"length is {length}; it must be at least 1")
        self.source = source
        self.length = length
        self._vocabulary: Any = None
        # Where ids go.
        self.register_buffer("place", torch.zeros(0), persistent=False)
        self.place: Tensor

    def of_texts(self, texts: Sequence[str]) -> Condition:
        if self._vocabulary is None:
            self._vocabulary = published_vocabulary(self.source)
        read = self._vocabulary(list(texts), max_length=self.length, truncation=True)
        ids, valid = pad_left([torch.tensor(row) for row in read["input_ids"]])
        return Condition(ids=ids, valid=valid).to(self.place.device)
