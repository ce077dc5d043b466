"""Residual quantization: each layer quantizes what the layers before it left (RQ-VAE, arXiv
2203.01941; SoundStream).

Layers are any quantizers, so this is also residual FSQ (`residual_fsq`), LFQ and SimVQ; one layer
with a `depth` is RQ-VAE's shared codebook. Gradients pass straight through once, to the sum;
`pass_each` is vector-quantize-pytorch's sum of straight-through layers, whose gradient is as many
times larger. Dropped layers give tokens all the same.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tessellar import distributed
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers.factors import factorized, factors, named_sum, split_tokens
from tessellar.tokenizers.quantizers.fsq import FSQ


class ResidualQuantizer(Quantizer):
    """Tokens [..., F], the factors of layer 0 first.

    Layer i sees the rest times ratio^i (one number, or one a channel). `soft_clamp` bounds z by
    tanh first, per channel. `dropout`: how likely a training pass uses only its first layers, at
    least `keep` of them. Losses are sums over layers. Raises ValueError for layers of several
    sizes, and for a depth, dropout or `keep` out of range.
    """

    def __init__(
        self,
        layers: tuple[Quantizer, ...],
        depth: int | None = None,
        ratio: float | tuple[float, ...] = 1.0,
        soft_clamp: tuple[float, ...] | None = None,
        dropout: float = 0.0,
        keep: int = 1,
        pass_each: bool = False,
    ) -> None:
        super().__init__()
        dims = {layer.dim for layer in layers}
        if len(dims) != 1:
            raise ValueError("a residual quantizer needs layers, all of one dim")
        if depth is not None and (depth < 1 or len(layers) > 1):
            raise ValueError(
                f"depth is {depth} with {len(layers)} layers; it repeats a single layer, at least once"
            )
        self.depth = depth or len(layers)
        if not 0 <= dropout <= 1 or not 1 <= keep <= self.depth:
            raise ValueError(
                f"dropout {dropout} must be in [0, 1], keep {keep} in [1, {self.depth}]"
            )
        self.layers = nn.ModuleList(layers)
        self.dim = dims.pop()
        self.ratio = ratio
        self.soft_clamp = soft_clamp
        self.dropout = dropout
        self.keep = keep
        self.pass_each = pass_each
        self.kinds = [self.layer(i).kind for i in range(self.depth)]
        self.kind = factorized(self.kinds)

    def layer(self, i: int) -> Quantizer:
        layer = self.layers[i % len(self.layers)]
        assert isinstance(layer, Quantizer)
        return layer

    def _scale(self, i: int, like: Tensor) -> Tensor:
        return torch.tensor(self.ratio, device=like.device, dtype=like.dtype) ** -i

    def _bound(self, z: Tensor) -> Tensor:
        z = at_least_float32(z)
        if self.soft_clamp is None:
            return z
        most = torch.tensor(self.soft_clamp, device=z.device, dtype=z.dtype)
        return (z / most).tanh() * most

    def scan(self, z: Tensor) -> Iterator[QuantizerOutput]:
        """Layer by layer: what it adds to the sum [..., C], its tokens and its losses."""
        rest = self._bound(z)
        for i in range(self.depth):
            scale = self._scale(i, rest)
            output = self.layer(i)(rest / scale)
            added = output.quantized * scale
            # Each layer learns from its own loss; the rest that it leaves is data for the next.
            rest = rest - added.detach()
            yield QuantizerOutput(added, output.tokens, output.losses)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            rest = self._bound(z)
            found = []
            for i, kind in enumerate(self.kinds):
                scale = self._scale(i, rest)
                tokens = self.layer(i).encode(rest / scale)
                rest = rest - self.layer(i).decode(tokens) * scale
                found.append(factors(tokens, kind))
        return torch.cat(found, -1)

    def parts(self, tokens: Tensor) -> list[Tensor]:
        """What each layer's tokens add to the sum, [..., C] each."""
        parts = []
        for i, of_layer in enumerate(split_tokens(tokens, self.kinds)):
            vectors = self.layer(i).decode(of_layer)
            parts.append(vectors * self._scale(i, vectors))
        return parts

    def decode(self, tokens: Tensor) -> Tensor:
        return torch.stack(self.parts(tokens)).sum(0)

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            tokens = []
            added = []
            losses = []
            for output, kind in zip(self.scan(z), self.kinds, strict=True):
                tokens.append(factors(output.tokens, kind))
                added.append(output.quantized)
                losses.append(output.losses)
            kept = self.draw_depth()
            total = torch.stack(added[:kept]).sum(0)
            if not self.pass_each:
                bounded = self._bound(z)
                total = bounded + (total - bounded).detach()
            return QuantizerOutput(total, torch.cat(tokens, -1), named_sum(losses[:kept]))

    def draw_depth(self) -> int:
        """How many layers this pass uses, the same in all processes."""
        if not self.training or not self.dropout:
            return self.depth
        kept = self.depth
        if float(torch.rand(())) < self.dropout:
            kept = int(torch.randint(self.keep, self.depth + 1, ()))
        return int(distributed.broadcast(kept))


def residual_fsq(levels: tuple[int, ...], depth: int) -> ResidualQuantizer:
    """Residual FSQ of vector-quantize-pytorch: symmetric levels, each layer finer by the number of
    levels.
    """
    layers = tuple(FSQ(levels, symmetric=True, clamp=True) for _ in range(depth))
    soft_clamp = tuple(1 + 1 / (level - 1) for level in levels)
    return ResidualQuantizer(layers, ratio=tuple(map(float, levels)), soft_clamp=soft_clamp)
