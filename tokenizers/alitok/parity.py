"""Replays of AliTok's tokenizers, their losses and clustering (recordings of system `alitok`).

The recorded images are in [0, 1], ours in [-1, 1]: a squared error of theirs is a quarter of ours.
"""

import torch
from torch import Tensor

from tessellar.parity.forms import as_row, as_vectors, from_unit, to_unit
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Fixed, gradient_norm, recorded_norms
from tessellar.protocol.tokenizer import TokenizerOutput
from tessellar.tokenizers.alitok.official import KEYS, from_official
from tessellar.tokenizers.alitok.tokenizer import AliTok
from tessellar.tokenizers.losses.logit_distance import WeightedDistances
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.titok.official import discriminator_from_official

READ = "img_size patch_size aux_tokens_num codebook_size token_size".split()
LOSS = (
    "reconstruction_weight quantizer_weight perceptual_weight lpips_weight disc_start discriminator_factor "
    "discriminator_weight"
).split()


def recorded_tokenizer(
    recording: Recording, part: str, prefix_weight: float | None = None
) -> AliTok:
    """The tokenizer of a weight file, `stage1` or `tokenizer`, checked against the config's sizes."""
    recording.options("tok", READ)
    heads = (recording.config["encoder"]["num_heads"], recording.config["decoder"]["num_heads"])
    made = from_official(recording.weights[part], heads, prefix_weight)
    codes, dim = made.quantizer.codebook.weight.shape  # type: ignore[union-attr]
    found = (made.image_size[0], made.patch_size, made.prefix, codes, dim)
    recording.check_sizes(dict(zip(READ, found, strict=True)), "tok")
    return made


def recorded_images(recording: Recording) -> Tensor:
    """The recorded images in [-1, 1]."""
    return from_unit(recording.inputs["image"] / 255)


@replays("alitok", "tok_encode", "tok_decode1", "tok_decode2")
def both_stages(recording: Recording) -> Outputs:
    """What the encoder writes, and what both decoders draw of it."""
    images = recorded_images(recording)
    first = recorded_tokenizer(recording, "stage1")
    second = recorded_tokenizer(recording, "tokenizer")
    latents = second.latents(images)
    quantized = first.quantizer(latents)
    states = first.decoder(quantized.quantized)
    return {
        "tok/latents": as_row(latents),
        "tok/indices": first.encode(images),
        "tok/z_q": as_row(quantized.quantized),
        "tok/quantizer_loss": quantized.losses["codebook"] + quantized.losses["commitment"],
        "tok/stage1_image": to_unit(first.draw_image(states)),
        "tok/stage1_aux": first.draw_strip(states),
        "tok/stage2_image": to_unit(second(images).reconstruction),
    }


@replays("alitok", "tok_decode_ids")
def decoding(recording: Recording) -> Outputs:
    """Other tokens drawn by both decoders, and by the causal one with one of them changed."""
    tokens = recording.inputs["tok/other_ids"]
    first = recorded_tokenizer(recording, "stage1")
    second = recorded_tokenizer(recording, "tokenizer")
    settings = recording.settings("tok/changed_stage1_image")
    vocab = recording.config["tok"]["codebook_size"]
    changed = tokens.clone()
    place = settings["position"]
    changed[:, place] = (changed[:, place] + settings["id_offset"]) % vocab
    return {
        "tok/other_stage1_image": to_unit(first.decode(tokens)),
        "tok/other_stage2_image": to_unit(second.decode(tokens)),
        "tok/changed_stage1_image": to_unit(first.decode(changed)),
    }


