"""MAR's KL VAE (kl16.ckpt, also xAR's and TokenBridge's): official keys to ours and back, and the recorded outputs."""

import re

import torch
from einops import rearrange
from torch import Tensor

from tessellar.parity.recording import Recording
from tessellar.tokenizers.kl_vae.official import from_official
from tessellar.tokenizers.kl_vae.tokenizer import KL16_SCALE


@torch.no_grad()
def replay(recording: Recording) -> dict[str, Tensor]:
    """Moments, a posterior sample, its KL and images, of the recorded VAE."""
    inputs = recording.inputs
    scale = re.search(r"/\s*([0-9.]+\d)", recording.entries["vae/decoded_from_scaled"].meaning)
    height, width = inputs["vae/image"].shape[-2:]
    vae = from_official(recording.weights["vae"], (height, width), float(scale[1]) if scale else KL16_SCALE)
    grid = {"h": height // vae.stride}

    def maps(tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b (h w) c -> b c h w", **grid)

    def tokens(maps: Tensor) -> Tensor:
        return rearrange(maps, "b c h w -> b (h w) c")

    moments = vae.latents(inputs["vae/image"])
    posterior = vae.quantizer.posterior(moments)
    sample = posterior.sample(tokens(inputs["vae/eps"]))
    return {
        "vae/moments": maps(moments),
        "vae/mean": maps(posterior.mean),
        "vae/logvar": maps(posterior.logvar),
        "vae/std": maps(posterior.std),
        "vae/sample": maps(sample),
        "vae/decoded": vae.render(sample),
        "vae/kl": posterior.kl().sum((1, 2)),
        "vae/decoded_from_scaled": vae.decode(tokens(inputs["vae/scaled_latents_in"])),
    }
