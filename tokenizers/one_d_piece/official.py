"""One-D-Piece's checkpoints (arXiv 2501.10064): the keys are those of TiTok's second stage."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tessellar.interop.importer import ImportOptions
from tessellar.tokenizers.one_d_piece.tokenizer import OneDPiece
from tessellar.tokenizers.titok.official import OFFICIAL as TITOK
from tessellar.tokenizers.titok.official import tokenizer_from_official


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> OneDPiece:
    made = tokenizer_from_official(state, options.heads, kind=OneDPiece)
    assert isinstance(made, OneDPiece)
    return made


OFFICIAL = replace(TITOK, what="a One-D-Piece tokenizer", build=_build)
