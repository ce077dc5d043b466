"""A tiny generator of class ids and one of captions, whole: tokenizer, generator, conditioner."""

from collections.abc import Sequence

import torch
from torch import nn

from tessellar.models.llamagen import LlamaGen
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.text.conditioners import CaptionConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

TEXTS = ["a red circle", "a blue square", "two stars"]


def of_classes(names: Sequence[str], seed: int = 0) -> ImageGenerator:
    """LlamaGen on 2 x 2 tokens of 8 x 8 pixels, of the named classes."""
    torch.manual_seed(seed)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 8, 4, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 2, 2, num_classes=len(names), ffn_multiple_of=8)
    nn.init.normal_(generator.output.weight, std=0.5)
    conditioner = ClassConditioner(len(names))
    return ImageGenerator(tokenizer, generator, conditioner, class_names=names).eval()


def of_captions() -> ImageGenerator:
    """Token-Shuffle on 4 x 4 tokens of 8 x 8 pixels, with a BPE learnt from TEXTS."""
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 8, 2, 16, 1, 1, 2)
    generator = TokenShuffle(tokenizer.layout, 16, 1, 2, 2, text_vocab=300, caption_length=16)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.5)
    conditioner = CaptionConditioner(300, 16)
    conditioner.prepare(lambda: TEXTS * 3)
    return ImageGenerator(tokenizer, generator, conditioner).eval()
