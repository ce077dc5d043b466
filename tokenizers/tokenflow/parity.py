"""Replays of TokenFlow's tokenizer (recordings of system `tokenflow`): the CLIP variant at tiny
sizes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.parity.forms import as_map
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import gradient_norm
from tessellar.tokenizers.tokenflow.official import from_official
from tessellar.tokenizers.tokenflow.tokenizer import TokenFlow

READ = (
    "image_size clip_heads semantic_decoder_heads scales commit_beta entropy_ratio dropped_scale_index "
    "interp_image_size interp_scales"
).split()
SHOWN = {  # options that the weights show, and what they are of ours
    "patch_size": lambda made: made.semantic.network.patch_embed.patch_size[0],
    "clip_width": lambda made: made.semantic.dim,
    "clip_layers": lambda made: len(made.semantic.network.blocks),
    "semantic_decoder_dim": lambda made: made.semantic_decoder.first.shape[-1],
    "semantic_decoder_depth": lambda made: len(made.semantic_decoder.blocks),
    "semantic_out_dim": lambda made: made.semantic_decoder.head[2].out_features,
    "pixel_ch": lambda made: made.encoder.conv_in.out_channels,
    "z_channels": lambda made: made.encoder.conv_out.out_channels,
    "encoder_num_res_blocks": lambda made: len(made.encoder.levels[0].res),
    "decoder_num_res_blocks": lambda made: len(made.decoder.levels[0].res) - 1,
    "codebook_size": lambda made: made.quantizer.kind.vocab,
    "semantic_code_dim": lambda made: made.quantizer.semantic_dim,
    "pixel_code_dim": lambda made: made.quantizer.pixel_dim,
}
NAMES = (
    "variant ch_mult decoder_ch".split()
)  # of the variant, and widths that the strict load checks


def recorded_tokenizer(recording: Recording, interpolated: bool = False) -> TokenFlow:
    """The recorded tokenizer, checked against the config; `interpolated`: of the larger images."""
    config = recording.options("", (*READ, *SHOWN, *NAMES), {"enhanced_decoder": False})
    size, sides = config["image_size"], config["scales"]
    if interpolated:
        size, sides = config["interp_image_size"], config["interp_scales"]
    made = from_official(
        recording.weights["model"],
        size,
        tuple(sides),
        heads=(config["clip_heads"], config["semantic_decoder_heads"]),
        commitment_weight=config["commit_beta"],
        entropy_weight=config["entropy_ratio"],
    )
    recording.check_sizes({name: shown(made) for name, shown in SHOWN.items()})
    return made


@replays("tokenflow", "shared", "main")
def tokenizer(recording: Recording) -> Outputs:
    """Both vectors, tokens, their sum and what both decoders make of it, from a prefix too."""
    made = recorded_tokenizer(recording)
    images = recording.inputs["image"]
    semantic, pixel = made.quantizer.split(made.latents(images))
    tokens = made.encode(images)
    vectors = made.quantizer.decode(tokens)
    scales = recording.settings("decode_prefix_image")["num_scales"]
    return {
        "semantic_feature": semantic,
        "pixel_feature": as_map(pixel, made.side),
        "indices": tokens,
        "quant": as_map(vectors, made.side),
        "semantic_recon": made.semantics(tokens),
        "image_recon": made(images).reconstruction,
        "decode_code_image": made.decode(tokens),
        "decode_prefix_image": made.decode(tokens[:, : made.quantizer.ends[scales]]),
    }


@replays("tokenflow", "interp")
def larger_images(recording: Recording) -> Outputs:
    """The same weights at another size of images, with one more scale."""
    made = recorded_tokenizer(recording, interpolated=True)
    images = recording.inputs["interp/image"]
    tokens = made.encode(images)
    return {
        "interp/indices": tokens,
        "interp/quant": as_map(made.quantizer.decode(tokens), made.side),
        "interp/semantic_recon": made.semantics(tokens),
        "interp/image_recon": made.decode(tokens),
    }


def part_norms(made: TokenFlow, images: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances to all codes of both codebooks, squared and summed: means over positions,
    then over scales.
    """
    found = []
    for rest, _, _ in made.quantizer.scan(made.latents(images)):
        latents = made.quantizer._normalize(rest)
        sums = [
            distances.square().sum(-1).mean()
            for distances in made.quantizer.part_distances(latents)
        ]
        found.append(torch.stack(sums))
    semantic, pixel = torch.stack(found).mean(0)
    return semantic, pixel


@replays("tokenflow", "loss", gradients=True)
def losses(recording: Recording) -> Outputs:
    """The terms of the loss without a perceptual and an adversarial one, and its gradients.

    In float64: the entropy's temperature multiplies what convolutions round, differently on every
    processor, by a hundred, and the recorded gradients have tolerances for their own rounding alone.
    """
    settings = recording.settings("loss/total")
    images = recording.inputs["image"].double()
    made = recorded_tokenizer(recording).double().train(settings["training"])
    made.quantizer.scale_dropout = float(settings["scale_drop"])
    output = made.forward_with(images, recording.inputs["loss/teacher_target"].double())
    pixels = F.mse_loss(output.reconstruction, images)
    total = torch.stack([pixels, *output.losses.values()]).sum()
    (of_codes,) = torch.autograd.grad(total, [made.quantizer.codebook.weight], retain_graph=True)
    semantic_codes, pixel_codes = made.quantizer.split(of_codes)
    semantic_norm, pixel_norm = part_norms(made, images)
    return {
        "loss/vq": output.losses["codebook"],
        "loss/commit": output.losses["commitment"],
        "loss/entropy": output.losses["entropy"],
        "loss/d_semantic_norm": semantic_norm,
        "loss/d_pixel_norm": pixel_norm,
        "loss/semantic": output.losses["semantic"],
        "loss/rec_l2": pixels,
        "loss/total": total,
        "loss/grad_norm": gradient_norm(total, made),
        "loss/grad_semantic_codebook": semantic_codes,
        "loss/grad_pixel_codebook": pixel_codes,
    }


@replays("tokenflow", "drop")
def skipped_scale(recording: Recording) -> Outputs:
    """A training pass that skips one scale: its tokens are not among theirs."""
    made = recorded_tokenizer(recording)
    skipped = recording.settings("drop/indices")["dropped_scale_index"]
    output = made.quantizer.quantize(made.latents(recording.inputs["image"]), skipped)
    start, end = made.quantizer.ends[skipped : skipped + 2]
    return {
        "drop/indices": torch.cat([output.tokens[:, :start], output.tokens[:, end:]], 1),
        "drop/quant": as_map(output.quantized, made.side),
    }
