"""Frozen text encoders (T5, CLIP) through Hugging Face's `transformers`, with their features kept
on disk.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.places import cache_folder
from tessellar.tensor_files import read_safetensors, write_safetensors
from tessellar.text.bpe import log, require

ALLOWED = "TESSELLAR_TEXT_ENCODERS"  # variable of the environment: names, separated by commas
KNOWN = frozenset(
    (
        *(f"google/flan-t5-{size}" for size in ("small", "base", "large", "xl", "xxl")),
        *(f"google/t5-v1_1-{size}" for size in ("small", "base", "large", "xl", "xxl")),
        *(f"google-t5/t5-{size}" for size in ("small", "base", "large", "3b", "11b")),
        "openai/clip-vit-base-patch16",
        "openai/clip-vit-base-patch32",
        "openai/clip-vit-large-patch14",
        "openai/clip-vit-large-patch14-336",
    )
)
"""Encoders that published generators read, at their makers' names."""


def require_known(source: str) -> None:
    """Raise UserError unless an export may name `source`: others could name any folder or address."""
    allowed = os.environ.get(ALLOWED, "").split(",")
    if source not in KNOWN and source not in allowed:
        raise UserError(
            f"this config, read from a file, names the text encoder {str(source)[:200]!r}: if you trust "
            f"that, set {ALLOWED}={str(source)[:200]}"
        )


def published_vocabulary(source: str) -> Any:
    """What makes ids of texts for a published model, a local folder or a hub id, through
    `transformers`; never code that came with it. Raises UserError where it cannot be read.
    """
    library = require("transformers")
    try:
        return library.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:160]
        raise UserError(f"the vocabulary of {source} cannot be read ({first})") from error


class FrozenEncoder:
    """Hidden states of a frozen T5 encoder or CLIP text model through `transformers`, float32.

    `source` is a local folder or a hub id. Nothing is read or downloaded before the first text that
    no cache holds.
    """

    def __init__(self, source: str, length: int) -> None:
        self.source = source
        self.length = length
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, texts: Sequence[str], device: torch.device) -> list[Tensor]:
        """Features [n, F] of each text, n <= length its tokens (no padding)."""
        tokenizer, model = self._load(device)
        read = tokenizer(
            list(texts),
            max_length=self.length,
            padding="longest",
            truncation=True,
            return_tensors="pt",
        ).to(device)
        mask = read["attention_mask"]
        # Without autocast: T5 overflows in float16, and features should not depend on the run's
        # precision.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            output = model(input_ids=read["input_ids"], attention_mask=mask)
        features = []
        # Padding is cut off, so that features of a text are the same in any batch.
        for states, keep in zip(output.last_hidden_state.float(), mask, strict=True):
            features.append(states[keep.bool()])
        return features

    def _load(self, device: torch.device) -> tuple[Any, Any]:
        if self._loaded is None:
            library = require("transformers")
            log.info("texts are read by %s", self.source)
            try:
                # Without the argument transformers asks the user whether to run code that came with
                # the encoder.
                config = library.AutoConfig.from_pretrained(self.source, trust_remote_code=False)
                tokenizer = published_vocabulary(self.source)
                kind = {
                    "t5": "T5EncoderModel",
                    "clip": "CLIPTextModel",
                    "clip_text_model": "CLIPTextModel",
                }
                if config.model_type not in kind:
                    raise UserError(
                        f"{self.source} is a {config.model_type}; T5 and CLIP text models can be read"
                    )
                # Encoders on hubs hold a pickle beside the safetensors; it is never read.
                model = getattr(library, kind[config.model_type]).from_pretrained(
                    self.source, use_safetensors=True
                )
            except UserError:
                raise
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0][:160]
                raise UserError(
                    f"the text encoder {self.source} cannot be loaded ({first})"
                ) from error
            self._loaded = tokenizer, model.float().eval().requires_grad_(False)
        tokenizer, model = self._loaded
        return tokenizer, model.to(device)


class FeatureCache:
    """Features by text in bfloat16 files under `folder`, one a text; None keeps nothing.

    Features are rounded to bfloat16 whether they were read or made, so that a run does not depend
    on what was cached.
    """

    def __init__(self, encoder: FrozenEncoder, folder: str | None) -> None:
        self.encoder = encoder
        self.folder = folder

    def __call__(self, texts: Sequence[str], device: torch.device) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        for text in dict.fromkeys(texts):  # each once, in order
            features = self._read(text)
            if features is None:
                missing.append(text)
            else:
                found[text] = features
        if missing:
            for text, made in zip(missing, self.encoder(missing, device), strict=True):
                found[text] = made.to(torch.bfloat16).cpu()
                self._write(text, found[text])
        return [found[text].to(device, torch.float32) for text in texts]

    def path(self, text: str) -> Path:
        key = json.dumps([self.encoder.source, self.encoder.length, text])
        # "replace": half of a surrogate pair, which JSON can spell, has no UTF-8.
        name = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
        assert self.folder is not None
        # 256 folders: millions of files in one are slow to list.
        return cache_folder(self.folder) / name[:2] / f"{name}.safetensors"

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
        write_safetensors({"features": features.contiguous()}, target)
