"""One-D-Piece: TiTok whose tokens are trained to matter in order, so any prefix decodes (arXiv
2501.10064).
"""

from tessellar.tokenizers.one_d_piece.tokenizer import (
    OneDPiece,
    TailDrop,
    one_d_piece_b256,
    one_d_piece_l256,
    one_d_piece_s256,
)

__all__ = ["OneDPiece", "TailDrop", "one_d_piece_b256", "one_d_piece_l256", "one_d_piece_s256"]
