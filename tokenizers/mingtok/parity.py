"""Replays of MingTok (recordings of system `mingtok`): the three stages, another image size, streaming,
the loss on pixels.
"""

import torch

from tessellar.interop.options import check_options, check_sizes
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.mingtok.official import from_official
from tessellar.tokenizers.mingtok.tokenizer import MingTok, visible_l1

ENCODER = "img_size patch_size depth embed_dim out_dim".split()
SEMANTIC = "in_dim patch_size embed_dim decoder_depth fa_enable".split()
PIXELS = "patch_size decoder_depth embed_dim norm_pix_loss".split()


def recorded_tokenizer(recording: Recording, image_size: int | None = None) -> MingTok:
    """The recorded tokenizer, checked against the config."""
    read = "low_level_encoder semantic_decoder pixel_decoder scaling_factor mean".split()
    config = recording.options("mingtok", read)
    gated = {"ffn_layer": "swiglufused"}
    parts = []
    # Normed pixels are of another loss than the recorded one; attention's kernel changes nothing.
    for name, own, supported in (
        ("low_level_encoder", ENCODER, gated),
        ("semantic_decoder", SEMANTIC, gated),
        ("pixel_decoder", PIXELS, {"loss_type": "L1-plain"}),
    ):
        parts.append(config[name])
        check_options(config[name], f"the config's {name}", own, supported)
    encoder, semantic, pixels = parts
    norm = (config["mean"], config["scaling_factor"])
    made = from_official(recording.weights["model"], image_size, norm)
    check_sizes(
        encoder,
        "the config's low_level_encoder",
        {
            "img_size": made.encoder.patch_size * made.side
            if image_size is None
            else encoder["img_size"],
            "patch_size": made.encoder.patch_size,
            "depth": len(made.encoder.blocks.layers),
            "embed_dim": made.encoder.positions.shape[-1],
            "out_dim": made.quantizer.dim,
        },
    )
    check_sizes(
        semantic,
        "the config's semantic_decoder",
        {
            "in_dim": made.quantizer.dim,
            "embed_dim": made.semantic_decoder.size.width,
            "decoder_depth": made.semantic_decoder.size.depth,
        },
    )
    check_sizes(
        pixels,
        "the config's pixel_decoder",
        {
            "patch_size": made.pixel_decoder.patch_size,
            "decoder_depth": len(made.pixel_decoder.blocks.layers),
            "embed_dim": made.pixel_decoder.norm_out.normalized_shape[0],
        },
    )
    return made


@replays("mingtok", "shared", "tok", "loss", "cached")
def three_stages(recording: Recording) -> Outputs:
    """Latents, features and pixels; features one at a time; the loss."""
    made = recorded_tokenizer(recording)
    images = recording.inputs["image"]
    latents = made.encoder(images)
    tokens = made.quantizer.encode(latents)
    features = made.semantic_decoder(latents)
    of_patches = features[:, :-1]
    pixels = made.decode(tokens[:, :-1])
    cache = made.semantic_decoder.new_cache(len(images), made.layout.length)
    streamed = []
    for token in tokens[:, :-1].unbind(1):
        streamed.append(made.semantic_decoder(made.quantizer.decode(token[:, None]), cache))
    finer = made.pixel_decoder.patch_size
    hidden = recording.inputs["pixel_loss_mask"]
    return {
        "encoder_out": latents,
        "latent": tokens,
        "semantic_tokens": of_patches,
        "semantic_cls": features[:, -1],
        "sem_to_pix": made.pixel_decoder.expand(of_patches),
        "pixel_tokens_in": made.pixel_decoder.finer(of_patches),
        "pixel_tokens_out": made.pixel_decoder.patches(of_patches),
        "recon_unclamped": pixels,
        "recon": pixels.clamp(-1, 1),
        "cached_semantic": torch.cat(streamed, 1),
        "pixel_loss_l1": visible_l1(pixels, images, finer),
        "pixel_loss_l1_masked": visible_l1(pixels, images, finer, hidden),
    }


@replays("mingtok", "interp")
def another_size(recording: Recording) -> Outputs:
    """Positions resized to a larger image."""
    images = recording.inputs["interp/image"]
    made = recorded_tokenizer(recording, recording.config["interp_image_size"])
    return {
        "interp/encoder_out": made.encoder(images),
        "interp/recon": made.decode(made.encode(images)).clamp(-1, 1),
    }
