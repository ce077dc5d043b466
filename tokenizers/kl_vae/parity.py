"""Replay of MAR's KL VAE (case `vae_main` of recordings of system `mar`)."""

from tessellar.errors import UserError
from tessellar.parity.forms import as_map, as_vectors
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.kl_vae.official import from_official
from tessellar.tokenizers.kl_vae.tokenizer import KLVAE

SIZES = ("embed_dim", "ch", "ch_mult", "num_res_blocks", "resolution")
ATTENTION = ("encoder_attn_resolutions", "decoder_attn_resolutions")


@replays("mar", "vae_main")
def replay(recording: Recording) -> Outputs:
    """Moments, a posterior sample, its KL and images, of the recorded VAE."""
    inputs = recording.inputs
    images = inputs["vae/image"]
    height, width = images.shape[-2:]
    scale = recording.settings("vae/decoded_from_scaled")["scale"]
    vae = from_official(recording.weights["vae"], (height, width), scale)
    check_attention(recording, vae)
    rows = height // vae.stride
    moments = vae.latents(images)
    posterior = vae.quantizer.posterior(moments)
    sample = posterior.sample(as_vectors(inputs["vae/eps"]))
    return {
        "vae/moments": as_map(moments, rows),
        "vae/mean": as_map(posterior.mean, rows),
        "vae/logvar": as_map(posterior.logvar, rows),
        "vae/std": as_map(posterior.std, rows),
        "vae/sample": as_map(sample, rows),
        "vae/decoded": vae.render(sample),
        "vae/kl": posterior.kl().sum((1, 2)),
        "vae/decoded_from_scaled": vae.decode(as_vectors(inputs["vae/scaled_latents_in"])),
    }


def check_attention(recording: Recording, vae: KLVAE) -> None:
    """Raises UserError where the config names attention at other levels than the weights have."""
    supported = {
        "double_z": True,
        "use_variational": True,
        "resamp_with_conv": True,
        "use_linear_attn": False,
    }
    config = recording.options("vae", (*SIZES, *ATTENTION), supported)
    finest_first = (vae.encoder.levels, vae.decoder.levels[::-1])
    for name, levels in zip(ATTENTION, finest_first, strict=True):
        found = [number for number, level in enumerate(levels) if len(level.attn)]  # type: ignore[arg-type]
        sides = [config["resolution"] // 2**number for number in found]
        if sorted(sides) != sorted(config[name]):
            raise UserError(
                f"the config's vae: {name} is {config[name]}; the weights attend at {sides}"
            )
