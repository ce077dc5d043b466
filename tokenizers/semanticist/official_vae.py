"""Semanticist's VAE, which is MAR's (`kl16.ckpt`) and no part of the tokenizer's own files."""

from pathlib import Path

from tessellar.checkpoints.reading import load_tokenizer
from tessellar.errors import UserError
from tessellar.interop.files import is_official_file, read_content
from tessellar.interop.importer import ImportOptions
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.kl_vae.official import OFFICIAL as KL_VAE


def load_vae(file: str | Path, image_size: int) -> KLVAE:
    """The VAE of MAR's file, or of an export of ours; raises UserError for other files."""
    if is_official_file(file):
        state = KL_VAE.read(read_content(file), str(file))
        return KL_VAE.build(state, ImportOptions(image_size=image_size))
    found = load_tokenizer(str(file))
    if not isinstance(found, KLVAE):
        raise UserError(f"{file} is a {type(found).__name__}; Semanticist's VAE is a KLVAE")
    return found
