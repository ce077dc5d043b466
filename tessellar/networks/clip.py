"""CLIP through Hugging Face's `transformers`: how well a picture goes with its caption (CLIPScore,
arXiv 2104.08718).
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.text.bpe import require
from tessellar.text.encoders import published_vocabulary

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """A frozen CLIP; `source` is a local folder or a hub id.

    Images are resized as a whole to the network's square (bicubic, antialiased): what is drawn here
    is square. Raises UserError where `source` is no CLIP that can be read.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        library = require("transformers")
        try:
            config = library.AutoConfig.from_pretrained(source, trust_remote_code=False)
            if config.model_type != "clip":
                raise UserError(f"{source} is a {config.model_type}, not a CLIP")
            model = library.CLIPModel.from_pretrained(source, use_safetensors=True)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0][:160]
            raise UserError(f"the CLIP {source} cannot be loaded ({first})") from error
        self.model: Any = model.float()
        self.vocabulary = published_vocabulary(source)
        self.side = int(config.vision_config.image_size)
        self.length = int(config.text_config.max_position_embeddings)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def pixels(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] as the network reads them."""
        images = at_least_float32(images).clamp(-1, 1)
        if tuple(images.shape[-2:]) != (self.side, self.side):
            size = (self.side, self.side)
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return ((images + 1) / 2 - self.mean) / self.std

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine [B] between images [B, 3, H, W] and their captions."""
        read = self.vocabulary(
            list(texts),
            max_length=self.length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(images.device)
        output = self.model(pixel_values=self.pixels(images), **read)
        return F.cosine_similarity(output.image_embeds, output.text_embeds, dim=-1)
