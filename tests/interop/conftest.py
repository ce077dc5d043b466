"""Tiny models for the interop tests, by seed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tessellar.models.llamagen import LlamaGen
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ


def make_tokenizer(seed: int = 0, vocab: int = 16) -> ViTVQ:
    """8x8 images as 2x2 codes."""
    torch.manual_seed(seed)
    return ViTVQ(VectorQuantizer(vocab, 4), 8, 4, 16, 1, 1, 2).eval()


def make_generator(seed: int = 0) -> ImageGenerator:
    """Three classes; logits far from flat."""
    vq = make_tokenizer(seed)
    llama = LlamaGen(vq.layout, 16, 2, 2, num_classes=3, ffn_multiple_of=8)
    nn.init.normal_(llama.output.weight, std=0.5)
    return ImageGenerator(vq, llama, ClassConditioner(3)).eval()


@pytest.fixture
def tokenizer() -> Callable[..., ViTVQ]:
    return make_tokenizer


@pytest.fixture
def generator() -> Callable[..., ImageGenerator]:
    return make_generator
