"""Binary tokenizers of UniWeTok and BitDance: published sizes, noise of the decoder, positions of any map, the losses
that the paper names, stages, and files with averages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.networks.vision import Teacher, VisionModel
from tessellar.protocol.layout import Bits
from tessellar.protocol.noise import Noise
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tensor_files import read_safetensors
from tessellar.tokenizers.bitdance import BinaryAutoencoder, ae_d16c32, ae_d32c128, ae_d32c256
from tessellar.tokenizers.bitdance import official as bitdance
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.uniwetok import BitPrior, Distillation, UniWeTok, uniwetok_128
from tessellar.tokenizers.uniwetok import official as uniwetok
from tessellar.tokenizers.uniwetok.attention import by_centres, from_edge_to_edge

BITS = 12
GOLDEN = Path(__file__).parents[1] / "golden"


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("preset", "parameters", "kind", "side"),
    [
        (ae_d16c32, 460_294_179, Bits(32), 16),
        (lambda: ae_d16c32(noisy=True), 460_589_091, Bits(32), 16),
        (ae_d32c128, None, Bits(128), 8),
        (ae_d32c256, None, Bits(256), 8),
        (uniwetok_128, 697_044_355, Bits(128), 8),
    ],
)
def test_published_variants(
    preset: Callable[[], Tokenizer], parameters: int | None, kind: Bits, side: int
) -> None:
    with torch.device("meta"):
        made = preset()
    assert made.layout.segments[0].kind == kind and made.layout.grid == (side, side)
    assert parameters is None or count(made) == parameters


def test_halves_of_the_published_autoencoder() -> None:
    with torch.device("meta"):
        made = ae_d16c32()
    assert (count(made.encoder), count(made.decoder)) == (198_935_328, 261_358_851)


def uniwetok_small(**options: Any) -> UniWeTok:
    torch.manual_seed(0)
    quantizer = LFQ(BITS, 3, form="bits", commitment_weight=0.0)
    sizes = {"attention_depth": 1, "num_heads": 4}
    return UniWeTok(quantizer, 16, 32, (1, 2), 1, **sizes, **options)


def autoencoder(noisy: bool, **options: Any) -> BinaryAutoencoder:
    torch.manual_seed(0)
    return BinaryAutoencoder(LFQ(BITS, 3, form="bits"), 16, 32, (1, 2), 1, noisy=noisy, **options)


KINDS: dict[str, Callable[..., BinaryAutoencoder | UniWeTok]] = {
    "uniwetok": uniwetok_small,
    "noisy": lambda **options: autoencoder(True, **options),
    "plain": lambda **options: autoencoder(False, **options),
}


def pictures(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_forward_is_decode_of_encode_and_images_do_not_touch_each_other(kind: str) -> None:
    made = KINDS[kind]().eval()
    images = pictures()
    tokens = made.encode(images)
    assert tokens.shape == (3, 64, BITS) and set(tokens.unique().tolist()) == {0, 1}
    output = made(images)
    assert torch.equal(output.tokens, tokens)
    together = made.decode(tokens)
    torch.testing.assert_close(output.reconstruction, together)
    alone = torch.cat([made.decode(tokens[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_noise_changes_the_image_alone(kind: str) -> None:
    """The same streams give the same image; a decoder without noise reads none."""
    made = KINDS[kind]().eval()
    tokens = made.encode(pictures())
    first = made.decode(tokens, Noise([1, 2, 3]))
    assert torch.equal(first, made.decode(tokens, Noise([1, 2, 3])))
    other = made.decode(tokens, Noise([4, 2, 3]))
    torch.testing.assert_close(first[1:], other[1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(first[0], other[0]) == (kind == "plain")


def test_streams_that_are_not_one_an_image_are_refused() -> None:
    made = KINDS["noisy"]().eval()
    with pytest.raises(ValueError, match="noise has 1 streams for 3 images"):
        made.decode(made.encode(pictures()), Noise([1]))


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_every_parameter(kind: str) -> None:
    options = {"prior": BitPrior(BITS, 8, 1, 2)} if kind == "uniwetok" else {}
    made = KINDS[kind](**options).train()
    output = made(pictures())
    loss = output.reconstruction.square().mean() + torch.stack([*output.losses.values()]).sum()
    loss.backward()
    still = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_features_of_uniwetok_are_bounded() -> None:
    made = uniwetok_small()
    nn.init.normal_(made.encoder.conv_out.weight, std=10.0)
    features = made.latents(pictures())
    assert 0.999 < float(features.abs().max()) <= 1


def test_positions_agree_at_eight_cells_and_are_numbers_at_one() -> None:
    torch.testing.assert_close(from_edge_to_edge(8), torch.arange(8) + 0.5)
    torch.testing.assert_close(by_centres(8), torch.arange(8) + 0.5)
    assert from_edge_to_edge(1).tolist() == [0.5]
    assert from_edge_to_edge(3).tolist() == [0.5, 4.0, 7.5]
    torch.testing.assert_close(by_centres(3), torch.tensor([1.5, 4.5, 7.5]))


def test_the_prior_teaches_the_codes_on_both_sides() -> None:
    torch.manual_seed(0)
    prior = BitPrior(BITS, 8, 1, 2, weight=2.0)
    codes = torch.randn(2, 5, BITS).sign().requires_grad_()
    loss = prior(codes)
    loss.backward()
    assert codes.grad is not None and bool((codes.grad.abs().sum(-1) > 0).all())
    nn.init.zeros_(prior.output.weight)
    nn.init.zeros_(prior.output.bias)
    torch.testing.assert_close(prior(codes), torch.tensor(2.0).log() * 2.0)


def test_the_prior_sees_no_later_token() -> None:
    torch.manual_seed(0)
    prior = BitPrior(BITS, 8, 1, 2)
    codes = torch.randn(1, 4, BITS).sign()
    outputs = []
    prior.output.register_forward_hook(lambda module, given, result: outputs.append(result))
    prior(codes)
    codes[:, 2] *= -1
    prior(codes)
    torch.testing.assert_close(outputs[0][:, :2], outputs[1][:, :2])
    assert not torch.allclose(outputs[0][:, 2], outputs[1][:, 2])


def test_distillation_teaches_features_and_bits() -> None:
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 1}
    vision = VisionModel("vit_tiny_patch16_224", image_size=16, options=sizes)
    vision.filled = True
    made = uniwetok_small(distillation=Distillation(Teacher(vision), 24, BITS, 1.0, 0.5))
    losses = made.train()(pictures()).losses
    assert {"distillation_before", "distillation_after"} <= losses.keys()
    assert not {"distillation_before", "prior"} & made.eval()(pictures()).losses.keys()
    losses["distillation_after"].backward()
    assert made.encoder.conv_out.weight.grad is not None
    assert not any("vision" in name or "teacher" in name for name in made.state_dict())
    with pytest.raises(UserError, match="dim is 7; the teacher's patches have 24 channels"):
        Distillation(Teacher(vision), 7, BITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": BitPrior(5, 8, 1, 2)}, "BitPrior reads 5 bits; the tokens have 12"),
        ({"train": "encoder"}, "train is 'encoder'; it must be one of all, decoder"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        uniwetok_small(**options)


def test_a_first_level_that_is_wider_than_the_first_convolution_is_refused() -> None:
    with pytest.raises(UserError, match="begin with 1"):
        UniWeTok(LFQ(BITS, 3, form="bits"), 16, 32, (2, 2), 1, 1, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_stage_trains_the_decoder_alone(kind: str) -> None:
    made = KINDS[kind](train="decoder").train()
    output = made(pictures())
    assert output.losses == {}
    output.reconstruction.square().mean().backward()
    trained = {name.partition(".")[0] for name, p in made.named_parameters() if p.grad is not None}
    assert trained == {"decoder"}


@torch.no_grad()
def test_a_noisy_decoder_goes_on_from_a_plain_one() -> None:
    plain = autoencoder(False).eval()
    noisy = autoencoder(True, train="decoder").eval()
    noisy.load_state_dict(noisy.starting_from(plain.state_dict()))
    tokens = plain.encode(pictures())
    torch.testing.assert_close(noisy.decode(tokens), plain.decode(tokens), atol=1e-5, rtol=1e-5)
    assert torch.equal(noisy.encode(pictures()), tokens)


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    """As a training run of the family saves it: raw weights, averages without dots, the loss's network."""
    raw = {name: tensor + 1 for name, tensor in state.items()}
    average = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in state.items()}
    counters = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    return {**raw, **average, **counters, "loss.discriminator.weight": torch.ones(3)}


@pytest.mark.parametrize("kind", ["uniwetok", "noisy"])
def test_averages_of_a_training_file_are_taken(kind: str) -> None:
    made = KINDS[kind]().eval()
    paper = uniwetok if kind == "uniwetok" else bitdance
    importer = uniwetok.OFFICIAL if kind == "uniwetok" else bitdance.PLAIN
    state = paper.to_official(made)  # type: ignore[arg-type]
    content = {"state_dict": lightning(state)}
    options = ImportOptions(image_size=16, num_heads=4)
    again = importer.build(importer.read(content, "file"), options)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name]), name


def test_the_way_back_gives_the_official_names() -> None:
    state, _ = read_safetensors(GOLDEN / "uniwetok" / "weights.safetensors")
    back = uniwetok.to_official(uniwetok.from_official(state, 32, 4))
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())
    inside, _ = read_safetensors(GOLDEN / "bitdance" / "weights.safetensors")
    frozen = {name.removeprefix("vae."): t for name, t in inside.items() if "vae." in name}
    back = bitdance.to_official(bitdance.from_official(inside, 8, 4))
    assert back.keys() == frozen.keys()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in back.items())
