"""SimVQ (arXiv 2411.02038): a frozen random table behind one learned linear map, so that all codes
move together.

Different from the official code: `decode` applies the map, which theirs forgets. With the rotation
trick the commitment can blow up; gradients pass straight through by default.
"""

from torch import Tensor, nn

from tessellar.layers.precision import at_least_float32
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


class SimVQ(VectorQuantizer):
    """`vocab_size` codes of `dim` channels; the table is from N(0, 1 / dim). `bias` is that of the
    map.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        rotation: bool = False,
        bias: bool = True,
    ) -> None:
        weights = (codebook_weight, commitment_weight, entropy_weight, entropy_temperature)
        super().__init__(vocab_size, dim, False, *weights, rotation=rotation)
        nn.init.normal_(self.codebook.weight, std=dim**-0.5)
        self.codebook.weight.requires_grad_(False)
        self.projection = nn.Linear(dim, dim, bias)

    def codes(self) -> Tensor:
        return self.projection(at_least_float32(self.codebook.weight))

    def decode(self, tokens: Tensor) -> Tensor:
        return at_least_float32(self.projection(self.codebook(tokens)))
