"""BitDance's binary autoencoders: convolutions around one vector of signs a cell (arXiv 2602.14041)."""

from tessellar.tokenizers.bitdance.tokenizer import (
    BinaryAutoencoder,
    ae_d16c32,
    ae_d32c128,
    ae_d32c256,
)

__all__ = ["BinaryAutoencoder", "ae_d16c32", "ae_d32c128", "ae_d32c256"]
