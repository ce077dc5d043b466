"""Replays of BitDance's autoencoder (case `vae` of recordings of systems `bitdance` and
`bitdance_parallel`).
"""

from einops import rearrange
from torch import Tensor

from tessellar.parity.forms import as_map
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.bitdance.official import from_official
from tessellar.tokenizers.bitdance.tokenizer import BinaryAutoencoder
from tessellar.tokenizers.quantizers.lfq import LFQ

OVERRIDES = "ch ch_mult num_res_blocks".split()


def recorded_autoencoder(recording: Recording) -> BinaryAutoencoder:
    """The autoencoder beside the recorded generator."""
    config = recording.config
    recording.options("vae_ddconfig_override", OVERRIDES)
    state = recording.weights["model"]
    made = from_official(state, config["resolution"], config["num_codebooks"])
    found = {"ch": made.encoder.conv_in.out_channels, "num_res_blocks": len(made.encoder.mid)}
    recording.check_sizes(found, "vae_ddconfig_override")
    return made


def signs_of(tokens: Tensor, height: int) -> Tensor:
    """Bits [B, h w, z] as the recorded maps [B, z, h, w] of -1 and 1."""
    return as_map(2.0 * tokens - 1, height)


def group_indices(bits: Tensor, groups: int) -> Tensor:
    """Bits [B, N, z] as the official ids [groups, B N], the first bit of a group the lowest."""
    ids = LFQ(bits.shape[-1], groups, form="index", entropy_weight=0.0).code.tokens(bits > 0)
    return rearrange(ids[..., None] if groups == 1 else ids, "b n g -> g (b n)")


@replays("bitdance", "vae")
@replays("bitdance_parallel", "vae")
def autoencoder(recording: Recording) -> Outputs:
    """Features, bits, group ids and the image drawn of them."""
    tokenizer = recorded_autoencoder(recording)
    images = recording.inputs["image"]
    latents = tokenizer.latents(images)
    tokens = tokenizer.encode(images)
    height = tokenizer.grid[0]
    return {
        "vae.enc_out": as_map(latents, height),
        "vae.bits": signs_of(tokens, height),
        "vae.group_indices": group_indices(tokens, recording.config["num_codebooks"]),
        "vae.dec_image": tokenizer.decode(tokens),
    }
