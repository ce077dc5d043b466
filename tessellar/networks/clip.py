"""CLIP through Hugging Face's `transformers`: how well a picture goes with its caption (CLIPScore,
arXiv 2104.08718).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.networks.facts import refuse_evaluator
from tessellar.networks.preprocessing import standardised
from tessellar.text.bpe import require
from tessellar.text.encoders import published_vocabulary

# Of images in [0, 1], as CLIP was trained (arXiv 2103.00020, official code).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SCALE = 2.5  # CLIPScore's w


class Clip(nn.Module):
    """A frozen CLIP; `source` is a local folder or a hub id.

    Raises UserError where `source` is no CLIP that can be read, and for an evaluation network.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        library = require("transformers")
        self.files = sorted(Path(source).expanduser().glob("*.safetensors"))
        for file in self.files:
            refuse_evaluator(file)
        try:
            # Without the argument transformers asks the user whether to run code of the model's.
            config = library.AutoConfig.from_pretrained(source, trust_remote_code=False)
            if config.model_type != "clip":
                raise UserError(f"{source} is a {config.model_type}, not a CLIP model")
            model = library.CLIPModel.from_pretrained(source, use_safetensors=True)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0][:160]
            raise UserError(f"the CLIP model {source} cannot be loaded ({first})") from error
        self.model: Any = model.float()
        self.vocabulary = published_vocabulary(source)
        self.side = int(config.vision_config.image_size)
        self.length = int(config.text_config.max_position_embeddings)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """CLIPScore [B], 2.5 max(cos, 0), of images [B, 3, H, W] in about [-1, 1] and their captions,
        or one caption of all.
        """
        read = self.vocabulary(
            list(texts), max_length=self.length, padding=True, truncation=True, return_tensors="pt"
        ).to(images.device)
        pixels = standardised(images, (self.side, self.side), MEAN, STD)
        found = self.model(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            pixel_values=pixels,
        )
        likeness = F.cosine_similarity(found.image_embeds, found.text_embeds)
        return SCALE * likeness.clamp(min=0)
