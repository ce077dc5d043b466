"""Replay of what the official TiTok tokenizers, their VQGAN, discriminator and losses gave (recordings of `titok`).

Sizes and options are read from the recording's config and weights, running means and weights of a loss from meanings.
The recorded images are in [0, 1], ours in [-1, 1].
"""

import re
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.parity.recording import Recording
from tessellar.protocol.tokenizer import TokenizerOutput
from tessellar.tokenizers.losses.lecam import LeCam
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.maskgit_vqgan import MaskGITVQGAN
from tessellar.tokenizers.maskgit_vqgan.official import vqgan_from_official
from tessellar.tokenizers.quantizers.base import Quantizer
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok.official import discriminator_from_official, tokenizer_from_official
from tessellar.tokenizers.titok.tokenizer import Stage, TiTok, proxy_loss

START = 1  # the update from which the replayed loss has its adversarial part


def to_unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]."""
    return (images + 1) / 2


def from_unit(images: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return 2 * images - 1


def as_map(vectors: Tensor) -> Tensor:
    """[B, N, C] as the official [B, C, 1, N]."""
    return rearrange(vectors, "b n c -> b c 1 n")


def official_quantizer(options: dict[str, Any]) -> Quantizer:
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


def make(recording: Recording, options: dict[str, Any], part: str, stage: Stage = "decoder", kind: Any = TiTok) -> Any:
    """The tokenizer of a variant's official options, filled with its weights; checked against the config's sizes."""
    table, state = recording.config["size_table"], recording.weights[part]
    heads = tuple(table[options[f"vit_{side}_model_size"]]["heads"] for side in ("enc", "dec"))
    legacy = options.get("is_legacy", True)
    made = tokenizer_from_official(state, heads, official_quantizer(options), legacy, stage, kind)  # type: ignore[arg-type]
    expected = (recording.config["crop_size"], options["vit_enc_patch_size"], options["num_latent_tokens"])
    if (made.image_size[0], made.patch_size, made.num_tokens) != expected:
        raise UserError(f"the weights are of {made.layout} at {made.image_size}, not of the config's {expected}")
    return made


def _images(recording: Recording) -> Tensor:
    return from_unit(recording.inputs["images"])


def _vqgan(recording: Recording) -> MaskGITVQGAN:
    """Encoder from its file, decoder and codebook from the two-stage tokenizer's pixel decoder."""
    state = dict(recording.weights["vqgan_encoder"])
    for key, tensor in recording.weights["two_stage"].items():
        if key.startswith("pixel_"):
            state[key.removeprefix("pixel_")] = tensor
    return vqgan_from_official(state, recording.config["crop_size"])


@torch.no_grad()
def vqgan(recording: Recording) -> dict[str, Tensor]:
    """Features, codes and the image of the codes."""
    model, images = _vqgan(recording), _images(recording)
    codes = model.encode(images)
    return {
        "vqgan/hidden": rearrange(model.latents(images), "b (h w) c -> b c h w", h=model.side),
        "vqgan/codes": codes,
        "vqgan/recon": to_unit(model.decode(codes)).clamp(0, 1),
    }


def _quantization(tokenizer: TiTok, images: Tensor, name: str) -> dict[str, Tensor]:
    latents = tokenizer.latents(images)
    quantized = tokenizer.quantizer(latents)
    return {
        f"{name}/latents": as_map(latents),
        f"{name}/tokens": rearrange(tokenizer.encode(images), "b n -> b 1 n"),
        f"{name}/z_quantized": as_map(quantized.quantized),
        f"{name}/quantizer_loss": sum(quantized.losses.values(), torch.zeros(())),
    }


@torch.no_grad()
def two_stage(recording: Recording) -> dict[str, Tensor]:
    """Both stages of the two-stage tokenizer."""
    options, images = recording.config["two_stage"], _images(recording)
    first, second = (make(recording, options, "two_stage", stage) for stage in ("proxy", "decoder"))
    outputs = _quantization(second, images, "vq2")
    quantized = second.quantizer(second.latents(images))
    scores, tokens = first.scores(quantized.quantized), second.encode(images)
    entropy = proxy_loss(scores, _vqgan(recording).encode(images))
    return {
        **outputs,
        "vq2/commitment_loss": quantized.losses["commitment"],
        "vq2/codebook_loss": quantized.losses["codebook"],
        "vq2/proxy_logits": rearrange(scores, "b h w v -> b v h w"),
        "vq2/stage1_ce": entropy,
        "vq2/stage1_total": entropy + sum(first(images).losses.values()),
        "vq2/stage1_recon": to_unit(first(images).reconstruction).clamp(0, 1),
        "vq2/image": to_unit(second(images).reconstruction),
        "vq2/decode_tokens": to_unit(second.decode(tokens)),
    }


