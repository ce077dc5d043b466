"""Training from a cache of tokens instead of images: the same views at the same visits, without
reading an image.

At each visit one of the cached views, and of the captions, is drawn by the very numbers that draw
it in the set of images, so with the same seed a run sees the same tokens and texts in the same
order. Other tokenizers' caches are refused.
"""

import hashlib
import logging
import mmap
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from tessellar.checkpoints.data_facts import other_class
from tessellar.checkpoints.fingerprint import is_made_by, model_fingerprint
from tessellar.data.batch import TokenBatch
from tessellar.data.captions import SEPARATOR, draw_captions, pick
from tessellar.data.classes import shown
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.dataset import ImageDataset, IndexedDataset, digest
from tessellar.data.token_cache.files import (
    CAPTIONS,
    CHECKSUMS,
    ENDS,
    LABELS,
    TOKENS,
    Header,
    crc_of,
    crc_of_rows,
    open_array,
    read_header,
)
from tessellar.data.token_cache.storage import sample_posterior, unpack
from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.randomness import derive, uniforms

log = logging.getLogger(__name__)
POSTERIOR = 0x7E  # sets the noise of a posterior apart from the choice of a view


class CachedTokens(IndexedDataset[TokenBatch]):
    """Tokens of the cache in `folder`: one view a visit, drawn from (seed, epoch, index), or always
    the first.

    Raises UserError for an incomplete or damaged cache, and for labels without a class.
    """

    def __init__(self, folder: str | Path, seed: int = 0, augment: bool = True) -> None:
        self.folder = Path(folder)
        self.header: Header = read_header(folder)
        self.seed = seed
        self.augment = augment
        self.class_names = self.header.class_names
        labels = open_array(self.folder / LABELS, (self.header.count,), "int64")
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            raise UserError(
                f"{self.folder / LABELS} holds classes {labels.min()} to {labels.max()}; the header names "
                f"{len(self.class_names)}"
            )
        self.labels = torch.from_numpy(np.array(labels))
        assert self._ends is None or len(self._ends) == len(self)
        self.has_captions = self._ends is not None and bool(self._ends[-1] > 0)
        # Opens the file: a damaged one is no surprise for the first epoch.
        assert len(self._tokens) == len(self)
        self._check_files()

    @cached_property
    def _tokens(self) -> np.ndarray:
        storage = self.header.storage
        return open_array(
            self.folder / TOKENS,
            (self.header.count, self.header.views, *storage.shape),
            storage.dtype,
        )

    @cached_property
    def _sums(self) -> np.ndarray | None:
        """Checksums of the rows of tokens; None in a cache of an older version."""
        if self.header.checksums is None:
            return None
        return open_array(self.folder / CHECKSUMS, (self.header.count, self.header.views), "uint32")

    def _check_files(self) -> None:
        """Raise UserError where a file beside the tokens does not have its checksum."""
        if self._sums is None:
            log.info("%s carries no checksums, so damage to it would not be noticed", self.folder)
        for name, expected in (self.header.checksums or {}).items():
            path = self.folder / Path(name).name
            if not path.is_file() or crc_of(path) != expected:
                raise UserError(
                    f"{path} is damaged: it does not have its checksum; make the cache anew"
                )

    @cached_property
    def _ends(self) -> np.ndarray | None:
        """Where each caption ends in the file of captions; None for a set without captions."""
        if not self.header.captions:
            return None
        ends = open_array(self.folder / ENDS, (self.header.count,), "int64")
        path = self.folder / CAPTIONS
        size = path.stat().st_size if path.is_file() else 0
        if ends[-1] != size:
            raise UserError(f"{path} has {size} bytes, not {ends[-1]}: it is truncated")
        return ends

    @cached_property
    def _captions(self) -> memoryview:
        with open(self.folder / CAPTIONS, "rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0
            return memoryview(
                b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        for name in ("_tokens", "_sums", "_ends", "_captions"):
            state.pop(name, None)
        return state

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        index = torch.as_tensor(indices)
        seed = derive(self.seed, self.epoch)
        draws = uniforms(seed, indices, 1)[:, 0] if self.augment else np.zeros(len(index))
        places = index.numpy(), (draws * self.header.views).astype(np.int64)
        rows = self._tokens[places]
        tokens = unpack(rows, self.header.storage, self.header.token_layout)
        try:
            if self.header.storage.kind != "posterior":
                self.header.token_layout.check(tokens)
        except ValueError as error:
            raise UserError(
                f"{self.folder / TOKENS} is damaged ({error}); make the cache anew"
            ) from error
        if self._sums is not None and (crc_of_rows(rows) != self._sums[places]).any():
            raise UserError(
                f"{self.folder / TOKENS} is damaged: a row lacks its checksum; make the cache anew"
            )
        if self.header.storage.kind == "posterior":
            count = tokens[0].numel() // 2
            u = torch.from_numpy(uniforms(derive(seed, POSTERIOR), indices, count))
            noise = torch.special.ndtri(u + 2.0**-54)  # 0 would become minus infinity
            tokens = sample_posterior(tokens, noise)
        batch: TokenBatch = {"tokens": tokens, "label": self.labels[index], "index": index}
        if self.has_captions:
            batch["caption"] = self._captions_of(index.numpy())
        return batch

    def captions(self, indices: Sequence[int]) -> list[str]:
        if not self.has_captions:
            raise UserError(f"{self.folder} holds no captions")
        return self._captions_of(np.asarray(indices))

    def _captions_of(self, index: np.ndarray) -> list[str]:
        assert self._ends is not None
        ends = self._ends[index]
        starts = np.where(index > 0, self._ends[index - 1], 0)
        texts = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            stored = bytes(self._captions[start:end]).decode(errors="replace")
            texts.append(tuple(stored.split(SEPARATOR)))
        if not self.augment:
            return [pick(several, 0.0) for several in texts]
        return draw_captions(texts, index, self.seed, self.epoch)

    def require(self, tokenizer: Tokenizer) -> None:
        """Raise UserError unless the cache was made by this very tokenizer, or by the one whose
        tokens it quantises.
        """
        tokenizer = tokenizer.source
        if is_made_by(self.header.tokenizer, self.header.tokenizer_config, tokenizer):
            return
        raise UserError(
            f"{self.folder} was encoded by another tokenizer (fingerprint {self.header.tokenizer}, the model's has "
            f"{model_fingerprint(tokenizer)}): encode it again with convert.py cache"
        )

    def fingerprint(self) -> str:
        header = self.header
        return digest(
            set="tokens",
            tokenizer=header.tokenizer,
            data=header.data_fingerprint,
            views=header.views,
        )

    def content(self) -> str:
        """With the labels as they are, and the lengths of the captions."""
        ends = b"" if self._ends is None else np.asarray(self._ends).tobytes()
        told = hashlib.sha256(self.labels.numpy().tobytes() + ends).hexdigest()
        return digest(tokens=self.fingerprint(), told=told)


@in_ranges
class CachedTokensData(ImageDataModule):
    """The cache that `convert.py cache` wrote into `root`: its parts `train` and `val`.

    `images` is the data set that was encoded: only needed where real images are, such as reference
    statistics.
    """

    def __init__(
        self,
        root: str,
        images: ImageDataModule | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        balance: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, balance)
        self.root = Path(root)
        self.images = images

    @cached_property
    def _train(self) -> CachedTokens:
        return CachedTokens(self.root / "train", self.seed)

    @cached_property
    def _val(self) -> CachedTokens:
        return CachedTokens(self.root / "val", self.seed, augment=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self._train.header.data

    @property
    def image_size(self) -> tuple[int, int]:  # type: ignore[override]
        return self._train.header.image_size

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self._train.class_names

    @property
    def holds_out(self) -> bool:
        return self.images is not None and self.images.holds_out

    def train_dataset(self, augment: bool = True) -> ImageDataset:
        return self._images().train_dataset(augment)

    def val_dataset(self) -> ImageDataset:
        return self._images().val_dataset()

    def text_datasets(self) -> list[IndexedDataset]:
        return [self._train, self._val]

    def _images(self) -> ImageDataModule:
        if self.images is None:
            raise UserError(
                f"{self.root} holds tokens, not images: name the images too (data.images), or use statistics"
            )
        theirs = self.images.class_names
        if tuple(theirs) != self.class_names:
            raise UserError(
                f"{self.root} was encoded with the classes {shown(self.class_names)}; data.images has {shown(theirs)}: "
                "name the images that were encoded, or encode them again"
            )
        return self.images

    def check_files(self) -> None:
        difference = other_class(self._train.class_names, self._val.class_names)
        if difference is not None:
            raise UserError(
                f"{self._train.folder} and {self._val.folder} have different classes: {difference}; encode both again"
            )
        self._tell_counts(self._train)

    def fingerprint(self) -> str:
        return digest(parts=[self._train.fingerprint(), self._val.fingerprint()])

    def contents(self) -> tuple[str, str]:
        return self._train.content(), self._val.content()

    def train_dataloader(self) -> DataLoader:
        return self._loader(self._checked(self._train), "train")

    def val_dataloader(self) -> DataLoader:
        return self._loader(self._checked(self._val), "val")

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def _checked(self, tokens: CachedTokens) -> CachedTokens:
        """The cache, if it was made by the tokenizer of the model in training; a model without one
        takes any cache.
        """
        module: Any = self.trainer.lightning_module if self.trainer else None
        tokenizer = getattr(module, "tokenizer", None)
        if isinstance(tokenizer, Tokenizer):
            tokens.require(tokenizer)
        return tokens
