"""TokenBridge's tokenizer file is MAR's kl16.ckpt: official keys to ours and back. The grid is the
published one.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable
from tessellar.tokenizers.kl_vae import official as kl_vae
from tessellar.tokenizers.kl_vae.tokenizer import KLVAE
from tessellar.tokenizers.tokenbridge.tokenizer import PostQuantized


def from_official(
    state: Mapping[str, Tensor], image_size: int | tuple[int, int] = 256, levels: int = 64
) -> PostQuantized:
    """The VAE that the weights show, its channels quantised to `levels` values in +-5."""
    return PostQuantized(kl_vae.from_official(state, image_size), levels).eval()


def to_official(tokenizer: PostQuantized) -> dict[str, Tensor]:
    """The official state dict of the VAE; the inverse of `from_official`."""
    return OFFICIAL.to_official(tokenizer)


def _keys_of(tokenizer: PostQuantized) -> KeyTable:
    vae = tokenizer.tokenizer
    assert isinstance(vae, KLVAE)
    inner = kl_vae.keys(len(vae.encoder.levels))
    return KeyTable(tuple(replace(rule, ours=f"tokenizer.{rule.ours}") for rule in inner.rules))


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> PostQuantized:
    """No file says how many levels there are: `variant` is their number, 64 as published."""
    levels = options.variant or "64"
    if not levels.isdecimal():
        raise UserError(
            f"--variant is {levels!r}; of TokenBridge it is a number of levels, such as 64"
        )
    return from_official(state, options.image_size or 256, int(levels))


OFFICIAL = TokenizerImporter(
    what="a KL VAE of TokenBridge",
    marks=kl_vae.OFFICIAL.marks,
    entries=kl_vae.OFFICIAL.entries,
    keys=_keys_of,
    own=("grid.values", *(f"tokenizer.{name}" for name in kl_vae.OWN)),
    build=_build,
)
