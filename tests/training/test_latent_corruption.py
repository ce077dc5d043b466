"""Latents disturbed on their way to the decoder: moments of the papers, nothing where nothing is
asked, any tokenizer; and decoders trained alone on tokens that a generator drew."""

from functools import partial
from pathlib import Path

import pytest
import torch

import tessellar
from tessellar.callbacks.ema import EMA
from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.sampling.settings import GREEDY, Sampling
from tessellar.sampling.speculative import SpeculativeJacobi
from tessellar.tokenizers.hita import Hita
from tessellar.tokenizers.quantizers.fsq import FSQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck, GaussianSpace
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.projected import Projected
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.training.methods.generated_tokens import RollOut
from tessellar.training.methods.latent_corruption import (
    Annealing,
    Disturbance,
    Interpolate,
    LatentCorruption,
    Mask,
    Swap,
)
from tessellar.training.random_state import new_seeds
from tests.tiny.pairs import TOKENIZERS
from tests.training.conftest import make_generator_module
from tests.training.test_resume import Drawing, SaveAll, differences, everything

NONE = (Interpolate(gamma=0.0), Mask(most=0.0), Swap(alpha=0.0), Swap(beta=1.0, delta=1))


def given(quantizer: Quantizer, z: torch.Tensor) -> QuantizerOutput:
    draws = isinstance(quantizer, GaussianSpace)
    return quantizer.train(not draws)(z)


def plain(vectors: torch.Tensor) -> QuantizerOutput:
    return QuantizerOutput(vectors, vectors, {})


@pytest.mark.parametrize("corruption", NONE, ids=lambda c: type(c).__name__)
def test_at_level_zero_nothing_changes_to_the_last_bit(corruption: LatentCorruption) -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 9, 4)
    quantizer = VectorQuantizer(16, 4)
    output = given(quantizer, z)
    disturbed = corruption.disturbed(quantizer, z, output, 1.0)
    assert torch.equal(disturbed, output.quantized)


def test_noise_and_masks_have_the_moments_of_l_detok() -> None:
    torch.manual_seed(0)
    z = torch.randn(100_000, 1, 2)
    none = GaussianBottleneck(2)
    square = Interpolate().disturbed(none, z, plain(z), 1.0).square().mean()
    assert float(square) == pytest.approx(1 / 3 + 9 / 3, rel=0.02)
    added = Interpolate(kind="add").disturbed(none, z, plain(z), 1.0).square().mean()
    assert float(added) == pytest.approx(1 + 9 / 3, rel=0.02)
    relative = Interpolate(relative=True).disturbed(none, 5 * z, plain(5 * z), 1.0)
    assert float(relative.square().mean()) == pytest.approx(25 * (10 / 3), rel=0.02)
    half = Interpolate(probability=0.5).disturbed(none, z, plain(z), 1.0)
    untouched = (half == z).flatten(1).all(1).float().mean()
    assert float(untouched) == pytest.approx(0.5, abs=0.01)

    ones = torch.ones(1, 200, 1)
    shares = torch.stack(
        [Mask().disturbed(none, ones, plain(ones), 1.0).mean() for _ in range(2000)]
    )
    assert float((shares == 1).float().mean()) == pytest.approx(0.125, abs=0.02)
    assert float(1 - shares.mean()) == pytest.approx(0.30625, abs=0.01)


def test_masks_differ_between_images_and_count_alike() -> None:
    torch.manual_seed(0)
    z = torch.ones(64, 20, 2)
    masked = Mask(0.5, 0.5).disturbed(GaussianBottleneck(2), z, plain(z), 1.0)[..., 0]
    assert masked.sum(1).tolist() == [10.0] * 64
    assert len({tuple(row) for row in masked.tolist()}) > 32


