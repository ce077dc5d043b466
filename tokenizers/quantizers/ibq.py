"""Index backpropagation quantization (IBQ, arXiv 2412.02692): the straight-through step is on the
one-hot assignment.

A code is the argmax of dot products, so norms of codes matter; gradients reach the latent and all
codes through the softmax. That keeps large codebooks in use, at the price of logits [N, V] in
training: `rows_at_once` makes them for so many vectors at a time, and again in the backward pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tessellar import distributed
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.protocol.layout import Categorical
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers.entropy import Entropies, entropies, entropy


class Compared(NamedTuple):
    """Rows compared with all codes: vectors [n, C], tokens [n], the sum of the rows' entropies, and
    the sum of their assignments [V].
    """

    quantized: Tensor
    tokens: Tensor
    sample: Tensor
    shares: Tensor


class IBQ(Quantizer):
    """`vocab_size` codes of `dim` channels, from N(0, 1). `temperature` is of the entropies;
    assignments have none.

    Losses: `index` |one-hot code - z|^2 (gradients to both), `codebook` and `commitment` as in VQ
    (the small weight is the codebook's here), `entropy`. In training `rows_at_once` vectors are
    compared with the codes at a time (None: all). Raises ValueError for sizes below 1.
    """

    has_neighbours = True

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        quantization_weight: float = 1.0,
        codebook_weight: float = 0.25,
        entropy_weight: float = 0.05,
        temperature: float = 0.01,
        rows_at_once: int | None = None,
    ) -> None:
        super().__init__()
        if vocab_size < 1 or dim < 1:
            raise ValueError(f"vocab_size {vocab_size} and dim {dim} must be at least 1")
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once is {rows_at_once}; it must be at least 1, or None")
        self.rows_at_once = rows_at_once
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
            rows = z.flatten(0, -2)
            parts = rows.split(self.rows_at_once or max(1, len(rows)))
            compared = [self._compare(part) for part in parts]
            tokens = torch.cat([part.tokens for part in compared]).view(z.shape[:-1])
            quantized = torch.cat([part.quantized for part in compared]).view(z.shape)
            hard = self.decode(tokens)
            losses = {
                "index": F.mse_loss(quantized, z),
                "codebook": self.codebook_weight * F.mse_loss(hard, z.detach()),
                "commitment": F.mse_loss(z, hard.detach()),
            }
            losses = {name: self.quantization_weight * value for name, value in losses.items()}
            if self.entropy_weight:
                count = tokens.numel()
                sample = torch.stack([part.sample for part in compared]).sum() / count
                shares = torch.stack([part.shares for part in compared]).sum(0) / count
                # The entropy of a mean over all ranks, as `entropies` has it.
                batch = entropy(distributed.mean_over_ranks(shares), "magvit")
                losses["entropy"] = self.entropy_weight * (sample - batch)
            return QuantizerOutput(quantized, tokens, losses)

    def _compare(self, rows: Tensor) -> "Compared":
        """Rows [n, C] against all codes; computed again in the backward pass where they are parts."""
        if self.rows_at_once is None or not self.training:
            return self._compared(rows)
        return Compared(*checkpoint(self._compared, rows, use_reentrant=False))

    def _compared(self, rows: Tensor) -> "Compared":
        logits = self.logits(rows)
        tokens = logits.argmax(-1)
        quantized = self._pass(logits, tokens)
        if not self.entropy_weight:
            nothing = rows.new_zeros(())
            return Compared(quantized, tokens, nothing, nothing)
        log_shares = (logits / self.temperature).log_softmax(-1)
        shares = log_shares.exp()
        return Compared(quantized, tokens, -(shares * log_shares).sum(), shares.sum(0))

    def _pass(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Codes whose gradient is that of the softmax's mean code; its values stay exact."""
        if not self.training:
            return self.decode(tokens)
        # One-hot in the forward pass, softmax in the backward one: every code gets a gradient.
        soft = logits.softmax(-1)
        hard = F.one_hot(tokens, logits.shape[-1]).to(soft.dtype)
        return (hard - soft.detach() + soft) @ at_least_float32(self.codebook.weight)