@torch.no_grad()
def single_stage(recording: Recording) -> dict[str, Tensor]:
    """The single-stage tokenizer."""
    tokenizer, images = make(recording, recording.config["single"], "single"), _images(recording)
    return {
        **_quantization(tokenizer, images, "single"),
        "single/image": to_unit(tokenizer(images).reconstruction),
    }


@torch.no_grad()
def kl(recording: Recording) -> dict[str, Tensor]:
    """The continuous tokenizer."""
    tokenizer, images = make(recording, recording.config["kl"], "kl"), _images(recording)
    moments = tokenizer.latents(images)
    posterior = tokenizer.quantizer.posterior(moments)
    sample = posterior.sample(rearrange(recording.inputs["kl/noise"], "b c 1 n -> b n c"))
    divergence = posterior.kl().sum(-1)
    tokenizer.quantizer.kl_weight = _stated(recording, "kl/kl_loss_weighted", r"^([\d.e-]+)", 1e-6) * sample[0].numel()
    return {
        "kl/moments": as_map(moments),
        "kl/sample": as_map(sample),
        "kl/image": to_unit(tokenizer.decode(sample)),
        "kl/image_mode": to_unit(tokenizer.decode(tokenizer.encode(images))),
        "kl/kl": divergence,
        "kl/kl_loss_weighted": tokenizer(images).losses["kl"],
    }


@torch.no_grad()
def discriminator(recording: Recording) -> dict[str, Tensor]:
    """The discriminator, and the losses of both sides of the second stage."""
    images, options = _images(recording), recording.config.get("discriminator", {})
    fake = make(recording, recording.config["two_stage"], "two_stage")(images)
    critic = discriminator_from_official(recording.weights["discriminator"], options.get("pool", 16))
    lecam = LeCam(
        _stated(recording, "disc/lecam", r"weight ([\d.e-]+)", 0.001),
        _stated(recording, "disc/ema_after", r"decay ([\d.e-]+)", 0.999),
    )
    lecam.means = _means(recording)
    weight = _stated(recording, "disc/gen_total", r"([\d.e-]+)\*gan", 0.01)
    # Theirs is the squared error of images in [0, 1]: a quarter of ours.
    loss = TokenizerLoss(Reconstruction(l2=0.25), None, 1.0, critic, weight, START, lecam=lecam)
    plain = TokenizerOutput(fake.reconstruction, fake.tokens, {})
    late, early = (loss.generator_loss(images, plain, step, torch.zeros(())) for step in (START, START - 1))
    against = loss.discriminator_loss(images, fake.reconstruction, START).terms
    return {
        "disc/logits_real": critic(images),
        "disc/logits_fake": critic(fake.reconstruction),
        "disc/gen_rec": loss.reconstruction.weighted(loss.reconstruction(images, fake.reconstruction)),
        "disc/gen_gan": late.terms["adversarial"],
        "disc/gen_total": late.total,
        "disc/gen_total_before_start": early.total,
        "disc/d_loss": against["discriminator"],
        "disc/lecam": against["lecam"],
        "disc/ema_after": lecam.means,
    }


def _means(recording: Recording) -> Tensor:
    """Running means of the logits before the step, which only a meaning tells."""
    found = re.search(r"EMA real/fake = (-?[\d.]+)/(-?[\d.]+)", recording.meanings["disc/d_loss"])
    if found is None:
        raise UserError("disc/d_loss does not say the running means of the logits (EMA real/fake = a/b)")
    return torch.tensor([float(found[1]), float(found[2])])


def _stated(recording: Recording, name: str, pattern: str, default: float) -> float:
    """A number from the meaning of a tensor."""
    found = re.search(pattern, recording.meanings[name])
    return float(found[1]) if found else default


@torch.no_grad()
def clustering(recording: Recording) -> dict[str, Tensor]:
    """A training pass of clustering VQ and what it does to the codebook."""
    codebook = recording.inputs["cvq/codebook_before"]
    options = {"use_l2_norm": False, **recording.config.get("cvq", {}), "clustering_vq": True}
    quantizer = official_quantizer({**options, "codebook_size": len(codebook), "token_size": codebook.shape[1]})
    assert isinstance(quantizer, ClusteringVQ)
    quantizer.codebook.weight.copy_(codebook)
    quantizer.shares.copy_(recording.inputs["cvq/embed_prob_before"])
    output = quantizer.train()(rearrange(recording.inputs["cvq/z"], "b c 1 n -> b n c"))
    return {
        "cvq/tokens": rearrange(output.tokens, "b n -> b 1 n"),
        "cvq/quantizer_loss": output.losses["codebook"] + output.losses["commitment"],
        "cvq/codebook_after": quantizer.codebook.weight,
        "cvq/embed_prob_after": quantizer.shares,
    }
