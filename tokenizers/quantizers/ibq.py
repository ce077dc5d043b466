"""Index backpropagation quantization (IBQ, arXiv 2412.02692): the straight-through step is on the
one-hot assignment.

A code is the argmax of dot products, so norms of codes matter; gradients reach the latent and all
codes through the softmax. That keeps large codebooks in use, at the price of logits [N, V] in
training.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.protocol.layout import Categorical
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers.entropy import Entropies, entropies


class IBQ(Quantizer):
    """`vocab_size` codes of `dim` channels, from N(0, 1). `temperature` is of the entropies;
    assignments have none.

    Losses: `index` |one-hot code - z|^2 (gradients to both), `codebook` and `commitment` as in VQ
    (the small weight is the codebook's here), `entropy`. Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        quantization_weight: float = 1.0,
        codebook_weight: float = 0.25,
        entropy_weight: float = 0.05,
        temperature: float = 0.01,
    ) -> None:
        super().__init__()
        if vocab_size < 1 or dim < 1:
            raise ValueError(f"vocab_size {vocab_size} and dim {dim} must be at least 1")
        self.kind = Categorical(vocab_size)
        self.dim = dim
        self.quantization_weight = quantization_weight
        self.codebook_weight = codebook_weight
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.codebook = nn.Embedding(vocab_size, dim)
        tag(self.codebook.weight, "no_decay")
        nn.init.normal_(self.codebook.weight)

    def logits(self, z: Tensor) -> Tensor:
        """Dot products [..., V] of z [..., C] with every code."""
        return at_least_float32(z) @ at_least_float32(self.codebook.weight).T

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.logits(z).argmax(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        return at_least_float32(self.codebook(tokens))

    def entropies(self, logits: Tensor) -> Entropies:
        """Entropies [1] of logits [..., V]."""
        return entropies(logits[..., None, :] / self.temperature)

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            z = at_least_float32(z)
            logits = self.logits(z)
            tokens = logits.argmax(-1)
            hard = self.decode(tokens)
            quantized = self._pass(logits, tokens)
            losses = {
                "index": F.mse_loss(quantized, z),
                "codebook": self.codebook_weight * F.mse_loss(hard, z.detach()),
                "commitment": F.mse_loss(z, hard.detach()),
            }
            losses = {name: self.quantization_weight * value for name, value in losses.items()}
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * self.entropies(logits).loss()
            return QuantizerOutput(quantized, tokens, losses)

    def _pass(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Codes whose gradient is that of the softmax's mean code; its values stay exact."""
        if not self.training:
            return self.decode(tokens)
        # One-hot in the forward pass, softmax in the backward one: every code gets a gradient.
        soft = logits.softmax(-1)
        hard = F.one_hot(tokens, logits.shape[-1]).to(soft.dtype)
        return (hard - soft.detach() + soft) @ at_least_float32(self.codebook.weight)
