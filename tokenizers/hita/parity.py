"""Replays of Hita's tokenizer (cases `tok_*` of recordings of system `hita`).

Features of the vision model are an input; where its weights are recorded they are computed as well
and must agree.
"""

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.options import require
from tessellar.parity.forms import as_map, as_vectors
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Fixed, FixedDiscriminator
from tessellar.tokenizers.hita.official import from_official, vision_from_official
from tessellar.tokenizers.hita.tokenizer import Hita
from tessellar.tokenizers.hita.vision import HitaVision
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss

READ = (
    "image_size cnn encoder_decoder_transformers codebook_size codebook_embed_dim codebook_slots_embed_dim l2_norm "
    "commit_loss_beta entropy_loss_ratio"
).split()
TRANSFORMERS = "tokenizer.encoder_decoder_transformers"
CNN_READ = "ch ch_mult num_res_blocks z_channels".split()
TRANSFORMERS_READ = (
    "dim depth num_head dim_head mlp_dim patch_size n_carrier dropout shift_k enable_vfm_recon vfm_dim"
).split()
LOSS_READ = "rec_weight perceptual_weight disc_weight disc_start disc_loss".split()

VISION_READ = ("arch", "embed_dim", "depth", "num_heads")
VISION = {"img_size": 518, "patch_size": 14, "mlp_ratio": 4, "layer_scale": True, "input": 224}


def recorded_tokenizer(recording: Recording) -> Hita:
    """Our tokenizer with the recorded weights and those of the vision model."""
    config = recording.options("tokenizer", READ)
    recording.options("tokenizer.cnn", CNN_READ, {"groups": 32})
    transformers = recording.options(TRANSFORMERS, TRANSFORMERS_READ)
    heads = transformers["num_head"]
    require(transformers, TRANSFORMERS, {"dim_head": transformers["dim"] // heads})
    made = from_official(
        recording.weights["tokenizer"],
        image_size=config["image_size"],
        num_heads=heads,
        shift=transformers["shift_k"],
        vision=_vision(recording),
        dropout=transformers["dropout"],
        quantizer_options={
            "l2_normalize": config["l2_norm"],
            "commitment_weight": config["commit_loss_beta"],
            "entropy_weight": config["entropy_loss_ratio"],
        },
    )
    stride = config["image_size"] // made.layout.segments[1].shape[0]
    sizes = {"n_carrier": made.holistic, "patch_size": stride}
    recording.check_sizes(sizes, TRANSFORMERS)
    return made


def _vision(recording: Recording) -> HitaVision:
    config = recording.options("vfm", VISION_READ, VISION)
    sizes = {name: config[name] for name in ("embed_dim", "depth", "num_heads")}
    return vision_from_official(recording.weights["backbone"], **sizes)


@replays("hita", "tok_shared", "tok_prep")
def preparation(recording: Recording) -> Outputs:
    """Images as the vision model sees them, every few pixels: the recorded ones and a wave."""
    vision = _vision(recording)
    settings = recording.settings("prep336_out_stride7")
    stride = settings["stride"]
    _, channels, height, width = settings["image_shape"]
    row = torch.arange(height, dtype=torch.float64)[:, None] * settings["row_frequency"]
    column = torch.arange(width, dtype=torch.float64) * settings["col_frequency"]
    channel = torch.arange(channels)[:, None, None]
    across = torch.cos(column + settings["col_phase"] * channel)
    wave = torch.sin(row + settings["row_phase"] * channel) * across
    wave = wave[None].float()
    return {
        "dino_input_stride7": vision.prepare(recording.inputs["image"])[..., ::stride, ::stride],
        "prep336_out_stride7": vision.prepare(wave)[..., ::stride, ::stride],
    }


def _features(recording: Recording, made: Hita) -> Tensor:
    """The recorded features; raises UserError where our vision model computes others."""
    recorded = recording.inputs["dino_features"]
    error = float((made.read_vision(recording.inputs["image"]) - recorded).abs().max())
    if error > 1e-3:
        raise UserError(f"the vision model's features differ from the recorded ones by {error:.1e}")
    return recorded


@replays("hita", "tok_shared", "tok_main")
def encoding_and_decoding(recording: Recording) -> Outputs:
    """Both kinds of tokens and what leads to them, and images of them."""
    made = recorded_tokenizer(recording)
    images = recording.inputs["image"]
    vision = _features(recording, made)
    side = made.layout.segments[1].shape[0]
    cnn = made.cnn_encoder(images)
    slots, patches = made.encoder(as_vectors(cnn), vision)
    holistic, latents = made.latents(images, vision)
    of_slots = made.holistic_quantizer(holistic)
    of_patches = made.quantizer(latents)
    tokens = torch.cat([of_slots.tokens, of_patches.tokens], 1)
    slot_codes = made.holistic_quantizer.decode(of_slots.tokens)
    patch_codes = made.quantizer.decode(of_patches.tokens)
    return {
        "cnn_features": cnn,
        "enc_patch": as_map(patches, side),
        "enc_slots": slots,
        "z_pre": as_map(latents, side),
        "q_pre": holistic,
        "z_indices": of_patches.tokens.flatten(),
        "q_indices": of_slots.tokens.flatten(),
        "z_quant_ste": as_map(of_patches.quantized, side),
        "q_quant_ste": of_slots.quantized,
        "recon": made.decode(tokens),
        "vfm_recon": made.predict_vision(slot_codes),
        "fused": as_map(made.fuse(slot_codes, patch_codes), side),
        "recon_swapped_holistic": made.swap_holistic(tokens, tokens.flip(0)),
    }


@replays("hita", "tok_shared", "tok_loss")
def losses(recording: Recording) -> Outputs:
    """The losses of both sides, with the recorded perceptual distance and logits."""
    made = recorded_tokenizer(recording)
    inputs = recording.inputs
    images = inputs["image"]
    config = recording.options("loss", LOSS_READ, {"rec": "l2", "gen_loss": "softplus"})
    vision = _features(recording, made)
    output = made.forward_with(images, vision)
    _, latents = made.latents(images, vision)
    patch = made.quantizer(latents).losses
    loss = TokenizerLoss(
        # the official "l2" adds the squared error twice
        Reconstruction(l1=0.0, l2=2 * config["rec_weight"]),
        Fixed(inputs["lpips_value"]),
        perceptual_weight=config["perceptual_weight"],
        discriminator=FixedDiscriminator(
            images, inputs["disc_logits_real"], inputs["disc_logits_fake"]
        ),
        adversarial_weight=config["disc_weight"],
        adversarial_start=config["disc_start"],
        adversarial_kind="non_saturating",  # softplus(-logits)
        discriminator_kind=config["disc_loss"],
    )
    outputs = {
        "loss_vq": output.losses["codebook"],
        "loss_commit": output.losses["commitment"],
        "loss_entropy": output.losses["entropy"],
        "loss_vq_patch": patch["codebook"],
        "loss_entropy_patch": patch["entropy"],
        "loss_sim": output.losses["vision"],
    }
    for name, settings in recording.each("loss_gen_*"):
        step = settings["global_step"]
        outputs[name] = loss.generator_loss(images, output, step, made.last_layer).total
    for name, settings in recording.each("loss_disc_*"):
        step = settings["global_step"]
        outputs[name] = loss.discriminator_loss(images, output.reconstruction, step).total
    return outputs
