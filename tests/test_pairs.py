"""Every tokenizer with every generator: legal pairs train a step, sample and decode; the others say why not."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessellar.pipeline import ImageGenerator
from tessellar.processes.diffusion import AncestralDiffusion
from tessellar.processes.flow import Euler
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.settings import Sampling
from tests.tiny.pairs import CLASSES, GENERATORS, TOKENIZERS, page, reason_against

ROOT = Path(__file__).parents[1]
# one tokenizer of every kind of layout: grid, sequence, prefixes, levels, two vocabularies, scales, latents
KINDS = (
    "ViT-VQ",
    "TiTok",
    "FlexTok",
    "ResTok",
    "Hita",
    "VAR's VQVAE",
    "VAT",
    "KL VAE",
    "MingTok",
    "TiTok KL",
    "Semanticist",
    "scale pyramid of a KL VAE",
    "TokenBridge's of a KL VAE",
    "Open-MAGVIT2",
    "BitDance's autoencoder",
    "UniWeTok",
    "BAR-FSQ",
)
LEGAL = [(t, g) for t in KINDS for g in GENERATORS if reason_against(t, g) is None]
FAST = Sampling(Constant(2.0), flow=Euler(2), diffusion=AncestralDiffusion(2))


@cache
def tokenizer(name: str) -> Tokenizer:
    torch.manual_seed(0)
    return TOKENIZERS[name]().eval()


def random_tokens(layout: Layout, batch: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    if layout.is_continuous:
        return torch.randn(layout.blank(batch).shape, generator=draw)
    if not layout.is_categorical:
        return torch.randint(0, 2, layout.blank(batch).shape, generator=draw)
    return (torch.rand(batch, layout.length, generator=draw) * layout.vocab()).long()


def test_the_page_is_true() -> None:
    assert (ROOT / "docs" / "pairs.md").read_text(encoding="utf-8") == page()


def test_every_tokenizer_has_a_generator_and_the_other_way_round() -> None:
    legal = {(t, g) for t in TOKENIZERS for g in GENERATORS if reason_against(t, g) is None}
    assert {t for t, _ in legal} == set(TOKENIZERS) and {g for _, g in legal} == set(GENERATORS)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_what_does_not_fit_is_said_in_one_line(name: str, generator: str) -> None:
    reason = reason_against(name, generator)
    assert reason is None or ("\n" not in reason and 20 < len(reason) < 400)


@pytest.mark.parametrize(("name", "generator"), LEGAL)
def test_a_legal_pair_trains_samples_and_decodes(name: str, generator: str) -> None:
    codes = tokenizer(name)
    torch.manual_seed(1)
    made = GENERATORS[generator](codes.layout)
    model = ImageGenerator(codes, made, made.make_conditioner())
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    labels = Condition(ids=torch.arange(4) % CLASSES)
    before = [p.detach().clone() for p in made.parameters()]
    torch.stack(
        list(made.train().loss(random_tokens(codes.layout, 4), labels).values())
    ).sum().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))
    images = model.sample(labels.select(torch.arange(2)), FAST, [0, 1])
    assert images.shape == (2, 3, 16, 16) and bool(images.isfinite().all())
