"""Replays of the TiTok tokenizers, their VQGAN, discriminator and losses (system `titok`).

The recorded images are in [0, 1], ours in [-1, 1].
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from tessellar.parity.forms import as_row, as_vectors, from_unit, to_unit
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Fixed
from tessellar.protocol.tokenizer import Quantizer, TokenizerOutput
from tessellar.tokenizers.losses.parity import recorded_lecam
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.maskgit_vqgan import MaskGITVQGAN
from tessellar.tokenizers.maskgit_vqgan.official import vqgan_from_official
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok.official import discriminator_from_official, tokenizer_from_official
from tessellar.tokenizers.titok.tokenizer import Stage, TiTok, proxy_loss

T = TypeVar("T", bound=TiTok)
VQGAN_READ = (
    "channel_mult num_resolutions hidden_channels num_res_blocks resolution z_channels".split()
)
DISCRIMINATOR_READ = "hidden_channels num_stages blur_kernel pool".split()
START = 1  # the update from which the replayed loss has its adversarial part
READ = (
    "quantize_mode clustering_vq codebook_size token_size use_l2_norm commitment_cost vit_enc_model_size "
    "vit_dec_model_size vit_enc_patch_size vit_dec_patch_size num_latent_tokens is_legacy"
).split()


def official_quantizer(options: Mapping[str, Any]) -> Quantizer:
    """The quantizer of a variant's official options."""
    if options.get("quantize_mode", "vq") == "vae":
        return GaussianBottleneck(options["token_size"], scale=1.0)
    kind = ClusteringVQ if options.get("clustering_vq", False) else VectorQuantizer
    return kind(
        options["codebook_size"],
        options["token_size"],
        l2_normalize=options.get("use_l2_norm", False),
        commitment_weight=options.get("commitment_cost", 0.25),
    )


def recorded_tokenizer(
    recording: Recording, variant: str, part: str, kind: type[T], stage: Stage = "decoder"
) -> T:
    """The tokenizer of a variant's official options, filled with its weights."""
    options = recording.options(variant, READ, {"strict_length_assertion": False})
    recording.options("vqgan", VQGAN_READ, {"dropout": 0.0, "num_channels": 3})
    table = recording.config["size_table"]
    encoder, decoder = (table[options[f"vit_{side}_model_size"]] for side in ("enc", "dec"))
    made = tokenizer_from_official(
        recording.weights[part],
        heads=(encoder["heads"], decoder["heads"]),
        quantizer=official_quantizer(options),
        mixes=options.get("is_legacy", True),
        stage=stage,
        kind=kind,
    )
    assert isinstance(made, kind)
    sizes = {
        "vit_enc_patch_size": made.patch_size,
        "vit_dec_patch_size": made.decoder_patch_size,
        "num_latent_tokens": made.num_tokens,
    }
    recording.check_sizes(sizes, variant)
    recording.check_sizes({"crop_size": made.image_size[0]})
    return made


def _vqgan(recording: Recording) -> MaskGITVQGAN:
    """Encoder from its file, decoder and codebook from the two-stage tokenizer's pixel decoder."""
    pixels = recording.state("pixel_", "two_stage")
    return vqgan_from_official(
        {**recording.weights["vqgan_encoder"], **pixels}, recording.config["crop_size"]
    )


@replays("titok", "tok_shared", "tok_vqgan")
def vqgan(recording: Recording) -> Outputs:
    """Features, codes and the image of the codes."""
    model = _vqgan(recording)
    images = from_unit(recording.inputs["images"])
    codes = model.encode(images)
    return {
        "vqgan/hidden": model.maps(images),
        "vqgan/codes": codes,
        "vqgan/recon": to_unit(model.decode(codes)).clamp(0, 1),
    }


def _quantization(tokenizer: TiTok, images: Tensor, name: str) -> Outputs:
    latents = tokenizer.latents(images)
    quantized = tokenizer.quantizer(latents)
    return {
        f"{name}/latents": as_row(latents),
        f"{name}/tokens": tokenizer.encode(images)[:, None],
        f"{name}/z_quantized": as_row(quantized.quantized),
        f"{name}/quantizer_loss": sum(quantized.losses.values(), torch.zeros(())),
    }


@replays("titok", "tok_shared", "tok_vq2")
def two_stage(recording: Recording) -> Outputs:
    """Both stages of the two-stage tokenizer."""
    images = from_unit(recording.inputs["images"])
    first = recorded_tokenizer(recording, "two_stage", "two_stage", TiTok, stage="proxy")
    second = recorded_tokenizer(recording, "two_stage", "two_stage", TiTok)
    quantized = second.quantizer(second.latents(images))
    scores = first.scores(quantized.quantized)
    entropy = proxy_loss(scores, _vqgan(recording).encode(images))
    output = first(images)
    weight = recording.settings("vq2/stage1_total")["quantizer_weight"]
    return {
        **_quantization(second, images, "vq2"),
        "vq2/commitment_loss": quantized.losses["commitment"],
        "vq2/codebook_loss": quantized.losses["codebook"],
        "vq2/proxy_logits": rearrange(scores, "b h w v -> b v h w"),
        "vq2/stage1_ce": entropy,
        "vq2/stage1_total": entropy + weight * sum(output.losses.values()),
        "vq2/stage1_recon": to_unit(output.reconstruction).clamp(0, 1),
        "vq2/image": to_unit(second(images).reconstruction),
        "vq2/decode_tokens": to_unit(second.decode(quantized.tokens)),
    }


