"""Replays of RecTok (recordings of system `rectok`): both sides, and a training pass whose draws were
recorded.
"""

import torch
from torch import Tensor

from tessellar.parity.forms import as_map, to_unit
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.parts.hidden_patches import visible
from tessellar.tokenizers.rectok.official import from_official
from tessellar.tokenizers.rectok.tokenizer import RecTok, Seen

SIZES = "vit_enc_model_size vit_dec_model_size vit_sem_model_size".split()
READ = "mask_ratio gamma size_table".split()


def recorded_tokenizer(recording: Recording) -> RecTok:
    """The recorded tokenizer, checked against the config."""
    shown = "img_size patch_size token_channels sem_embed_dim use_qknorm".split()
    supported = {"foundation_model_type": "dinov3"}
    config = recording.options("", (*SIZES, *READ, *shown), supported)
    encoder, decoder, semantic = (config["size_table"][config[name]] for name in SIZES)
    made = from_official(
        recording.weights["model"], (encoder["heads"], decoder["heads"]), semantic["heads"]
    )
    assert made.semantic_decoder is not None
    found = {
        "img_size": made.image_size[0],
        "patch_size": made.encoder.patch_size,
        "token_channels": made.quantizer.dim,
        "sem_embed_dim": made.semantic_decoder.out.out_features,
        "use_qknorm": isinstance(made.encoder.blocks[0].q_norm, torch.nn.RMSNorm),
    }
    recording.check_sizes(found)
    made.gamma = config["gamma"]
    return made


@replays("rectok", "shared", "enc", "dec")
def both_sides(recording: Recording) -> Outputs:
    """Moments, tokens, and images of the tokens."""
    made = recorded_tokenizer(recording)
    images = recording.inputs["image"]
    tokens = made.encode(images)
    drawn = made.decode(tokens)
    rope = torch.cat([made.encoder.cos, made.encoder.sin], dim=-1)
    return {
        "enc/moments": made.latents(images),
        "enc/rope": rope[None],
        "enc/latent_mean_bchw": as_map(tokens, made.side),
        "dec/reconstruct": to_unit(drawn).clamp(0, 1),
        "dec/raw": drawn,
    }


@replays("rectok", "shared", "fsd")
def distillation(recording: Recording) -> Outputs:
    """A pass over hidden patches and noise, with the recorded draws."""
    made = recorded_tokenizer(recording)
    inputs = recording.inputs
    order: Tensor = inputs["fsd/mask_noise"]
    places = visible(order, recording.config["mask_ratio"])
    posterior = made.quantizer.posterior(made.encoder(inputs["image"], places))
    z = posterior.sample(inputs["fsd/post_noise"])
    seen = Seen(made.noisy(z, inputs["fsd/u"], inputs["fsd/noise"]), places, posterior)
    assert made.semantic_decoder is not None
    return {
        "fsd/t": made.time(inputs["fsd/u"]),
        "fsd/ids_keep": places,
        "fsd/ids_restore": order.argsort(dim=1).argsort(dim=1),
        "fsd/mean_visible": posterior.mean,
        "fsd/logvar_visible": posterior.logvar,
        "fsd/kl": posterior.kl().sum((1, 2)),
        "fsd/xt": seen.latents,
        "fsd/sem_pred": made.semantic_decoder(seen.latents, places),
        "fsd/pixel_pred": made.decoder(seen.latents, places),
        "fsd/sem_loss": made.semantic_loss(seen, inputs["fsd/sem_target"]),
    }
