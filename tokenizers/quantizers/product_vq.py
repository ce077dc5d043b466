"""Product quantization: channels in groups, each with a quantizer of its own (UniTok, arXiv
2502.20321; PQ).

Groups may hold any quantizers: VQ gives UniTok's multi-codebook quantizer, residual ones grouped
residual VQ (HiFi- Codec). Losses are means over groups.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers.factors import factorized, factors, named_sum, split_tokens


class ProductQuantizer(Quantizer):
    """Vectors of sum(dim of the groups) channels; tokens [..., F], the factors of group 0 first.

    Raises ValueError without groups, and for groups whose tokens are not ids.
    """

    def __init__(self, groups: tuple[Quantizer, ...]) -> None:
        super().__init__()
        if not groups:
            raise ValueError("a product quantizer needs at least one group")
        self.groups = nn.ModuleList(groups)
        self.dims = [group.dim for group in groups]
        self.kinds = [group.kind for group in groups]
        self.kind = factorized(self.kinds)
        self.dim = sum(self.dims)

    def _with_groups(self, parts: Sequence[Tensor]) -> Iterator[tuple[Quantizer, Tensor]]:
        """Each group with its part."""
        for group, part in zip(self.groups, parts, strict=True):
            assert isinstance(group, Quantizer)
            yield group, part

    def encode(self, z: Tensor) -> Tensor:
        tokens = []
        for group, part in self._with_groups(z.split(self.dims, -1)):
            tokens.append(factors(group.encode(part), group.kind))
        return torch.cat(tokens, -1)

    def decode(self, tokens: Tensor) -> Tensor:
        parts = self._with_groups(split_tokens(tokens, self.kinds))
        return torch.cat([group.decode(part) for group, part in parts], -1)

    def forward(self, z: Tensor) -> QuantizerOutput:
        quantized = []
        tokens = []
        losses = []
        for group, part in self._with_groups(z.split(self.dims, -1)):
            output = group(part)
            quantized.append(output.quantized)
            tokens.append(factors(output.tokens, group.kind))
            losses.append(output.losses)
        means = {name: total / len(losses) for name, total in named_sum(losses).items()}
        return QuantizerOutput(torch.cat(quantized, -1), torch.cat(tokens, -1), means)
