"""One-D-Piece's checkpoints (arXiv 2501.10064): the keys are those of TiTok's second stage (titok.py)."""

from collections.abc import Mapping

from torch import Tensor

from tessellar.interop.importer import ImportOptions
from tessellar.tokenizers.one_d_piece.tokenizer import OneDPiece
from tessellar.tokenizers.titok.official import tokenizer_from_official


def import_tokenizer(state: Mapping[str, Tensor], options: ImportOptions) -> OneDPiece:
    """What `convert.py import one_d_piece` makes of a tokenizer's file."""
    heads = (options.num_heads, options.num_heads) if options.num_heads else None
    made = tokenizer_from_official(state, heads, kind=OneDPiece)
    assert isinstance(made, OneDPiece)
    return made
