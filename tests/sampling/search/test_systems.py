"""Searches over real tokens: ordered sequences, grids, levels and scales, sets, bits, factors and real numbers."""

from dataclasses import replace

import pytest
import torch

from tessellar.pipeline import ImageGenerator
from tessellar.processes.diffusion import AncestralDiffusion
from tessellar.processes.flow import Euler
from tessellar.protocol.guidance import Constant
from tessellar.protocol.noise import Noise
from tessellar.sampling.search.beam import Beam, Lookahead
from tessellar.sampling.search.best_of import BestOfN
from tessellar.sampling.search.network_verifiers import Reconstruction
from tessellar.sampling.search.schedules import Even
from tessellar.sampling.search.searching import PartialDecoder, Task
from tessellar.sampling.search.verifiers import Subject
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.flextok import FlexTok
from tests.tiny.pairs import GENERATORS, TOKENIZERS

FAST = Sampling(Constant(2.0), flow=Euler(2), diffusion=AncestralDiffusion(2))
PAIRS = [
    ("FlexTok", "FlexTok's AR"),
    ("One-D-Piece", "ReToK's GPT"),
    ("LlamaGen VQ", "LlamaGen"),
    ("ResTok", "HAR"),
    ("VAR's VQVAE", "VAR"),
    ("ViT-VQ", "RAR"),
    ("ViT-VQ", "LPD"),
    ("ViT-VQ", "MaskGIT"),
    ("BAR-FSQ", "BAR"),
    ("Open-MAGVIT2", "Open-MAGVIT2's AR"),
    ("KL VAE", "MAR"),
    ("KL VAE", "xAR, cell"),
]


def model_of(tokenizer: str, generator: str) -> ImageGenerator:
    torch.manual_seed(0)
    encoder = TOKENIZERS[tokenizer]()
    if isinstance(encoder, FlexTok):
        encoder.decoding = replace(encoder.decoding, steps=2)
    decoder = GENERATORS[generator](encoder.layout)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return ImageGenerator(encoder, decoder, decoder.make_conditioner()).eval()


@pytest.mark.parametrize(("tokenizer", "generator"), PAIRS, ids=[f"{t}, {g}" for t, g in PAIRS])
def test_searches_over_every_kind_of_tokens(tokenizer: str, generator: str) -> None:
    model = model_of(tokenizer, generator)
    reference = torch.rand(3, *model.image_size) * 2 - 1

    def task() -> Task:
        return Task(
            generator=model.generator,
            tokenizer=model.tokenizer,
            condition=model.class_condition([1]),
            sampling=FAST,
            seed=3,
            subject=Subject(label=1, reference=reference),
        )

    judge = Reconstruction()
    count = model.generator.entities.count
    schedule = Even(every=max(1, -(-count // 3)))
    for kind in (Beam, Lookahead):
        search = kind(judge, width=2, candidates=3, schedule=schedule)
        found = search(task(), results=2)
        assert found.known == count and found.scores[0] >= found.scores[1]
        shown = PartialDecoder(model.tokenizer, model.generator.entities, 3)(found.shown, count)
        assert torch.allclose(shown, found.images, atol=1e-5)
        error = (found.images.clamp(-1, 1) - reference).square().flatten(1).mean(1)
        assert torch.allclose(found.scores.float(), -error, atol=1e-5)
    plain = FAST.tokens(model.generator, task().condition, [3])
    single = BestOfN(judge, count=1)(task())
    assert torch.equal(single.tokens, plain)
    assert torch.equal(single.images, model.decode(plain))
    # A solver's values differ by rounding in a batch.
    assert BestOfN(judge, count=4)(task()).scores[0] >= single.scores[0] - 1e-6


@pytest.mark.parametrize("name", ["FlexTok", "Semanticist", "UniWeTok"])
def test_a_seed_is_the_noise_of_an_image(name: str) -> None:
    """The image's own stream, whatever its tokens and its batch."""
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name]().eval()
    tokens = tokenizer.encode(torch.rand(2, 3, *tokenizer.image_size) * 2 - 1)
    with torch.no_grad():
        found = tokenizer.decode_seeded(tokens, [5, 6])
        wanted = tokenizer.decode(tokens, noise=Noise([5, 6]))  # type: ignore[call-arg]
        alone = tokenizer.decode_seeded(tokens[1:], [6])
    assert torch.equal(found, wanted)
    assert torch.allclose(found[1:], alone, atol=1e-5)