@replays("titok", "tok_shared", "tok_single")
def single_stage(recording: Recording) -> Outputs:
    """The single-stage tokenizer."""
    tokenizer = recorded_tokenizer(recording, "single", "single", TiTok)
    images = from_unit(recording.inputs["images"])
    return {
        **_quantization(tokenizer, images, "single"),
        "single/image": to_unit(tokenizer(images).reconstruction),
    }


@replays("titok", "tok_shared", "tok_kl")
def kl(recording: Recording) -> Outputs:
    """The continuous tokenizer."""
    tokenizer = recorded_tokenizer(recording, "kl", "kl", TiTok)
    bottleneck = tokenizer.quantizer
    assert isinstance(bottleneck, GaussianBottleneck)
    images = from_unit(recording.inputs["images"])
    moments = tokenizer.latents(images)
    posterior = bottleneck.posterior(moments)
    sample = posterior.sample(as_vectors(recording.inputs["kl/noise"]))
    # theirs is summed over an image's values, ours is their mean
    bottleneck.kl_weight = (
        recording.settings("kl/kl_loss_weighted")["kl_weight"] * sample[0].numel()
    )
    return {
        "kl/moments": as_row(moments),
        "kl/sample": as_row(sample),
        "kl/image": to_unit(tokenizer.decode(sample)),
        "kl/image_mode": to_unit(tokenizer.decode(tokenizer.encode(images))),
        "kl/kl": posterior.kl().sum(-1),
        "kl/kl_loss_weighted": tokenizer(images).losses["kl"],
    }


@replays("titok", "tok_shared", "tok_disc")
def discriminator(recording: Recording) -> Outputs:
    """The discriminator, and the losses of both sides of the second stage, without a quantizer's."""
    settings = recording.settings("disc/gen_total")
    images = from_unit(recording.inputs["images"])
    fake = recorded_tokenizer(recording, "two_stage", "two_stage", TiTok)(images)
    plain = TokenizerOutput(fake.reconstruction, fake.tokens, {})
    options = recording.options("discriminator", DISCRIMINATOR_READ)
    critic = discriminator_from_official(recording.weights["discriminator"], options["pool"])
    lecam = recorded_lecam(settings)
    loss = TokenizerLoss(
        # theirs is the squared error of images in [0, 1]: a quarter of ours
        Reconstruction(l2=0.25),
        Fixed(torch.tensor(settings["perceptual_loss"])),
        perceptual_weight=settings["perceptual_weight"],
        discriminator=critic,
        adversarial_weight=settings["discriminator_weight"],
        adversarial_start=START,
        lecam=lecam,
    )
    early = loss.generator_loss(images, plain, START - 1, torch.zeros(()))
    late = loss.generator_loss(images, plain, START, torch.zeros(()))
    against = loss.discriminator_loss(images, fake.reconstruction, START).terms
    return {
        "disc/logits_real": critic(images),
        "disc/logits_fake": critic(fake.reconstruction),
        "disc/gen_rec": loss.reconstruction.weighted(
            loss.reconstruction(images, fake.reconstruction)
        ),
        "disc/gen_gan": late.terms["adversarial"],
        "disc/gen_total": late.total,
        "disc/gen_total_before_start": early.total,
        "disc/d_loss": against["discriminator"],
        "disc/lecam": against["lecam"],
        "disc/ema_after": lecam.means,
    }


@replays("titok", "tok_cvq")
def clustering(recording: Recording) -> Outputs:
    """A training pass of clustering VQ and what it does to the codebook."""
    codebook = recording.inputs["cvq/codebook_before"]
    codes, dim = codebook.shape
    settings = recording.settings("cvq/tokens")
    quantizer = ClusteringVQ(
        codes,
        dim,
        l2_normalize=settings["use_l2_norm"],
        commitment_weight=settings["commitment_cost"],
        decay=settings["decay"],
    )
    quantizer.codebook.weight.copy_(codebook)
    quantizer.shares.copy_(recording.inputs["cvq/embed_prob_before"])
    output = quantizer.train()(as_vectors(recording.inputs["cvq/z"]))
    return {
        "cvq/tokens": output.tokens[:, None],
        "cvq/quantizer_loss": output.losses["codebook"] + output.losses["commitment"],
        "cvq/codebook_after": quantizer.codebook.weight,
        "cvq/embed_prob_after": quantizer.shares,
    }