def _loss(recording: Recording) -> TokenizerLoss:
    """The official loss, with the recorded values of its two perceptual networks."""
    config = recording.options("loss", LOSS)
    distances = WeightedDistances(
        [Fixed(recording.inputs["loss/lpips"]), Fixed(recording.inputs["loss/perceptual"])],
        [config["lpips_weight"], config["perceptual_weight"]],
    )
    factor = config["discriminator_factor"]
    return TokenizerLoss(
        Reconstruction(l2=config["reconstruction_weight"] / 4),
        distances,
        discriminator=discriminator_from_official(recording.weights["discriminator"]),
        adversarial_weight=factor * config["discriminator_weight"],
        discriminator_weight=factor,
        adversarial_start=config["disc_start"],
    )


def _terms(loss: TokenizerLoss, images: Tensor, output: TokenizerOutput, step: int) -> Outputs:
    """The parts that the official code names, at a step; its `mse` holds the prefix's error."""
    found = loss.generator_loss(images, output, step, torch.zeros(()))
    zero = torch.zeros(())
    pixels = loss.reconstruction(images, output.reconstruction)
    return {
        "mse": loss.reconstruction.weighted(pixels) + found.terms.get("prefix", zero),
        "perceptual_sum": found.terms["perceptual"],
        "vq": found.terms.get("codebook", zero) + found.terms.get("commitment", zero),
        "gan": loss.weight_at(step) * found.terms.get("adversarial", zero),
        "total": found.total,
    }


@replays("alitok", "tok_loss1", gradients=True)
def first_stage(recording: Recording) -> Outputs:
    """Losses of both players before and after the discriminator starts, and gradients."""
    images = recorded_images(recording)
    settings = recording.settings("loss/after/total")
    tokenizer = recorded_tokenizer(recording, "stage1", settings["mse_aux_weight"])
    output = tokenizer.train()(images)
    loss = _loss(recording)
    outputs = {}
    for when in ("before", "after"):
        step = recording.settings(f"loss/{when}/total")["global_step"]
        terms = _terms(loss, images, output, step)
        outputs |= {f"loss/{when}/{name}": value for name, value in terms.items()}
    total = outputs["loss/after/total"]
    outputs |= recorded_norms(
        recording, "loss/grad_norm/*", total, tokenizer, to_official=KEYS.to_official
    )
    step = recording.settings("loss/disc")["global_step"]
    against = loss.discriminator_loss(images, output.reconstruction.detach(), step)
    assert loss.discriminator is not None
    return {
        **outputs,
        "loss/disc": against.total,
        "loss/logits_real_mean": against.terms["logits_real"],
        "loss/logits_fake_mean": against.terms["logits_fake"],
        "loss/logits_real": loss.discriminator(images),
    }


@replays("alitok", "tok_loss2", gradients=True)
def second_stage(recording: Recording) -> Outputs:
    """The second stage's loss, and the gradient of its decoder."""
    images = recorded_images(recording)
    tokenizer = recorded_tokenizer(recording, "tokenizer").train()
    step = recording.settings("loss2/total")["global_step"]
    loss = _loss(recording)
    terms = _terms(loss, images, tokenizer(images), step)
    for parameter in (*tokenizer.encoder.parameters(), *tokenizer.quantizer.parameters()):
        parameter.requires_grad_(True)  # asked of all, so that a leak of gradients would show
    outputs = {f"loss2/{name}": terms[name] for name in ("mse", "gan", "total")}
    return {**outputs, "loss2/grad_norm": gradient_norm(terms["total"], tokenizer)}


@replays("alitok", "tok_cvq")
def clustering(recording: Recording) -> Outputs:
    """A training pass of the first stage's quantizer over the recorded latents."""
    settings = recording.settings("cvq/embedding")
    latents = as_vectors(recording.tensors["tok/latents"])
    quantizer = recorded_tokenizer(recording, "stage1").quantizer
    assert isinstance(quantizer, ClusteringVQ)
    quantizer.decay = settings["decay"]
    quantizer.commitment_weight = settings["commitment_cost"]
    output = quantizer.train()(latents)
    return {
        "cvq/embed_prob": quantizer.shares,
        "cvq/embedding": quantizer.codebook.weight,
        "cvq/z_q": as_row(output.quantized),
    }
