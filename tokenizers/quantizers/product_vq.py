"""Product quantization: channels in groups, each with a quantizer of its own (UniTok, arXiv
2502.20321; PQ).

Groups may hold any quantizers: VQ gives UniTok's multi-codebook quantizer, residual ones grouped
residual VQ (HiFi- Codec). Losses are means over groups.
"""

import torch
from torch import Tensor, nn

from tessellar.tokenizers.quantizers.base import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers.factors import factorized, factors, named_mean, split_tokens


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
        self.kind, self.dim = factorized(self.kinds), sum(self.dims)

    def _groups(self) -> list[Quantizer]:
        return [group for group in self.groups if isinstance(group, Quantizer)]

    def _join(self, tokens: list[Tensor]) -> Tensor:
        return torch.cat([factors(t, kind) for t, kind in zip(tokens, self.kinds, strict=True)], -1)

    def encode(self, z: Tensor) -> Tensor:
        parts = zip(self._groups(), z.split(self.dims, -1), strict=True)
        return self._join([group.encode(part) for group, part in parts])

    def decode(self, tokens: Tensor) -> Tensor:
        parts = zip(self._groups(), split_tokens(tokens, self.kinds), strict=True)
        return torch.cat([group.decode(part) for group, part in parts], -1)

    def forward(self, z: Tensor) -> QuantizerOutput:
        outputs = [
            group(part) for group, part in zip(self._groups(), z.split(self.dims, -1), strict=True)
        ]
        quantized = torch.cat([out.quantized for out in outputs], -1)
        return QuantizerOutput(
            quantized,
            self._join([out.tokens for out in outputs]),
            named_mean([o.losses for o in outputs]),
        )
