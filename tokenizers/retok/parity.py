"""Replays of the official ReToK tokenizer (cases `tok_*` of recordings of system `retok`)."""

import torch

from tessellar.parity.forms import as_map, as_row, as_vectors
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.losses.alignment import cosine_distance
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.retok.official import tokenizer_from_official
from tessellar.tokenizers.retok.tokenizer import Inferred, ReToK

READ = (
    "image_size num_latent_tokens keep_tokens redundant_tokens codebook_size codebook_embed_dim commit_loss_beta "
    "entropy_loss_ratio codebook_l2_norm ch num_res_blocks ch_mult z_channels encoder decoder rot distill_depth "
    "out_inner_dim gpt gpt_generation"
).split()
SUPPORTED = {"multi_level_query_init": True, "adaptive_gn": True, "d2s_up": True, "use_attn": False}


def _tokenizer(recording: Recording) -> ReToK:
    """With nothing inferred: the released code keeps all N tokens and has no schedule."""
    config = recording.options(read=READ, supported=SUPPORTED)
    quantizer = VectorQuantizer(
        config["codebook_size"],
        config["codebook_embed_dim"],
        l2_normalize=config.get("codebook_l2_norm", True),
        commitment_weight=config.get("commit_loss_beta", 0.25),
        entropy_weight=config.get("entropy_loss_ratio", 0.0),
        rotation=config["rot"],
    )
    made = tokenizer_from_official(
        recording.weights["tokenizer"],
        encoder_heads=config["encoder"]["heads"],
        decoder_heads=config["decoder"]["heads"],
        semantic_layer=config["distill_depth"],
        quantizer=quantizer,
        inferred=Inferred(nested_dropout=False, semantic_schedule="constant"),
        feature_weight=1.0,
    )
    sizes = {
        "image_size": made.image_size[0],
        "num_latent_tokens": made.num_tokens,
        "keep_tokens": made.always,
        "redundant_tokens": made.redundant,
    }
    recording.check_sizes(sizes)
    return made


@replays("retok", "tok_shared", "tok_encode")
def encode(recording: Recording) -> Outputs:
    """Map, latents, tokens and quantized vectors, redundant ones included."""
    tokenizer = _tokenizer(recording)
    images = recording.inputs["images"]
    spatial = tokenizer.encoder(images)
    latents = tokenizer.latents(spatial)
    return {
        "spatial": spatial,
        "latents": as_row(latents),
        "indices": tokenizer.encode_all(images),
        "quant": as_row(tokenizer.quantizer(latents).quantized),
    }


@replays("retok", "tok_shared", "tok_decode")
def decode(recording: Recording) -> Outputs:
    """Images of the first k tokens."""
    tokenizer = _tokenizer(recording)
    tokens = tokenizer.encode_all(recording.inputs["images"])
    outputs = {}
    for name in recording.names("output", {"tok_decode"}):
        length = recording.settings(name)["num_tokens"]
        decode = tokenizer.decode if length <= tokenizer.num_tokens else tokenizer.decode_all
        outputs[name] = decode(tokens[:, :length])
    return outputs


@replays("retok", "tok_shared", "tok_train")
def train(recording: Recording) -> Outputs:
    """A training pass and its losses before their weights."""
    tokenizer = _tokenizer(recording).train()
    images = recording.inputs["images"]
    output = tokenizer(images)
    spatial = tokenizer.encoder(images)
    length = recording.settings("train/recon")["num_tokens"]
    vectors = tokenizer.quantizer(tokenizer.latents(spatial)).quantized[:, :length]
    semantic = tokenizer.spread(vectors).semantic
    assert semantic is not None
    return {
        "train/recon": output.reconstruction,
        "train/direct_recon": tokenizer.decoder(spatial),
        "train/vq_loss": output.losses["codebook"],
        "train/commit_loss": output.losses["commitment"],
        "train/feature_rec_loss": output.losses["feature"],
        "train/inner_feat": semantic,
        # theirs is -cosine, ours 1 - cosine
        "train/proj_loss": cosine_distance(semantic, recording.inputs["train/teacher"]).mean() - 1,
    }


@replays("retok", "tok_rot", gradients=True)
def rotation(recording: Recording) -> Outputs:
    """The quantizer's output and the gradient that it passes on."""
    quantizer = _tokenizer(recording).quantizer
    z = recording.inputs["rot/z"].clone().requires_grad_()
    out = as_map(quantizer(as_vectors(z)).quantized, z.shape[2])
    (gradient,) = torch.autograd.grad((out * recording.inputs["rot/w"]).sum(), z)
    return {"rot/out": out, "rot/grad": gradient}
