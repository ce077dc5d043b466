"""A quantizer between two linear maps, for vectors of other channels than codes have (factorised
codes, ViT-VQGAN).
"""

from torch import Tensor, nn

from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput


class Projected(Quantizer):
    """`quantizer` for vectors of `dim` channels."""

    def __init__(self, quantizer: Quantizer, dim: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(dim, quantizer.in_dim)
        self.quantizer = quantizer
        self.project_out = nn.Linear(quantizer.dim, dim)
        self.kind = quantizer.kind
        self.dim = dim
        self.has_neighbours = quantizer.has_neighbours

    def logits(self, z: Tensor) -> Tensor:
        return self.quantizer.logits(self.project_in(z))

    def encode(self, z: Tensor) -> Tensor:
        return self.quantizer.encode(self.project_in(z))

    def decode(self, tokens: Tensor) -> Tensor:
        return self.project_out(self.quantizer.decode(tokens).to(self.project_out.weight.dtype))

    def forward(self, z: Tensor) -> QuantizerOutput:
        output = self.quantizer(self.project_in(z))
        return output._replace(
            quantized=self.project_out(output.quantized.to(self.project_out.weight.dtype))
        )
