"""Vector quantization with a learned codebook (VQ-VAE, arXiv 1711.00937), as in LlamaGen (arXiv
2406.06525).

With `l2_normalize` (ViT-VQGAN, arXiv 2110.04627) latents and codes are compared on the unit sphere;
stored codes are normalised at every use. Different from LlamaGen's code: codes may be initialised
from data and unused ones restarted (arXiv 2005.00341, section 3.1), which a small training run
needs. In several processes codes are counted over all of them and replaced by latents of any, so
that every process keeps the same codebook, and the one that a single process with the whole batch
would have.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar import distributed
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.protocol.layout import Categorical
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers.entropy import entropy_loss
from tessellar.tokenizers.quantizers.rotation import rotate_to


class VectorQuantizer(Quantizer):
    """Nearest code of `vocab_size` codes of `dim` channels.

    `init_step`: replace the codes by random latents at that training pass. `restart_every`: every
    so many passes, until `restart_until`, codes that no latent chose since the last time become
    random latents. `rotation`: gradients by the rotation trick instead of straight through.
    `unit_codes`: with `l2_normalize` codes are stored with norm 1 at first, as LlamaGen's; without,
    as they are drawn, with norms of about 1 / `vocab_size`, as TiTok's and ResTok's, which Adam
    then turns some thousand times faster at first. Raises ValueError for sizes or passes below 1,
    and for an end of restarts without restarts.
    """

    has_neighbours = True

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2_normalize: bool = True,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        init_step: int | None = None,
        restart_every: int | None = None,
        restart_until: int | None = None,
        rotation: bool = False,
        unit_codes: bool = True,
    ) -> None:
        super().__init__()
        counts = {
            "vocab_size": vocab_size,
            "dim": dim,
            "init_step": init_step,
            "restart_every": restart_every,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if restart_until is not None and restart_every is None:
            raise ValueError(
                f"restart_until is {restart_until}, but codes are not restarted: give restart_every"
            )
        self.kind = Categorical(vocab_size)
        self.dim = dim
        self.l2_normalize = l2_normalize
        self.codebook_weight = codebook_weight
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.init_step = init_step
        self.restart_every = restart_every
        self.restart_until = restart_until
        self.rotation = rotation
        self.codebook = nn.Embedding(vocab_size, dim)
        tag(self.codebook.weight, "no_decay")
        if init_step is not None or restart_every is not None:
            tag(self.codebook.weight, "written")
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(vocab_size))
        self.step: Tensor
        self.counts: Tensor
        nn.init.uniform_(self.codebook.weight, -1 / vocab_size, 1 / vocab_size)
        if l2_normalize and unit_codes:
            with torch.no_grad():
                self.codebook.weight.copy_(F.normalize(self.codebook.weight, dim=-1))

    def _normalize(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        return F.normalize(x, dim=-1) if self.l2_normalize else x

    def codes(self) -> Tensor:
        """Codes as they are compared and decoded, [V, C]."""
        return self._normalize(self.codebook.weight)

    def distances(self, z: Tensor) -> Tensor:
        """Squared distances [..., V] of normalised z [..., C] to every code."""
        # |z - c|^2 = |z|^2 + |c|^2 - 2 z.c: one product instead of V differences a latent.
        codes = self.codes()
        return z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.T

    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            return self.distances(self._normalize(z)).argmin(-1)

    def logits(self, z: Tensor) -> Tensor:
        """Minus the squared distances [..., V]."""
        return -self.distances(self._normalize(z))

    def decode(self, tokens: Tensor) -> Tensor:
        return self._normalize(self.codebook(tokens))

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            z = at_least_float32(z)
            finite = distributed.all_finite(z.detach()) if self.training else None
            if finite is not None:
                self._maintain(self.candidates(z.detach()), finite)
            output = self.quantize(z)
            if finite is not None:
                self._count(output.tokens, finite)
            return output

    def candidates(self, z: Tensor) -> Tensor:
        """Vectors that codes are initialised and restarted from."""
        return self._normalize(z)

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """z quantized with the codes as they are, and its losses."""
        z = self._normalize(z)
        tokens = self.encode(z)
        quantized = self.decode(tokens)
        losses = {
            "codebook": self.codebook_weight * F.mse_loss(quantized, z.detach()),
            "commitment": self.commitment_weight * F.mse_loss(z, quantized.detach()),
        }
        if self.entropy_weight > 0:
            losses["entropy"] = self.entropy_weight * entropy_loss(
                -self.distances(z), self.entropy_temperature
            )
        # Straight through: the value of the code, the gradient of the latent.
        passed = rotate_to(z, quantized) if self.rotation else z + (quantized - z).detach()
        return QuantizerOutput(passed, tokens, losses)

    def _count(self, tokens: Tensor, finite: Tensor) -> None:
        """Count which codes a training pass chose, of all processes: each sees the same unused."""
        if self.restart_every is not None:
            used = tokens.flatten().bincount(minlength=len(self.counts))
            self.counts += distributed.all_reduce_sum(used) * finite

    @torch.no_grad()
    def _maintain(self, z: Tensor, finite: Tensor) -> None:
        """Initialise the codes from data, restart unused ones; counted in training passes, kept in
        buffers.

        A pass whose latents are not `finite` (on all ranks) changes nothing and is not counted.
        """
        self.step += finite
        if self.init_step is None and self.restart_every is None:
            return  # reading the step would make a GPU wait
        if not bool(finite):
            return
        step = int(self.step)
        if step == self.init_step:
            self._replace(torch.ones_like(self.counts, dtype=torch.bool), z)
            return
        due = self.restart_every is not None and step % self.restart_every == 0
        ended = self.restart_until is not None and step > self.restart_until
        if due and not ended:
            self._replace(self.counts == 0, z)

    def _replace(self, which: Tensor, z: Tensor) -> None:
        """Random latents of the global batch in place of the chosen codes; z [B, ..., C] is this
        process's share.
        """
        ranks = distributed.world_size()
        rank = distributed.rank()
        latents = z.flatten(0, -2)
        count = int(which.sum())
        drawn = distributed.broadcast(draw_rows(ranks * len(latents), count).cpu()).to(z.device)
        # Sample i of the global batch is sample i // ranks of rank i % ranks, as the sampler deals
        # them.
        each = len(latents) // len(z)
        sample = drawn // each
        place = drawn % each
        own = (sample % ranks == rank)[:, None]
        rows = torch.where(own, latents[sample // ranks * each + place], 0)
        self.codebook.weight[which] = distributed.all_reduce_sum(rows).to(self.codebook.weight)
        self.counts.zero_()


def draw_rows(total: int, count: int) -> Tensor:
    """`count` of `total` numbers: distinct where there are enough, else each at least once."""
    whole, rest = divmod(count, total)
    return torch.cat([torch.randperm(total)[:n] for n in [total] * whole + [rest]])
