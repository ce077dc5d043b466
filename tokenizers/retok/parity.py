"""Replay of what the official ReToK tokenizer gave (cases `tok_*` of recordings of system `retok`).

Sizes and options are read from the recording's config and weights; the length of a prefix from the name or meaning of
the output.
"""

import re

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.parity.recording import Recording, numbers
from tessellar.tokenizers.losses.alignment import cosine_distance
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.retok.official import tokenizer_from_official
from tessellar.tokenizers.retok.tokenizer import Inferred, ReToK

FIXED = {"multi_level_query_init": True, "adaptive_gn": True, "d2s_up": True, "use_attn": False}


def _tokenizer(recording: Recording) -> ReToK:
    """In eval mode, with nothing inferred: the released code keeps all N tokens and has no schedule."""
    config, state = recording.config, recording.weights["tokenizer"]
    other = {key: config[key] for key, value in FIXED.items() if config.get(key, value) != value}
    if other:
        raise UserError(f"no published ReToK has {other}; this tokenizer is {FIXED}")
    quantizer = VectorQuantizer(
        config["codebook_size"],
        config["codebook_embed_dim"],
        commitment_weight=config.get("commit_loss_beta", 0.25),
        rotation=config.get("rot", True),
    )
    made = tokenizer_from_official(
        state,
        config["encoder"]["heads"],
        config["decoder"]["heads"],
        config["distill_depth"],
        quantizer=quantizer,
        inferred=Inferred(nested_dropout=False, semantic_schedule="constant"),
        feature_weight=1.0,
    )
    expected = (config["image_size"], config["num_latent_tokens"], config["keep_tokens"], config["redundant_tokens"])
    if (made.image_size[0], made.num_tokens, made.always, made.redundant) != expected:
        raise UserError(f"the weights are of {made.layout} at {made.image_size}, not of the config's {expected}")
    return made


@torch.no_grad()
def encode(recording: Recording) -> dict[str, Tensor]:
    """Map, latents, tokens and quantized vectors, redundant ones included."""
    tokenizer, images = _tokenizer(recording), recording.inputs["images"]
    spatial = tokenizer.encoder(images)
    latents = tokenizer.latents(spatial)
    return {
        "spatial": spatial,
        "latents": rearrange(latents, "b t c -> b c 1 t"),
        "indices": tokenizer.encode_all(images),
        "quant": rearrange(tokenizer.quantizer(latents).quantized, "b t c -> b c 1 t"),
    }


@torch.no_grad()
def decode(recording: Recording) -> dict[str, Tensor]:
    """Images of the first k tokens."""
    tokenizer = _tokenizer(recording)
    tokens, outputs = tokenizer.encode_all(recording.inputs["images"]), {}
    for name in recording.names("output", {"tok_decode"}):
        told = re.fullmatch(r"image_k(\d+)", name)
        length = int(told[1] if told else numbers(recording.meanings[name]).get("num_tokens", tokenizer.num_tokens))
        outputs[name] = (tokenizer.decode if length <= tokenizer.num_tokens else tokenizer.decode_all)(
            tokens[:, :length]
        )
    return outputs


@torch.no_grad()
def train(recording: Recording) -> dict[str, Tensor]:
    """A training pass and its losses before their weights."""
    tokenizer, images = _tokenizer(recording).train(), recording.inputs["images"]
    output, spatial = tokenizer(images), tokenizer.encoder(images)
    vectors = tokenizer.quantizer(tokenizer.latents(spatial)).quantized[:, : tokenizer.num_tokens]
    semantic = tokenizer.spread(vectors).semantic
    assert semantic is not None
    return {
        "train/recon": output.reconstruction,
        "train/direct_recon": tokenizer.decoder(spatial),
        "train/vq_loss": output.losses["codebook"],
        "train/commit_loss": output.losses["commitment"],
        "train/feature_rec_loss": output.losses["feature"],
        "train/inner_feat": semantic,
        "train/proj_loss": cosine_distance(semantic, recording.inputs["train/teacher"]).mean() - 1,
    }


def rotation(recording: Recording) -> dict[str, Tensor]:
    """The quantizer's output and the gradient that it passes on."""
    tokenizer = _tokenizer(recording)
    z = recording.inputs["rot/z"].clone().requires_grad_()
    quantized = tokenizer.quantizer(rearrange(z, "b c h w -> b (h w) c")).quantized
    out = rearrange(quantized, "b (h w) c -> b c h w", h=z.shape[2])
    (gradient,) = torch.autograd.grad((out * recording.inputs["rot/w"]).sum(), z)
    return {"rot/out": out, "rot/grad": gradient}