@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizer(32, 4),
        IBQ(32, 4),
        FSQ((4, 4, 3)),
        FSQ((4, 3), symmetric=True),
        Projected(VectorQuantizer(32, 4), 6),
        GaussianSpace(VectorQuantizer(32, 4)),
    ],
    ids=lambda q: type(q).__name__,
)
def test_swaps_are_near_codes_of_the_first_images(quantizer: Quantizer) -> None:
    torch.manual_seed(0)
    z = torch.randn(8, 5, quantizer.in_dim, requires_grad=True)
    output = given(quantizer, z)
    near = quantizer.neighbours(z, 3)
    assert torch.equal(near[..., 0], output.tokens)
    assert quantizer.neighbours(z, 10_000).shape[-1] == quantizer.kind.vocab
    disturbed = Swap(beta=0.5, delta=3).disturbed(quantizer, z, output, 1.0)
    assert torch.equal(disturbed[4:], output.quantized[4:])
    codes = quantizer.decode(near[:4])
    errors = (codes - disturbed[:4, :, None]).abs().amax(-1)
    assert float(errors.amin(-1).max().detach()) < 1e-5  # each is one of the three
    assert errors.argmin(-1).unique().numel() == 3
    weight = torch.randn_like(disturbed)
    (moved,) = torch.autograd.grad((disturbed * weight).sum(), z, retain_graph=True)
    (own,) = torch.autograd.grad((output.quantized * weight).sum(), z)
    assert torch.equal(moved, own)


def test_annealing_is_robusttoks() -> None:
    annealing = Annealing()
    factors = [annealing.factor(epoch / 200) for epoch in (0, 40, 80, 120, 200)]
    assert factors == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])
    with pytest.raises(UserError, match="end comes later"):
        Annealing(0.5, 0.5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_tokenizer_with_a_bottleneck_is_disturbed_in_training_alone(name: str) -> None:
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name]()
    if not tokenizer.bottlenecks():
        # What another tokenizer's tokens are made into is not trained; two have noise of their own.
        own_noise = ("Semanticist", "RecTok")
        assert tokenizer.is_derived or name in (*own_noise, "scale pyramid of a KL VAE")
        with pytest.raises(UserError, match="no quantizer"):
            Disturbance([Mask()], tokenizer)
        return
    seen: list[torch.Tensor] = []

    class Zero(Mask):
        def disturbed(self, quantizer, z, output, factor):
            seen.append(output.quantized)
            return torch.zeros_like(output.quantized)

    Disturbance([Zero()], tokenizer)
    images = torch.rand(2, 3, *tokenizer.image_size) * 2 - 1
    forward = tokenizer.forward
    if isinstance(tokenizer, Hita):
        forward = partial(tokenizer.forward_with, vision=torch.rand(2, 16, 16))
    with torch.no_grad():
        tokenizer.eval()
        forward(images)
        assert not seen
        tokenizer.train()
        forward(images)
    assert len(seen) == len(tokenizer.bottlenecks())


def test_swap_needs_one_codebook() -> None:
    for name in ("VAR's VQVAE", "BitDance's autoencoder", "KL VAE", "Open-MAGVIT2"):
        with pytest.raises(UserError, match="one codebook"):
            Disturbance([Swap()], TOKENIZERS[name]())


CORRUPTIONS = (Interpolate(), Mask(), Swap(beta=0.5, delta=4))


def test_a_run_anneals_and_resumes_to_the_last_bit(fit, make, tmp_path: Path) -> None:
    factors = []

    class Watched(Mask):
        def disturbed(self, quantizer, z, output, factor):
            factors.append(factor)
            return super().disturbed(quantizer, z, output, factor)

    def run(steps: int, *callbacks, **options):
        watched = Watched(annealing=Annealing(0.0, 0.5, 0.0))
        module = make.tokenizer_module(corruptions=(*CORRUPTIONS, watched))
        ema = EMA(0.9)
        drawing = Drawing()
        trainer, _ = fit(module, steps, [ema, drawing, *callbacks], **options)
        return everything(module, trainer, ema, drawing)

    whole = run(4, SaveAll(tmp_path))
    assert factors == [1.0, 0.5, 0.0, 0.0]
    resumed = run(4, ckpt_path=tmp_path / "batch_2.ckpt")
    assert not differences(whole, resumed)


