"""LlamaGen's tokenizer, discriminator and losses against recorded official outputs, and with other official options."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.parity.recording import Recording, read_recording
from tessellar.parity.registration import replays_of
from tessellar.tokenizers.llamagen.official import (
    discriminator_from_official,
    tokenizer_from_config,
    tokenizer_from_official,
)
from tessellar.tokenizers.llamagen.official import to_official as official_keys

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen"
CASES = ("vq", "vq_no_l2", "vq_train", "disc", "loss_plain", "loss_adaptive")


def vq(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the selected cases."""
    outputs: dict[str, Tensor] = {}
    for replay in replays_of("llamagen"):
        if replay.covers_any(recording.cases):
            outputs |= replay.function(recording)
    return outputs


def recording(part: str = "vq", cases: tuple[str, ...] = CASES, **options: Any) -> Recording:
    made = read_recording(GOLDEN)
    made.cases = set(cases)
    made.config = copy.deepcopy(made.config)
    made.config[part].update(options)
    return made


@cache
def recorded() -> tuple[Recording, dict[str, Tensor]]:
    made = recording()
    return made, vq(made)


NAMES = read_recording(GOLDEN).names("output", set(CASES))


@pytest.mark.parametrize("name", NAMES)
def test_recorded_output(name: str) -> None:
    made, outputs = recorded()
    entry, theirs = made.entries[name], made.tensors[name]
    torch.testing.assert_close(
        outputs[name].detach().to(torch.float64),
        theirs.to(torch.float64),
        atol=entry.atol,
        rtol=entry.rtol,
    )


def test_nothing_else_is_computed_and_every_input_is_read() -> None:
    made, outputs = recorded()
    assert outputs.keys() == set(NAMES)
    assert made.inputs.used == {"vq/images", "vq/codes", "vq/train/perceptual"}


def test_weights_of_the_quantizer_losses_come_from_the_config() -> None:
    _, base = recorded()
    changed = vq(recording(cases=("vq_train",), entropy_loss_ratio=0.3, commit_loss_beta=0.5))
    torch.testing.assert_close(changed["vq/train/entropy_loss"], 3 * base["vq/train/entropy_loss"])
    torch.testing.assert_close(changed["vq/train/commit_loss"], 2 * base["vq/train/commit_loss"])
    without = vq(recording(cases=("vq_train",), entropy_loss_ratio=0.0))
    assert float(without["vq/train/entropy_loss"]) == 0.0


def test_normalisation_comes_from_the_config() -> None:
    _, base = recorded()
    plain = vq(recording(cases=("vq",), codebook_l2_norm=False))
    assert torch.equal(plain["vq/indices"], base["vq/no_l2/indices"])
    torch.testing.assert_close(plain["vq/quant"], base["vq/no_l2/quant"])


PLAIN = ("vq", "vq_train", "loss_plain")


def total(made: Recording, outputs: dict[str, Tensor], moment: str) -> Tensor:
    """The official total, put together by hand from the recorded parts."""
    options, images = made.config["loss"], made.tensors["vq/images"]
    error = outputs["vq/recon"] - images
    pixels = error.abs().mean() if options["reconstruction"] == "l1" else error.square().mean()
    perceptual = options["perceptual_weight"] * made.tensors["vq/train/perceptual"].mean()
    codes = sum(outputs[f"vq/train/{name}_loss"] for name in ("vq", "commit", "entropy"))
    fake = logits(made, outputs["vq/recon"])
    swapped = F.binary_cross_entropy_with_logits(torch.ones_like(fake), fake)
    adversarial = swapped if options["gen_loss"] == "non-saturating" else -fake.mean()
    active = moment == "after_start" and options["disc_start"] <= 150
    return (
        options["reconstruction_weight"] * pixels
        + perceptual
        + codes
        + active * options["disc_weight"] * adversarial
    )


def logits(made: Recording, images: Tensor) -> Tensor:
    with torch.no_grad():
        return discriminator_from_official(
            made.config["disc"], made.weights["discriminator"]
        ).train()(images)


@pytest.mark.parametrize(
    "options",
    [
        {"reconstruction": "l1", "reconstruction_weight": 2.0},
        {"reconstruction_weight": 0.0, "perceptual_weight": 0.5},
        {"perceptual_weight": 0, "disc_weight": 0.25},
        {"disc_start": 151},
        {"gen_loss": "non-saturating", "codebook_weight": 7.0},
    ],
    ids=str,
)
def test_total_is_made_of_the_configured_parts(options: dict[str, Any]) -> None:
    made = recording("loss", PLAIN, **options)
    outputs = vq(made)
    for moment in ("before_start", "after_start"):
        ours = outputs[f"loss/plain/generator_{moment}"].detach().float()
        torch.testing.assert_close(ours, total(made, outputs, moment), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non-saturating"])
def test_discriminator_losses_of_every_official_kind(kind: str) -> None:
    made = recording("loss", PLAIN, disc_loss=kind)
    outputs = vq(made)
    real, fake = logits(made, made.tensors["vq/images"]), logits(made, outputs["vq/recon"])
    expected = {
        "hinge": (1 - real).relu().mean() + (1 + fake).relu().mean(),
        "vanilla": F.softplus(-real).mean() + F.softplus(fake).mean(),
        "non-saturating": F.binary_cross_entropy_with_logits(torch.ones_like(real), real)
        + torch.tensor(2.0).log(),
    }[kind]
    ours = outputs["loss/plain/discriminator_after_start"].detach().float()
    torch.testing.assert_close(ours, 0.5 * 0.5 * expected, atol=1e-5, rtol=1e-5)
    assert float(outputs["loss/plain/discriminator_before_start"].detach()) == 0.0


def test_oblong_recordings() -> None:
    made = recording(cases=PLAIN)
    for name in ("vq/images", "vq/codes"):
        made.tensors[name] = torch.cat([made.tensors[name]] * 2, dim=-1)
    outputs = vq(made)
    assert outputs["vq/quant"].shape == (2, 4, 12, 24) and outputs["vq/codes_image"].shape == (
        2,
        3,
        24,
        48,
    )
    ours = outputs["loss/plain/generator_after_start"].detach().float()
    torch.testing.assert_close(ours, total(made, outputs, "after_start"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("multipliers", "blocks", "stride"),
    [((1,), 2, 1), ((1, 2), 2, 2), ((1, 1, 2), 1, 4), ((2, 1, 1, 2), 1, 8)],
)
def test_sizes_are_told_by_the_weights(
    multipliers: tuple[int, ...], blocks: int, stride: int
) -> None:
    config = {"ch": 32, "ch_mult": multipliers, "num_res_blocks": blocks, "z_channels": 8}
    made = tokenizer_from_config(
        {**config, "codebook_size": 16, "codebook_embed_dim": 4}, (16, 24)
    ).eval()
    again = tokenizer_from_official(official_keys(made), 16)
    assert again.stride == stride and again.layout.grid == (16 // stride, 16 // stride)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(again.maps(images), made.maps(images))