def test_a_disturbed_run_differs_and_its_validation_is_not_disturbed(fit, make) -> None:
    plain, disturbed = (
        fit(make.tokenizer_module(corruptions=corruptions), 2)[1]
        for corruptions in ((), CORRUPTIONS)
    )
    assert plain != disturbed
    module = make.tokenizer_module(corruptions=CORRUPTIONS).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    module.log_terms = lambda *_: None
    first, second = (module.validation_step({"image": images}, 0) for _ in range(2))
    assert torch.equal(first["reconstruction"], second["reconstruction"])


@pytest.fixture
def source(tmp_path: Path) -> str:
    """An export of a tiny generator whose predictions depend on what it reads."""
    model = make_generator_module().model
    for parameter in model.generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(next(model.tokenizer.quantizer.parameters()))
    return str(export_generator(model, tmp_path / "source"))


def test_roll_outs_keep_their_share_and_read_what_they_keep() -> None:
    torch.manual_seed(0)
    model = make_generator_module().model
    for parameter in model.generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    true = torch.randint(16, (200, 16))
    condition = Condition(ids=torch.arange(200) % 10)
    assert torch.equal(RollOut(kept=1.0).tokens(model, true, condition), true)
    mixed = RollOut(kept=0.7, sampling=GREEDY).tokens(model, true, condition)
    model.generator.eval()
    with torch.no_grad():
        predicted = model.generator.score(mixed, condition).logits.argmax(-1)
    same = mixed == true
    # Every place has the true token, or what is likeliest after the mixture before it.
    assert bool((same | (mixed == predicted)).all())
    chance = float((predicted == true).float().mean())
    assert float(same.float().mean()) == pytest.approx(0.7 + 0.3 * chance, abs=0.02)
    hot = Sampling(guidance=1.5, choice=Choice(temperature=1.2))
    torch.manual_seed(5)
    free = RollOut(kept=0.0, sampling=hot).tokens(model, true, condition)
    torch.manual_seed(5)
    assert torch.equal(free, model.sample_tokens(condition, hot, new_seeds(200)))
    again = RollOut(kept=1.0, reencode=True).tokens(model, true, condition)
    assert again.shape == true.shape and not torch.equal(again, true)
    with pytest.raises(UserError, match="Ancestral"):
        RollOut(sampling=Sampling(algorithm=SpeculativeJacobi()))


def test_the_decoder_alone_learns_from_the_generators_tokens(fit, make, source, tmp_path) -> None:
    own = tmp_path / "tokenizer"
    export_tokenizer(tessellar.load(source).tokenizer, own)
    with pytest.raises(UserError, match="init_from"):
        make.tokenizer_module(decoder_only=True)
    with pytest.raises(UserError, match="corruptions"):
        make.tokenizer_module(decoder_only=True, init_from=str(own), corruptions=CORRUPTIONS)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    losses = []
    of_true_tokens = {"generated_by": source, "roll_out": RollOut(kept=1.0)}
    for options in ({}, of_true_tokens, {"generated_by": source}):
        module = make.tokenizer_module(decoder_only=True, init_from=str(own), **options)
        before = {name: value.clone() for name, value in module.tokenizer.state_dict().items()}
        tokens = module.tokenizer.encode(images)
        losses.append(fit(module, 2)[1])
        after = module.tokenizer.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and not any("quantizer" in name or "encoder" in name for name in moved)
        assert torch.equal(module.tokenizer.encode(images), tokens)
    assert losses[0] == losses[1] != losses[2]
    other = make.tokenizer_module(decoder_only=True, init_from=str(own), generated_by=source)
    torch.nn.init.normal_(next(other.tokenizer.quantizer.parameters()))
    with pytest.raises(UserError, match="another tokenizer"):
        other.setup("fit")
